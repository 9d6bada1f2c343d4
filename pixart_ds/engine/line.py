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
from pixart_ds.engine.storage import Storage, file_is_damaged, read, storage_of
from pixart_ds.errors import CheckpointError, MachineError
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
    starts = []
    for launch in _launches_of(attempt):
        path = attempt.start(launch)
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


def _launches_of(attempt: AttemptLayout) -> list[int]:
    """The launches that have a start file, by its name alone."""
    present = {path.name for path in attempt.root.iterdir()} if attempt.root.is_dir() else set()
    return [launch for launch in range(MAX_LAUNCHES + 1) if attempt.start(launch).name in present]


def committed(layout: StageLayout) -> list[CheckpointName]:
    """The checkpoints whose marker is there, on the line or not, by images seen."""
    storage = storage_of(layout)
    return [name for name in present(layout) if _has_marker(storage.sub(str(name)))]


def _has_marker(storage: Storage) -> bool:
    try:
        return storage.size(MARKER_NAME) is not None
    except MachineError as error:
        if not file_is_damaged(error):
            raise
        return True  # else it would pass for a save that was killed, and be deleted


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
    resumed = [
        start.origin
        for start in read_starts(layout).values()
        if start.origin is not None and (upto is None or start.number <= upto)
    ]
    # what was never resumed from is in no start file; deleting never takes the newest, and no roll-back goes behind the oldest
    saved = [name for name in _noted(layout) if upto is None or (name.attempt, name.launch) <= upto]
    if lost := max(resumed + saved, default=None):
        raise CheckpointError(
            f"the stage had {'been resumed from' if lost in resumed else 'saved'} {lost}, "
            "but no committed checkpoint of its line is left",
            where=storage_of(layout).where,
            remedy="put the folder back, see that it is mounted on this node, or start a new run",
        )
    return None


def _noted(layout: StageLayout) -> list[CheckpointName]:
    """The checkpoints that attempts have noted as committed, wherever these are now."""
    rows = (row for attempt in layout.all_attempts() for row in files.read_json_lines(attempt.saves, torn_ok=True))
    names = (CheckpointName.parse(str(row.get("checkpoint"))) for row in rows if isinstance(row, dict))
    return [name for name in names if name is not None]


def is_highest(layout: StageLayout, number: LaunchNumber) -> bool:
    """Whether no later launch or attempt has begun, as far as can be seen from here."""
    attempts = layout.all_attempts()
    if attempts and attempts[-1].number > number[0]:
        return False
    # files of older attempts say nothing here, and one that is damaged is no reason not to save
    return max(_launches_of(layout.attempt(number[0])), default=0) <= number[1]


def is_milestone(layout: StageLayout, name: CheckpointName) -> bool:
    """Whether a committed checkpoint is to be kept for ever; one whose marker is damaged, or gone since, is: a person may look."""
    try:
        marker = json.loads(read(storage_of(layout).sub(str(name)), MARKER_NAME))
        return bool(marker["milestone"])
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return True
    except MachineError as error:
        if not file_is_damaged(error):
            raise
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

    What cannot be deleted has no marker any more, if that much could be done, and is left for the next time.

    Returns:
        The committed ones that were deleted.

    Raises:
        MachineError: Some could not be deleted; all others are.
    """
    if not is_highest(layout, number):
        return []
    there = committed(layout)
    on_line = line(layout, number)
    milestones = {name for name in there if is_milestone(layout, name)}
    deleted = expendable(on_line, [name for name in there if name not in on_line], milestones, keep)
    torn = [name for name in present(layout) if name not in there and (name.attempt, name.launch) <= number]
    storage, failures = storage_of(layout), []
    for name in [*deleted, *torn]:
        try:
            storage.sub(str(name)).delete(first=MARKER_NAME)  # what is half deleted must not look committed
        except MachineError as error:
            failures.append(error)
    if failures:
        raise MachineError(
            "; ".join(f"{error.where}: {error.what}" for error in failures),
            where=storage.where,
            remedy=failures[0].remedy,
        ) from failures[0]
    return deleted
