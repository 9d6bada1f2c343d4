"""One attempt at a stage: who may begin it, and what it leaves on disk beside the ranks' own files.

The supervisor keeps this record; where there is none, rank 0 does (`train/rank.py`). So `status`, `audit` and the cost report
need not know how a run was started.
"""

from __future__ import annotations

import datetime
import getpass
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixart_ds import __version__, files
from pixart_ds.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_STOPPED,
    EXITS_THAT_TELL,
    ConfigError,
    DataError,
    MachineError,
)
from pixart_ds.layout import FROZEN_NAME, AttemptLayout, CheckpointName, RunLayout, StageLayout
from pixart_ds.ledger.book import write_entry
from pixart_ds.ledger.budget import refuse_used_up
from pixart_ds.ledger.entries import Entry
from pixart_ds.log import Log
from pixart_ds.train.pulse import read_pulses

_BEAT_SECONDS = 5.0
_LEDGER_SECONDS = 300.0
"""The signs of life are fresher; a line is what outlives them."""
_FRESH_SECONDS = 60.0
SITE_VARIABLE = "PIXART_DS_SITE"
_ALIVE_BEATS = 3
"""So many beats may a process that is known to live be late."""


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

    def __init__(
        self,
        layout: StageLayout,
        attempt: AttemptLayout,
        device: str,
        images_before: int,
        log: Log,
        site: dict[str, Any] | None = None,
    ) -> None:
        self.attempt = attempt
        self._site = site or {}
        self._layout, self._device, self._images_before, self._log = layout, device, images_before, log
        self._began, self._began_here = time.time(), time.monotonic()
        self._next_beat = self._next_line = 0.0
        self._row_before: dict[str, Any] = {}
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
            ConfigError: A stop file lies there, the run's budget is used up, or what the job says of its site cannot be read.
            MachineError: The stage runs already.
        """
        if layout.done.exists():
            log.event("is done already; nothing to do")
            return None
        if os.path.lexists(layout.stop_request):
            raise ConfigError(
                "a stop file asks this stage to stop", where=layout.stop_request, remedy="remove it to go on"
            )
        refuse_used_up(RunLayout(layout.root.parent))
        images_before, site = _images_seen(layout), site_of_this_job()
        try:
            refuse_others(layout, log)
            _, folder = files.make_numbered(layout.attempts)
            record = cls(layout, AttemptLayout(folder), device, images_before, log, site)
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
        pause_s = round(max(0.0, self._now() - started), 3)
        self._row_before = last_metrics(self.attempt)
        self._entry = replace(entry, pause_s=pause_s, job=os.environ.get("SLURM_JOB_ID"), user=_user(), site=self._site)
        write_entry(self.attempt, self._entry)
        self._next_line = time.monotonic() + _LEDGER_SECONDS

    def _counted(self, entry: Entry, now: float, *, ended: bool = False) -> Entry:
        """The entry up to now. A launch that was sent back counts from where it started: its file says so before its first step."""
        row = last_metrics(self.attempt)
        start = _start_clock(self.attempt, entry.launch)
        if start is not None:
            entry = entry.from_clock(start)
            row = {} if row == self._row_before else row  # of the launch before
        return entry.still_running(now, row).divided(read_pulses(self.attempt, entry.launch), ended=ended)

    def entry_now(self) -> Entry | None:
        """The newest launch's entry as it would be written now; None before the first one."""
        return None if self._entry is None else self._counted(self._entry, self._now())

    def ranks_left(self, launch: int, ending: str, failure: RankFailure | None, stepped: bool) -> None:
        """Closes a launch's entry, and remembers for `outcome.json` how it ended, and whether a step had been made."""
        assert self._entry is not None
        cause = None if failure is None else failure.what.splitlines()[0].rstrip(":")
        self._entry = self._counted(self._entry, self._now(), ended=True).ended_as(ending, cause)
        with self._disk("the ledger"):
            write_entry(self.attempt, self._entry)
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
        """Keeps heartbeat and, more rarely, ledger fresh; call it as often as you like."""
        assert self._entry is not None
        now = time.monotonic()
        if now > self._next_beat:
            self._next_beat = now + _BEAT_SECONDS
            with self._disk("the heartbeat"):
                _beat(self.attempt)
        if now > self._next_line:
            self._next_line = now + _LEDGER_SECONDS
            with self._disk("the ledger"):
                self._entry = self._counted(self._entry, self._now())
                write_entry(self.attempt, self._entry)

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
        if self._entry is not None:
            with self._disk("the ledger"):  # the devices were held until now, also after the last launch had ended
                entry = self._counted(self._entry, now, ended=True)
                write_entry(self.attempt, entry.ended_as(outcome["outcome"], outcome["cause"]))
        outcome |= {"started": _iso(self._began), "ended": _iso(now)}
        outcome |= {"world_size": self._world_size, "device": self._device, "launches": self.launches}
        with self._disk("outcome.json"):
            outcome |= {"images_committed": _newest_saved(self._layout)}
            files.write_json(self.attempt.outcome, outcome)
        because = f" ({outcome['cause']})" if outcome["cause"] else ""
        self._log.event(f"attempt {self.attempt.number}: {outcome['outcome']}{because}")
        return outcome

    def _judge(self, asked: str | None, failure: RankFailure | None) -> dict[str, Any]:
        if self._entry is None and failure is None:
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


