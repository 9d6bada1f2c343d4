"""One stage of a run for `pixart-ds status`, from files that somebody may be writing, or was killed while writing."""

from __future__ import annotations

import itertools
import json
import math
import os
import socket
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pixart_ds import files
from pixart_ds.cluster.status_queue import Queue, Queued
from pixart_ds.config.freeze import read_stage
from pixart_ds.config.schema import StageConfig
from pixart_ds.engine import line
from pixart_ds.engine.storage import storage_of
from pixart_ds.errors import EXIT_BUG, PixArtError
from pixart_ds.layout import MARKER_NAME, AttemptLayout, CheckpointName, RunLayout, StageLayout
from pixart_ds.ledger.book import FRESH_S
from pixart_ds.train.pulse import read_pulses, slow_ranks

Found = TypeVar("Found")

_ROWS = 50
"""Of the metrics, that the rate is smoothed over."""
_TAIL_BYTES = 1 << 17
_DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError)
"""What reading a file gives whose content is not what it should be."""
_BEATS_S = 20.0
"""A heartbeat, due every 5 s, is at most so old while all is well."""


@dataclass
class Look:
    """One look at a run.

    Attributes:
        run: The run.
        now: Unix seconds.
        queue: What Slurm said.
        warnings: What people should know; it grows while the files are read.
    """

    run: RunLayout
    now: float
    queue: Queue = field(default_factory=Queue)
    warnings: list[str] = field(default_factory=list)

    def tried(self, what: str, read: Callable[[], Found], otherwise: Found) -> Found:
        """What could be read; where it could not, that is told, and everything else is shown all the same."""
        try:
            return read()
        except PixArtError as error:
            self.warnings.append(f"{what} cannot be read: {error.what}")
        except _DAMAGE as error:
            self.warnings.append(f"{what} cannot be read: {type(error).__name__}: {error}")
        return otherwise


@dataclass(frozen=True)
class Ending:
    """How an attempt ended, if it did.

    Attributes:
        word: done, stopped, failed, running, or lost: it left no word.
        cause: In words.
        exit_code: Of the supervisor.
        silent_s: Seconds since its last sign of life; None if it has ended.
    """

    word: str
    cause: str | None = None
    exit_code: int | None = None
    silent_s: float | None = None


def stage_status(look: Look, name: str) -> dict[str, Any]:
    """Where a stage stands."""
    layout, jobs = look.run.stage(name), [job for job in look.queue.jobs if job.stage == name]
    config = look.tried(f"{name}: its recipe", lambda: read_stage(look.run, name), None)
    attempts = look.tried(f"{name}: its attempts", layout.all_attempts, list[AttemptLayout]())
    endings = [_ending(look, each, newest=each is attempts[-1]) for each in attempts]
    rows = recent_rows(attempts[-1]) if attempts else []
    row = rows[-1] if rows else _newest_row(attempts[:-1])
    last = endings[-1] if endings else None
    done = layout.done.exists()
    begun = done or bool(jobs) or (last is not None and last.word == "running")
    failure = None if begun else look.tried(f"{name}: its jobs", lambda: _without_attempt(look, layout, attempts), None)
    state = _state(done, jobs, last, failure)
    if failure is not None:
        last = Ending("failed", *failure)
    told = last if last is not None and state in ("stopped", "failed", "lost", "waiting") else None
    seen, total = int(_number(row, "images_seen") or 0), None if config is None else config.total_images
    rate = _rate(rows)
    found = {
        "stage": name,
        "state": state,
        "images_seen": seen,
        "total_images": total,
        "part": seen / total if total else None,
        "attempts": len(attempts),
        "outcomes": [each.word for each in endings],
        "cause": None if told is None else told.cause,
        "exit_code": None if told is None else told.exit_code,
        "loss": next(
            (loss for each in reversed([*rows] or [row]) if (loss := _number(each, "loss")) is not None), None
        ),
        "images_per_second": rate,
        "seconds_left": None if done else _number(row, "seconds_left"),
        "chain_seconds_left": None if done else _number(row, "chain_seconds_left"),
        "silent_s": None if last is None else last.silent_s,
        "jobs": [job.job for job in jobs],
        "log": str(attempts[-1].log) if attempts else None,
    }
    found |= _checkpoint(look, layout, attempts, config, seen, rate, running=state == "running")
    pulses = read_pulses_of(look, attempts[-1]) if state == "running" and attempts else []
    found["slow_ranks"] = look.tried(f"{name}: its ranks", lambda: slow_ranks(pulses), list[dict[str, Any]]())
    return found


