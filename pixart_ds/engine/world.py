"""The ranks: who am I among how many, and the process group that connects us."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from pixart_ds.engine import deepspeed_compat
from pixart_ds.engine.environment import RankEnvironment, read_environment
from pixart_ds.errors import MachineError

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a collective waits for its peers before it raises."""


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


def join_world(
    device: Literal["cpu", "cuda"], timeout: datetime.timedelta = TIMEOUT, environment: RankEnvironment | None = None
) -> World:
    """Joins the process group of all ranks, and readies DeepSpeed in it: gloo on CPUs, NCCL on GPUs.

    Afterwards the environment says in torch's words who this rank is, whichever launcher's it was in.

    Args:
        device: What the ranks compute on.
        timeout: Of every collective, DeepSpeed's own group included.
        environment: Who this rank is; by default what the environment says.

    Raises:
        MachineError: The environment says too little or something impossible, the device is missing, or the first rank
            cannot be reached.
    """
    given = environment or read_environment(os.environ)
    os.environ.update(given.variables())  # torch and DeepSpeed look there, whoever started this rank
    chosen = torch.device("cpu") if device == "cpu" else _gpu(given.local_rank, given.local_size)
    deepspeed_compat.prepare(device)
    try:
        deepspeed_compat.connect("gloo" if device == "cpu" else "nccl", timeout)
    except dist.DistError as cause:
        address = f"{given.master_addr}:{given.master_port}"
        raise MachineError(
            f"rank {given.rank} of {given.size} could not join the others: {cause}",
            where=f"MASTER_ADDR:MASTER_PORT = {address}",
            remedy="see that all ranks were started, and that the first one's host can be reached so",
        ) from cause
    return World(given.rank, given.size, given.local_rank, given.local_size, chosen)


def leave_world() -> None:
    """Waits for all ranks, then gives the process group back; a process joins once."""
    if dist.is_initialized():
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
        dist.destroy_process_group()


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