def site_of_this_job() -> dict[str, Any]:
    """What the job's profile says of price, grid and PUE, as `pixart-ds launch` has written it into the job; empty outside of one.

    Raises:
        ConfigError: The variable holds something else.
    """
    text = os.environ.get(SITE_VARIABLE)
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{SITE_VARIABLE} is no JSON object: {text[:80]!r}", remedy=f"unset {SITE_VARIABLE}")
    return found


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without this user
        return None


def refuse_others(layout: StageLayout, log: Log | None = None, patience_s: float = _FRESH_SECONDS) -> None:
    """Refuses while the process that keeps the newest record is alive.

    It is over if it was of this host and is gone, or of an earlier start of this Slurm job, whatever it has left. On this host a
    process of its number with a fresh heartbeat is it. All others must be seen to beat: another host's clock may differ, so it is
    not compared; a process of this host may have got the number of one that ended long ago; and a heartbeat that a power loss has
    emptied says nothing of who keeps it.

    Raises:
        MachineError: It is, with host and process.
    """
    for attempt in layout.all_attempts()[-1:]:
        if attempt.outcome.exists() or not attempt.heartbeat.exists():
            continue
        text = attempt.heartbeat.read_bytes()
        beat = _parsed(text)
        if beat is not None and _is_over(beat):
            continue
        who = "a process whose heartbeat cannot be read" if beat is None else f"pid {beat['pid']} on {beat['host']}"
        if _beats(attempt, text, who, log, patience_s, here=beat is not None and beat["host"] == socket.gethostname()):
            raise MachineError(
                f"this stage runs already: {who}, attempt {attempt.number}",
                where=layout.root,
                remedy="wait for it, or stop it first",
            )


def _parsed(text: bytes) -> dict[str, Any] | None:
    """What a heartbeat says; None if it does not say whose it is."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    whole = isinstance(found, dict) and isinstance(found.get("host"), str) and isinstance(found.get("pid"), int)
    return found if whole else None


def _is_over(beat: dict[str, Any]) -> bool:
    """Whether the process of a heartbeat has ended for certain."""
    if beat["host"] == socket.gethostname() and not _alive(beat["pid"]):
        return True
    job, restart = os.environ.get("SLURM_JOB_ID"), beat.get("restart")
    return bool(job) and beat.get("job") == job and isinstance(restart, int) and restart < _restart_count()


def _restart_count() -> int:
    """How often Slurm has put this job back into the queue and started it again."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _beats(attempt: AttemptLayout, text: bytes, who: str, log: Log | None, patience_s: float, *, here: bool) -> bool:
    """Whether a heartbeat changes; it is not waited for where the file system itself says that it is old.

    One of a process that lives on this host need not be seen to change if it is fresh; if it is old, the process has a last chance.
    """
    age_s = _age_s(attempt)
    if here and age_s < _ALIVE_BEATS * _BEAT_SECONDS:
        return True
    wait_s = max(patience_s - max(0.0, age_s), min(patience_s, _ALIVE_BEATS * _BEAT_SECONDS) if here else 0.0)
    until = time.monotonic() + wait_s
    if log is not None and wait_s > 0:
        log.event(f"looks for up to {wait_s:.0f} s whether {who} is alive")
    while time.monotonic() < until:
        with suppress(OSError):  # such as ESTALE, in the moment of a rename on a network file system
            if attempt.heartbeat.read_bytes() != text:
                return True
        time.sleep(min(1.0, patience_s / 10))
    return False


