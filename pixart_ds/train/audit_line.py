"""What the attempts of a stage logged, and which of it is the run's history: the steps on the line of checkpoints.

Each step on the line has one line in one log: that of the launch whose checkpoints the later ones go on from. What a launch logged
after the checkpoint from which its successor resumed is rework. Nothing here computes a sample.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import index
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.engine import line as lines
from pixart_ds.engine.line import LaunchNumber, Start
from pixart_ds.engine.storage import read, storage_of
from pixart_ds.errors import CheckpointError
from pixart_ds.layout import MANIFEST_NAME, MARKER_NAME, AttemptLayout, HandoverLayout, StageLayout
from pixart_ds.train.skips import Window
from pixart_ds.train.state import windows_of

_PUT_BACK = "put the log back as it was, from a copy of the run; without it the step cannot be proven"


@dataclass(frozen=True, slots=True)
class Logged:
    """One line of an audit.jsonl; `attempt` and `launch` are what the line says, `row` is its number in the file, from 1."""

    path: Path
    row: int
    attempt: int
    launch: int
    world_size: int | None
    images_seen: int
    samples: int
    applied: bool
    digest: int
    left_out: bool = False

    @property
    def where(self) -> str:
        return f"{self.path}, line {self.row}"


@dataclass(frozen=True)
class Log:
    """One attempt's audit.jsonl: its lines, and the numbers of those that cannot be read."""

    attempt: int
    path: Path
    steps: list[Logged]
    unreadable: list[int]


@dataclass(frozen=True)
class Segment:
    """The steps of one launch that count: images in (after, upto].

    Its start file says in which order of the data they come, and which of them are left out.
    """

    launch: LaunchNumber
    after: int
    upto: int
    order: str | None = None
    skips: tuple[Window, ...] = ()


@dataclass(frozen=True)
class Mark:
    """What a start file, a checkpoint, a handover or the end says of the clock there; None where it is silent."""

    name: str
    path: Path
    images_seen: int
    applied_steps: int | None = None
    skipped_steps: int | None = None
    order: str | None = None


@dataclass(frozen=True)
class Violation:
    """The first thing that is not as it must be.

    Attributes:
        kind: missing, twice, sequence, foreign, samples, clock, data, digest or visit.
        step: At which step, from 1; None where it concerns the whole stage.
        what: For people.
        where: File and line.
        remedy: What to do.
        attempt, launch: Whose step it is.
        logged, expected: The two values that differ.
    """

    kind: str
    step: int | None
    what: str
    where: str
    remedy: str = _PUT_BACK
    attempt: int | None = None
    launch: int | None = None
    logged: str | None = None
    expected: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class History:
    """The line of a stage up to its newest checkpoint, or to its end.

    Attributes:
        segments: Oldest first; together they go from 0 to `images_seen`.
        marks: By images.
        images_seen: Where the line ends.
        done: Whether the stage is finished.
        top: The launch at the line's end; None if none was started.
        broken: Why the line cannot be walked back to its beginning, if it cannot.
    """

    segments: list[Segment]
    marks: list[Mark]
    images_seen: int
    done: bool
    top: LaunchNumber | None
    broken: Violation | None = None


# ---- reading -------------------------------------------------------------------------------------------------------


def read_log(attempt: AttemptLayout) -> Log:
    """An attempt's lines; one that is torn at the end belongs to a step that no checkpoint stands on, and is left out."""
    log = Log(attempt.number, attempt.audit, [], [])
    text = attempt.audit.read_text(encoding="utf-8", errors="replace") if attempt.audit.exists() else ""
    rows = text.split("\n")
    for row, line in enumerate(rows, start=1):
        if not line.strip():
            continue
        try:
            log.steps.append(_parse(json.loads(line), log, row))
        except (ValueError, KeyError, TypeError, AttributeError):
            if row < len(rows):
                log.unreadable.append(row)
    return log


def _parse(values: Mapping[str, Any], log: Log, row: int) -> Logged:
    world, digest, applied = values.get("world_size"), int(values["digest"], 16), values["applied"]
    left_out = values.get("left_out", False)
    if not 0 <= digest < 2**64 or not isinstance(applied, bool) or not isinstance(left_out, bool):
        raise ValueError("no line that the meter wrote")
    return Logged(
        path=log.path,
        row=row,
        attempt=index(values.get("attempt", log.attempt)),  # lines of earlier versions do not say it;
        launch=index(values.get("launch", 1)),  # their attempts had one launch
        world_size=None if world is None else index(world),
        images_seen=index(values["images_seen"]),
        samples=index(values["samples"]),
        applied=applied,
        digest=digest,
        left_out=left_out,
    )


