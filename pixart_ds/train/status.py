"""Where each stage of a run stands, read from its folder alone."""

from __future__ import annotations

from typing import Any

from pixart_ds import files
from pixart_ds.config.freeze import read_stage
from pixart_ds.engine import line
from pixart_ds.errors import ConfigError
from pixart_ds.layout import AttemptLayout, RunLayout, StageLayout
from pixart_ds.log import duration, si
from pixart_ds.train.attempt import last_metrics
from pixart_ds.train.pulse import read_pulses, slow_ranks, slow_words


def run_status(run: RunLayout) -> list[dict[str, Any]]:
    """One row for each stage: state, images, attempts, the newest checkpoint, the last loss, the time left at the last pace."""
    return [_row(run, name) for name in files.read_json(run.manifest, error=ConfigError)["stages"]]


def _row(run: RunLayout, name: str) -> dict[str, Any]:
    stage, layout = read_stage(run, name), run.stage(name)
    attempts = layout.all_attempts()
    last = _newest_metrics(attempts)
    outcomes = [files.read_json(a.outcome)["outcome"] if a.outcome.exists() else "running or lost" for a in attempts]
    if layout.done.exists():
        state = "done"
    elif attempts:
        state = outcomes[-1]
    else:
        state = "not started"
    return {
        "stage": name,
        "state": state,
        "images_seen": int(last.get("images_seen", 0)),
        "total_images": stage.total_images,
        "attempts": len(attempts),
        "outcomes": outcomes,
        "checkpoint": _newest(layout),
        "loss": last.get("loss"),
        "seconds_left": None if state == "done" else last.get("seconds_left"),
        "chain_seconds_left": None if state == "done" else last.get("chain_seconds_left"),
        "slow_ranks": slow_ranks(read_pulses(attempts[-1])) if state == "running or lost" else [],
    }


def _newest(layout: StageLayout) -> str | None:
    names = line.committed(layout)
    return str(names[-1]) if names else None


def _newest_metrics(attempts: list[AttemptLayout]) -> dict[str, Any]:
    return next((row for attempt in reversed(attempts) if (row := last_metrics(attempt))), {})


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [f"{'stage':<14}{'state':<18}{'images':>20}{'attempts':>10}{'loss':>9}{'left':>14}  newest checkpoint"]
    for row in rows:
        images = f"{si(row['images_seen'])} of {si(row['total_images'])}"
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        left = "-" if row["seconds_left"] is None else duration(row["seconds_left"])
        numbers = f"{images:>20}{row['attempts']:>10}{loss:>9}{left:>14}"
        lines.append(f"{row['stage']:<14}{row['state']:<18}{numbers}  {row['checkpoint'] or '-'}")
    slow = [(row["stage"], each) for row in rows for each in row["slow_ranks"]]
    return "\n".join([*lines, *(f"{stage}: {slow_words(each)}" for stage, each in slow)])
