"""`pixart-ds status` of runs in every state, whole and damaged, with a queue that answers, hangs, or is not there."""

from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pixart_ds import files
from pixart_ds.cli import main
from pixart_ds.cluster import status_advice, status_queue, status_text
from pixart_ds.cluster.bad_nodes import record
from pixart_ds.cluster.cancel import CANCELLED
from pixart_ds.cluster.jobs import job_name
from pixart_ds.cluster.status import run_status
from pixart_ds.cluster.status_queue import parse
from pixart_ds.cluster.status_text import page, show
from pixart_ds.config.budget import change_budget
from pixart_ds.config.freeze import create_run
from pixart_ds.config.load import load_chain
from pixart_ds.engine.line import Start, write_start
from pixart_ds.errors import DataError
from pixart_ds.layout import MARKER_NAME, AttemptLayout, CheckpointName, RunLayout
from pixart_ds.ledger.book import write_entry
from pixart_ds.ledger.entries import Entry

NOW = 1_795_000_000.0
"""2026-11-18 11:06:40 UTC."""
STAGES = ("stage1", "stage2", "stage3_256", "stage3_512", "stage3_1024")
NOBODY = 2**22 + 1
"""A process that no Linux has."""


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(
        status_advice.os, "statvfs", lambda path: SimpleNamespace(f_blocks=100, f_bavail=50, f_frsize=1)
    )


@pytest.fixture
def run(tmp_path: Path) -> RunLayout:
    return create_run(tmp_path / "run", load_chain("smoke/chain"), "smoke/chain")


def slurm(tmp_path: Path, script: str) -> None:
    """A squeue that runs a line of shell."""
    path = tmp_path / "bin" / "squeue"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def queue(tmp_path: Path, run: RunLayout, *rows: str) -> None:
    """A squeue with these rows: `JOB STAGE STATE REASON [START [DEPENDENCY [COMMENT]]]`, and a stranger's job."""
    lines = ["9|somebody-elses|RUNNING|None|N/A|1|(null)|(null)"]
    for row in rows:
        job, stage, state, reason, *more = row.split(" ", 6)
        starts, after, comment = [*more, *("N/A", "(null)", "(null)")[len(more) :]]
        lines.append(f"{job}|{job_name(run.root, stage)}|{state}|{reason}|{starts}|8|{after}|{comment}")
        (run.stage(stage).submissions).mkdir(exist_ok=True)
    (tmp_path / "rows").write_text("\n".join(lines) + "\n")
    slurm(tmp_path, f'while read -r line; do echo "$line"; done < {tmp_path / "rows"}')


def attempt(
    run: RunLayout, stage: str, number: int = 1, *, ago: float = 5.0, images: int = 0, **more: Any
) -> AttemptLayout:
    """An attempt that was alive `ago` seconds before now, and has come so far; `outcome` and others go into outcome.json."""
    made = run.stage(stage).attempt(number)
    made.root.mkdir(parents=True)
    env = {"launcher": "supervisor, 2 processes", "world_size": 2, "device": "cpu", "slurm": {}}
    if (job := more.pop("job", None)) is not None:
        env["slurm"] = {"SLURM_JOB_ID": job}
    files.write_json(made.env, env)
    beat = {"host": more.pop("host", "elsewhere"), "pid": more.pop("pid", 1), "time": NOW - ago, "job": job}
    made.heartbeat.write_text(json.dumps(beat))
    os.utime(made.heartbeat, (NOW - ago, NOW - ago))
    for seen in range(32, images + 1, 32):
        row = {"images_seen": seen, "loss": 0.5 - seen / 10_000, "seconds": 4.0, "images_per_second": 8.0}
        left = {"seconds_left": (384 - seen) / 8, "chain_seconds_left": (384 - seen) / 8 + 600}
        files.append_json_line(made.metrics, {**row, **left})
    if "outcome" in more:
        files.write_json(made.outcome, {"cause": None, "exit_code": 0, "launches": [], **more})
    return made


