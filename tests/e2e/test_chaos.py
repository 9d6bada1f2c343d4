"""A short form of tools/chaos.py: after a handful of random faults the run is the uninterrupted one; and what it objects to."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/chaos.py"
FAULTS = 6


def tool() -> Any:
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("chaos", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module
    spec.loader.exec_module(module)
    return module


chaos = tool()


@pytest.mark.e2e
def test_a_handful_of_random_faults_changes_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("PIXART_TEST_SEED", "0")) or random.randrange(1, 10**6)
    print(f"PIXART_TEST_SEED={seed}")
    command = [sys.executable, TOOL, "--faults", FAULTS, "--seed", seed, "--out", tmp_path / "out", "--json"]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    print(answer.stderr)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert found["faults"] == sum(each["faults"] for each in found["by_kind"].values()) == FAULTS
    assert found["audit"]["proven_steps"] == found["steps"]
    assert found["loss_difference_first_steps"] <= 1e-5
    assert found["checkpoints_passed_over"] >= found["checkpoints_damaged"]
    assert found["samples_not_finite"] == [0]
    assert sum(found["time"].values()) == pytest.approx(1, abs=0.001)
    assert found["time"]["rework"] > 0
    assert not (tmp_path / "out").exists()


def test_a_seed_plans_the_same_faults_with_every_kind_among_many() -> None:
    kinds = list(chaos.KINDS)
    faults = chaos.plan(7, 100, kinds)
    assert faults == chaos.plan(7, 100, kinds) != chaos.plan(8, 100, kinds)
    assert {fault.kind for fault in faults} == set(kinds)
    assert [fault.number for fault in faults] == list(range(1, 101))
    assert [fault.step for fault in faults] == sorted(fault.step for fault in faults)
    assert faults[-1].step < chaos.steps_for(100) - chaos.STEPS_PER_FAULT
    assert len({fault.kind for fault in chaos.plan(7, 5, kinds)}) == 5, "few faults are of different kinds"


@pytest.mark.e2e
def test_what_cannot_be_done_is_said_before_anything_begins(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for words, told in (
        (["--out", tmp_path], "is not empty"),
        (["--kinds", "kill-rank,fire"], "there is no fault fire"),
    ):
        command = [sys.executable, TOOL, "--seed", "1", *words]
        answer = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert answer.returncode == 2
        assert told in answer.stdout + answer.stderr


def test_a_fault_that_follows_at_once_comes_before_the_stage_is_over(tmp_path: Path) -> None:
    """However fast the machine: at its step, if that is trained before its seconds have passed."""
    stage = chaos.RunLayout(tmp_path).stage("stage1")
    stage.attempt(1).root.mkdir(parents=True)
    around = chaos.Chaos.__new__(chaos.Chaos)
    around.stage = stage
    now = chaos.time.monotonic()
    before = chaos.Struck(fault("kill-rank"), now, (1, 1), recovered_s=1.0)
    follows = chaos.Fault(2, "kill-rank", 40, 100.0, True, 0.5, 3.0)
    for step, at, due in ((39, now, False), (39, now - 101, True), (40, now, True)):
        stage.attempt(1).metrics.write_text(json.dumps({"step": step}) + "\n")
        around.struck = [replace(before, at=at)]
        assert around._is_due(follows) is due, (step, at)


# ---- what it would object to ----------------------------------------------------------------------------------------


def fault(kind: str) -> Any:
    return chaos.Fault(1, kind, 1, 0.0, False, 0.5, 3.0)


def outcome(said: str, code: int, *endings: str) -> dict[str, Any]:
    return {"outcome": said, "exit_code": code, "launches": [{"ending": ending} for ending in endings]}


@pytest.mark.parametrize(
    ("code", "said", "kinds"),
    [
        (75, outcome("stopped", 75, "stopped"), ["term-supervisor"]),
        (75, outcome("stopped", 75, "failed", "stopped"), ["kill-rank", "stop-file"]),
        (70, outcome("failed", 70, *["failed"] * 4), ["kill-rank"] * 3 + ["stop-rank"]),
        (3, outcome("failed", 3, "failed"), ["full-disk"]),
        (3, None, ["full-disk"]),
        (-9, None, ["kill-supervisor"]),
    ],
)
def test_endings_that_faults_explain(code: int, said: dict[str, Any] | None, kinds: list[str]) -> None:
    chaos.check_ending(code, said, [fault(kind) for kind in kinds], done=False)


@pytest.mark.parametrize(
    ("code", "said", "kinds", "done", "words"),
    [
        (75, outcome("stopped", 75), ["kill-rank"], False, "allowed were"),
        (1, None, ["full-disk"], False, "allowed were"),
        (0, outcome("done", 0, "done"), [], False, "the stage is not done"),
        (75, outcome("stopped", 75), ["stop-file"], True, "the stage is done"),
        (75, None, ["stop-file"], False, "there is no outcome.json"),
        (75, outcome("stopped", 0), ["stop-file"], False, "outcome.json says 0"),
        (0, outcome("done", 0, "failed", "done"), [], True, "one did by itself"),
        (70, outcome("failed", 70, "failed"), ["kill-rank"], False, "gave up after 1 failed launches, 3 retries"),
        (0, outcome("stopped", 0), ["term-rank"], True, "the outcome should be done"),
    ],
)
def test_endings_that_faults_do_not_explain(
    code: int, said: dict[str, Any] | None, kinds: list[str], done: bool, words: str
) -> None:
    with pytest.raises(chaos.Violation, match=words):
        chaos.check_ending(code, said, [fault(kind) for kind in kinds], done=done)


def stage_with(tmp_path: Path, rows: list[str], there: list[str]) -> Any:
    """A stage whose saves.jsonl has these rows, and these checkpoints."""
    stage = chaos.RunLayout(tmp_path).stage("stage1")
    stage.attempt(1).root.mkdir(parents=True)
    stage.attempt(1).saves.write_text("".join(json.dumps({"checkpoint": name}) + "\n" for name in rows))
    for name in there:
        (stage.checkpoints / name).mkdir(parents=True)
        (stage.checkpoints / name / chaos.MARKER_NAME).touch()
    return stage


A, B, C = (f"img-{images:012d}-a0001-l01" for images in (16, 32, 48))


@pytest.mark.parametrize(
    ("rows", "there", "words"),
    [
        ([A, B], [A, B], None),
        ([A, B], [B], None),
        ([A, B], [A, B, C], None),
        ([A], [A, B, C], "saves.jsonl does not name"),
        ([A, B], [A], "names img-000000000032-a0001-l01 last, which is not there"),
    ],
)
def test_saves_and_checkpoints_must_agree(tmp_path: Path, rows: list[str], there: list[str], words: str | None) -> None:
    stage = stage_with(tmp_path, rows, there)
    if words is None:
        chaos.check_saves(stage, set())
    else:
        with pytest.raises(chaos.Violation, match=words):
            chaos.check_saves(stage, set())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"digest": "f"}, "steps \\[2\\] have another digest"),
        ({"applied": False}, "steps \\[2\\] have another applied"),
        ({"loss": 1.0001}, "losses of the first 50 steps differ by 1.0e-04"),
        ({"loss": None}, "steps \\[2\\] have a loss in one run only"),
        ({"images_seen": 16}, "3 and 2 steps were logged, not 3"),
    ],
)
def test_runs_that_differ_are_told_apart(tmp_path: Path, change: dict[str, Any], words: str | None) -> None:
    stages = []
    for name in ("whole", "broken"):
        stage = chaos.RunLayout(tmp_path / name).stage("stage1")
        stage.attempt(1).root.mkdir(parents=True)
        rows = [
            {"images_seen": chaos.BATCH * step, "digest": "0", "applied": True, "loss": 1.0} for step in range(1, 4)
        ]
        if name == "broken":
            rows[1] |= change
        for path in (stage.attempt(1).audit, stage.attempt(1).metrics):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        stages.append(stage)
    if words is None:
        assert chaos.compare(*stages, 3)["loss_difference_first_steps"] == 0
    else:
        with pytest.raises(chaos.Violation, match=words):
            chaos.compare(*stages, 3)
