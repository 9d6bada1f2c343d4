"""`pixart-ds audit`: proves from what the attempts logged which samples each step used, and that none was lost or repeated.

The line of checkpoints says whose log counts for each step; the order and the draws say what its digest must be. No torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pixart_ds import files
from pixart_ds.config.change import read_changes
from pixart_ds.config.freeze import open_run, read_stage
from pixart_ds.config.schema import StageConfig
from pixart_ds.data.shards import PreparedSet
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.layout import RunLayout, StageLayout
from pixart_ds.plan.order import StepPlan
from pixart_ds.train.audit_line import (
    Followed,
    History,
    Log,
    Logged,
    Mark,
    Segment,
    Violation,
    check_clocks,
    follow,
    read_history,
    read_log,
)
from pixart_ds.train.replay import LEFT_OUT, Coverage, Outcome, Replay, explain
from pixart_ds.train.replay_pool import recompute
from pixart_ds.train.sets import open_sets, order_of
from pixart_ds.train.skips import read_windows


@dataclass(frozen=True)
class Part:
    """Which images of each stage are recomputed: those after `after`, up to `upto`; None for the line's end."""

    after: int = 0
    upto: int | None = None

    def steps(self, batch: int, last: int) -> tuple[int, int]:
        """First and last step that hold one of these images, among steps 1 … `last`."""
        upto = last if self.upto is None else min(last, -(-self.upto // batch))
        return self.after // batch + 1, upto


@dataclass(frozen=True)
class _Era:
    """The steps first … last, trained on one order of the data: all of a stage, unless a change of its dataset was allowed."""

    first: int
    last: int
    config: StageConfig
    sets: list[PreparedSet]
    replay: Replay

    @classmethod
    def of(cls, config: StageConfig, first: int = 1, last: int = 0) -> _Era:
        sets = open_sets(config)
        return cls(first, last, config, sets, _replay(config, sets))

    @property
    def num_ids(self) -> int:
        return sum(prepared.num_samples for prepared in self.sets)


@dataclass(frozen=True)
class _Stage:
    """A stage as the audit reads it."""

    config: StageConfig
    layout: StageLayout
    history: History
    logs: list[Log]
    eras: list[_Era]

    @classmethod
    def open(cls, run: RunLayout, name: str) -> _Stage:
        config, layout = read_stage(run, name), run.stage(name)
        now = _Era.of(config)  # a set that is not there is told before anything else
        history = read_history(layout)
        logs = [read_log(attempt) for attempt in layout.all_attempts()]
        return cls(config, layout, history, logs, _eras(layout, history, now))

    def era(self, step: int) -> _Era:
        """The one that a step belongs to; steps to come belong to the last."""
        return next((era for era in self.eras if step <= era.last), self.eras[-1])


def _eras(layout: StageLayout, history: History, now: _Era) -> list[_Era]:
    """The line cut where the order of the data changed. An order that no version of the stage gives any more counts as today's, and
    is then found to be another.
    """
    batch, before = now.config.global_batch_size, [change.stage_before for change in read_changes(layout)]
    known: dict[str, _Era] = {now.replay.order.fingerprint: now}
    eras: list[_Era] = []
    for segment in history.segments:
        order = segment.order or _order_within(history, segment) or now.replay.order.fingerprint
        while order not in known and before:
            older = _Era.of(before.pop())
            known.setdefault(older.replay.order.fingerprint, older)
        first, last, era = segment.after // batch + 1, segment.upto // batch, known.get(order, now)
        if eras and eras[-1].replay is era.replay:
            first = eras.pop().first
        eras.append(replace(era, first=first, last=last))
    skips = tuple(sorted({window for segment in history.segments for window in segment.skips}))
    return [replace(era, replay=replace(era.replay, skips=skips)) for era in eras] or [now]


def _order_within(history: History, segment: Segment) -> str | None:
    """What a checkpoint of the segment says of the order, for start files that do not."""
    return next((m.order for m in history.marks if m.order and segment.after < m.images_seen <= segment.upto), None)


def _replay(config: StageConfig, sets: list[PreparedSet]) -> Replay:
    dropout = config.model.condition_dropout
    return Replay(order_of(config, sets), config.name, config.seed, dropout, config.global_batch_size)


def audit_run(root: Path, stage: str | None = None, part: Part | None = None, processes: int = 1) -> dict[str, Any]:
    """Audits one stage of a run, or all that have attempts.

    Args:
        root: Folder of the run.
        stage: Only this one.
        part: The images whose digests are recomputed; the logs are followed in whole.
        processes: How many recompute.

    Returns:
        The answer as JSON: `proven`, and one entry for each stage.

    Raises:
        ConfigError: There is no such run or stage.
        DataError, CheckpointError: A set, a start file or a checkpoint cannot be read.
    """
    run = open_run(root)
    names = [stage] if stage else _begun(run)
    stages = [audit_stage(_Stage.open(run, name), part or Part(), processes) for name in names]
    return {"run": str(root), "proven": all(each["violation"] is None for each in stages), "stages": stages}


def _begun(run: RunLayout) -> list[str]:
    names = files.read_json(run.manifest, error=ConfigError)["stages"]
    return [name for name in names if run.stage(name).all_attempts()]


def audit_stage(stage: _Stage, part: Part, processes: int) -> dict[str, Any]:
    """One stage's answer as JSON."""
    batch, history = stage.config.global_batch_size, stage.history
    followed = follow(history, stage.logs, batch)
    violation = _other_data(stage) or _wrong_length(stage) or _unrecorded(stage)
    outcome, seconds, first, last = Outcome(Coverage(0)), 0.0, 1, 0
    if violation is None:
        clocks = check_clocks(followed.steps, history.marks, batch)
        first, last = part.steps(batch, len(followed.steps) if clocks is None or clocks.step is None else clocks.step)
        began = time.monotonic()
        outcome, fault = _recompute(stage, followed, first, last, processes)
        seconds = time.monotonic() - began
        violation = fault or clocks or followed.violation
    now = stage.eras[-1].replay.order
    return {
        "stage": stage.config.name,
        "done": history.done,
        "batch": batch,
        "steps": history.images_seen // batch,
        "total_steps": stage.config.total_steps,
        "samples": now.num_samples,
        "proven": {
            "from_step": first,
            "to_step": first + outcome.steps - 1,
            "steps": outcome.steps,
            "images": outcome.steps * batch,
            "passes": outcome.steps * batch / now.num_samples,
        },
        "attempts": _attempts(stage, followed),
        "rework": {"steps": sum(followed.rework.values()), "images": sum(followed.rework.values()) * batch},
        "open_steps": followed.open,
        "skipped_steps": sum(not step.applied and not step.left_out for step in followed.steps),
        "left_out_steps": sum(step.left_out for step in followed.steps),
        "order": now.fingerprint,
        "orders": [
            {"from_step": era.first, "to_step": era.last, "order": era.replay.order.fingerprint} for era in stage.eras
        ],
        "seconds": round(seconds, 3),
        "samples_per_second": outcome.steps * batch / seconds if seconds > 0 else 0.0,
        "violation": None if violation is None else violation.to_json(),
    }


# ---- the checks ----------------------------------------------------------------------------------------------------


def _recompute(
    stage: _Stage, followed: Followed, first: int, last: int, processes: int
) -> tuple[Outcome, Violation | None]:
    """Recomputes the steps first … last, era by era up to the first fault; how far it came, and the fault."""
    whole = Outcome(Coverage(0))
    for era in stage.eras:
        begin, end = max(first, era.first), min(last, era.last)
        logged = np.array([step.digest for step in followed.steps[begin - 1 : max(0, end)]], np.uint64)
        if begin > end:
            continue
        outcome = recompute(era.replay, begin, logged, era.num_ids, processes)
        whole = replace(outcome, steps=whole.steps + outcome.steps)
        if (fault := _fault(stage, era, followed, outcome, whole=begin == 1 and outcome.steps == end)) is not None:
            return whole, fault
    return whole, None


def _other_data(stage: _Stage) -> Violation | None:
    """Whether a checkpoint of the line was trained on another order of the data than the sets and the recipe give now."""
    for mark in stage.history.marks:
        order = stage.era(mark.images_seen // stage.config.global_batch_size).replay.order.fingerprint
        if mark.order is not None and mark.order != order:
            paths = ", ".join(config.path for config in stage.config.data.sets)
            return Violation(
                "data",
                None,
                f"{mark.name} was trained on another order of the data: a set, a filter or a key of `order` has changed",
                str(mark.path),
                f"put the prepared sets back as they were ({paths}), and the run's stage.yaml",
                logged=mark.order,
                expected=order,
            )
    return None


def _wrong_length(stage: _Stage) -> Violation | None:
    """Whether end and checkpoints stand at whole steps, and a finished stage at its full length."""
    batch, total = stage.config.global_batch_size, stage.config.total_images
    for mark in stage.history.marks:
        if mark.images_seen % batch:
            return _clock(mark, f"{mark.name} is at {mark.images_seen} images, which are no whole steps of {batch}")
        if stage.history.done and mark.path == stage.layout.done and mark.images_seen != total:
            return _clock(mark, f"the stage is said to be done at {mark.images_seen} images; its length is {total}")
    return None


def _unrecorded(stage: _Stage) -> Violation | None:
    """Whether a launch left images out of which the stage's own record says nothing."""
    recorded = read_windows(stage.layout)
    for segment in stage.history.segments:
        for window in segment.skips:
            if window not in recorded:
                what = f"the launch left out {window}, which {stage.layout.skips.name} does not record"
                where = str(stage.layout.attempt(segment.launch[0]).start(segment.launch[1]))
                return Violation("left out", None, what, where, "put both files back", *segment.launch)
    return None


def _clock(mark: Mark, what: str) -> Violation:
    return Violation("clock", None, what, str(mark.path), "put the file back as it was, from a copy of the run")


def _fault(stage: _Stage, era: _Era, followed: Followed, outcome: Outcome, *, whole: bool) -> Violation | None:
    """The first step whose samples or digest are not what they must be; `whole` if they are the stage's from its beginning."""
    if outcome.wrong is None:
        images = outcome.steps * era.replay.batch
        problem = outcome.coverage.problem(images, era.replay.order.num_samples) if whole and images else None
        where = str(stage.layout.attempts)
        return None if problem is None else Violation("visit", outcome.steps, problem, where, _our_fault())
    line = followed.steps[outcome.wrong - 1]
    if outcome.expected is None:
        return _at(line, "visit", outcome.wrong, f"{outcome.fault}: samples are lost or repeated", _our_fault())
    found = explain(era.replay, outcome.wrong, line.digest, stage.config.total_steps)
    return replace(
        _at(
            line,
            "digest",
            outcome.wrong,
            f"the digest is not that of the step's samples, timesteps and noise: {found}",
            "if the log was changed, put it back from a copy; if not, train again from a checkpoint before this step",
        ),
        logged=f"{line.digest:016x}",
        expected=f"{outcome.expected:016x}",
    )


def _at(line: Logged, kind: str, step: int, what: str, remedy: str) -> Violation:
    return Violation(kind, step, what, line.where, remedy, line.attempt, line.launch)


def _our_fault() -> str:
    return "this is a fault of the order of the data, not of your run: report it with the stage's stage.yaml"


def _attempts(stage: _Stage, followed: Followed) -> list[dict[str, Any]]:
    """One entry for each launch that logged a step or whose steps count, in their sequence."""
    on_line = {segment.launch: segment for segment in stage.history.segments}
    numbers = {(log.attempt, step.launch) for log in stage.logs for step in log.steps} | set(on_line)
    batch = stage.config.global_batch_size
    entries = []
    for attempt, launch in sorted(numbers):
        segment = on_line.get((attempt, launch))
        entries.append(
            {
                "attempt": attempt,
                "launch": launch,
                "world_size": _world(stage, attempt, launch),
                "from_step": None if segment is None else segment.after // batch + 1,
                "to_step": None if segment is None else segment.upto // batch,
                "rework_steps": followed.rework.get((attempt, launch), 0),
            }
        )
    return entries


def _world(stage: _Stage, attempt: int, launch: int) -> int | None:
    """Ranks of a launch: as its lines say, else as its attempt's supervisor wrote."""
    for log in stage.logs:
        for step in log.steps:
            if (log.attempt, step.launch) == (attempt, launch) and step.world_size is not None:
                return step.world_size
    env = stage.layout.attempt(attempt).env
    return files.read_json(env).get("world_size") if env.exists() else None


# ---- one step ------------------------------------------------------------------------------------------------------


def show_step(root: Path, stage: str | None, step: int) -> dict[str, Any]:
    """The samples of a step, with what was drawn for them, as JSON; steps count from 1, as in metrics.jsonl.

    Raises:
        ConfigError: There is no such stage or step, or it is not said which stage is meant.
        DataError: The sets are no longer those that the checkpoints were trained on.
    """
    run = open_run(root)
    begun = _begun(run)
    if stage is None and len(begun) != 1:
        raise ConfigError(
            f"--step {step} does not say of which stage",
            remedy=f"add --stage, one of: {', '.join(begun) or 'none has begun'}",
        )
    opened = _Stage.open(run, stage or begun[0])
    if not 1 <= step <= opened.config.total_steps:
        raise ConfigError(f"--step {step}: {opened.config.name} has the steps 1 to {opened.config.total_steps}")
    if (other := _other_data(opened)) is not None:
        raise DataError(other.what, where=other.where, remedy=other.remedy)
    era = opened.era(step)
    drawn = era.replay.draw(era.replay.plan(step))
    followed = follow(opened.history, opened.logs, opened.config.global_batch_size)
    line = followed.steps[step - 1] if step <= len(followed.steps) else None
    lost = followed.violation if line is None and step * era.replay.batch <= opened.history.images_seen else None
    plan, batch = drawn.plan, opened.config.global_batch_size
    columns = {
        "sample_id": plan.sample_id,
        "set": plan.set_index,
        "part": [int(era.sets[s].parts[g]) for s, g in zip(plan.set_index, plan.group, strict=True)],
        "row": plan.row,
        "visit": plan.visit,
        "bucket": plan.bucket,
        "timestep": drawn.timesteps,
        "dropped": drawn.dropped,
    }
    rows = [
        dict(zip(columns, values, strict=True))
        for values in zip(*(np.asarray(c).tolist() for c in columns.values()), strict=True)
    ]
    for row, key, name in zip(rows, drawn.noise_keys.tolist(), _names(era, drawn.plan), strict=True):
        row |= {"noise_key": f"{key:016x}", "name": name}
    return {
        "run": str(root),
        "stage": opened.config.name,
        "step": step,
        "from_image": (step - 1) * batch + 1,
        "to_image": step * batch,
        "digest": f"{drawn.digest:016x}",
        "logged": None
        if line is None
        else {
            "digest": f"{line.digest:016x}",
            "attempt": line.attempt,
            "launch": line.launch,
            "applied": line.applied,
            "left_out": line.left_out,
        },
        "proven": lost is None if line is None else line.digest == (LEFT_OUT if line.left_out else drawn.digest),
        "violation": None if lost is None else lost.to_json(),
        "sets": [config.path for config in era.config.data.sets],
        "samples": rows,
    }


def _names(era: _Era, plan: StepPlan) -> list[str]:
    """The pictures' names."""
    found = [""] * len(plan)
    for number, prepared in enumerate(era.sets):
        mine = np.flatnonzero(plan.set_index == number)
        if not len(mine):
            continue
        first = prepared.counts.cumsum() - prepared.counts
        names = prepared.names_of(first[plan.group[mine]] + plan.row[mine])
        for place, name in zip(mine.tolist(), names, strict=True):
            found[place] = name
    return found
