"""`auto` in numbers: one choice for all ranks, written to the log, refused on a CPU before a rank starts."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pixart_ds.cli import main
from pixart_ds.config.load import load_stage
from pixart_ds.engine.world import World
from pixart_ds.errors import ConfigError
from pixart_ds.log import Log
from pixart_ds.plan.fit import GIB, choose
from pixart_ds.train import execution
from pixart_ds.train.execution import in_numbers

AUTO = ["execution.micro_batch_size=auto", "execution.checkpointed_blocks=auto"]


def resolve(
    monkeypatch: pytest.MonkeyPatch, ranks: list[tuple[str, float, int]], rank: int, *overrides: str
) -> tuple[Any, str]:
    """The stage in numbers and the log of one of the ranks: (GPU's name, GiB, ranks on its machine) each."""
    names = [execution.gpu_named(name, int(gib * GIB)) for name, gib, _ in ranks]
    monkeypatch.setattr(execution, "together", lambda world, action: [*names[:rank], action(), *names[rank + 1 :]])
    monkeypatch.setattr(execution, "gather", lambda world, value: [each for _, _, each in ranks])
    name, gib, each = ranks[rank]
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(name=name, total_memory=int(gib * GIB)),
    )
    told = io.StringIO()
    world = World(rank, len(ranks), 0, each, torch.device("cuda", 0))
    return in_numbers(load_stage("stage2", [*AUTO, *overrides]), world, Log("stage2", told)).execution, told.getvalue()


def test_every_rank_takes_the_estimates_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [("Tesla V100-SXM2-32GB", 31.7, 8)] * 64
    wanted = choose(load_stage("stage2", AUTO), "v100-32gb", 8, 8)
    for rank in (0, 63):
        found, told = resolve(monkeypatch, ranks, rank)
        assert found == wanted.execution
        assert told.rstrip().endswith(str(wanted))


def test_the_least_memory_of_mixed_gpus_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [("Tesla V100-SXM2-32GB", 31.7, 2), ("Tesla V100-SXM2-16GB", 15.8, 2)] * 2
    wanted = choose(load_stage("stage2", AUTO), "v100-16gb", 2, 2).execution
    assert all(resolve(monkeypatch, ranks, rank)[0] == wanted for rank in range(4))
    odd = [("NVIDIA H200", 139.8, 2), ("NVIDIA H200", 139.8, 2), ("NVIDIA H200", 139.8, 1)]
    assert resolve(monkeypatch, odd, 0)[0] == choose(load_stage("stage2", AUTO), "h200", 3, 1).execution


def test_numbers_need_no_gpu_and_no_peers() -> None:
    stage = load_stage("stage2")
    told = io.StringIO()
    assert in_numbers(stage, World(0, 64, 0, 8, torch.device("cpu")), Log("stage2", told)) is stage
    assert told.getvalue() == ""


def test_a_rank_on_a_cpu_refuses() -> None:
    with pytest.raises(ConfigError, match="auto is chosen for a GPU's memory, and stage2 is to run on cpu") as error:
        in_numbers(load_stage("stage2", AUTO[1:]), World(0, 1, 0, 1, torch.device("cpu")), Log("stage2"))
    assert "where: execution.checkpointed_blocks\n" in str(error.value)


def test_train_refuses_before_a_process_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "run")
    assert main(["create", folder, "--chain", "smoke/chain"]) == 0
    words = [word for text in AUTO for word in ("--set", text)]
    assert main(["train", folder, "stage1", "--device", "cpu", *words]) == 2
    text = capsys.readouterr().err
    assert "where: execution.micro_batch_size, execution.checkpointed_blocks" in text
    assert "to do: give numbers: --set execution.micro_batch_size=N --set execution.checkpointed_blocks=all" in text
    assert not list(Path(folder).glob("*/attempts/*"))


def test_another_deepspeed_file_is_refused_because_the_runs_own_is_frozen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "run")
    assert main(["create", folder, "--chain", "smoke/chain"]) == 0
    assert main(["train", folder, "stage1", "--device", "cpu", "--set", "execution.deepspeed=zero2_a100"]) == 2
    text = capsys.readouterr().err
    assert "stage1 was made with the DeepSpeed file zero2_cpu, which is frozen into the run; zero2_a100 would" in text
    assert f"where: {folder}/stage1/deepspeed.json" in text


def test_an_edited_deepspeed_file_is_held_against_the_recipe_before_a_process_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["create", str(folder), "--chain", "smoke/chain"]) == 0
    path = folder / "stage1" / "deepspeed.json"
    path.write_text(path.read_text().replace('"loss_scale_window": 200', '"loss_scale_window": 0'))
    assert main(["train", str(folder), "stage1", "--device", "cpu"]) == 2
    text = capsys.readouterr().err
    assert "fp16.loss_scale_window: a whole number from 1 on is due, the file says 0" in text
    assert f"where: {path}" in text
