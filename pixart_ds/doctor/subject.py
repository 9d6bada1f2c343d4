"""What is examined: a machine, and if given a stage of a run and a site. What several probes need is asked once, and kept."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from pixart_ds.config.profile import Profile, node_range
from pixart_ds.config.schema import StageConfig
from pixart_ds.doctor.ask import Answer, ask
from pixart_ds.layout import RunLayout

_NVML_S = 20.0
_TORCH_S = 180.0
_HEAD_CHANNELS = 72
"""Of the paper's net, where no stage is given."""


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Attributes:
        device: What the ranks are to compute on.
        gpu_required: Whether it is a failure that there is no GPU here: not on a login node.
        run, stage: What is to be trained, if it was said.
        profile: The site, if it was said.
        environment: Variables of this process.
    """

    device: Literal["cuda", "cpu"] = "cuda"
    gpu_required: bool = False
    run: RunLayout | None = None
    stage: StageConfig | None = None
    profile: Profile | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def host(self) -> str:
        """This node, as the scheduler calls it where there is one."""
        return self.environment.get("SLURMD_NODENAME") or socket.gethostname()

    @property
    def job(self) -> str | None:
        """The Slurm job that this process runs in."""
        return self.environment.get("SLURM_JOB_ID") or None

    def number(self, name: str) -> int | None:
        """A variable's number, if it has one."""
        text = self.environment.get(name, "").strip()
        return int(text) if text.isdecimal() else None

    @property
    def granted_gpus(self) -> int | None:
        """GPUs of this node that the job was given, by Slurm's own word."""
        return self.number("SLURM_GPUS_ON_NODE") if self.job else None

    @property
    def gpus_per_node(self) -> int | None:
        """As the job has them, else as the profile says."""
        return self.granted_gpus or (self.profile.gpus_per_node if self.profile else None)

    @property
    def nodes(self) -> int | None:
        """As the job has them, else the fewest of the profile."""
        if self.job:
            return self.number("SLURM_JOB_NUM_NODES")
        if self.profile is None or self.stage is None:
            return None
        return node_range(self.profile.nodes_of(self.stage.name, self.stage.paper_gpus))[0]

    @cached_property
    def gpus(self) -> Answer:
        """What NVML says of this node's driver and GPUs (`children/nvml.py`), or why it says nothing."""
        return ask("nvml", timeout_s=_NVML_S)

    @cached_property
    def torch(self) -> Answer:
        """What torch says of itself, and of the GPUs (`children/torch_facts.py`); it takes seconds."""
        return ask("torch_facts", json.dumps(self.wanted_of_torch), timeout_s=_TORCH_S)

    @property
    def wanted_of_torch(self) -> dict[str, object]:
        """What attention is tried with: as the stage's net will call it."""
        device = "cpu" if self.device == "cpu" or self.gpus.error is not None else "cuda"
        stage = self.stage
        if stage is None:
            dtype = "float16" if device == "cuda" else "float32"
            return {"device": device, "channels": _HEAD_CHANNELS, "dtype": dtype, "fp32": False, "packed": False}
        return {
            "device": device,
            "channels": stage.model.hidden_size // stage.model.num_heads,
            "dtype": {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[stage.precision],
            "fp32": stage.fp32_attention,
            "packed": stage.execution.packed_text,
        }

    @property
    def gpu_name(self) -> str | None:
        """The GPU's name in rates.yaml: of the first one here, else the profile's."""
        from pixart_ds.plan.fit import known_gpu

        if self.device == "cuda" and self.gpus.value and self.gpus.value["gpus"]:
            first = self.gpus.value["gpus"][0]
            return known_gpu(first["name"], first["memory_bytes"])
        return self.profile.gpu if self.profile else None
