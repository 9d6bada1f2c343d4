"""How long training goes on between two recovery checkpoints, as far as that is known before it starts. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable

from pixart_ds import files
from pixart_ds.config.schema import StageConfig
from pixart_ds.errors import DataError
from pixart_ds.layout import RunLayout

_SAVE_S = 60.0
"""What a save is taken to cost where Daly's rule decides: more than it does, so that the interval is rather too long."""


def checkpoint_interval_s(run: RunLayout, stage: StageConfig, estimated: Callable[[], float | None]) -> float | None:
    """Seconds between two recovery checkpoints; None if nobody knows.

    Args:
        run, stage: What is trained; the newest attempt that has said its rate counts.
        estimated: Images a second of all GPUs where none has; asked only then.
    """
    if stage.checkpoint.every is None:  # by Daly's rule, whose interval is well below the mean time that is given
        hours = stage.checkpoint.mean_time_between_failures_hours
        return None if hours is None else math.sqrt(2 * _SAVE_S * 3600 * hours)
    rate = measured_rate(run, stage) or estimated()
    return stage.checkpoint.every.in_images(stage.global_batch_size) / rate if rate else None


def measured_rate(run: RunLayout, stage: StageConfig) -> float | None:
    """Images a second of the newest attempt that has said it."""
    for attempt in reversed(run.stage(stage.name).all_attempts()):
        try:
            row = files.last_json_line(attempt.metrics)
        except DataError:  # a line that a killed launch left torn
            continue
        if row and row.get("images_per_second"):
            return float(row["images_per_second"])
    return None
