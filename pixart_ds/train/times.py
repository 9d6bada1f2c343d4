"""Where a rank's seconds go: every moment from its start on belongs to one category; pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Phase = Literal["start", "data", "compute", "together", "save", "preview"]
"""What a rank is at: `together` is waiting for the other ranks, in a collective."""

_OUTSIDE_STEPS = {"start": "startup", "save": "checkpoint", "preview": "evaluation"}


class Times:
    """Seconds by category (`ledger.entries.PARTS`): they sum up to the time since it was made.

    Time in a step waits until the step has ended: only then it is known whether it moved training on. What was spent on a step
    that never ended is idle.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._phase: Phase = "start"
        self._since = clock()
        self._parts: dict[str, float] = {}
        self._step_s = 0.0
        self.flops = 0.0

    def enter(self, phase: Phase) -> None:
        """Says what comes now."""
        self._settle()
        self._phase = phase

    def step_ended(self, *, data_wait_s: float, moved: bool, flops: float) -> None:
        """A step has ended.

        Args:
            data_wait_s: For which the slowest rank waited for data.
            moved: Whether it took training further than it had ever been: a step that is repeated, or refused, did not.
            flops: Of the model, over all ranks, without recomputation.
        """
        self._settle()
        if moved:
            wait = min(data_wait_s, self._step_s)
            self._add("data_wait", wait)
            self._add("productive", self._step_s - wait)
        else:
            self._add("rework", self._step_s)
        self._step_s = 0.0
        self.flops += flops

    def parts(self) -> dict[str, float]:
        """Seconds by category up to now."""
        found = dict(self._parts)
        for category, seconds in (("idle", self._step_s), (self._category(), self._clock() - self._since)):
            if seconds > 0:
                found[category] = found.get(category, 0.0) + seconds
        return {name: round(seconds, 3) for name, seconds in found.items()}

    def _category(self) -> str:
        return _OUTSIDE_STEPS.get(self._phase, "idle")

    def _settle(self) -> None:
        now = self._clock()
        if self._phase in _OUTSIDE_STEPS:
            self._add(self._category(), now - self._since)
        else:
            self._step_s += now - self._since
        self._since = now

    def _add(self, category: str, seconds: float) -> None:
        self._parts[category] = self._parts.get(category, 0.0) + seconds
