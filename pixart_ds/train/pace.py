"""When the next checkpoint is due: after so many images, or when what a failure would lose is worth what a save costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pixart_ds.config.schema import CheckpointConfig
from pixart_ds.engine.shelf import Committed

_FIRST_COST_S = 1.0
"""Assumed until a save was measured: then the first one comes early, and says."""
_WRITING_SHARE = 0.25
"""Of the time, at most, in which a checkpoint is being written behind training."""


def daly_interval(cost_s: float, mean_time_between_failures_s: float) -> float:
    """The seconds of work between two saves for which a job's expected length is least.

    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, 2006, eq. 37; its first term is
    Young's √(2 δ M).

    Args:
        cost_s: δ, seconds for which a save stops the work.
        mean_time_between_failures_s: M, of the whole job.
    """
    if cost_s >= 2 * mean_time_between_failures_s:
        return mean_time_between_failures_s
    part = cost_s / (2 * mean_time_between_failures_s)
    return math.sqrt(2 * cost_s * mean_time_between_failures_s) * (1 + math.sqrt(part) / 3 + part / 9) - cost_s


class Pace:
    """Says when a checkpoint is due by the clock on the wall; a rank's own opinion, on which the ranks must agree.

    Args:
        config: With `mean_time_between_failures_hours`; without it, this is never due.
        clock: Seconds.
    """

    def __init__(self, config: CheckpointConfig, clock: Callable[[], float] = time.monotonic) -> None:
        hours = config.mean_time_between_failures_hours
        self._failures_s = None if hours is None else 3600 * hours
        self._clock = clock
        self._last = clock()
        self._committed: Committed | None = None

    @property
    def interval_s(self) -> float:
        """Seconds between two saves: Daly's, from the stall measured last, but with at most a quarter of the time spent writing."""
        if self._failures_s is None:
            return math.inf
        if self._committed is None:
            return daly_interval(_FIRST_COST_S, self._failures_s)
        writing = self._committed.commit_s / _WRITING_SHARE
        return max(daly_interval(self._committed.stall_s, self._failures_s), writing)

    @property
    def due(self) -> bool:
        return self._clock() - self._last >= self.interval_s

    @property
    def stall_s(self) -> float | None:
        """Seconds for which training stood still for the last checkpoint that was committed."""
        return None if self._committed is None else round(self._committed.stall_s, 4)

    def begun(self) -> None:
        """A save has begun now."""
        self._last = self._clock()

    def committed(self, what: Committed) -> None:
        """A save was measured."""
        self._committed = what
