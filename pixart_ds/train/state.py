"""Where a stage stands: the clock in images and what became of its steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """The clock of a stage.

    Attributes:
        images_seen: Images of this stage that were consumed, also by skipped steps.
        applied_steps: Optimizer updates that were applied; warm-up counts these.
        skipped_steps: Updates that all ranks refused because of non-finite numbers.
    """

    images_seen: int = 0
    applied_steps: int = 0
    skipped_steps: int = 0

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
        return cls(**{name: int(values[name]) for name in cls.__dataclass_fields__})


def passed(interval: int, before: int, after: int) -> bool:
    """Whether a multiple of `interval` lies in (before, after]."""
    return after // interval > before // interval
