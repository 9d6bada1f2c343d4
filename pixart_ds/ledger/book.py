"""The book of a run: one append-only file for each attempt, folded when it is read."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.errors import DataError
from pixart_ds.layout import AttemptLayout, RunLayout, StageLayout
from pixart_ds.ledger.entries import Entry

FRESH_S = 120.0
"""An attempt without an ending whose heartbeat is younger than this is taken to be running."""


def write_entry(attempt: AttemptLayout, entry: Entry) -> None:
    """Writes what is true now; the line replaces the launch's earlier ones when the book is read."""
    files.append_json_line(attempt.ledger, entry.to_json())


@dataclass(frozen=True)
class Book:
    """What could be read of a run.

    Attributes:
        stages: All stages in the chain's sequence, with the entries of each; a stage that never ran has none.
        problems: What could not be read, in words.
    """

    stages: dict[str, list[Entry]]
    problems: tuple[str, ...]


def read_book(run: Path) -> Book:
    """All entries of a run.

    Raises:
        DataError: The folder holds no run, or one of another version.
    """
    layout = RunLayout(run)
    if not layout.manifest.exists():
        raise DataError(
            "there is no run in this folder (no manifest.json)", where=run.resolve(), remedy="give the folder of a run"
        )
    problems: list[str] = []
    manifest = files.read_json(layout.manifest)
    stages = manifest.get("stages") if isinstance(manifest, dict) else None
    if not isinstance(stages, list) or not all(isinstance(stage, str) for stage in stages):
        raise DataError(
            "the run is of another version: its manifest lists no stages",
            where=layout.manifest,
            remedy="use the version of this package that made it (`package` in that file)",
        )
    return Book({stage: read_stage_book(layout.stage(stage), problems) for stage in stages}, tuple(problems))


def read_stage_book(stage: StageLayout, problems: list[str] | None = None) -> list[Entry]:
    """The entries of a stage, oldest first; `problems` takes what could not be read."""
    problems = [] if problems is None else problems
    attempts = stage.all_attempts()
    return [
        entry
        for attempt in attempts
        for entry in read_attempt_book(attempt, stage.root.name, problems, newest=attempt is attempts[-1])
    ]


def furthest(stage: StageLayout) -> int:
    """The furthest that training has come on a stage, committed or not: what comes before is done again."""
    return max((entry.images_to for entry in read_stage_book(stage)), default=0)


_LAUNCH = re.compile(rb'"launch": (\d+)')


def read_attempt_book(attempt: AttemptLayout, stage: str, problems: list[str], *, newest: bool) -> list[Entry]:
    """The last line of each launch. From the end on: a long attempt has a thousand lines, of which a few count.

    Args:
        attempt, stage: Which.
        problems: Takes what could not be read.
        newest: Whether no attempt has begun after it; else it is over, whatever it says.
    """
    where = f"{stage}, attempt {attempt.number}"
    try:
        text = attempt.ledger.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{where}: its ledger cannot be read: {error.strerror}")
        return []
    lines = text.split(b"\n")
    if lines.pop():
        problems.append(f"{where}: the last line of its ledger is cut off")
    last: dict[int, Entry] = {}
    for number in range(len(lines), 0, -1):
        line = lines[number - 1]
        launch = _LAUNCH.search(line)
        if launch is not None and int(launch[1]) in last:
            continue
        try:
            entry = Entry.from_json(json.loads(line))
        except (ValueError, TypeError) as error:
            said = "it is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            problems.append(f"{where}: line {number} of its ledger is left out: {said}")
            continue
        last.setdefault(entry.launch, entry)
    entries = [last[launch] for launch in sorted(last)]
    if entries and entries[-1].outcome == "running":
        entries[-1] = _as_last_known(attempt, entries[-1], newest=newest)
    return entries


def _as_last_known(attempt: AttemptLayout, entry: Entry, *, newest: bool) -> Entry:
    """An entry without an ending, up to the last heartbeat: the ledger's own lines are minutes apart."""
    beat = _json(attempt.heartbeat)
    seen = max(entry.until, float(beat.get("time") or 0.0))
    pulses = [pulse for pulse in _pulses(attempt) if pulse.get("launch") == entry.launch]
    row = _last_row(attempt)
    images = max(entry.images_to, int(row.get("images_seen", 0)))
    if not newest or time.time() - seen > FRESH_S:
        entry = entry.ended_as("lost", "its supervisor left no word")
    return replace(entry, until=seen, images_to=images).divided(pulses, ended=False)


def _pulses(attempt: AttemptLayout) -> Iterator[dict[str, Any]]:
    if attempt.pulses.is_dir():
        yield from (found for path in sorted(attempt.pulses.glob("*.json")) if "rank" in (found := _json(path)))


def _last_row(attempt: AttemptLayout) -> dict[str, Any]:
    try:
        return files.last_json_line(attempt.metrics) or {}
    except (DataError, OSError):  # torn by a kill
        return {}


def _json(path: Path) -> dict[str, Any]:
    """A small file that is rewritten all the time; empty where it cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