def _state(done: bool, jobs: Sequence[Queued], last: Ending | None, failure: tuple[str, int] | None) -> str:
    """done, running, waiting, failed, stopped, lost, or not started."""
    if done:
        return "done"
    if any(job.running for job in jobs) or (last is not None and last.word == "running"):
        return "running"
    if jobs:
        return "waiting"
    if failure is not None:
        return "failed"
    if last is None:
        return "not started"
    return last.word if last.word in ("stopped", "failed") else "lost"


def _ending(look: Look, attempt: AttemptLayout, *, newest: bool) -> Ending:
    outcome = small_json(attempt.outcome)
    if isinstance(outcome.get("outcome"), str):
        cause, code = outcome.get("cause"), outcome.get("exit_code")
        return Ending(
            outcome["outcome"], None if cause is None else str(cause), code if isinstance(code, int) else None
        )
    if not newest:
        return Ending("lost")
    beat = small_json(attempt.heartbeat)
    silent_s = max(0.0, look.now - _last_sign(attempt, beat))
    over = silent_s > FRESH_S or _is_gone(beat) or (silent_s > _BEATS_S and _has_lost_its_job(look, attempt))
    return Ending("lost" if over else "running", silent_s=silent_s)


def _last_sign(attempt: AttemptLayout, beat: dict[str, Any]) -> float:
    """When the attempt was last known to live; a heartbeat that a power loss has emptied still has its file's time."""
    times = [float(beat["time"])] if isinstance(beat.get("time"), int | float) else []
    for path in (attempt.heartbeat, attempt.root):
        try:
            times.append(path.stat().st_mtime)
            break
        except OSError:
            continue
    return max(times, default=0.0)


def _is_gone(beat: dict[str, Any]) -> bool:
    """Whether a process of this host has ended."""
    pid = beat.get("pid")
    return isinstance(pid, int) and beat.get("host") == socket.gethostname() and not Path(f"/proc/{pid}").exists()


def _has_lost_its_job(look: Look, attempt: AttemptLayout) -> bool:
    """Whether Slurm, asked for this user's jobs, does not run the one that the attempt was in."""
    job = job_of(attempt)
    if not look.queue.known or job is None:
        return False
    try:
        mine = attempt.root.stat().st_uid == os.getuid()
    except OSError:
        return False
    return mine and not any(each.job == job and each.running for each in look.queue.jobs)


def job_of(attempt: AttemptLayout) -> str | None:
    """The job of Slurm that an attempt ran in; its heartbeat is there before its ranks are."""
    slurm = small_json(attempt.env).get("slurm")
    job = slurm.get("SLURM_JOB_ID") if isinstance(slurm, dict) else small_json(attempt.heartbeat).get("job")
    return job if isinstance(job, str) else None


def _without_attempt(look: Look, layout: StageLayout, attempts: Sequence[AttemptLayout]) -> tuple[str, int] | None:
    """A job that ended before it began an attempt: cause and exit code.

    Without Slurm's word a job that has printed something may be about to begin one; then it is waited for a while.
    """
    outputs = list(layout.submissions.glob("*.out")) if layout.submissions.is_dir() else []
    newest = max((path for path in outputs if path.stem.isdigit()), key=lambda path: int(path.stem), default=None)
    if newest is None or newest.stem in {job_of(attempt) for attempt in attempts}:
        return None
    if not look.queue.known and look.now - newest.stat().st_mtime < FRESH_S:
        return None
    from pixart_ds.cluster.chain import failure_of  # it checks data, too, which needs numpy

    failure = look.tried(f"{layout.root.name}: what its jobs printed", lambda: failure_of(layout), None)
    return failure if failure is not None and failure[0].startswith("job ") else None


# ---- figures -----------------------------------------------------------------------------------------------------------


