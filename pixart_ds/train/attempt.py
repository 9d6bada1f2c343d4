"""One attempt at a stage: who may begin it, and what it leaves on disk beside the ranks' own files.

The supervisor keeps this record; where there is none, rank 0 does (`train/rank.py`). So `status`, `audit` and the cost report
need not know how a run was started.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart_ds import __version__, files
from pixart_ds.engine import line
from pixart_ds.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_STOPPED,
    EXITS_THAT_TELL,
    ConfigError,
    DataError,
    MachineError,
)
from pixart_ds.layout import FROZEN_NAME, AttemptLayout, CheckpointName, StageLayout
from pixart_ds.ledger.book import open_entry, update_entry
from pixart_ds.ledger.entries import Entry
from pixart_ds.log import Log

_BEAT_SECONDS = 5.0
_FRESH_SECONDS = 60.0


@dataclass(frozen=True)
class RankFailure:
    """What ended a launch.

    Attributes:
        what: For people; the first line says it, the others are the rank's last words.
        code: An exit code that says of which kind it is.
        node: Where it happened, if that is known.
    """

    what: str
    code: int
    node: str | None = None


class AttemptRecord:
    """The record of an attempt that this process began: `env.json`, `heartbeat`, the ledger's entry and `outcome.json`."""

    def __init__(self, layout: StageLayout, attempt: AttemptLayout, device: str, images_before: int, log: Log) -> None:
        self.attempt = attempt
        self._layout, self._device, self._images_before, self._log = layout, device, images_before, log
        self._began, self._began_here = time.time(), time.monotonic()
        self._next_beat = 0.0
        self._entry: Entry | None = None
        self._world_size = 0
        self.launches: list[dict[str, Any]] = []

    def _now(self) -> float:
        """Unix seconds that never run back, whatever happens to the clock on the wall."""
        return self._began + time.monotonic() - self._began_here

    @classmethod
    def begin(cls, layout: StageLayout, device: str, log: Log) -> AttemptRecord | None:
        """Takes the stage's next attempt number; None, and a word, if the stage is done.

        Raises:
            ConfigError: A stop file lies there.
            MachineError: The stage runs already.
        """
        if layout.done.exists():
            log.event("is done already; nothing to do")
            return None
        if os.path.lexists(layout.stop_request):
            raise ConfigError(
                "a stop file asks this stage to stop", where=layout.stop_request, remedy="remove it to go on"
            )
        images_before = _images_seen(layout)
        try:
            refuse_others(layout, log)
            _, folder = files.make_numbered(layout.attempts)
            record = cls(layout, AttemptLayout(folder), device, images_before, log)
            _beat(record.attempt)
        except OSError as cause:
            raise MachineError(
                f"the run's folder cannot be written: {cause.strerror}",
                where=layout.root,
                remedy="make it writable for this user, or free disk space and quota",
            ) from cause
        return record

    def ranks_started(
        self, world_size: int, launcher: str, launch: int = 1, where: Mapping[str, object] | None = None
    ) -> None:
        """Writes where and with what the attempt runs, and opens the launch's entry in the ledger.

        Devices count from `begin` on, or from the end of the launch before. `where` is what the scheduler says of nodes and GPUs.
        """
        if launch == 1:
            files.write_json(self.attempt.env, {**environment(world_size, self._device, launcher), **(where or {})})
        self._world_size = world_size
        started = self._began if self._entry is None else self._entry.until
        before = self._images_before if self._entry is None else self._entry.images_to
        entry = Entry.start(
            *(self._layout.root.name, self.attempt.number, launch, self._device), *(world_size, started, before)
        )
        self._entry = open_entry(self.attempt, entry)

    def ranks_left(self, launch: int, ending: str, failure: RankFailure | None, stepped: bool) -> None:
        """Closes a launch's entry, and remembers for `outcome.json` how it ended, and whether a step had been made."""
        assert self._entry is not None
        self._entry = self._entry.ended_as(ending, self._now(), _last_metrics(self.attempt))
        with self._disk("the ledger"):
            update_entry(self.attempt, self._entry)
        told: dict[str, Any] = {"launch": launch, "world_size": self._world_size, "ending": ending, "cause": None}
        if failure is not None:
            told |= {"cause": failure.what, "code": failure.code, "node": failure.node}
        told |= {"stepped": stepped}
        self.launches.append({**told, "started": _iso(self._entry.started), "ended": _iso(self._entry.until)})

    @contextmanager
    def _disk(self, what: str) -> Iterator[None]:
        """A disk that refuses is told of, and ends no training: that is for those who lose something by it."""
        try:
            yield
        except OSError as error:
            self._log.event(f"{what} cannot be written: {error.strerror or error} ({self.attempt.root})")

    def keep(self) -> None:
        """Keeps heartbeat and ledger fresh; call it as often as you like."""
        assert self._entry is not None
        now = time.monotonic()
        if now > self._next_beat:
            self._next_beat = now + _BEAT_SECONDS
            with self._disk("heartbeat and ledger"):
                _beat(self.attempt)
                self._entry = self._entry.still_running(self._now(), _last_metrics(self.attempt))
                update_entry(self.attempt, self._entry)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps it in a thread, also while the ranks wait in a collective; a disk that is full is told, and ends no training."""
        over = threading.Event()

        def keep_on() -> None:
            while True:
                self.keep()
                if over.wait(_BEAT_SECONDS):
                    return

        thread = threading.Thread(target=keep_on, name="attempt-record", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def end(self, asked: str | None, failure: RankFailure | None) -> dict[str, Any]:
        """Judges from the ranks' markers how the attempt ended, and writes it into ledger and `outcome.json`.

        Args:
            asked: Who asked for a stop first, if anyone.
            failure: What went wrong, if anything did.
        """
        outcome = self._judge(asked, failure)
        now = self._now()
        if self._entry is not None and self._entry.outcome == "running":
            with self._disk("the ledger"):
                update_entry(self.attempt, self._entry.ended_as(outcome["outcome"], now, _last_metrics(self.attempt)))
        outcome |= {"started": _iso(self._began), "ended": _iso(now)}
        outcome |= {"world_size": self._world_size, "device": self._device, "launches": self.launches}
        outcome |= {"images_committed": images_committed(self._layout)}
        with self._disk("outcome.json"):
            files.write_json(self.attempt.outcome, outcome)
        because = f" ({outcome['cause']})" if outcome["cause"] else ""
        self._log.event(f"attempt {self.attempt.number}: {outcome['outcome']}{because}")
        return outcome

    def _judge(self, asked: str | None, failure: RankFailure | None) -> dict[str, Any]:
        if self._entry is None:
            return {
                "outcome": "stopped",
                "cause": f"{asked}, before the ranks were started",
                "exit_code": EXIT_STOPPED,
            }
        if self._layout.done.exists():  # written last of all: what a rank does afterwards takes nothing back
            return {"outcome": "done", "cause": None, "exit_code": EXIT_DONE}
        if self.attempt.stopped.exists():
            reason = asked or files.read_json(self.attempt.stopped)["reason"]
            return {"outcome": "stopped", "cause": reason, "exit_code": EXIT_STOPPED}
        if (back := self._rolled_back()) is not None and failure is None:
            return {"outcome": "failed", "cause": f"sent back: {back}; start it again", "exit_code": EXIT_STOPPED}
        failure = failure or RankFailure("the ranks left without a word: neither done nor stopped", EXIT_BUG)
        if asked:
            cause = f"asked to stop ({asked}), but {failure.what}"
            return {"outcome": "failed", "cause": cause, "exit_code": EXIT_STOPPED}
        code = failure.code if failure.code in EXITS_THAT_TELL else EXIT_BUG
        return {"outcome": "failed", "cause": failure.what, "exit_code": code}

    def _rolled_back(self) -> str | None:
        """Why the guard sent the last launch back, if it did."""
        launch = 1 if self._entry is None else self._entry.launch
        path = self.attempt.rolled_back(launch)
        return str(files.read_json(path)["reason"]) if path.exists() else None

    def ending(self, launch: int, failure: RankFailure | None) -> str:
        """How a launch ended, from the ranks' markers."""
        if self._layout.done.exists():
            return "done"
        if self.attempt.stopped.exists():
            return "stopped"
        return "rolled back" if failure is None and self.attempt.rolled_back(launch).exists() else "failed"