def read_history(layout: StageLayout) -> History:
    """The stage's line, read before the logs: what it stands on was synced to them before.

    Raises:
        CheckpointError: A start file or manifest is damaged, or no checkpoint of an unfinished stage's line is left.
    """
    starts = lines.read_starts(layout)
    done = files.read_json(layout.done) if layout.done.exists() else None
    if done is not None:  # nothing that began later took part
        starts = {number: start for number, start in starts.items() if number[0] <= done["attempt"]}
    top = max(starts, default=None)
    if top is None:
        return History([], [], 0, False, None)
    if done is not None:
        end = int(done["images_seen"])
    else:
        newest = lines.newest(layout, top)
        end = 0 if newest is None else newest.images_seen
    segments, lost = segments_of(starts, top, end)
    broken = None if lost is None else _no_start(layout, lost)
    marks = [*_start_marks(layout, starts, segments), *_checkpoint_marks(layout, top)]
    if done is not None:
        marks += _end_marks(layout, done)
    within = [mark for mark in marks if mark.images_seen <= end]
    return History(segments, sorted(within, key=lambda m: m.images_seen), end, done is not None, top, broken)


def segments_of(
    starts: Mapping[LaunchNumber, Start], top: LaunchNumber, end: int
) -> tuple[list[Segment], LaunchNumber | None]:
    """Which images of which launch count, walking back from `top` by the start files; pure.

    Returns:
        The segments that hold a step, oldest first, and the launch at which the walk found no start file, if any.
    """
    segments: list[Segment] = []
    number: LaunchNumber | None = top
    while number is not None:
        start = starts.get(number)
        if start is None:
            return segments[::-1], number
        after = 0 if start.origin is None else start.origin.images_seen
        if after < end:
            segments.append(Segment(number, after, end, start.state.get("order"), windows_of(start.state)))
            end = after
        number = None if start.origin is None else (start.origin.attempt, start.origin.launch)
    return segments[::-1], None


def _no_start(layout: StageLayout, number: LaunchNumber) -> Violation:
    attempt, launch = number
    what = f"later attempts resumed from attempt {attempt}, launch {launch}, which has no start file"
    path = layout.attempt(attempt).start(launch)
    return Violation("missing", None, what, str(path), "put the file back, from a copy of the run", attempt, launch)


def _start_marks(layout: StageLayout, starts: Mapping[LaunchNumber, Start], segments: Sequence[Segment]) -> list[Mark]:
    return [
        Mark(
            f"the start of attempt {number[0]}, launch {number[1]}",
            layout.attempt(number[0]).start(number[1]),
            after,
            starts[number].state.get("applied_steps"),
            starts[number].state.get("skipped_steps"),
        )
        for number, after in ((segment.launch, segment.after) for segment in segments)
    ]


def _checkpoint_marks(layout: StageLayout, top: LaunchNumber) -> list[Mark]:
    marks = []
    for name in lines.line(layout, top):
        storage = storage_of(layout).sub(str(name))
        where = Path(storage.where) / MANIFEST_NAME
        try:
            said = files.parse_json(read(storage, MANIFEST_NAME), where, error=CheckpointError)["state"]
        except FileNotFoundError as cause:
            if storage.size(MARKER_NAME) is not None:
                raise CheckpointError("a committed checkpoint has no manifest", where=where) from cause
            continue  # a running attempt has deleted it meanwhile
        state = said["state"]
        marks.append(
            Mark(
                f"the checkpoint {name}",
                where,
                name.images_seen,
                state["applied_steps"],
                state["skipped_steps"],
                said["order"],
            )
        )
    return marks


def _end_marks(layout: StageLayout, done: Mapping[str, Any]) -> list[Mark]:
    end = Mark(
        "the stage's end", layout.done, int(done["images_seen"]), done.get("applied_steps"), done.get("skipped_steps")
    )
    lineage = HandoverLayout(layout.handover).lineage
    if not lineage.exists():
        return [end]
    about = files.read_json(lineage)["lineage"]
    return [end, Mark("the handover", lineage, int(about["images_seen"]), order=about["order"])]


# ---- following the line --------------------------------------------------------------------------------------------


@dataclass
class Followed:
    """The lines on the line, step by step, up to the first that is not as it must be.

    Attributes:
        steps: Line of step 1, 2, …
        violation: Why it ends before the line does.
        rework: Lines of each launch that later launches undid.
        open: Lines after the newest checkpoint, of the launch that may still go on.
    """

    steps: list[Logged] = field(default_factory=list)
    violation: Violation | None = None
    rework: dict[LaunchNumber, int] = field(default_factory=dict)
    open: int = 0


def follow(history: History, logs: Sequence[Log], batch: int) -> Followed:
    """Takes for each step of the line exactly one logged line: that of the launch that the line says; pure."""
    followed = Followed(violation=history.broken)
    _count_others(followed, history, logs)
    by_attempt = {log.attempt: log for log in logs}
    for segment in history.segments:
        if followed.violation is not None:
            break
        log = by_attempt.get(segment.launch[0], Log(segment.launch[0], Path("attempts"), [], []))
        followed.violation = _follow_segment(followed, segment, log, logs, batch)
    return followed


def _count_others(followed: Followed, history: History, logs: Sequence[Log]) -> None:
    """Counts the lines off the line: rework, and what the last launch logged since it saved."""
    on_line = {segment.launch: segment for segment in history.segments}
    for log in logs:
        for step in log.steps:
            number = (log.attempt, step.launch)
            segment = on_line.get(number)
            if segment is not None and segment.after < step.images_seen <= segment.upto:
                continue
            if number == history.top and step.images_seen > history.images_seen and not history.done:
                followed.open += 1
            else:
                followed.rework[number] = followed.rework.get(number, 0) + 1


