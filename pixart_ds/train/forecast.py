"""When a stage, and the stages after it, will be done: by the time that this launch has needed so far."""

from __future__ import annotations

from pixart_ds import files
from pixart_ds.config.freeze import read_stage
from pixart_ds.config.schema import StageConfig
from pixart_ds.layout import RunLayout
from pixart_ds.plan.counts import Net, training_flops


class Forecast:
    """Time left, by the pace since this launch's first step: saves and previews are in it, starts and lost nodes are not.

    Args:
        total_images: Length of the stage.
        images_ahead: What comes after it, see `images_ahead`.
    """

    def __init__(self, total_images: int, images_ahead: float = 0.0) -> None:
        self._total, self._ahead = total_images, images_ahead
        self._first: tuple[int, float] | None = None
        self._pace: float | None = None
        self._images_seen = 0

    def record(self, images_seen: int, now: float) -> None:
        """A step ended `now`, in seconds of a steady clock."""
        self._images_seen = images_seen
        if self._first is None:
            self._first = (images_seen, now)
        elif images_seen > self._first[0]:
            self._pace = (now - self._first[1]) / (images_seen - self._first[0])

    @property
    def seconds_left(self) -> float | None:
        """Of the stage; None before the second step."""
        return None if self._pace is None else self._pace * (self._total - self._images_seen)

    @property
    def chain_seconds_left(self) -> float | None:
        """Of the stage and all that come after it, on the same GPUs."""
        return None if self._pace is None else self._pace * (self._total - self._images_seen + self._ahead)


def images_ahead(run: RunLayout, stage: StageConfig) -> float:
    """The images of the stages after this one that are not done, each worth as many of this stage's images as its FLOPs say.

    So a forecast assumes that later stages compute as many FLOPs in a second as this one.
    """
    names = list(files.read_json(run.manifest)["stages"])
    later = names[names.index(stage.name) + 1 :]
    return sum(
        each.total_images * _flops(each) / _flops(stage)
        for each in (read_stage(run, name) for name in later if not run.stage(name).done.exists())
    )


def _flops(stage: StageConfig) -> int:
    return training_flops(Net.of(stage.model))
