"""Where a stage stands: the clock in images and what became of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pixart_ds.train.skips import Window


@dataclass
class TrainState:
    """The clock of a stage.

    Attributes:
        images_seen: Images of this stage that were consumed, also by skipped steps.
        applied_steps: Optimizer updates that were applied; warm-up counts these.
        skipped_steps: Steps that changed no weight: all ranks refused them because of non-finite numbers, or they are left out.
        skips: The windows of images that are left out.
    """

    images_seen: int = 0
    applied_steps: int = 0
    skipped_steps: int = 0
    skips: tuple[Window, ...] = ()

    def advance(self, images: int, applied: bool) -> None:
        """Counts one step of `images` images."""
        self.images_seen += images
        if applied:
            self.applied_steps += 1
        else:
            self.skipped_steps += 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        counts = {name: int(values[name]) for name in ("images_seen", "applied_steps", "skipped_steps")}
        return cls(**counts, skips=windows_of(values))

    def leaves_out(self, images_seen: int) -> bool:
        """Whether the step that begins at this clock is left out."""
        return any(window.holds(images_seen) for window in self.skips)


def windows_of(values: Mapping[str, Any]) -> tuple[Window, ...]:
    """The windows in a state's JSON; older ones have none."""
    return tuple(Window(row["after"], row["upto"]) for row in values.get("skips", ()))


def passed(interval: int, before: int, after: int) -> bool:
    """Whether a multiple of `interval` lies in (before, after]."""
    return after // interval > before // interval
