"""`pixart-ds status` beside a real Slurm: a stage that is done, one that runs, one that waits, and one that never will start."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pixart_ds import files
from pixart_ds.layout import RunLayout
from tests.e2e.test_demo import call
from tests.e2e.test_same_run import create
from tests.slurm.cluster import Cluster, until

pytestmark = pytest.mark.slurm


def look(run: Path) -> dict[str, Any]:
    answer = call("status", run, "--json")
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def test_stages_that_are_done_run_and_wait(cluster: Cluster, small_set: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    create(run, small_set, "stage1.length.steps=12", "stage2.length.steps=4000")
    urgent = cluster.fill(8)
    cluster.wait_state(urgent, "RUNNING")
    submitted = call("chain", run, "--profile", "test-cluster", "--json")
    assert submitted.returncode == 0, submitted.stderr
    jobs = {each["stage"]: each["jobs"][0] for each in json.loads(submitted.stdout)["stages"]}
    until(lambda: look(run)["jobs"][0]["reason"] in ("Resources", "Priority"), 120, lambda: str(look(run)["jobs"]))
    waiting = look(run)
    assert [row["state"] for row in waiting["stages"]] == ["waiting"] * 5
    assert {job["stage"]: job["job"] for job in waiting["jobs"]} == jobs
    assert waiting["next"] == [f"nothing to do: job {jobs['stage1']} of stage1 is in the queue"]
    text = call("status", run).stdout
    assert f"PENDING (Dependency): waits for job {jobs['stage1']} (stage1)" in text

    cluster.tell("scancel", urgent)
    metrics = RunLayout(run).stage("stage2").attempt(1).metrics
    until(lambda: (files.last_json_line(metrics) or {}).get("step", 0) >= 10, 300, lambda: str(look(run)))
    began = time.monotonic()
    running = look(run)
    print(f"status: {time.monotonic() - began:.2f} s")
    assert [row["state"] for row in running["stages"]] == ["done", "running", "waiting", "waiting", "waiting"]
    row, job = running["stages"][1], next(job for job in running["jobs"] if job["stage"] == "stage2")
    assert (row["outcomes"], row["jobs"], job["state"], job["nodes"]) == (["running"], [jobs["stage2"]], "RUNNING", "2")
    assert row["images_per_second"] > 0
    assert row["images_seen"] >= 320
    assert running["seconds_left"] > 0
    assert running["account"]["device_seconds"] > 0
    assert running["next"] == ["nothing to do: stage2 runs"]

    cluster.tell("scancel", jobs["stage2"])
    cluster.wait_state(jobs["stage2"], "CANCELLED")
    until(lambda: any("never start" in each for each in look(run)["warnings"]), 180, lambda: str(look(run)))
    ended = look(run)
    assert [row["state"] for row in ended["stages"]] == ["done", "stopped", "waiting", "waiting", "waiting"]
    why = f"the job that it waits for did not end well: job {jobs['stage2']} (stage2)"
    never = f"stage3_256: job {jobs['stage3_256']} will never start: {why}"
    assert never in ended["warnings"]
    assert ended["next"] == [f"pixart-ds chain {run} --profile PROFILE"]
    print(call("status", run).stdout)
