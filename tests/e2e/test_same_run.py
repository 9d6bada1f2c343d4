"""A stage that is stopped, killed and resumed at other worlds trains on the same samples and comes to the same losses."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart_ds import files
from pixart_ds.engine.checkpoint import Reader
from pixart_ds.layout import HandoverLayout, RunLayout, StageLayout
from tests.e2e.test_demo import ROOT, call

pytestmark = pytest.mark.e2e

STEPS, CLOSE = 56, 50
"""Steps of the stage, and those over which losses at other worlds agree to 1e-5; later they may drift apart."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("data"))


def prepare_small(folder: Path) -> Path:
    """A small set with buckets, straddled passes (60 samples, batches of 32), and several row groups."""
    from pixart_ds.demo.pictures import write_pictures

    write_pictures(folder / "pictures", 60, seed=1)
    encoders = ROOT / "pixart_ds/demo/encoders"
    sets = [
        f"source.path={folder / 'pictures'}",
        f"output={folder / 'set'}",
        f"vae={encoders / 'vae'}",
        f"text_encoder={encoders / 'text'}",
    ]
    answer = call("prepare", "smoke/prepare", *(word for each in sets for word in ("--set", each)))
    assert answer.returncode == 0, answer.stderr
    return folder / "set"


def create(run: Path, data: Path, *more: str) -> StageLayout:
    overrides = [
        f"*.data.sets=[{{path: {data}}}]",
        f"stage1.length.steps={STEPS}",
        "stage1.checkpoint.every.steps=6",
        "stage1.data.latents=40-buckets",
        *more,
    ]
    answer = call("create", run, "--chain", "smoke/chain", *(word for each in overrides for word in ("--set", each)))
    assert answer.returncode == 0, answer.stderr
    return RunLayout(run).stage("stage1")