def checkpoint(run: RunLayout, stage: str, images: int, number: int = 1, ago: float = 60.0) -> str:
    layout, name = run.stage(stage), CheckpointName(images, number, 1)
    write_start(layout, Start((number, 1), None, {"images_seen": 0}))
    marker = layout.checkpoints / str(name) / MARKER_NAME
    marker.parent.mkdir(parents=True)
    marker.write_text('{"milestone": false}')
    os.utime(marker, (NOW - ago, NOW - ago))
    return str(name)


def entry(attempt_: AttemptLayout, **changes: Any) -> None:
    made = Entry.start(attempt_.root.parent.parent.name, attempt_.number, 1, "cpu", 2, NOW - 3600, 0)
    parts = {"productive": 2700.0, "data_wait": 300.0, "startup": 600.0}
    told = {"until": NOW, "images_to": 192, "parts": parts, "device_kind": "cpu-core"} | {
        "outcome": "failed",
        **changes,
    }
    write_entry(attempt_, Entry.from_json({**made.to_json(), **told}))


def done(run: RunLayout, *stages: str) -> None:
    for stage in stages:
        files.write_json(run.stage(stage).done, {})


def stage1(run: RunLayout) -> dict[str, Any]:
    row: dict[str, Any] = run_status(run, NOW)["stages"][0]
    return row


def told(run: RunLayout, text: str) -> str:
    """The one warning that has these words."""
    (found,) = [warning for warning in run_status(run, NOW)["warnings"] if text in warning]
    return str(found)


# ---- states ------------------------------------------------------------------------------------------------------------


def test_a_run_that_has_not_begun(run: RunLayout, tmp_path: Path) -> None:
    found = run_status(run, NOW)
    assert [row["state"] for row in found["stages"]] == ["not started"] * 5
    assert found["warnings"] == []
    assert found["next"] == [
        f"pixart-ds train {run.root} stage1",
        f"on a cluster: pixart-ds chain {run.root} --profile PROFILE"
        "    (or: sbatch slurm/stage1.sbatch, with RUN in slurm/setup.sh)",
    ]
    slurm(tmp_path, "exit 1")
    (tmp_path / "bin" / "sbatch").symlink_to("squeue")
    assert run_status(run, NOW)["next"][0].startswith(f"pixart-ds chain {run.root} --profile PROFILE")
    json.dumps(found, allow_nan=False)


def test_a_run_that_is_done(run: RunLayout, tmp_path: Path) -> None:
    slurm(tmp_path, "sleep 60")  # nobody asks it
    done(run, *STAGES)
    found = run_status(run, NOW)
    assert {row["state"] for row in found["stages"]} == {"done"}
    assert found["seconds_left"] is None
    assert [line.split()[:3] for line in found["next"]] == [
        ["pixart-ds", "sample", str(run.root)],
        ["pixart-ds", "export", str(run.root)],
    ]


def test_an_attempt_that_runs_without_slurm(run: RunLayout) -> None:
    attempt(run, "stage1", images=192)
    row = stage1(run)
    assert (row["state"], row["outcomes"], row["images_seen"], row["total_images"]) == (
        "running",
        ["running"],
        192,
        384,
    )
    assert (row["images_per_second"], row["loss"], row["seconds_left"]) == (8.0, 0.5 - 0.0192, 24.0)
    assert run_status(run, NOW)["seconds_left"] == 624.0, "the ledger says nothing yet: by the steps"
    assert run_status(run, NOW)["next"] == ["nothing to do: stage1 runs"]


@pytest.mark.parametrize("pid", [NOBODY, 1])
def test_an_attempt_that_was_killed_is_lost(run: RunLayout, pid: int) -> None:
    """Its process is gone, or it has been silent for too long."""
    attempt(run, "stage1", host=socket.gethostname(), pid=pid, ago=5.0 if pid == NOBODY else 500.0, images=64)
    assert (stage1(run)["state"], stage1(run)["outcomes"]) == ("lost", ["lost"])
    assert told(run, "stage1").startswith("stage1: its attempt left no word about the end")
    assert run_status(run, NOW)["next"] == [f"pixart-ds train {run.root} stage1 --device cpu --processes 2"]