def _age_s(attempt: AttemptLayout) -> float:
    """Seconds since the last heartbeat; both times are the file system's."""
    probe = files.temporary_name(attempt.heartbeat)
    try:
        probe.touch()
        return probe.stat().st_mtime - attempt.heartbeat.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


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
        "restart": _restart_count(),
    }
    files.replace_text(attempt.heartbeat, json.dumps(beat))


def images_committed(layout: StageLayout) -> int:
    """Images that the stage's launches have trained and committed, rework included: it grows with every commit of something new."""
    return sum(_progress(layout))


def attempts_without_progress(layout: StageLayout) -> int:
    """How many attempts in a row, up to the newest, have committed nothing new; one that was killed counts, too."""
    count = 0
    for images in _progress(layout):
        count = 0 if images > 0 else count + 1
    return count


def _progress(layout: StageLayout) -> list[int]:
    """For each attempt the images that it has committed beyond the clocks at which its launches had started.

    A launch that was sent back starts at an earlier clock than was reached before: what it commits is new all the same. Where no
    file says at which clock it started, it is the highest one committed before it.
    """
    found, best = [], 0
    for attempt in layout.all_attempts():
        newest: dict[int, int] = {}
        for name in _saved(attempt):
            newest[name.launch] = max(name.images_seen, newest.get(name.launch, 0))
        images = 0
        for launch, clock in sorted(newest.items()):
            start = _start_clock(attempt, launch)
            images += max(0, clock - (best if start is None else start))
            best = max(best, clock)
        found.append(images)
    return found


def _saved(attempt: AttemptLayout) -> list[CheckpointName]:
    """The checkpoints that an attempt has committed, as it has noted them itself: no store is asked."""
    rows = files.read_json_lines(attempt.saves, torn_ok=True)
    return [name for row in rows if (name := CheckpointName.parse(row["checkpoint"])) is not None]


def _newest_saved(layout: StageLayout) -> int:
    """The clock of the checkpoint that was committed last; 0 if there is none."""
    names = (saved[-1] for attempt in reversed(layout.all_attempts()) if (saved := _saved(attempt)))
    return next((name.images_seen for name in names), 0)


def _start_clock(attempt: AttemptLayout, launch: int) -> int | None:
    """The stage's clock when a launch started; None if no file says so. A damaged one is for the next launch to tell of."""
    try:
        return int(json.loads(attempt.start(launch).read_bytes())["state"]["images_seen"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _images_seen(layout: StageLayout) -> int:
    """Images that the stage's attempts had seen before this one."""
    rows = [last_metrics(attempt) for attempt in layout.all_attempts()]
    return max((int(row["images_seen"]) for row in rows if row), default=0)


def last_metrics(attempt: AttemptLayout) -> dict[str, Any]:
    """The newest row of an attempt's metrics; empty if there is none."""
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
    try:
        answer = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--show-toplevel", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # there is no git
        return None
    words = answer.stdout.splitlines()
    if answer.returncode != 0 or len(words) != 2 or Path(words[0]).resolve() != here:
        return None  # an installed package may lie in an environment inside somebody else's checkout
    return words[1]


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