def _follow_segment(
    followed: Followed, segment: Segment, log: Log, logs: Sequence[Log], batch: int
) -> Violation | None:
    attempt, launch = segment.launch
    own = [step for step in log.steps if step.launch == launch or step.attempt != attempt]
    count = (segment.upto - segment.after) // batch
    for place in range(count):
        clock = segment.after + (place + 1) * batch
        found = own[place] if place < len(own) else None
        if found is not None and found.attempt != attempt:
            return _stray(found, segment, batch)
        problem = _problem(
            found, clock, {step.images_seen for step in own[place:]} if _odd(found, clock) else set(), batch
        )
        if problem is not None:
            kind, what = problem
            return Violation(
                kind,
                clock // batch,
                what + (_hint(clock, log, logs) if kind == "missing" else ""),
                found.where if found is not None else str(log.path),
                attempt=attempt,
                launch=launch,
            )
        assert found is not None
        if found.samples != batch:
            return _wrong_count(found, segment, batch)
        if (wrong := _wrongly_left_out(found, segment, batch)) is not None:
            return wrong
        followed.steps.append(found)
    for late in own[count:]:
        if late.attempt != attempt or late.images_seen <= segment.upto:
            return _stray(late, segment, batch)
    return None


def _odd(found: Logged | None, clock: int) -> bool:
    return found is None or found.images_seen != clock


def _problem(found: Logged | None, clock: int, still: set[int], batch: int) -> tuple[str, str] | None:
    """What is wrong with the line at this place; `still` holds the clocks that stand here and after."""
    if not _odd(found, clock):
        return None
    step = clock // batch
    if found is not None and found.images_seen < clock:
        before = found.images_seen // batch
        return "twice", f"where step {step} should stand, step {before} is logged a second time"
    if found is not None and clock in still:
        return "sequence", f"step {found.images_seen // batch} is logged before step {step}"
    return "missing", f"step {step} is not in the log: its line is lost"


def _hint(clock: int, log: Log, logs: Sequence[Log]) -> str:
    """What else is known of a step whose line is missing."""
    hints = [
        f"; attempt {other.attempt} logged it, but its line is not the one that counts"
        for other in logs
        if other.attempt != log.attempt and any(step.images_seen == clock for step in other.steps)
    ]
    if log.unreadable:
        hints.append(f"; line {log.unreadable[0]} of the file cannot be read")
    return "".join(hints)


def _wrongly_left_out(found: Logged, segment: Segment, batch: int) -> Violation | None:
    """A step is left out if, and only if, the launch had recorded so before it began."""
    before, step = found.images_seen - batch, found.images_seen // batch
    recorded = any(window.holds(before) for window in segment.skips)
    if found.left_out == recorded:
        return None
    if found.left_out:
        what = f"step {step} was left out, and no window that was recorded before says so"
    else:
        what = f"step {step} was trained, though it was recorded as left out"
    remedy = "if log or start file were changed, put them back; if not, train again from a checkpoint before this step"
    return Violation("left out", step, what, found.where, remedy, *segment.launch)


def _wrong_count(found: Logged, segment: Segment, batch: int) -> Violation:
    step = found.images_seen // batch
    return Violation(
        "samples",
        step,
        f"{found.samples} samples were used instead of the {batch} of a step",
        found.where,
        f"if the log was changed, put it back; if not, train again from a checkpoint before step {step}",
        *segment.launch,
        str(found.samples),
        str(batch),
    )


def _stray(found: Logged, segment: Segment, batch: int) -> Violation:
    attempt, launch = segment.launch
    step = found.images_seen // batch
    if found.attempt != attempt:
        what = f"a line of attempt {found.attempt} stands in the log of attempt {attempt}"
        return Violation("foreign", step, what, found.where, attempt=attempt, launch=launch)
    what = f"step {step} is logged a second time, after step {segment.upto // batch}"
    return Violation("twice", step, what, found.where, attempt=attempt, launch=launch)


def check_clocks(steps: Sequence[Logged], marks: Sequence[Mark], batch: int) -> Violation | None:
    """Holds the counts of applied and skipped steps against what checkpoints, starts and the end say; pure."""
    applied = at = 0
    for mark in marks:
        upto = mark.images_seen // batch
        if upto > len(steps):
            break  # `follow` has said why
        applied += sum(step.applied for step in steps[at:upto])
        at = upto
        said = (mark.applied_steps, mark.skipped_steps)
        if None not in said and said != (applied, upto - applied):
            return Violation(
                "clock",
                upto,
                f"{mark.name} says that {said[0]} steps were applied and {said[1]} skipped up to step {upto}, "
                f"the logs say {applied} and {upto - applied}",
                str(mark.path),
                "put the log or the file back as it was, from a copy of the run",
                steps[upto - 1].attempt if upto else None,
                steps[upto - 1].launch if upto else None,
                f"{applied} applied, {upto - applied} skipped",
                f"{said[0]} applied, {said[1]} skipped",
            )
    return None
