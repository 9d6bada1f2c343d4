"""The record of an attempt, as the supervisor and a lone rank 0 keep it."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pixart_ds import files
from pixart_ds.engine.environment import PARENT_PID
from pixart_ds.errors import ConfigError, MachineError
from pixart_ds.layout import RunLayout, StageLayout
from pixart_ds.ledger.book import read_book
from pixart_ds.log import Log
from pixart_ds.train import attempt as module
from pixart_ds.train import rank
from pixart_ds.train.attempt import AttemptRecord, RankFailure


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
    one, two = read_book(stage.root.parent)["stage1"]
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


def test_it_is_kept_in_a_thread_and_a_full_disk_is_told(stage: StageLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.02)
    output = io.StringIO()
    record = begin(stage, output)
    with record.kept():
        trained(record, 32)
        _until(lambda: read_book(stage.root.parent)["stage1"][0].images_to == 32)
        ledger = record.attempt.ledger
        ledger.rename(ledger.with_name("elsewhere"))
        ledger.mkdir()  # a write fails, also for root
        _until(lambda: "heartbeat and ledger cannot be written" in output.getvalue())
        ledger.rmdir()
        ledger.with_name("elsewhere").rename(ledger)
        trained(record, 64)
        _until(lambda: read_book(stage.root.parent)["stage1"][0].images_to == 64)


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_keeper_leaves_an_entry_that_counts(stage: StageLayout) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom pixart_ds.layout import StageLayout\nfrom pixart_ds.log import Log\n"
        "from pixart_ds.train import attempt\nattempt._BEAT_SECONDS = 0.05\n"
        f"record = attempt.AttemptRecord.begin(StageLayout(Path({str(stage.root)!r})), 'cpu', Log('stage1'))\n"
        "record.ranks_started(3, 'srun')\nwith record.kept():\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    _until(lambda: stage.attempt(1).ledger.exists() and len(list(files.read_json_lines(stage.attempt(1).ledger))) > 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (entry,) = read_book(stage.root.parent)["stage1"]
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
