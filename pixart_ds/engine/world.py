"""The ranks: who am I among how many, and the process group that connects us."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from pixart_ds.engine import deepspeed_compat
from pixart_ds.errors import MachineError

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a collective waits for its peers before it raises."""

_LAUNCH = "start the ranks with `pixart-ds train`, torchrun, or srun through the package's supervisor"


@dataclass(frozen=True)
class World:
    """One rank among all.

    Attributes:
        rank: 0 … size - 1.
        size: Ranks in all.
        local_rank: Rank among those of this machine.
        local_size: Ranks on this machine.
        device: The device this rank computes on.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device


def join_world(device: Literal["cpu", "cuda"], timeout: datetime.timedelta = TIMEOUT) -> World:
    """Joins the process group that the environment describes, and readies DeepSpeed in it: gloo on CPUs, NCCL on GPUs.

    Args:
        device: What the ranks compute on.
        timeout: Of every collective, DeepSpeed's own group included.

    Raises:
        MachineError: The environment says too little or something impossible, the device is missing, or the first rank
            cannot be reached.
    """
    rank, size, local_rank, local_size = read_environment(os.environ)
    place = torch.device("cpu") if device == "cpu" else _gpu(local_rank, local_size)
    deepspeed_compat.prepare(device)
    try:
        deepspeed_compat.connect("gloo" if device == "cpu" else "nccl", timeout)
    except dist.DistError as cause:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise MachineError(
            f"rank {rank} of {size} could not join the others: {cause}",
            where=f"MASTER_ADDR:MASTER_PORT = {address}",
            remedy="see that all ranks were started, and that the first one's host can be reached so",
        ) from cause
    return World(rank, size, local_rank, local_size, place)


def leave_world() -> None:
    """Waits for all ranks, then gives the process group back; a process joins once."""
    if dist.is_initialized():
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
        dist.destroy_process_group()


def read_environment(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """Rank, world size, local rank and local world size, as torchrun and our supervisor set them.

    Raises:
        MachineError: All variables that are missing, are no number, or contradict each other.
    """
    numbers: dict[str, int] = {}
    problems = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        value = environment.get(name)
        if value is None or not value.strip():
            problems.append(f"{name} is not set")
        elif name != "MASTER_ADDR":
            if value.isdigit():
                numbers[name] = int(value)
            else:
                problems.append(f"{name} is {value!r}, not a number")
    for part, whole in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE", "WORLD_SIZE")):
        if part in numbers and whole in numbers:
            most = numbers[whole] if part == "LOCAL_WORLD_SIZE" else numbers[whole] - 1
            if numbers[part] > most:
                problems.append(f"{part} is {numbers[part]}, but {whole} is {numbers[whole]}")
    if problems:
        raise MachineError(
            "the environment does not say who this rank is: " + "; ".join(problems),
            where="environment variables",
            remedy=_LAUNCH,
        )
    return numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], numbers["LOCAL_WORLD_SIZE"]


def _gpu(local_rank: int, local_size: int) -> torch.device:
    """This rank's GPU; a rank that sees a single one (`--gpus-per-task=1`) takes it whatever its number."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise MachineError(
            "no CUDA GPU can be used here",
            where=os.uname().nodename,
            remedy="ask for GPUs in the job, or train with --device cpu",
        )
    if 1 < count < local_size:
        raise MachineError(
            f"{local_size} ranks run on this machine, but it has {count} GPUs",
            where=os.uname().nodename,
            remedy="start one rank for each GPU",
        )
    device = torch.device("cuda", local_rank % count)
    torch.cuda.set_device(device)
    return device