def small_json(path: Path) -> dict[str, Any]:
    """A small file that is rewritten, or written once at the end; empty where it is not there, or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def json_rows(path: Path, tail_bytes: int = _TAIL_BYTES) -> list[dict[str, Any]]:
    """The whole lines at the end of a file of JSON lines; those that a kill has torn are left out."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - tail_bytes)
            file.seek(start)
            lines = file.read().split(b"\n")
    except OSError:
        return []
    found = []
    for text in lines[1 if start else 0 :]:
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def recent_rows(attempt: AttemptLayout) -> list[dict[str, Any]]:
    """The newest rows of an attempt's metrics, oldest first."""
    return [row for row in json_rows(attempt.metrics) if _number(row, "images_seen") is not None][-_ROWS:]


def _newest_row(attempts: Sequence[AttemptLayout]) -> dict[str, Any]:
    return next((rows[-1] for attempt in reversed(attempts) if (rows := recent_rows(attempt))), {})


def _number(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _rate(rows: Sequence[dict[str, Any]]) -> float | None:
    """Images a second over all these steps; saves and previews between them do not count."""
    steps = [(_number(row, "images_per_second"), _number(row, "seconds")) for row in rows]
    known = [(rate, seconds) for rate, seconds in steps if rate is not None and seconds is not None]
    whole = sum(seconds for _, seconds in known)
    return sum(rate * seconds for rate, seconds in known) / whole if whole > 0 else None


def read_pulses_of(look: Look, attempt: AttemptLayout) -> list[dict[str, Any]]:
    """The ranks' signs of life."""
    return look.tried(f"{attempt.root}: its ranks' signs of life", lambda: read_pulses(attempt), list[dict[str, Any]]())


# ---- checkpoints -------------------------------------------------------------------------------------------------------


def _checkpoint(
    look: Look,
    layout: StageLayout,
    attempts: Sequence[AttemptLayout],
    config: StageConfig | None,
    seen: int,
    rate: float | None,
    *,
    running: bool,
) -> dict[str, Any]:
    """The newest one that counts, when it was committed, and whether the next one is late."""
    saves = [row for each in attempts[-1:] for row in json_rows(each.saves)]
    nothing: tuple[CheckpointName | None, float | None] = (None, None)
    found = look.tried(f"{layout.root.name}: its checkpoints", lambda: _newest_checkpoint(layout, attempts), nothing)
    name, when = found
    every = None if config is None else config.checkpoint.every
    images = None if every is None or config is None else every.in_images(config.global_batch_size)
    interval_s = images / rate if images is not None and rate else _gap(saves)
    late = False
    if running and images is not None:
        late = seen - (0 if name is None else name.images_seen) > 2 * images
    elif running and interval_s is not None and when is not None:
        late = look.now - when > 2 * interval_s
    return {
        "checkpoint": None if name is None else str(name),
        "checkpoint_age_s": None if when is None else max(0.0, look.now - when),
        "checkpoint_interval_s": interval_s,
        "checkpoint_is_late": late,
    }


def _newest_checkpoint(
    layout: StageLayout, attempts: Sequence[AttemptLayout]
) -> tuple[CheckpointName | None, float | None]:
    """Which, and when it was committed. No store is asked, which may be slow or away: there, the attempts' own notes say it."""
    elsewhere = small_json(layout.checkpoints_elsewhere).get("path")
    if isinstance(elsewhere, str) and "://" in elsewhere:
        for attempt in reversed(attempts):
            for row in reversed(json_rows(attempt.saves)):
                if (name := CheckpointName.parse(str(row.get("checkpoint")))) is not None:
                    return name, _number(row, "time")
        return None, None
    name = line.newest(layout)
    if name is None:
        return None, None
    try:
        return name, (Path(storage_of(layout).where) / str(name) / MARKER_NAME).stat().st_mtime
    except OSError:
        return name, None


def _gap(saves: Sequence[dict[str, Any]]) -> float | None:
    """Seconds between two saves, as an attempt that saves by the clock has shown."""
    times = [time for row in saves if (time := _number(row, "time")) is not None]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(gaps[-5:]) if len(gaps) >= 2 else None


def exit_code_or_bug(row: Mapping[str, Any]) -> int:
    """Of a failed stage."""
    code = row["exit_code"]
    return code if isinstance(code, int) else EXIT_BUG


def first_line(text: str | None) -> str | None:
    """What a cause says before a rank's last words."""
    words = (text or "").strip().splitlines()
    return words[0].rstrip(":") if words else None


def lines_of(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a small file."""
    return [row for row in files.read_json_lines(path, torn_ok=True) if isinstance(row, dict)]
