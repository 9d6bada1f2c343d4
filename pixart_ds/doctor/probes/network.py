"""What GPUs of one node, or processes of one machine, reach when they reduce together."""

from __future__ import annotations

import os
from typing import Any

from pixart_ds.doctor.ask import Child
from pixart_ds.doctor.check import Check, failed, ok, skipped, warning
from pixart_ds.doctor.subject import Subject
from pixart_ds.engine.environment import free_port
from pixart_ds.log import si

_LAUNCH_S = 180.0
_CPU_RANKS = 2
_LEAST = {"NVLink": 20e9, "PCIe": 2e9, "memory": 20e6}
"""Bytes a second of bus bandwidth below which something is wrong with a link; assumed, far below what they give when sound."""
_NCCL_REMEDY = "run again with NCCL_DEBUG=INFO; see nvidia-smi topo -m, NCCL_P2P_DISABLE and /dev/shm"


def judge_all_reduce(rate: float, ranks: int, size: int, link: str) -> Check:
    """Whether an all-reduce was as fast as its links let one expect.

    Args:
        rate: Bytes a second of the bus: through the slowest link of a ring.
        ranks: That reduced.
        size: Bytes of the tensor.
        link: NVLink or PCIe between GPUs; memory between gloo's processes.
    """
    what = "gloo processes" if link == "memory" else "GPUs"
    seen = f"all-reduce of {si(size, 'B')} over {ranks} {what} ({link}): {si(rate, 'B/s')} of the bus"
    if rate < _LEAST[link]:
        remedy = "see what else runs on this machine" if link == "memory" else _NCCL_REMEDY
        return warning("network.all_reduce", f"{seen}; {si(_LEAST[link], 'B/s')} is the least to expect", remedy)
    return ok("network.all_reduce", seen)


def link_between(gpus: list[dict[str, Any]]) -> str:
    """NVLink if every GPU has one that is up."""
    return "NVLink" if all(gpu["nvlinks"] for gpu in gpus) else "PCIe"


def all_reduce(subject: Subject) -> Check:
    name = "network.all_reduce"
    if subject.device == "cpu":
        return _reduced("cpu", _CPU_RANKS, "memory")
    if subject.gpus.error is not None:
        return skipped(name, "see gpu.driver" if subject.gpu_required else "there is no GPU here")
    gpus = subject.gpus.value["gpus"]
    if len(gpus) < 2:
        return skipped(name, f"{len(gpus)} GPU here: there is nothing to reduce with")
    return _reduced("cuda", len(gpus), link_between(gpus))


def _reduced(device: str, ranks: int, link: str) -> Check:
    said = _launch(device, ranks)
    if isinstance(said, str):
        remedy = "see what of gloo fails: GLOO_SOCKET_IFNAME names an interface" if device == "cpu" else _NCCL_REMEDY
        return failed("network.all_reduce", f"{ranks} ranks could not reduce: {said}", remedy)
    return judge_all_reduce(said["bytes_per_second"], said["ranks"], said["bytes"], link)


def _launch(device: str, ranks: int) -> dict[str, Any] | str:
    """What rank 0 measured, or the first error."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    children = [
        Child("all_reduce", device, environment={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    try:
        said = children[0].answer(_LAUNCH_S)
        if said.error is None:
            return dict(said.value)
        # the first rank may only have waited for one that failed
        return next(filter(None, (child.failure() for child in children[1:])), said.error)
    finally:
        for child in children[1:]:
            child.end()


FULL = (all_reduce,)
