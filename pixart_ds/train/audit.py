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
    Violation,
    check_clocks,
    follow,
    read_history,
    read_log,
)
from pixart_ds.train.replay import Coverage, Outcome, Replay, explain
from pixart_ds.train.replay_pool import recompute
from pixart_ds.train.sets import open_sets, order_of


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
class _Stage:
    """A stage as the audit reads it."""

    config: StageConfig
    layout: StageLayout
    sets: list[PreparedSet]
    history: History
    logs: list[Log]
    replay: Replay

    @classmethod
    def open(cls, run: RunLayout, name: str) -> _Stage:
        config, layout = read_stage(run, name), run.stage(name)
        sets = open_sets(config)
        history = read_history(layout)
        logs = [read_log(attempt) for attempt in layout.all_attempts()]
        return cls(config, layout, sets, history, logs, _replay(config, sets))

    @property
    def num_ids(self) -> int:
        return sum(prepared.num_samples for prepared in self.sets)


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
    violation = _other_data(stage) or _wrong_length(stage)
    outcome, seconds, first, last = Outcome(Coverage(0)), 0.0, 1, 0
    if violation is None:
        clocks = check_clocks(followed.steps, history.marks, batch)
        first, last = part.steps(batch, len(followed.steps) if clocks is None or clocks.step is None else clocks.step)
        began = time.monotonic()
        logged = np.array([step.digest for step in followed.steps[first - 1 : max(0, last)]], np.uint64)
        outcome = recompute(stage.replay, first, logged, stage.num_ids, processes)
        seconds = time.monotonic() - began
        violation = _fault(stage, followed, outcome, first, last) or clocks or followed.violation
    return {
        "stage": stage.config.name,
        "done": history.done,
        "batch": batch,
        "steps": history.images_seen // batch,
        "total_steps": stage.config.total_steps,
        "samples": stage.replay.order.num_samples,
        "proven": {
            "from_step": first,
            "to_step": first + outcome.steps - 1,
            "steps": outcome.steps,
            "images": outcome.steps * batch,
            "passes": outcome.steps * batch / stage.replay.order.num_samples,
        },
        "attempts": _attempts(stage, followed),
        "rework": {"steps": sum(followed.rework.values()), "images": sum(followed.rework.values()) * batch},
        "open_steps": followed.open,
        "skipped_steps": sum(not step.applied for step in followed.steps),
        "order": stage.replay.order.fingerprint,
        "seconds": round(seconds, 3),
        "samples_per_second": outcome.steps * batch / seconds if seconds > 0 else 0.0,
        "violation": None if violation is None else violation.to_json(),
    }


# ---- the checks ----------------------------------------------------------------------------------------------------


def _other_data(stage: _Stage) -> Violation | None:
    """Whether a checkpoint of the line was trained on another order of the data than the sets and the recipe give now."""
    order = stage.replay.order.fingerprint
    for mark in stage.history.marks:
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


def _clock(mark: Mark, what: str) -> Violation:
    return Violation("clock", None, what, str(mark.path), "put the file back as it was, from a copy of the run")


def _fault(stage: _Stage, followed: Followed, outcome: Outcome, first: int, last: int) -> Violation | None:
    """The first step whose samples or digest are not what they must be."""
    if outcome.wrong is None:
        images = outcome.steps * stage.replay.batch
        whole = first == 1 and outcome.steps == last
        problem = outcome.coverage.problem(images, stage.replay.order.num_samples) if whole and images else None
        return None if problem is None else Violation("visit", last, problem, str(stage.layout.attempts), _our_fault())
    line = followed.steps[outcome.wrong - 1]
    if outcome.expected is None:
        return _at(line, "visit", outcome.wrong, f"{outcome.fault}: samples are lost or repeated", _our_fault())
    found = explain(stage.replay, outcome.wrong, line.digest, stage.config.total_steps)
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
    drawn = opened.replay.draw(opened.replay.plan(step))
    followed = follow(opened.history, opened.logs, opened.config.global_batch_size)
    line = followed.steps[step - 1] if step <= len(followed.steps) else None
    lost = followed.violation if line is None and step * opened.replay.batch <= opened.history.images_seen else None
    plan, batch = drawn.plan, opened.config.global_batch_size
    columns = {
        "sample_id": plan.sample_id,
        "set": plan.set_index,
        "part": [int(opened.sets[s].parts[g]) for s, g in zip(plan.set_index, plan.group, strict=True)],
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
    for row, key, name in zip(rows, drawn.noise_keys.tolist(), _names(opened, drawn.plan), strict=True):
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
        else {"digest": f"{line.digest:016x}", "attempt": line.attempt, "launch": line.launch, "applied": line.applied},
        "proven": line.digest == drawn.digest if line is not None else lost is None,
        "violation": None if lost is None else lost.to_json(),
        "sets": [config.path for config in opened.config.data.sets],
        "samples": rows,
    }


def _names(stage: _Stage, plan: StepPlan) -> list[str | None]:
    """The pictures' names, where the set's rows are at hand."""
    found: list[str | None] = [None] * len(plan)
    for number, (prepared, config) in enumerate(zip(stage.sets, stage.config.data.sets, strict=True)):
        path = Path(config.path) / "rows.npz"
        mine = np.flatnonzero(plan.set_index == number)
        if not path.exists() or not len(mine):
            continue
        with np.load(path, allow_pickle=False) as columns:
            names = columns["name"]
        first = prepared.counts.cumsum() - prepared.counts
        for place, at in zip(mine.tolist(), (first[plan.group[mine]] + plan.row[mine]).tolist(), strict=True):
            found[place] = str(names[at])
    return found