def refuse_others(layout: StageLayout, log: Log | None = None, patience_s: float = _FRESH_SECONDS) -> None:
    """Refuses while the process that keeps the newest record is alive.

    On this host its process is looked for. On another one its heartbeat must be seen to change: clocks may differ, so they are not
    compared. An earlier start of the same Slurm job is over, whatever it has left.

    Raises:
        MachineError: It is, with host and process.
    """
    for attempt in layout.all_attempts()[-1:]:
        if attempt.outcome.exists() or not attempt.heartbeat.exists():
            continue
        beat = _read_beat(attempt)
        job = os.environ.get("SLURM_JOB_ID")
        if job and beat.get("job") == job:
            continue
        here = beat["host"] == socket.gethostname()
        if _alive(beat["pid"]) if here else _beats(attempt, beat, log, patience_s):
            raise MachineError(
                f"this stage runs already: pid {beat['pid']} on {beat['host']}, attempt {attempt.number}",
                where=layout.root,
                remedy="wait for it, or stop it first",
            )


def _beats(attempt: AttemptLayout, beat: dict[str, Any], log: Log | None, patience_s: float) -> bool:
    """Whether a heartbeat changes; it is not waited for where the file system itself says that it is old."""
    probe = files.temporary_name(attempt.heartbeat)
    probe.touch()
    age_s = probe.stat().st_mtime - attempt.heartbeat.stat().st_mtime  # both times are the file system's
    probe.unlink()
    until = time.monotonic() + patience_s - max(0.0, age_s)
    if log is not None and time.monotonic() < until:
        log.event(f"looks for up to {patience_s:.0f} s whether pid {beat['pid']} on {beat['host']} is alive")
    while time.monotonic() < until:
        if _read_beat(attempt) != beat:
            return True
        time.sleep(min(1.0, patience_s / 10))
    return False


