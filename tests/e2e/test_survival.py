"""A stage survives a killed rank, a rank that hangs, and samples that are no numbers, without a person's help."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pixart_ds import files
from pixart_ds.layout import StageLayout
from tests.e2e import test_same_run
from tests.e2e.test_demo import call
from tests.e2e.test_same_run import create, final_lines, ranks_of, start, wait_for
from tests.helpers.sets import spoil

pytestmark = pytest.mark.e2e

data = test_same_run.data


def launches(stage: StageLayout, attempt: int = 1) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = files.read_json(stage.attempt(attempt).outcome)["launches"]
    return found


def audited(run: Path) -> dict[str, Any]:
    answer = call("audit", run, "--stage", "stage1", "--json")
    assert answer.returncode == 0, answer.stdout
    found: dict[str, Any] = json.loads(answer.stdout)["stages"][0]
    return found


def test_a_killed_rank_and_one_that_hangs_cost_a_launch_each_and_nothing_else(data: Path, tmp_path: Path) -> None:
    stage = create(tmp_path / "run", data)
    process = start(tmp_path / "run", 2, "stage1", "--set", "execution.deadlines.silence=10", retries=3)
    wait_for(stage, 1, 32 * 9, process)
    victims = ranks_of(tmp_path / "run")
    os.kill(int(victims[-1]), signal.SIGKILL)
    wait_for(stage, 1, 32 * 20, process)
    stuck = [rank for rank in ranks_of(tmp_path / "run") if rank not in victims]
    os.kill(int(stuck[-1]), signal.SIGSTOP)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert [each["ending"] for each in launches(stage)] == ["failed", "failed", "done"]
    assert "was killed by SIGKILL" in launches(stage)[0]["cause"]
    assert "has given no sign of life for" in launches(stage)[1]["cause"]
    assert f"(pid {stuck[-1]})" in launches(stage)[1]["cause"]
    hang = files.read_json(stage.attempt(1).hang(2))
    (culprit,) = hang["culprits"]
    assert culprit["pid"] == int(stuck[-1])
    other = stage.attempt(1).rank_log(2, 1 - culprit["rank"]).read_text()
    assert "most recent call first" in other, "the stacks of the rank that waited"
    assert output.count("trains again") == 2, output
    print([line for line in output.splitlines() if "trains again" in line])
    found = audited(tmp_path / "run")
    assert found["rework"]["steps"] > 0
    assert ranks_of_none(tmp_path / "run")


def ranks_of_none(run: Path) -> bool:
    pattern = f"pixart_ds.train.rank --run {run}"
    return subprocess.run(["pgrep", "-f", pattern], capture_output=True, check=False).returncode == 1


def test_a_rank_that_dies_somewhere_in_the_stop_loses_nothing_that_was_committed(data: Path, tmp_path: Path) -> None:
    """SIGTERM to the supervisor, and a rank is killed a moment later: in the step, in the save, between commit and marker."""
    stage = create(tmp_path / "run", data)
    seed = int(os.environ.get("PIXART_TEST_SEED", "0")) or random.randrange(1, 10**6)
    print(f"PIXART_TEST_SEED={seed}")
    chance = random.Random(seed)
    for attempt in (1, 2, 3):
        process = start(tmp_path / "run", 2, retries=3)
        wait_for(stage, attempt, 32 * 10 * attempt, process)
        ranks = ranks_of(tmp_path / "run")
        process.terminate()
        time.sleep(chance.uniform(0, 0.4))
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(ranks[0] if attempt == 1 else chance.choice(ranks)), signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode == 75, output
        assert len(launches(stage, attempt)) == 1, "nothing is started into an allocation that is to end"
    process = start(tmp_path / "run", 1)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert audited(tmp_path / "run")["proven"]["to_step"] == test_same_run.STEPS


@pytest.fixture(scope="module")
def spoilt(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set with one sample that is no number."""
    folder = tmp_path_factory.mktemp("spoilt") / "set"
    shutil.copytree(data, folder)
    spoil(folder, "40-buckets")
    return folder


def test_a_sample_that_is_no_number_is_refused_each_time_and_named(spoilt: Path, tmp_path: Path) -> None:
    stage = create(tmp_path / "run", spoilt, "stage1.length.steps=10")
    process = start(tmp_path / "run", 2)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    refused = list(files.read_json_lines(stage.attempt(1).refused))
    applied = {clock: line["applied"] for clock, line in final_lines(stage, "audit").items()}
    assert [row["images_seen"] for row in refused] == [clock for clock in applied if not applied[clock]]
    assert 4 <= len(refused) <= 6, "5.3 passes, and a step may hold two visits"
    bad = {sample["sample_id"] for row in refused for sample in row["samples"] if sample["loss"] is None}
    good = {sample["sample_id"] for row in refused for sample in row["samples"] if sample["loss"] is not None}
    assert len(bad) == 1
    assert not bad & good
    assert files.read_json(stage.done)["skipped_steps"] == len(refused)
    assert audited(tmp_path / "run")["skipped_steps"] == len(refused)


def test_refused_steps_send_training_back_and_are_left_out(spoilt: Path, tmp_path: Path) -> None:
    """With a guard that forgives none, each pass's bad step is left out after a roll-back; the rest is trained."""
    guard = ["stage1.guard.consecutive_skips=1", "stage1.guard.rollbacks=9"]
    stage = create(tmp_path / "run", spoilt, "stage1.length.steps=8", "stage1.checkpoint.every.steps=2", *guard)
    process = start(tmp_path / "run", 2)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    endings = [each["ending"] for each in launches(stage)]
    windows = files.read_json(stage.skips)["windows"]
    assert endings == ["rolled back"] * len(windows) + ["done"]
    assert 3 <= len(windows) <= 5
    evidence = files.read_json(stage.attempt(1).rolled_back(1))
    assert any(row["loss"] is None for row in evidence["samples"])
    found = audited(tmp_path / "run")
    assert (found["left_out_steps"], found["skipped_steps"]) == (len(windows), 0)
    done = files.read_json(stage.done)
    assert (done["applied_steps"], done["skipped_steps"]) == (8 - len(windows), len(windows))
    log = stage.attempt(1).audit
    rows = list(files.read_json_lines(log))
    trained = next(row for row in reversed(rows) if not row.get("left_out"))
    trained["left_out"] = True
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = call("audit", tmp_path / "run")
    assert answer.returncode == 4
    assert "was left out, and no window that was recorded before says so" in " ".join(answer.stdout.split())


def test_where_going_back_does_not_help_the_stage_ends_with_a_report(spoilt: Path, tmp_path: Path) -> None:
    guard = ["stage1.guard.consecutive_skips=1", "stage1.guard.rollbacks=1"]
    stage = create(tmp_path / "run", spoilt, "stage1.length.steps=8", "stage1.checkpoint.every.steps=2", *guard)
    process = start(tmp_path / "run", 1)
    output, _ = process.communicate()
    assert process.returncode == 2, output
    cause = files.read_json(stage.attempt(1).outcome)["cause"]
    assert "training was sent back 1 times, and it did not help" in cause
    assert "rolled-back-l02.json" in cause
