"""What the ranks measure of a step: loss by timestep, work, waiting, memory; and its names in `metrics.jsonl`."""

from __future__ import annotations

import platform
import resource
import time
from contextlib import suppress
from typing import Any

import torch

from pixart_ds.config.schema import StageConfig
from pixart_ds.data.reader import MicroBatch
from pixart_ds.diffusion.loss import Losses
from pixart_ds.diffusion.schedule import NUM_TIMESTEPS
from pixart_ds.engine.agree import Agreement, gather
from pixart_ds.engine.world import World
from pixart_ds.log import Log
from pixart_ds.plan.counts import Net
from pixart_ds.plan.work import Peak, Work, device_kind, peak_of, work_of

_MEANS = ("loss", "mse", "vlb")
_QUARTER = NUM_TIMESTEPS // 4
QUARTERS = tuple(f"loss_t{start}_{start + _QUARTER}" for start in range(0, NUM_TIMESTEPS, _QUARTER))
"""Mean loss of the samples whose timestep lies in [start, end)."""
_WORK = ("image_tokens", "text_tokens", "model_flops", "hardware_flops")


class Figures:
    """One rank's figures of a step. Losses are summed on the device, and fetched once at the end.

    Args:
        stage: With every `auto` chosen.
        device: Of this rank.
    """

    def __init__(self, stage: StageConfig, device: torch.device) -> None:
        self._device, self._net = device, Net.of(stage.model)
        self._checkpointed = _checkpointed(stage)
        self._patch = stage.model.patch_size**2
        self._work = Work(0)
        self._sums: torch.Tensor | None = None
        self._waited = 0.0
        self._began, self._ready = _moment(device), None

    def add(self, batch: MicroBatch, losses: Losses) -> None:
        """Counts one micro-batch."""
        total = losses.total.detach()
        quarters = batch.timesteps // _QUARTER == torch.arange(4, device=total.device)[:, None]  # (4, B)
        by_quarter = torch.where(quarters, total.double(), 0.0).sum(1)
        means = torch.stack([total.sum(), losses.mse.detach().sum(), losses.vlb.detach().sum()]).double()
        sums = torch.cat([means, by_quarter, quarters.sum(1).double()])
        self._sums = sums if self._sums is None else self._sums + sums
        count, _, height, width = batch.latents.shape
        self._work += work_of(
            self._net,
            self._checkpointed,
            images=count,
            tokens=height * width // self._patch,
            text_tokens=sum(batch.caption_lengths),
        )

    def waited(self, seconds: float) -> None:
        """The loop waited for data."""
        self._waited += seconds

    def ready(self) -> None:
        """All gradients of this rank are on their way; from here on it waits for the others."""
        self._ready = _moment(self._device)

    def sums(self) -> dict[str, float]:
        """To be added up over the ranks; fetches the losses from the device."""
        names = (*_MEANS, *QUARTERS, *(f"{name}_samples" for name in QUARTERS))
        values = [0.0] * len(names) if self._sums is None else self._sums.tolist()
        return {**dict(zip(names, values, strict=True)), **{name: getattr(self._work, name) for name in _WORK}}

    def each(self) -> dict[str, float]:
        """This rank's own. Call it after `sums`: the device has then done all that is timed."""
        ready = 0.0 if self._ready is None else _seconds(self._began, self._ready)
        memory, reserved = memory_bytes(self._device)
        return {
            "data_wait_s": self._waited,
            "ready_s": ready,
            "memory_bytes": float(memory),
            "reserved_bytes": float(reserved),
        }


def row_of(agreed: Agreement) -> dict[str, Any]:
    """The figures of all ranks by name: means over the step's samples; of waiting and memory the most."""
    row: dict[str, Any] = {name: agreed.sums[name] / agreed.samples for name in _MEANS}
    for name in QUARTERS:
        count = agreed.sums[f"{name}_samples"]
        row[name] = agreed.sums[name] / count if count else None
    ready, memory = agreed.each["ready_s"], agreed.each["memory_bytes"]
    return {
        **row,
        "data_wait_s": round(max(agreed.each["data_wait_s"]), 5),
        "ready_s": round(max(ready), 5),
        "ready_s_least": round(min(ready), 5),
        "slowest_rank": ready.index(max(ready)),
        "memory_bytes": int(memory[0]),
        "memory_bytes_most": int(max(memory)),
        "reserved_bytes": int(agreed.each["reserved_bytes"][0]) or None,
    }


def work_in(agreed: Agreement) -> Work:
    """The work of all ranks."""
    return Work(agreed.samples, **{name: agreed.sums[name] for name in _WORK})


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """The most so far of what tensors took on this rank's GPU, and of what torch held there; on a CPU of the process, and 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 0


def device_of(world: World) -> dict[str, str | None]:
    """What this rank computes on: `device_model` as it calls itself, `device_kind` as the table of rates does."""
    if world.device.type != "cuda":
        return {"device_model": _processor(), "device_kind": "cpu-core"}
    about = torch.cuda.get_device_properties(world.device)
    return {"device_model": about.name, "device_kind": device_kind(about.name, about.total_memory)}


def _processor() -> str:
    """The name of this machine's processor, where the kernel tells it."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_flops(stage: StageConfig, world: World, log: Log) -> float | None:
    """What the GPUs of all ranks can do in a second, as the log says; None if one of them is not in the table. A collective."""
    own: Peak | None = None
    if world.device.type == "cuda":
        about = torch.cuda.get_device_properties(world.device)
        own = peak_of(about.name, about.total_memory, stage.precision)
    found = gather(world, None if own is None else vars(own))
    if None in found:
        if world.device.type == "cuda":  # of CPUs nobody asks it
            log.event("no MFU: the table of rates has no peak for one of the GPUs")
        return None
    kinds = sorted({(peak["gpu"], peak["flops"]) for peak in found})
    said = ", ".join(f"{gpu} with {flops / 1e12:g} TFLOP/s" for gpu, flops in kinds)
    log.event(f"MFU and HFU are parts of the peak in {stage.precision}: {said}")
    return float(sum(peak["flops"] for peak in found))


def _checkpointed(stage: StageConfig) -> int:
    blocks = stage.execution.checkpointed_blocks
    assert blocks != "auto", "train.execution chooses it first"
    return {"all": stage.model.depth, "none": 0}[blocks] if isinstance(blocks, str) else blocks


def _moment(device: torch.device) -> Any:
    """Now: on a GPU, when it gets there."""
    if device.type != "cuda":
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return float(ended - began)
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000