def test_a_job_that_slurm_does_not_run_any_more_is_lost_soon(run: RunLayout, tmp_path: Path) -> None:
    attempt(run, "stage1", job="71", ago=30.0)
    queue(tmp_path, run)
    assert stage1(run)["state"] == "lost"
    queue(tmp_path, run, "71 stage1 RUNNING None")
    assert stage1(run)["state"] == "running"
    slurm(tmp_path, "exit 1")
    assert stage1(run)["state"] == "running", "nobody says that it does not"


def test_a_stage_that_was_stopped(run: RunLayout) -> None:
    attempt(run, "stage1", outcome="stopped", cause="the file stop", exit_code=75, images=64)
    files.write_text(run.stage("stage1").stop_request, "")
    assert (stage1(run)["state"], stage1(run)["cause"]) == ("stopped", "the file stop")
    assert told(run, "a stop file lies there").endswith(str(run.stage("stage1").stop_request))
    assert run_status(run, NOW)["next"] == [
        f"rm {run.stage('stage1').stop_request}",
        f"pixart-ds train {run.root} stage1 --device cpu --processes 2",
    ]


def test_a_stop_file_of_cancel_goes_away_by_itself(run: RunLayout) -> None:
    attempt(run, "stage1", outcome="stopped", exit_code=75, job="71")
    run.stage("stage1").submissions.mkdir()
    files.write_text(run.stage("stage1").stop_request, f"{CANCELLED}; …\n")
    found = run_status(run, NOW)
    assert found["next"] == [f"pixart-ds chain {run.root} --profile PROFILE"]
    assert found["warnings"] == []


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (2, "mend the recipe or the option that it names"),
        (3, "mend what the machine lacks"),
        (4, "mend the data that it names"),
        (5, "put the checkpoint right"),
        (70, "find out why it failed"),
    ],
)
def test_a_stage_that_failed(run: RunLayout, code: int, says: str) -> None:
    made = attempt(run, "stage1", outcome="failed", cause="no shard 7:\n  to do: put it back\nmore", exit_code=code)
    found = run_status(run, NOW)
    assert (found["stages"][0]["state"], found["stages"][0]["exit_code"]) == ("failed", code)
    *before, mend, again = found["next"]
    assert mend == f"{says} ({made.log}), then:"
    assert again == f"pixart-ds train {run.root} stage1 --device cpu --processes 2"
    assert before == ([f"pixart-ds checkpoint verify {run.root} --stage stage1"] if code == 5 else [])
    text = page(found)
    assert f"failed (exit code {code}): no shard 7\n" in text
    assert "to do: put it back\n" in text
    run.stage("stage1").submissions.mkdir()
    assert run_status(run, NOW)["next"][-1] == f"pixart-ds chain {run.root} --profile PROFILE --retry"


def test_a_failure_that_another_start_heals_needs_no_retry(run: RunLayout) -> None:
    attempt(run, "stage1", outcome="failed", cause="sent back: …; start it again", exit_code=75, job="71")
    run.stage("stage1").submissions.mkdir()
    assert run_status(run, NOW)["next"] == [f"pixart-ds chain {run.root} --profile PROFILE"]


def test_a_job_of_plain_sbatch_goes_on_so(run: RunLayout) -> None:
    attempt(run, "stage1", outcome="stopped", exit_code=75, job="71")
    assert run_status(run, NOW)["next"] == ["sbatch slurm/stage1.sbatch"]


def test_a_job_that_ended_before_an_attempt(run: RunLayout, tmp_path: Path) -> None:
    queue(tmp_path, run)
    run.stage("stage1").submissions.mkdir()
    (run.stage("stage1").submissions / "71.out").write_text("pixart-ds train: there is no torch\n")
    row = stage1(run)
    assert row["state"] == "failed"
    assert "job 71 ended before an attempt began: pixart-ds train: there is no torch" in row["cause"]
    attempt(run, "stage1", job="71", outcome="stopped", exit_code=75)
    assert stage1(run)["state"] == "stopped", "it had one"