def start(run: Path, processes: int, stage: str = "stage1", *more: str, retries: int = 0) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "pixart_ds",
        "train",
        str(run),
        stage,
        "--device",
        "cpu",
        "--processes",
        str(processes),
        "--retries",
        str(retries),
        *more,
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(stage: StageLayout, attempt: int, images: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        row = files.last_json_line(stage.attempt(attempt).metrics)
        if row is not None and row["images_seen"] >= images:
            return
        time.sleep(0.02)


def final_lines(stage: StageLayout, name: str) -> dict[int, dict[str, Any]]:
    """By clock, each line of the newest attempt that reached it: what the line of checkpoints holds."""
    lines: dict[int, dict[str, Any]] = {}
    for attempt in stage.all_attempts():
        for line in files.read_json_lines(getattr(attempt, name)):
            lines[line["images_seen"]] = line
    return lines


def test_stopped_killed_and_resumed_at_other_worlds(data: Path, tmp_path: Path) -> None:
    whole = create(tmp_path / "whole", data)
    process = start(tmp_path / "whole", 2)
    assert process.wait() == 0, process.stdout.read() if process.stdout else ""
    broken = create(tmp_path / "broken", data)
    seed = int(os.environ.get("PIXART_TEST_SEED", "0")) or random.randrange(1, 10**6)
    print(f"PIXART_TEST_SEED={seed}")
    chance = random.Random(seed)
    for attempt, (world, how) in enumerate(((2, "SIGTERM"), (3, "SIGKILL"), (1, "SIGUSR1"), (2, None)), start=1):
        process = start(tmp_path / "broken", world)
        if how:
            wait_for(broken, attempt, 32 * (8 * attempt + chance.randrange(-2, 3)), process)
            if how == "SIGKILL":  # a rank dies: nothing is saved, the newest checkpoint counts
                os.kill(int(chance.choice(ranks_of(tmp_path / "broken"))), signal.SIGKILL)
            else:
                process.send_signal(getattr(signal, how))
        code = process.wait()
        output = process.stdout.read() if process.stdout else ""
        assert code == {"SIGTERM": 75, "SIGUSR1": 75, "SIGKILL": 70, None: 0}[how], output
    assert [files.read_json(a.outcome)["outcome"] for a in broken.all_attempts()] == [
        "stopped",
        "failed",
        "stopped",
        "done",
    ]

    audit, other = final_lines(whole, "audit"), final_lines(broken, "audit")
    assert sorted(audit) == sorted(other) == list(range(32, 32 * STEPS + 1, 32))
    assert [line["digest"] for line in audit.values()] == [other[clock]["digest"] for clock in audit]
    losses, again = final_lines(whole, "metrics"), final_lines(broken, "metrics")
    off = {clock // 32: abs(again[clock]["loss"] / line["loss"] - 1) for clock, line in losses.items()}
    print(
        "largest difference of a loss, by ten steps:",
        [f"{max(off[s] for s in off if s // 10 == t):.1e}" for t in range(6)],
    )
    assert max(off[step] for step in range(1, CLOSE + 1)) <= 1e-5
    assert all(again[clock]["learning_rate"] == line["learning_rate"] for clock, line in losses.items())
    check_audit(tmp_path)


def test_killed_at_random_moments_and_resumed_at_the_same_world_it_is_bit_equal(data: Path, tmp_path: Path) -> None:
    whole = create(tmp_path / "whole", data)
    process = start(tmp_path / "whole", 2)
    assert process.wait() == 0, process.stdout.read() if process.stdout else ""
    broken = create(tmp_path / "broken", data)
    seed = int(os.environ.get("PIXART_TEST_SEED", "0")) or random.randrange(1, 10**6)
    print(f"PIXART_TEST_SEED={seed}")
    chance = random.Random(seed)
    for attempt in (1, 2):  # at any moment: in a step, in a save, between the file and the marker
        process = start(tmp_path / "broken", 2)
        wait_for(broken, attempt, 32 * (14 * attempt), process)
        time.sleep(chance.uniform(0, 0.5))
        os.kill(int(chance.choice(ranks_of(tmp_path / "broken"))), signal.SIGKILL)
        assert process.wait() == 70, process.stdout.read() if process.stdout else ""
    process = start(tmp_path / "broken", 2)
    assert process.wait() == 0, process.stdout.read() if process.stdout else ""
    one, other = final_lines(whole, "metrics"), final_lines(broken, "metrics")
    keys = ("loss", "mse", "vlb", "grad_norm", "learning_rate")
    assert [[line[key] for key in keys] for line in one.values()] == [[other[at][key] for key in keys] for at in one]
    newest = [StageLayout(tmp_path / name / "stage1").checkpoints for name in ("whole", "broken")]
    ends = [Reader.at(max(folder.iterdir())).state_dict("ema") for folder in newest]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def ranks_of(run: Path) -> list[str]:
    pattern = f"pixart_ds.train.rank --run {run}"
    return subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True).stdout.split()


def test_recipe_and_dataset_change_under_way_only_on_record(data: Path, tmp_path: Path) -> None:
    """Another learning rate and a larger set: refused with a diff when they just happen, trained and audited when allowed."""
    stage = create(tmp_path / "run", data, f"stage1.length.steps={CLOSE // 2}")
    process = start(tmp_path / "run", 2)
    wait_for(stage, 1, 32 * 10, process)
    process.terminate()
    assert process.wait() == 75
    stopped = files.read_json(stage.attempt(1).stopped)["images_seen"]
    before = stage.config.read_text()
    stage.config.write_text(before.replace("learning_rate: 0.002", "learning_rate: 0.001"))
    assert stage.config.read_text() != before
    process = start(tmp_path / "run", 2)
    assert process.wait() == 5
    told = files.read_json(stage.attempt(2).outcome)["cause"]
    assert "optimizer.learning_rate: 0.002 → 0.001" in told
    assert f"pixart-ds change RUN {stage.root.name} --allow recipe" in told
    stage.config.write_text(before)
    words = ["change", tmp_path / "run", "stage1", "--set", "optimizer.learning_rate=0.001"]
    assert call(*words).returncode == 2, "not allowed"
    shorter = ["--set", f"data.sets=[{{path: {data}, count: 40}}]"]
    answer = call(*words, *shorter, "--allow", "recipe", "--allow", "dataset")
    assert answer.returncode == 0, answer.stderr
    process = start(tmp_path / "run", 1)
    assert process.wait() == 0, process.stdout.read() if process.stdout else ""
    rates = {line["images_seen"]: line["learning_rate"] for line in final_lines(stage, "metrics").values()}
    assert {rate for clock, rate in rates.items() if clock > stopped} == {0.001}
    answer = call("audit", tmp_path / "run", "--stage", "stage1", "--json")
    assert answer.returncode == 0, answer.stdout
    (audited,) = json.loads(answer.stdout)["stages"]
    eras = [(era["from_step"], era["to_step"]) for era in audited["orders"]]
    assert eras == [(1, stopped // 32), (stopped // 32 + 1, CLOSE // 2)]
    lineage = files.read_json(HandoverLayout(stage.handover).lineage)["lineage"]["lineage"]
    assert [change["images_seen"] for change in lineage["changes"]] == [stopped]
    assert lineage["changes"][0]["allowed"] == ["recipe", "dataset"]


def check_audit(tmp_path: Path) -> None:
    """The audit proves the run; in a copy with one digit of one digest changed it names the step."""
    answer = call("audit", tmp_path / "broken", "--processes", "2")
    print(answer.stdout)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.startswith("stage1: proven\n")
    assert f"1 to {STEPS} of {STEPS}" in answer.stdout
    (stage,) = json.loads(call("audit", tmp_path / "broken", "--json").stdout)["stages"]
    assert [attempt["world_size"] for attempt in stage["attempts"]] == [2, 3, 1, 2]
    shutil.copytree(tmp_path / "broken", tmp_path / "copy")
    log = RunLayout(tmp_path / "copy").stage("stage1").attempt(4).audit
    rows = list(files.read_json_lines(log))
    step, digest = rows[-2]["images_seen"] // 32, rows[-2]["digest"]
    rows[-2]["digest"] = ("1" if digest[0] == "0" else "0") + digest[1:]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = call("audit", tmp_path / "copy")
    print(answer.stdout)
    assert answer.returncode == 4
    assert f"stage1: NOT PROVEN, step {step} is the first violation" in answer.stdout


def test_a_killed_supervisor_leaves_no_rank_behind_and_the_next_one_resumes(data: Path, tmp_path: Path) -> None:
    stage = create(tmp_path / "run", data)
    process = start(tmp_path / "run", 2)
    wait_for(stage, 1, 32 * 8, process)
    process.kill()
    process.wait()
    pattern = f"pixart_ds.train.rank --run {tmp_path / 'run'}"
    deadline = time.monotonic() + 60
    while subprocess.run(["pgrep", "-f", pattern], capture_output=True, check=False).returncode == 0:
        assert time.monotonic() < deadline, "ranks are still there"
        time.sleep(0.1)
    assert stage.attempt(1).stopped.exists()  # they saved and left
    assert not stage.attempt(1).outcome.exists()
    process = start(tmp_path / "run", 1)
    assert process.wait() == 0, process.stdout.read() if process.stdout else ""
    clocks = [line["images_seen"] for attempt in stage.all_attempts() for line in files.read_json_lines(attempt.audit)]
    assert clocks == list(range(32, 32 * STEPS + 1, 32))
