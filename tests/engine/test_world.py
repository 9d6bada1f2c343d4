"""What a rank reads from its environment."""

from __future__ import annotations

import pytest
import torch

from pixart_ds.engine import deepspeed_compat, world
from pixart_ds.engine.world import join_world, read_environment
from pixart_ds.errors import MachineError

WHOLE = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


def test_a_whole_environment() -> None:
    assert read_environment(WHOLE) == (5, 8, 1, 4)


def test_everything_missing_is_named_at_once() -> None:
    with pytest.raises(MachineError) as error:
        read_environment({"RANK": "0", "MASTER_ADDR": ""})
    text = str(error.value)
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        assert f"{name} is not set" in text
    assert "RANK is not set" not in text.replace("LOCAL_RANK is not set", "")
    assert "torchrun" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "8"}, "RANK is 8, but WORLD_SIZE is 8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK is 4, but LOCAL_WORLD_SIZE is 4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE is 9, but WORLD_SIZE is 8"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a number"),
        ({"RANK": "-1"}, "RANK is '-1', not a number"),
    ],
)
def test_contradictions(change: dict[str, str], message: str) -> None:
    with pytest.raises(MachineError, match=message):
        read_environment(WHOLE | change)


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