# ---- the queue ---------------------------------------------------------------------------------------------------------


def test_a_queue_in_words(run: RunLayout, tmp_path: Path) -> None:
    attempt(run, "stage1", job="71", images=64)
    queue(
        tmp_path,
        run,
        f"71 stage1 RUNNING None {NOW - 3600:.0f}",
        f"72 stage2 PENDING Resources {NOW + 600:.0f}",
        "73 stage3_256 PENDING Dependency N/A afterok:72(unfulfilled)",
        "74 stage3_512 PENDING JobHeldUser N/A (null) pixart-ds waits for stage3_256",
        "75 stage3_1024 PENDING Priority",
    )
    found = run_status(run, NOW)
    assert [row["state"] for row in found["stages"]] == ["running"] + ["waiting"] * 4
    assert [(job["job"], job["stage"]) for job in found["jobs"]] == list(
        zip(map(str, range(71, 76)), STAGES, strict=True)
    )
    assert found["warnings"] == []
    text = page(found)
    assert "job 71, 8 nodes, RUNNING for 1 h 00 min\n" in text
    waits = "job 72, 8 nodes, PENDING (Resources): is next, as soon as nodes are free; expected to start in 10 min 00 s"
    assert waits in " ".join(text.split())
    assert "job 73, 8 nodes, PENDING (Dependency): waits for job 72 (stage2)\n" in text
    assert "job 74, 8 nodes, PENDING (JobHeldUser): is released when stage3_256 is done\n" in text
    assert "job 75, 8 nodes, PENDING (Priority): waits behind other jobs\n" in text
    assert found["next"] == ["nothing to do: stage1 runs"]


def test_a_requeued_job_waits_and_its_last_attempt_is_told(run: RunLayout, tmp_path: Path) -> None:
    attempt(run, "stage1", job="71", images=64, outcome="stopped", cause="preempted", exit_code=75)
    queue(tmp_path, run, "71 stage1 PENDING BeginTime")
    found = run_status(run, NOW)
    assert (found["stages"][0]["state"], found["stages"][0]["cause"]) == ("waiting", "preempted")
    assert found["next"] == [
        "nothing to do: job 71 of stage1 is in the queue",
        f"pixart-ds chain {run.root} --profile PROFILE    (puts stage2, stage3_256, stage3_512, stage3_1024 behind it)",
    ]


def test_jobs_that_will_never_start(run: RunLayout, tmp_path: Path) -> None:
    done(run, "stage1")
    queue(tmp_path, run, "72 stage2 PENDING DependencyNeverSatisfied N/A afterok:71(failed)")
    assert told(run, "never") == ("stage2: job 72 will never start: the job that it waits for did not end well: job 71")
    assert run_status(run, NOW)["next"][0].startswith(f"pixart-ds chain {run.root} --profile PROFILE    (gives job 72")
    queue(tmp_path, run, "72 stage2 PENDING BadConstraints")
    assert told(run, "never") == "stage2: job 72 will never start: no node has what its constraint asks for"
    assert run_status(run, NOW)["next"][0].startswith("scancel 72, correct the profile")
    queue(tmp_path, run, "72 stage2 PENDING JobHeldUser")
    assert "scontrol release 72" in told(run, "held")
    assert run_status(run, NOW)["next"][0] == "scontrol release 72"


def test_two_jobs_of_one_stage_are_one_too_many_unless_one_waits_behind(run: RunLayout, tmp_path: Path) -> None:
    attempt(run, "stage1", job="71")
    queue(tmp_path, run, "71 stage1 RUNNING None", "72 stage1 PENDING Dependency N/A singleton(unfulfilled)")
    found = run_status(run, NOW)
    assert found["warnings"] == []
    assert found["jobs"][1]["words"] == "waits for the job of its own name that runs"
    queue(tmp_path, run, "71 stage1 RUNNING None", "72 stage1 PENDING Priority")
    assert told(run, "2 jobs").startswith("stage1: it has 2 jobs, 71, 72;")


