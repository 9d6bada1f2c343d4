"""What the tests examine: a small run on a small set, and GPUs that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pixart_ds.config.freeze import create_run, read_stage
from pixart_ds.config.load import load_chain
from pixart_ds.doctor.ask import Answer
from pixart_ds.doctor.check import Check
from pixart_ds.doctor.subject import Subject
from pixart_ds.layout import RunLayout
from tests.helpers.sets import tiny_set

GIB = 2**30
TEXT_STAGES = ("stage2", "stage3_256", "stage3_512", "stage3_1024")


def make_run(root: Path, path: str | Path | None = None, *more: str) -> RunLayout:
    """A run of the smoke recipes whose nets fit `tiny_set`; the set is made unless a path names one."""
    if path is None:
        tiny_set(root / "set")
    sets = [f"*.data.sets=[{{path: '{path or root / 'set'}'}}]", "*.data.latents=32-square", "*.model.base_size=2"]
    sets += ["stage1.model.num_classes=2"]
    for stage in TEXT_STAGES:
        sets += [f"{stage}.model.caption_channels=6", f"{stage}.model.max_tokens=9"]
    return create_run(root / "run", load_chain("smoke/chain", [*sets, *more]), "smoke/chain")


def subject(run: RunLayout | None = None, name: str = "stage1", **more: Any) -> Subject:
    """On a CPU, outside of any job, unless said otherwise; with a run, its stage `name`."""
    if run is not None and "stage" not in more:
        more["stage"] = read_stage(run, name)
    return Subject(**{"device": "cpu", "environment": {}, "run": run, **more})


def gpu(index: int = 0, **changes: Any) -> dict[str, Any]:
    """A sound V100 as `children/nvml.py` describes it."""
    facts: dict[str, Any] = {
        "index": str(index),
        "name": "Tesla V100-SXM2-32GB",
        "memory_bytes": int(31.74 * GIB),
        "used_bytes": 300 << 20,
        "uncorrected": 0,
        "pages_pending": False,
        "rows_pending": None,
        "rows_failed": None,
        "nvlinks": 6,
        "processes": [],
    }
    return facts | changes


def gpus(count: int = 8, **changes: Any) -> dict[str, Any]:
    """What NVML says of a sound node."""
    facts = {
        "driver": "570.124.06",
        "cuda": 12080,
        "on_node": count,
        "slices": 0,
        "gpus": [gpu(n) for n in range(count)],
    }
    return facts | changes


def torch_facts(**changes: Any) -> dict[str, Any]:
    """What a torch says that suits a V100."""
    facts: dict[str, Any] = {
        "torch": "2.10.0+cu128",
        "cuda": "12.8",
        "architectures": ["sm_70", "sm_75", "sm_80", "sm_90"],
        "cudnn": 91002,
        "nccl": [2, 27, 5],
        "finds_gpu": True,
        "capabilities": [[7, 0]] * 8,
        "bf16": False,
        "attention": {"memory_efficient": None, "flash": "no kernel", "math": None},
    }
    return facts | changes


def on_node(nvml: Answer, torch: Answer | None = None, **more: Any) -> Subject:
    """A subject whose questions are answered already."""
    found = subject(**{"device": "cuda", "gpu_required": True, **more})
    found.__dict__["gpus"] = nvml
    if torch is not None:
        found.__dict__["torch"] = torch
    return found


def one(checks: Check | list[Check]) -> Check:
    """The only check of a probe."""
    found = [checks] if isinstance(checks, Check) else checks
    assert len(found) == 1
    return found[0]
