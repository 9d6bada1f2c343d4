"""The record of an attempt, as the supervisor and a lone rank 0 keep it."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pixart_ds import files
from pixart_ds.cluster.status import run_status
from pixart_ds.config.freeze import create_run
from pixart_ds.config.load import load_chain
from pixart_ds.engine.environment import PARENT_PID
from pixart_ds.errors import ConfigError, MachineError
from pixart_ds.layout import AttemptLayout, CheckpointName, RunLayout, StageLayout
from pixart_ds.ledger.book import read_book
from pixart_ds.log import Log
from pixart_ds.train import attempt as module
from pixart_ds.train import rank
from pixart_ds.train.attempt import (
    AttemptRecord,
    RankFailure,
    attempts_without_progress,
    code_commit,
    images_committed,
    refuse_others,
)


@pytest.fixture
def stage(tmp_path: Path) -> StageLayout:
    run = RunLayout(tmp_path / "run")
    run.stage("stage1").root.mkdir(parents=True)
    run.manifest.write_text(json.dumps({"stages": ["stage1"]}))
    return run.stage("stage1")


def begin(stage: StageLayout, output: io.StringIO | None = None) -> AttemptRecord:
    record = AttemptRecord.begin(stage, "cpu", Log("stage1", output))
    assert record is not None
    record.ranks_started(2, "torchrun")
    return record


def trained(record: AttemptRecord, images: int) -> None:
    files.append_json_line(record.attempt.metrics, {"images_seen": images, "loss": 1.0})


def test_attempts_follow_each_other_and_the_ledger_counts_both(stage: StageLayout) -> None:
    output = io.StringIO()
    first = begin(stage, output)
    trained(first, 64)
    files.write_json(first.attempt.stopped, {"images_seen": 64, "reason": "SIGTERM"})
    assert first.end(None, None)["exit_code"] == 75
    assert "attempt 1: stopped (SIGTERM)" in output.getvalue()
    second = begin(stage)
    trained(second, 96)
    files.write_json(stage.done, {})
    assert second.end("SIGTERM", RankFailure("rank 0 raised at the very end", 70))["outcome"] == "done"
    one, two = read_book(stage.root.parent).stages["stage1"]
    assert [(e.attempt, e.outcome, e.device_count, e.images) for e in (one, two)] == [
        (1, "stopped", 2, 64),
        (2, "done", 2, 32),
    ]
    assert files.read_json(second.attempt.env)["launcher"] == "torchrun"
    outcome = files.read_json(second.attempt.outcome)
    assert outcome | {"world_size": 2, "device": "cpu", "cause": None} == outcome
    assert AttemptRecord.begin(stage, "cpu", Log("stage1", output)) is None
    assert "is done already; nothing to do" in output.getvalue()


@pytest.mark.parametrize(
    ("asked", "failure", "cause", "code"),
    [
        (None, RankFailure("rank 0 raised DataError: no shard", 4), "rank 0 raised DataError: no shard", 4),
        (None, RankFailure("rank 0 raised RuntimeError: x", 1), "rank 0 raised RuntimeError: x", 70),
        (None, None, "the ranks left without a word: neither done nor stopped", 70),
        ("SIGTERM", RankFailure("rank 0 raised", 70), "asked to stop (SIGTERM), but rank 0 raised", 75),
    ],
)
def test_failures(stage: StageLayout, asked: str | None, failure: RankFailure | None, cause: str, code: int) -> None:
    record = begin(stage)
    record.end(asked, failure)
    outcome = files.read_json(record.attempt.outcome)
    assert (outcome["outcome"], outcome["cause"], outcome["exit_code"]) == ("failed", cause, code)


def test_a_stop_file_or_a_living_one_is_respected(stage: StageLayout) -> None:
    stage.stop_request.touch()
    with pytest.raises(ConfigError, match="a stop file asks this stage to stop"):
        begin(stage)
    stage.stop_request.unlink()
    record = begin(stage)
    with pytest.raises(MachineError, match=f"this stage runs already: pid {os.getpid()} on .*, attempt 1"):
        begin(stage)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    beat = files.read_json(record.attempt.heartbeat) | {"pid": dead.pid}
    record.attempt.heartbeat.write_text(json.dumps(beat))
    assert begin(stage).attempt.number == 2


def heartbeat(stage: StageLayout, *, age_s: float = 0.0, **said: object) -> Path:
    """The newest attempt's heartbeat: of this process unless told otherwise."""
    path = (stage.all_attempts() or [stage.attempt(1)])[-1].heartbeat
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": 0.0, "job": None, **said}))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"host": 1, "pid": "x"}'])
def test_a_heartbeat_that_does_not_say_whose_it_is_is_judged_by_whether_it_changes(
    stage: StageLayout, text: str
) -> None:
    path = heartbeat(stage)
    path.write_text(text)
    refuse_others(stage, patience_s=0.3)
    os.utime(path, (1, 1))
    assert begin(stage).attempt.number == 2
    path = heartbeat(stage)
    path.write_text(text)
    over = threading.Event()

    def live() -> None:  # again and again: the first time may come before the first look
        while not over.wait(0.2):
            files.replace_text(path, path.read_text() + " ")

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(MachineError, match="runs already: a process whose heartbeat cannot be read, attempt 2"):
            refuse_others(stage, patience_s=30)
    finally:
        over.set()
        thread.join()