def test_a_slurm_that_is_away_costs_a_warning(run: RunLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(run, "stage1", job="71")
    slurm(tmp_path, "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert told(run, "Slurm does not answer") == (
        "Slurm does not answer (squeue: Unable to contact slurm controller): what waits in its queue is not known"
    )
    monkeypatch.setattr(status_queue, "_PATIENCE_S", 0.1)
    slurm(tmp_path, "exec /bin/sleep 60")
    assert "gave no answer within" in told(run, "Slurm does not answer")
    assert stage1(run)["state"] == "running"


def test_unknown_words_of_slurm_are_shown_as_they_are() -> None:
    rows = (
        "71|a|PENDING|QOSMaxCpuPerUserLimit|N/A|8|(null)|(null)\n72|a|PENDING|SomethingNew|N/A|8|(null)|a|b\nnonsense\n"
    )
    limit, new = parse(rows, {"a": "stage1"}, {})
    assert limit.words == "a limit of the account or the QOS is reached"
    assert (new.words, new.reason) == ("waits", "SomethingNew")


# ---- warnings ----------------------------------------------------------------------------------------------------------


def test_each_warning(run: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(run, "stage1", 1, ago=9000.0)
    made = attempt(run, "stage1", 2, images=32)
    files.append_json_line(made.refused, {"images_seen": 32})
    files.append_json_line(made.refused, {"images_seen": 64})
    files.write_json(made.hang(1), {"what": "rank 3 on n1 has not moved for 900 s", "seen": []})
    window = {"after": 32, "upto": 96, "reason": "the loss was above 3", "attempt": 1, "launch": 1}
    files.write_json(run.stage("stage1").skips, {"format": 1, "windows": [window]})
    files.write_text(run.stage("stage1").stop_request, "")
    record(run, {"n7": "its ranks failed before the first step"}, "stage1", 1, now=NOW - 60)
    record(run, {"n8": "long ago"}, "stage1", 1, now=NOW - 90_000)
    made.pulses.mkdir()
    for rank, own in enumerate((1.0, 1.0, 2.5)):
        made.pulse(rank).write_text(json.dumps({"rank": rank, "launch": 1, "host": f"n{rank}", "own_s": own}))
    made.ledger.write_text('{"torn')
    disk = SimpleNamespace(f_blocks=1000, f_bavail=40, f_frsize=1_000_000)
    monkeypatch.setattr(status_advice.os, "statvfs", lambda path: disk)
    assert run_status(run, NOW)["warnings"] == [
        "stage1, attempt 2: the last line of its ledger is cut off",
        "stage1: a stop file asks it to stop; it saves at the end of its step and ends",
        "stage1: 1 of its 2 attempts left no word about the end: killed, or on a lost node",
        "stage1: rank 2 on n2 takes 2.50 s for its part of a step, the median rank 1.00 s: the others wait for it",
        "stage1: the guard has sent it back once, and 64 images are left out; at last: the loss was above 3",
        f"stage1: attempt 2 has refused 2 steps for losses or gradients that are no numbers: {made.refused}",
        "stage1: attempt 2 hung: rank 3 on n1 has not moved for 900 s",
        "node n7 is left out of the run's jobs: its ranks failed before the first step",
        "the disk of the run is nearly full: 40 MB are free, 4.0%",
    ]
    done(run, "stage1")
    assert not any("stage1:" in each for each in run_status(run, NOW)["warnings"]), "what is done is past"


def test_a_checkpoint_that_is_late(run: RunLayout) -> None:
    made = attempt(run, "stage1", images=384)  # every 6 steps of 32 images
    assert told(run, "no checkpoint yet") if stage1(run)["checkpoint_is_late"] else stage1(run)["images_seen"] == 384
    files.append_json_line(made.metrics, {"images_seen": 416, "loss": 0.1, "seconds": 4.0, "images_per_second": 8.0})
    assert told(run, "two intervals have passed").startswith("stage1: there is no checkpoint yet")
    name = checkpoint(run, "stage1", 192, ago=720.0)
    row = stage1(run)
    assert (row["checkpoint"], row["checkpoint_age_s"], row["checkpoint_is_late"]) == (name, 720.0, False)
    assert row["checkpoint_interval_s"] == 24.0
    assert f"checkpoint {name}, 12 min 00 s ago\n" in page(run_status(run, NOW))


def test_checkpoints_in_a_store_are_known_by_the_attempts_notes(run: RunLayout) -> None:
    made = attempt(run, "stage1", images=64)
    files.write_json(run.stage("stage1").checkpoints_elsewhere, {"path": "s3://nowhere/run"})
    for images in (32, 64):
        name = str(CheckpointName(images, 1, 1))
        files.append_json_line(made.saves, {"checkpoint": name, "time": NOW - 100 + images})
    assert (stage1(run)["checkpoint"], stage1(run)["checkpoint_age_s"]) == (name, 36.0)


def test_checkpoints_that_are_gone_are_told(run: RunLayout) -> None:
    made = attempt(run, "stage1", images=64, outcome="failed", exit_code=5, cause="…")
    files.append_json_line(made.saves, {"checkpoint": str(CheckpointName(64, 1, 1)), "time": NOW})
    assert "no committed checkpoint of its line is left" in told(run, "its checkpoints cannot be read")


def test_a_supervisor_that_is_silent_in_a_running_job(run: RunLayout, tmp_path: Path) -> None:
    attempt(run, "stage1", job="71", ago=300.0)
    queue(tmp_path, run, "71 stage1 RUNNING None")
    assert stage1(run)["state"] == "running"
    assert told(run, "no sign of life").startswith(
        "stage1: its job runs, but attempt 1 has given no sign of life for 5 min 00 s"
    )


# ---- what it costs -----------------------------------------------------------------------------------------------------


def test_cost_forecast_and_budget(run: RunLayout) -> None:
    entry(attempt(run, "stage1", images=192))
    change_budget(run, ["gpu_days=0.1"])
    found = run_status(run, NOW)
    assert found["account"]["device_hours"] == 2.0
    assert found["account"]["goodput"] == 0.75
    assert found["seconds_left"] == pytest.approx((24 + 600) * 3600 / 3000), "with what is no training on top"
    assert told(run, "the budget is nearly used up") == "the budget is nearly used up: 0.08333 of 0.1 gpu_days"
    change_budget(run, ["gpu_days=0.05"])
    files.write_json(
        run.stage("stage1").attempt(1).outcome, {"outcome": "stopped", "cause": "the budget", "exit_code": 75}
    )
    assert "used up; no attempt begins" in told(run, "the budget is")
    assert run_status(run, NOW)["next"][0].startswith(f"raise it: pixart-ds budget {run.root} --set gpu_days=MORE")


def test_a_device_that_nobody_knows_has_no_price(run: RunLayout) -> None:
    entry(attempt(run, "stage1", images=192), device="cuda", device_kind=None, device_model="Tesla Z9")
    change_budget(run, ["gpu_days=0.1"])
    found = run_status(run, NOW)
    assert (found["account"]["device_hours"], found["account"]["kwh"], found["account"]["usd"]) == (2.0, None, None)
    assert found["account"]["goodput"] == 0.75
    assert [row["part"] for row in found["budget"]] == [pytest.approx(0.8333, abs=1e-4)]
    assert "'Tesla Z9', which the table does not have" in told(run, "energy, CO2e and money are not known")
    assert "2.00 device-hours, - kWh, -, - kg CO2e; goodput 75.0%" in page(found)


# ---- damage ------------------------------------------------------------------------------------------------------------

TORN = {
    "an empty heartbeat": lambda made: made.heartbeat.write_text(""),
    "half a heartbeat": lambda made: made.heartbeat.write_text('{"host": "n1", "pi'),
    "a heartbeat of another kind": lambda made: made.heartbeat.write_text("[]"),
    "no heartbeat": lambda made: made.heartbeat.unlink(),
    "no env": lambda made: made.env.unlink(),
    "half an env": lambda made: made.env.write_text('{"slurm": {"SLURM_JO'),
    "an env of another kind": lambda made: made.env.write_text('{"slurm": 7}'),
    "half an outcome": lambda made: made.outcome.write_text('{"outcome": "fai'),
    "an empty outcome": lambda made: made.outcome.write_text(""),
    "a torn row": lambda made: made.metrics.write_text('{"images_seen": 32}\n{"images_se'),
    "rows of another kind": lambda made: made.metrics.write_text('7\n{"images_seen": "many"}\n\x00\x00\n[]\n'),
    "metrics that are a folder": lambda made: (made.metrics.unlink(), made.metrics.mkdir()),
    "a torn ledger": lambda made: made.ledger.write_text('{"format": 2, "stage'),
    "an empty ledger": lambda made: made.ledger.write_text(""),
    "a ledger of zeros": lambda made: made.ledger.write_bytes(bytes(100) + b"\n"),
    "torn saves": lambda made: made.saves.write_text('{"checkpoint": "img-0'),
    "saves of another kind": lambda made: made.saves.write_text('{"checkpoint": 7}\n7\n'),
    "torn refusals": lambda made: made.refused.write_text('{"images'),
    "half a hang": lambda made: made.hang(1).write_text('{"what'),
    "a torn start": lambda made: made.start(1).write_text('{"from'),
    "a start of another kind": lambda made: made.start(1).write_text("{}"),
    "torn signs of life": lambda made: (made.pulses.mkdir(), made.pulse(0).write_text('{"rank": 0, "lau')),
    "signs of life without a launch": lambda made: (made.pulses.mkdir(), made.pulse(0).write_text("{}")),
    "torn skips": lambda made: (made.root.parents[1] / "skips.json").write_text('{"windows": ['),
    "skips of another kind": lambda made: (made.root.parents[1] / "skips.json").write_text("[]"),
    "no recipe": lambda made: (made.root.parents[1] / "stage.yaml").unlink(),
    "half a recipe": lambda made: (made.root.parents[1] / "stage.yaml").write_text("name: [sta"),
    "torn bad nodes": lambda made: (made.root.parents[2] / "bad-nodes.jsonl").write_text("{\n{}\n"),
    "half a budget": lambda made: (made.root.parents[2] / "budget.json").write_text('{"lim'),
    "a damaged address": lambda made: (made.root.parents[1] / "checkpoints.json").write_text("{"),
    "attempts that are a file": lambda made: (made.root.rename(made.root.parents[2] / "x"), made.root.parent.rmdir()),
}


@pytest.mark.parametrize("damage", TORN.values(), ids=TORN)
def test_damage_ends_no_status(run: RunLayout, damage: Callable[[AttemptLayout], object], tmp_path: Path) -> None:
    made = attempt(run, "stage1", images=64, job="71")
    entry(made)
    queue(tmp_path, run, "71 stage1 RUNNING None")
    damage(made)
    found = run_status(run, NOW)
    assert [row["stage"] for row in found["stages"]] == list(STAGES)
    assert found["stages"][0]["state"] == "running"
    for width in (80, 100):
        assert "stage1        running" in page(found, width)
    json.dumps(found, allow_nan=False)


def test_a_folder_without_a_run_is_an_error(run: RunLayout, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "there is no run in this folder" in capsys.readouterr().err
    run.manifest.write_text("[]")
    with pytest.raises(DataError, match="its manifest lists no stages"):
        run_status(run)
    assert main(["status", str(run.root)]) == 4


# ---- for people --------------------------------------------------------------------------------------------------------

GOLDEN = """\
Run {run}
of the chain smoke: 1 of 5 stages are done; 2026-11-18 11:06:40 UTC

stage         state                    images           loss  images/s
stage1        done                 384 of 384  100%   0.4616         -
stage2        running              192 of 384   50%   0.4808         8
              job 72, 8 nodes, RUNNING for 1 h 00 min
              attempt 2: running (before: 1 failed)
              checkpoint img-000000000192-a0002-l01, 1 min 30 s ago
              24 s left of the stage
stage3_256    waiting             0 of 3.84 k    0%        -         -
              job 73, 8 nodes, PENDING (Dependency): waits for job 72 (stage2)
stage3_512    not started            0 of 384
stage3_1024   not started            0 of 384

Time left   12 min 29 s to the chain's end, about 2026-11-18 11:19 UTC (at the pace of stage2's
            newest attempt and its 2 devices, with 20% on top for what is no training; later stages
            by their FLOPs; without waiting in the queue)
Cost so far 2.00 device-hours, 0.0240 kWh, $0.0800, 0.0114 kg CO2e; goodput 75.0%
Budget      0.08333 of 0.5 gpu_days, 16.7%; 0.1007 by the chain's end at this pace

Warnings
  - stage2: attempt 2 has refused one step for losses or gradients that are no numbers:
    {run}/stage2/attempts/0002/refused.jsonl

Next
  nothing to do: stage2 runs
  pixart-ds chain {run} --profile PROFILE    (puts stage3_512, stage3_1024 behind it)
"""


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = create_run(Path("r"), load_chain("smoke/chain"), "smoke/chain")
    attempt(run, "stage1", outcome="done", images=384)
    done(run, "stage1")
    attempt(run, "stage2", 1, outcome="failed", cause="a node was lost", exit_code=70)
    made = attempt(run, "stage2", 2, images=192, job="72")
    entry(made)
    checkpoint(run, "stage2", 192, 2, ago=90.0)
    files.append_json_line(made.refused, {"images_seen": 32})
    change_budget(run, ["gpu_days=0.5"])
    rows = f"72 stage2 RUNNING None {NOW - 3600:.0f}", "73 stage3_256 PENDING Dependency N/A afterok:72(unfulfilled)"
    queue(tmp_path, run, *rows)
    found = run_status(run, NOW)
    assert page(found, 100) + "\n" == GOLDEN.format(run=run.root)
    copied = ("pixart-ds", "refused.jsonl")  # commands and paths are not broken
    assert all(len(line) <= 80 for line in page(found, 80).split("\n") if not any(word in line for word in copied))


def test_watching_ends_when_the_run_is_done(run: RunLayout) -> None:
    stream, looks = io.StringIO(), []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        done(run, *STAGES[: 2 * len(looks) + 1])

    show(lambda: run_status(run, NOW), every_s=7, stream=stream, sleep=sleep)
    assert looks == [7, 7]
    assert [
        line.split(":")[1].split(";")[0] for line in stream.getvalue().split("\n") if line.startswith("of the chain")
    ] == [
        " 0 of 5 stages are done",
        " 3 of 5 stages are done",
        " 5 of 5 stages are done",
    ]
    assert "\x1b" not in stream.getvalue()
    one_line = io.StringIO()
    show(lambda: run_status(run, NOW), every_s=7, as_json=True, stream=one_line, sleep=sleep)
    assert json.loads(one_line.getvalue())["run"] == str(run.root)


def test_a_terminal_is_drawn_anew_and_left_with_ctrl_c(run: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status_text.shutil, "get_terminal_size", lambda fallback: os.terminal_size((80, 6)))
    stream = Terminal()
    show(lambda: run_status(run, NOW), every_s=1, stream=stream, sleep=interrupted)
    lines = stream.getvalue().split("\n")
    assert lines[0].startswith("\x1b[HRun ")
    assert lines[4:] == ["…\x1b[K", "\x1b[J", ""], "the rest would scroll"


def test_the_verb(run: RunLayout, capsys: pytest.CaptureFixture[str]) -> None:
    attempt(run, "stage1", outcome="failed", cause="a cause", exit_code=70)
    assert main(["status", str(run.root)]) == 0
    assert "failed (exit code 70): a cause" in capsys.readouterr().out
    assert main(["status", str(run.root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"run", "stages", "jobs", "warnings", "next", "account"} <= set(found)
    done(run, *STAGES)
    assert main(["status", str(run.root), "--watch"]) == 0
