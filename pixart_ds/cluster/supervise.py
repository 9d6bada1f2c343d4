"""The supervisor: the one process of an allocation that starts the ranks, passes signals on, and writes how it ended."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from pixart_ds import __version__, files
from pixart_ds.cluster.launchers import Launcher, LaunchRequest, Ranks
from pixart_ds.errors import (
    EXIT_BUG,
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_DONE,
    EXIT_MACHINE,
    EXIT_STOPPED,
    ConfigError,
    MachineError,
)
from pixart_ds.layout import AttemptLayout, RunLayout, StageLayout
from pixart_ds.ledger.book import open_entry, update_entry
from pixart_ds.ledger.entries import Entry
from pixart_ds.log import Log

_TELLING = (EXIT_CONFIG, EXIT_MACHINE, EXIT_DATA, EXIT_CHECKPOINT)
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_POLL_SECONDS = 0.1
_BEAT_SECONDS = 5.0
_FRESH_SECONDS = 60.0
_PEERS_SECONDS = 20.0
"""How long ranks may take to leave after one of them failed, before they are killed."""


@dataclass
class Timing:
    """How long a stop may take.

    Attributes:
        hurry_grace_s: After a second request, seconds until the ranks are killed.
    """

    hurry_grace_s: float = 30.0


class _Requests:
    """Stop signals that reached the supervisor, in their order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._earlier = {number: signal.signal(number, self._on_signal) for number in _STOP_SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.names.append(signal.Signals(number).name)

    def restore(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)


def supervise(
    run: Path,
    stage: str,
    *,
    launcher: Launcher,
    device: str,
    output: TextIO = sys.stdout,
    timing: Timing | None = None,
) -> int:
    """Runs one attempt at a stage.

    Args:
        run: Folder of the run.
        stage: Name of the stage.
        launcher: Starts the ranks.
        device: cpu or cuda.
        output: Where rank 0's lines and the supervisor's own go.

    Returns:
        The exit code: 0 done, or requeued under Slurm; 75 stopped on request; 2 to 5 what a rank said of config, machine, data or
        checkpoint; 70 anything else.

    Raises:
        ConfigError: A stop file lies there.
        MachineError: Another supervisor runs this stage.
    """
    layout = RunLayout(run).stage(stage)
    log = Log(stage, output)
    if layout.done.exists():
        log.event("is done already; nothing to do")
        return EXIT_DONE
    _refuse_others(layout)
    if layout.stop_request.exists():
        raise ConfigError("a stop file asks this stage to stop", where=layout.stop_request, remedy="remove it to go on")
    images_before = _images_seen(layout)
    _, folder = files.make_numbered(layout.attempts)
    attempt = AttemptLayout(folder)
    requests = _Requests()
    began = time.time()
    try:
        _beat(attempt)
        ranks = launcher.start(LaunchRequest(run, stage, attempt, 1, device), output)
        files.write_json(attempt.env, environment(ranks.world_size, device))
        entry = open_entry(
            attempt, Entry.start(stage, attempt.number, 1, device, ranks.world_size, began, images_before)
        )
        watch = _Watch(ranks, attempt, requests, timing or Timing(), entry)
        watch.until_all_left()
    finally:
        requests.restore()
    outcome = _outcome(layout, attempt, ranks, requests.names)
    update_entry(attempt, watch.entry.ended_as(outcome["outcome"], time.time(), _last_metrics(attempt)))
    outcome |= {"started": _iso(began), "ended": _iso(time.time()), "world_size": ranks.world_size, "device": device}
    files.write_json(attempt.outcome, outcome)
    log.event(
        f"attempt {attempt.number}: {outcome['outcome']}" + (f" ({outcome['cause']})" if outcome["cause"] else "")
    )
    if outcome["outcome"] == "stopped" and (job := os.environ.get("SLURM_JOB_ID")):
        return _requeue(job, log)
    return int(outcome["exit_code"])


class _Watch:
    """Waits for the ranks, passing requests on and keeping the heartbeat and the ledger fresh."""

    def __init__(self, ranks: Ranks, attempt: AttemptLayout, requests: _Requests, timing: Timing, entry: Entry) -> None:
        self.ranks, self.attempt, self.requests, self.timing, self.entry = ranks, attempt, requests, timing, entry
        self._told = 0
        self._kill_at: float | None = None
        self._next_beat = 0.0

    def until_all_left(self) -> None:
        while self.ranks.alive():
            now = time.monotonic()
            self._pass_on(now)
            if self.ranks.failed() and self._kill_at is None:
                self.ranks.send(signal.SIGTERM)
                self._kill_at = now + _PEERS_SECONDS
            if self._kill_at is not None and now > self._kill_at:
                self.ranks.send(signal.SIGKILL)
            if now > self._next_beat:
                self._next_beat = now + _BEAT_SECONDS
                _beat(self.attempt)
                self.entry = self.entry.still_running(time.time(), _last_metrics(self.attempt))
                update_entry(self.attempt, self.entry)
            time.sleep(_POLL_SECONDS)

    def _pass_on(self, now: float) -> None:
        """Tells the ranks of new requests; the second one hurries them, and kills them after a grace."""
        asked = len(self.requests.names)
        if asked > self._told:
            self.ranks.send(signal.SIGTERM)
            if asked > 1 and self._kill_at is None:
                self._kill_at = now + self.timing.hurry_grace_s
            self._told = asked


def _outcome(layout: StageLayout, attempt: AttemptLayout, ranks: Ranks, requests: list[str]) -> dict[str, Any]:
    """Reads from the ranks' markers and exit codes how the attempt ended."""
    failure = ranks.failed()
    if layout.done.exists():  # written last of all: what a rank does afterwards takes nothing back
        return {"outcome": "done", "cause": None, "exit_code": EXIT_DONE}
    if attempt.stopped.exists():
        reason = requests[0] if requests else files.read_json(attempt.stopped)["reason"]
        return {"outcome": "stopped", "cause": reason, "exit_code": EXIT_STOPPED}
    if failure is None:
        cause = "the ranks left without a word: neither done nor stopped"
    else:
        rank, code = failure
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        cause = f"rank {rank} {how}:\n{ranks.last_words(rank)}"
    if requests:
        return {"outcome": "failed", "cause": f"asked to stop ({requests[0]}), but {cause}", "exit_code": EXIT_STOPPED}
    code = failure[1] if failure is not None and failure[1] in _TELLING else EXIT_BUG
    return {"outcome": "failed", "cause": cause, "exit_code": code}


def _requeue(job: str, log: Log) -> int:
    """Puts our own Slurm job back into the queue; Slurm then ends this process."""
    answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if answer.returncode:
        log.event(f"scontrol requeue {job} failed: {answer.stderr.strip()}")
        return EXIT_STOPPED
    log.event(f"job {job} is requeued")
    return EXIT_DONE


def _refuse_others(layout: StageLayout) -> None:
    """Refuses while a supervisor on this host that beat lately is alive; on another host a fresh heartbeat is enough."""
    for attempt in reversed(layout.all_attempts()[-1:]):
        if attempt.outcome.exists() or not attempt.heartbeat.exists():
            continue
        beat = json.loads(attempt.heartbeat.read_text(encoding="utf-8"))
        here = beat["host"] == socket.gethostname()
        alive = _alive(beat["pid"]) if here else time.time() - beat["time"] < _FRESH_SECONDS
        if alive:
            raise MachineError(
                f"another supervisor runs this stage: pid {beat['pid']} on {beat['host']}, attempt {attempt.number}",
                where=layout.root,
                remedy="wait for it, or stop it first",
            )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def _beat(attempt: AttemptLayout) -> None:
    beat = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    temporary = files.temporary_name(attempt.heartbeat)
    temporary.write_text(json.dumps(beat), encoding="utf-8")
    os.replace(temporary, attempt.heartbeat)


def _images_seen(layout: StageLayout) -> int:
    """Images that the stage's attempts had seen before this one."""
    rows = [_last_metrics(attempt) for attempt in layout.all_attempts()]
    return max((int(row["images_seen"]) for row in rows if row), default=0)


def _last_metrics(attempt: AttemptLayout) -> dict[str, Any]:
    return files.last_json_line(attempt.metrics) or {}


def environment(world_size: int, device: str) -> dict[str, Any]:
    """Where and with what an attempt runs; no environment variable that could hold a secret."""
    versions: dict[str, str | None] = {}
    for package in ("torch", "deepspeed", "mosaicml-streaming", "diffusers", "transformers", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "world_size": world_size,
        "device": device,
        "python": platform.python_version(),
        "package": __version__,
        "commit": _commit(),
        "versions": versions,
        "slurm": {name: value for name, value in os.environ.items() if name in _SLURM_NAMES},
    }


_SLURM_NAMES = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_PARTITION",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_NUM_NODES",
)


def _commit() -> str | None:
    """The checkout's commit, or None outside of one."""
    here = Path(__file__).parent
    answer = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