def test_a_number_that_a_process_of_this_host_has_got_since_is_not_it(stage: StageLayout) -> None:
    heartbeat(stage)
    with pytest.raises(MachineError, match="this stage runs already"):
        refuse_others(stage, patience_s=3600)  # fresh: nothing is waited for
    path = heartbeat(stage, age_s=1e6)
    refuse_others(stage, patience_s=0.3)
    timer = threading.Timer(0.3, lambda: files.replace_text(path, path.read_text() + " "))
    timer.start()
    with pytest.raises(MachineError, match="this stage runs already"):  # it was only suspended
        refuse_others(stage, patience_s=30)
    timer.join()


def test_of_one_slurm_job_only_an_earlier_start_is_over(stage: StageLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    record = begin(stage)
    said = files.read_json(record.attempt.heartbeat)
    assert (said["job"], said["restart"]) == ("4711", 2)
    with pytest.raises(MachineError, match="this stage runs already"):
        begin(stage)
    heartbeat(stage, job="4711", restart=1)
    refuse_others(stage, patience_s=3600)
    heartbeat(stage, job="4712", restart=1)
    with pytest.raises(MachineError, match="this stage runs already"):
        refuse_others(stage, patience_s=3600)


def saved(stage: StageLayout, attempt: AttemptLayout, launch: int, images: int, start: int | None = None) -> None:
    """A launch commits a checkpoint; it had started at a clock."""
    if start is not None:
        files.write_json(attempt.start(launch), {"from": None, "state": {"images_seen": start}})
    name = str(CheckpointName(images, attempt.number, launch))
    files.append_json_line(attempt.saves, {"checkpoint": name})


def test_progress_is_what_was_committed_beyond_where_a_launch_had_started(stage: StageLayout) -> None:
    one, two, three = (stage.attempt(number) for number in (1, 2, 3))
    for attempt in (one, two, three):
        attempt.root.mkdir(parents=True)
    saved(stage, one, 1, 64, start=0)
    saved(stage, one, 1, 128)
    assert (images_committed(stage), attempts_without_progress(stage)) == (128, 2)
    saved(stage, one, 2, 96, start=64)  # it was sent back
    assert images_committed(stage) == 160
    with open(one.saves, "a") as file:
        file.write('{"checkpoint": "img\n')  # torn, and ended by the next launch
    saved(stage, two, 1, 96, start=96)  # no step
    assert (images_committed(stage), attempts_without_progress(stage)) == (160, 2)
    saved(stage, three, 1, 112, start=96)
    assert (images_committed(stage), attempts_without_progress(stage)) == (176, 0)


def test_an_outcome_is_written_also_where_the_store_cannot_be_reached(
    stage: StageLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(layout: StageLayout) -> None:
        raise MachineError("the store does not answer")

    monkeypatch.setattr("pixart_ds.engine.line.storage_of", unreachable)
    record = begin(stage)
    saved(stage, record.attempt, 1, 64)
    record.end(None, RankFailure("rank 0 raised MachineError: the store does not answer", 3))
    outcome = files.read_json(record.attempt.outcome)
    assert (outcome["exit_code"], outcome["images_committed"]) == (3, 64)


def test_the_ledger_is_written_more_rarely_than_the_heartbeat(
    stage: StageLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BEAT_SECONDS", -1.0)
    record = begin(stage)
    for _ in range(5):
        beat = record.attempt.heartbeat.read_bytes()
        record.keep()
        assert record.attempt.heartbeat.read_bytes() != beat
    assert len(list(files.read_json_lines(record.attempt.ledger))) == 1
    record.ranks_left(1, "failed", None, stepped=False)
    assert [row["outcome"] for row in files.read_json_lines(record.attempt.ledger)] == ["running", "failed"]


def test_the_images_that_a_launch_trained_again_count(stage: StageLayout) -> None:
    record = begin(stage)
    trained(record, 128)
    record.ranks_left(1, "rolled back", None, stepped=True)
    record.ranks_started(2, "torchrun", 2)
    files.write_json(record.attempt.start(2), {"from": None, "state": {"images_seen": 64}})
    record.ranks_left(2, "failed", None, stepped=False)
    record.ranks_started(2, "torchrun", 3)
    files.write_json(record.attempt.start(3), {"from": None, "state": {"images_seen": 64}})
    trained(record, 160)
    files.write_json(stage.done, {})
    record.end(None, None)
    entries = read_book(stage.root.parent).stages["stage1"]
    assert [(e.images_from, e.images_to, e.images) for e in entries] == [(0, 128, 128), (64, 64, 0), (64, 160, 96)]


def test_the_time_that_is_waited_for_another_launch_counts(stage: StageLayout) -> None:
    record = begin(stage)
    record.ranks_left(1, "failed", None, stepped=False)
    (left,) = read_book(stage.root.parent).stages["stage1"]
    record.end("SIGTERM", RankFailure("rank 0 was killed", 70))
    (entry,) = read_book(stage.root.parent).stages["stage1"]
    assert entry.outcome == "failed"
    assert entry.until > left.until


def test_a_full_disk_gets_no_temporary_files(stage: StageLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    record = begin(stage)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = set(record.attempt.root.iterdir())
    monkeypatch.setattr(os, "replace", full)
    record.keep()
    assert set(record.attempt.root.iterdir()) == before


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        answer = subprocess.run(["git", *who, "-C", str(tmp_path), *words], capture_output=True, text=True, check=True)
        return answer.stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "pixart_ds" / "train" / "attempt.py"))
    assert code_commit() == git("rev-parse", "HEAD")
    installed = tmp_path / ".venv" / "lib" / "pixart_ds" / "train"
    installed.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(installed / "attempt.py"))
    assert code_commit() is None, "that commit is somebody else's"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_commit() is None, "there is no git"


def test_a_torn_line_of_the_metrics_ends_no_status(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", load_chain("smoke/chain"), "smoke/chain")
    attempt = run.stage("stage2").attempt(1)
    attempt.root.mkdir(parents=True)
    attempt.metrics.write_text('{"images_seen": 32, "loss"\n')
    row = next(row for row in run_status(run)["stages"] if row["stage"] == "stage2")
    assert (row["state"], row["images_seen"]) == ("running", 0)


def test_it_is_kept_in_a_thread_and_a_full_disk_is_told(stage: StageLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "_LEDGER_SECONDS", 0.02)
    output = io.StringIO()
    record = begin(stage, output)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with record.kept():
        trained(record, 32)
        _until(lambda: read_book(stage.root.parent).stages["stage1"][0].images_to == 32)
        with monkeypatch.context() as broken:
            broken.setattr(module, "write_entry", full)
            _until(lambda: "the ledger cannot be written: No space left on device" in output.getvalue())
        trained(record, 64)
        _until(lambda: read_book(stage.root.parent).stages["stage1"][0].images_to == 64)


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_keeper_leaves_an_entry_that_counts(stage: StageLayout) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom pixart_ds.layout import StageLayout\nfrom pixart_ds.log import Log\n"
        "from pixart_ds.train import attempt\nattempt._BEAT_SECONDS = attempt._LEDGER_SECONDS = 0.05\n"
        f"record = attempt.AttemptRecord.begin(StageLayout(Path({str(stage.root)!r})), 'cpu', Log('stage1'))\n"
        "record.ranks_started(3, 'srun')\nwith record.kept():\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    _until(lambda: stage.attempt(1).ledger.exists() and len(list(files.read_json_lines(stage.attempt(1).ledger))) > 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (entry,) = read_book(stage.root.parent).stages["stage1"]
    assert (entry.outcome, entry.device_count) == ("running", 3)
    assert entry.until > entry.started
    assert begin(stage).attempt.number == 2


def test_a_full_disk_under_a_rank_is_told_with_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/run/metrics.jsonl")
    assert rank._tell(error) == 3
    assert "a file of the run cannot be written: No space left on device" in capsys.readouterr().err
    assert rank._tell(OSError(errno.ENOENT, "No such file", "/run/x")) == 70


def test_a_rank_whose_launcher_is_gone_leaves_before_it_trains(tmp_path: Path) -> None:
    """The kernel tells a rank of its parent's end only once it was asked to."""
    words = [sys.executable, "-m", "pixart_ds.train.rank", "--run", str(tmp_path), "--stage", "s", "--device", "cpu"]
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", PARENT_PID: "1"}
    answer = subprocess.run([*words, "--attempt", "1"], env={**os.environ, **place}, capture_output=True, check=False)
    assert answer.returncode == 75, answer.stderr
