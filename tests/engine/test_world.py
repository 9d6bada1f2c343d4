"""How a rank joins the others: its device, and who it is afterwards."""

from __future__ import annotations

import os

import pytest
import torch

from pixart_ds.engine import deepspeed_compat, world
from pixart_ds.engine.world import join_world
from pixart_ds.errors import MachineError

WHOLE = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


def _gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> list[torch.device]:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize(("count", "local_rank", "local_size", "index"), [(8, 3, 8, 3), (1, 3, 4, 0), (4, 0, 1, 0)])
def test_which_gpu(monkeypatch: pytest.MonkeyPatch, count: int, local_rank: int, local_size: int, index: int) -> None:
    chosen = _gpus(monkeypatch, count)
    assert world._gpu(local_rank, local_size) == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]


@pytest.mark.parametrize(
    ("count", "message"), [(0, "no CUDA GPU can be used"), (2, "4 ranks run on this machine, but it has 2 GPUs")]
)
def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch, count: int, message: str) -> None:
    _gpus(monkeypatch, count)
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MachineError, match=message):
        join_world("cuda")


def test_a_first_rank_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)

    def refuse(*_: object) -> None:
        raise torch.distributed.DistNetworkError("connection refused")

    monkeypatch.setattr(deepspeed_compat, "prepare", lambda device: None)
    monkeypatch.setattr(deepspeed_compat, "connect", refuse)
    with pytest.raises(MachineError, match="rank 5 of 8 could not join the others: connection refused") as error:
        join_world("cpu")
    assert "node1:29500" in str(error.value)


def test_whatever_started_a_rank_torchs_words_say_it_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WHOLE:
        monkeypatch.setenv(name, "")  # gives back afterwards what join_world sets
    slurm = {"PROCID": "3", "LOCALID": "1", "NODEID": "1", "NTASKS": "4", "TASKS_PER_NODE": "2(x2)"}
    for name, value in {**slurm, "JOB_ID": "7", "STEP_ID": "0", "JOB_NODELIST": "n[5-6]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(deepspeed_compat, "prepare", lambda device: None)
    monkeypatch.setattr(deepspeed_compat, "connect", lambda *_: None)
    joined = join_world("cpu")
    assert (joined.rank, joined.size, joined.local_rank, joined.local_size) == (3, 4, 1, 2)
    assert {name: os.environ[name] for name in WHOLE} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n5",
        "MASTER_PORT": "20007",
    }