def _read_beat(attempt: AttemptLayout) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(attempt.heartbeat.read_text(encoding="utf-8"))
    return found


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
    beat = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "job": os.environ.get("SLURM_JOB_ID"),
    }
    temporary = files.temporary_name(attempt.heartbeat)
    temporary.write_text(json.dumps(beat), encoding="utf-8")
    os.replace(temporary, attempt.heartbeat)


def images_committed(layout: StageLayout) -> int:
    """The clock of the newest committed checkpoint; 0 if there is none."""
    names = line.committed(layout)
    return names[-1].images_seen if names else 0


def attempts_without_progress(layout: StageLayout) -> int:
    """How many attempts in a row, up to the newest, have committed nothing new; one that was killed counts, too."""
    count, best = 0, 0
    for attempt in layout.all_attempts():
        names = [CheckpointName.parse(row["checkpoint"]) for row in files.read_json_lines(attempt.saves)]
        clocks = [name.images_seen for name in names if name is not None]
        count = 0 if max(clocks, default=0) > best else count + 1
        best = max([best, *clocks])
    return count


def _images_seen(layout: StageLayout) -> int:
    """Images that the stage's attempts had seen before this one."""
    rows = [_last_metrics(attempt) for attempt in layout.all_attempts()]
    return max((int(row["images_seen"]) for row in rows if row), default=0)


def _last_metrics(attempt: AttemptLayout) -> dict[str, Any]:
    try:
        return files.last_json_line(attempt.metrics) or {}
    except DataError:  # a line that a killed launch left torn, ended by the next one
        return {}


def environment(world_size: int, device: str, launcher: str) -> dict[str, Any]:
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
        "launcher": launcher,
        "python": platform.python_version(),
        "package": __version__,
        "commit": code_commit(),
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


def code_commit() -> str | None:
    """The commit that this code is of: of the checkout, or noted where it was frozen; None if neither says."""
    here = Path(__file__).resolve().parents[2]
    if (here / FROZEN_NAME).exists():
        commit: str | None = files.read_json(here / FROZEN_NAME)["commit"]
        return commit
    answer = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
