"""The line of checkpoints: which of those on disk belong to the run's history, and which may be deleted. No torch.

An old attempt may live on, on a lost node or behind a slow file system, and write checkpoints that no one must resume
from. So each launch says in its start file, before its first step, which checkpoint it started from; a reader walks
back from the highest launch. What lies off that walk is ignored, whenever it was published.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pixart_ds import files
from pixart_ds.engine.storage import read, storage_of
from pixart_ds.errors import CheckpointError
from pixart_ds.layout import MARKER_NAME, AttemptLayout, CheckpointName, StageLayout

LaunchNumber = tuple[int, int]
"""(attempt, launch); later ones are greater."""

MAX_LAUNCHES = 99
"""Launches that an attempt may have: their number has two digits in a checkpoint's name."""


@dataclass(frozen=True)
class Start:
    """What a launch wrote before its first step.

    Attributes:
        number: The launch.
        origin: The checkpoint it started from; None if from the stage's initial weights.
        state: The caller's clock and skips at that moment.
    """

    number: LaunchNumber
    origin: CheckpointName | None
    state: dict[str, Any]


def write_start(layout: StageLayout, start: Start) -> None:
    """Durably writes a launch's start file."""
    attempt, launch = start.number
    value = {
        "format": 1,
        "attempt": attempt,
        "launch": launch,
        "from": start.origin and str(start.origin),
        "state": start.state,
    }
    files.write_json(layout.attempt(attempt).start(launch), value)


def read_starts(layout: StageLayout) -> dict[LaunchNumber, Start]:
    """The start files of all launches.

    Raises:
        CheckpointError: One is damaged.
    """
    return {start.number: start for attempt in layout.all_attempts() for start in _starts_of(attempt)}


def _starts_of(attempt: AttemptLayout) -> list[Start]:
    present = {path.name for path in attempt.root.iterdir()}
    starts = []
    for launch in range(MAX_LAUNCHES + 1):
        path = attempt.start(launch)
        if path.name in present:
            value = files.read_json(
                path, error=CheckpointError, remedy="put the file back: it says where the launch started from"
            )
            origin = None if value["from"] is None else CheckpointName.parse(value["from"])
            if value["from"] is not None and (
                origin is None or (origin.attempt, origin.launch) >= (attempt.number, launch)
            ):
                raise CheckpointError(
                    f"the launch says it started from {value['from']!r}, which is no earlier checkpoint", where=path
                )
            starts.append(Start((attempt.number, launch), origin, value["state"]))
    return starts


def committed(layout: StageLayout) -> list[CheckpointName]:
    """The checkpoints whose marker is there, on the line or not, by images seen."""
    storage = storage_of(layout)
    return [name for name in present(layout) if storage.sub(str(name)).size(MARKER_NAME) is not None]


def present(layout: StageLayout) -> list[CheckpointName]:
    """All checkpoints that were begun, committed or not."""
    names = map(CheckpointName.parse, storage_of(layout).folders())
    return sorted(name for name in names if name is not None)


def line(layout: StageLayout, upto: LaunchNumber | None = None) -> list[CheckpointName]:
    """The committed checkpoints of the line, oldest first.

    Args:
        layout: The stage.
        upto: Ignores launches after this one; None for none.

    Raises:
        CheckpointError: A start file is damaged.
    """
    starts = read_starts(layout)
    there = committed(layout)
    numbers = [number for number in starts if upto is None or number <= upto]
    number, limit = max(numbers, default=None), None
    found: list[CheckpointName] = []
    while number is not None:
        found += [
            name
            for name in there
            if (name.attempt, name.launch) == number and (limit is None or name.images_seen <= limit)
        ]
        origin = starts[number].origin if number in starts else None
        number, limit = (None, None) if origin is None else ((origin.attempt, origin.launch), origin.images_seen)
    return sorted(found)


def newest(layout: StageLayout, upto: LaunchNumber | None = None) -> CheckpointName | None:
    """The checkpoint to go on from, or None to start the stage anew.

    Raises:
        CheckpointError: Launches had saved, but none of their checkpoints is left: starting anew would hide the loss.
    """
    names = line(layout, upto)
    if names:
        return names[-1]
    lost = sorted(
        str(start.origin)
        for start in read_starts(layout).values()
        if start.origin is not None and (upto is None or start.number <= upto)
    )
    if lost:
        raise CheckpointError(
            f"the stage had been resumed from {lost[-1]}, but no committed checkpoint of its line is left",
            where=layout.checkpoints,
            remedy="put the folder back, or start a new run",
        )
    return None


def is_highest(layout: StageLayout, number: LaunchNumber) -> bool:
    """Whether no later launch or attempt has begun, as far as can be seen from here."""
    attempts = layout.all_attempts()
    if attempts and attempts[-1].number > number[0]:
        return False
    return max(read_starts(layout), default=number) <= number


def is_milestone(layout: StageLayout, name: CheckpointName) -> bool:
    """Whether a committed checkpoint is to be kept for ever; one with a damaged marker is, for a person to see."""
    try:
        marker = json.loads(read(storage_of(layout).sub(str(name)), MARKER_NAME))
        return bool(marker["milestone"])
    except (ValueError, KeyError, TypeError):
        return True


def expendable(
    on_line: Sequence[CheckpointName],
    off_line: Sequence[CheckpointName],
    milestones: Collection[CheckpointName],
    keep: int,
) -> list[CheckpointName]:
    """Which committed checkpoints may go: all but milestones and the newest `keep` others of the line; pure.

    Args:
        on_line: The line, oldest first.
        off_line: Committed ones off the line, which nothing resumes from.
        milestones: Those to keep for ever, wherever they lie.
        keep: At least 1.
    """
    recovery = [name for name in on_line if name not in milestones]
    kept = {*recovery[-keep:], *on_line[-1:]}
    return [name for name in [*recovery, *off_line] if name not in kept and name not in milestones]


def delete_expendable(layout: StageLayout, number: LaunchNumber, keep: int) -> list[CheckpointName]:
    """Deletes what `expendable` names and what killed saves left, if `number` is the highest launch; else nothing.

    Returns:
        The committed ones that were deleted.
    """
    if not is_highest(layout, number):
        return []
    there = committed(layout)
    on_line = line(layout, number)
    milestones = {name for name in there if is_milestone(layout, name)}
    deleted = expendable(on_line, [name for name in there if name not in on_line], milestones, keep)
    torn = [name for name in present(layout) if name not in there and (name.attempt, name.launch) <= number]
    for name in [*deleted, *torn]:
        storage_of(layout).sub(str(name)).delete(first=MARKER_NAME)  # what is half deleted must not look committed
    return deleted
