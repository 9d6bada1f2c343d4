"""Judges each step: losses that are no numbers for too long, or far above what they were, send training back."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixart_ds.config.schema import GuardConfig
from pixart_ds.train.skips import Window

_MAD_TO_SIGMA = 1.4826
"""Of a normal distribution: σ over the median absolute deviation."""
_LEAST_HISTORY = 50
_LEAST_RISE = 0.5
"""Of the median: a loss that hardly scatters may still rise by half."""


@dataclass(frozen=True)
class Verdict:
    """Training has gone wrong.

    Attributes:
        window: The images where it did; they are to be left out.
        reason: For people.
    """

    window: Window
    reason: str


class Guard:
    """Watches a stage's steps. Ranks that see the same figures come to the same verdict.

    Args:
        config: The bounds.
        batch: Images of a step.
        kept: What `to_json` gave for a checkpoint; older ones hold the losses alone.
    """

    def __init__(self, config: GuardConfig, batch: int, kept: Mapping[str, Any] | Sequence[float] = ()) -> None:
        self.config, self.batch = config, batch
        history: Mapping[str, Any] = kept if isinstance(kept, Mapping) else {"losses": kept}
        self._losses = deque(history.get("losses", ()), config.history_steps)
        self._high = int(history.get("high", 0))
        self._refused = False

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint: the losses of the last applied steps that were not too high, oldest first, and how many were since.

        Without that number a stop amid a spike would make its own checkpoint look like one from before.
        """
        return {"losses": list(self._losses), "high": self._high}

    @property
    def doubts(self) -> bool:
        """Whether the last step was refused, or the last loss too high: a checkpoint made now may lie inside a window."""
        return self._refused or self._high > 0

    @property
    def bound(self) -> float | None:
        """The highest loss that is not a spike: median + factor · 1.4826 · MAD of the history, at least 1.5 times the median.

        None while there is too little history, or spikes are not looked for.
        """
        if self.config.spike_factor is None or len(self._losses) < min(_LEAST_HISTORY, self.config.history_steps):
            return None
        middle = statistics.median(self._losses)
        scatter = statistics.median(abs(loss - middle) for loss in self._losses)
        return middle + max(self.config.spike_factor * _MAD_TO_SIGMA * scatter, _LEAST_RISE * abs(middle))

    def judge(self, images_before: int, *, loss: float, applied: bool, consecutive_skips: int) -> Verdict | None:
        """What a step says of the training.

        Args:
            images_before: The clock at which it began.
            loss: Mean over all ranks' samples.
            applied: Whether it changed the weights.
            consecutive_skips: Steps refused in a row, up to this one.

        Returns:
            None if training may go on.
        """
        upto = images_before + self.batch
        self._refused = consecutive_skips > 0
        if consecutive_skips >= self.config.consecutive_skips:
            window = Window(upto - consecutive_skips * self.batch, upto)
            return Verdict(window, f"{consecutive_skips} steps in a row had a loss or gradient that is not finite")
        if not applied:
            return None
        bound = self.bound
        if bound is None or loss <= bound:
            self._losses.append(loss)
            self._high = 0
            return None
        self._high += 1
        if self._high < self.config.spike_steps:
            return None
        window = Window(upto - self._high * self.batch, upto)
        return Verdict(window, f"the loss was above {bound:.4g} for {self._high} steps, {loss:.4g} at last")


def is_persistent(config: GuardConfig, batch: int, records: Sequence[dict[str, Any]], window: Window) -> bool:
    """Whether going back has not helped: too many windows were recorded in the steps before this one."""
    near = window.after - config.rollback_steps * batch
    return sum(row["after"] >= near for row in records) >= config.rollbacks
