"""One entry: the devices that one launch of an attempt held, from when to when, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pixart_ds.units import DeviceTime

Source = Literal["estimate", "nvml", "sacct"]


@dataclass(frozen=True)
class Entry:
    """A launch's account. It is written at its start, while it runs, and at its end; the last line counts.

    Attributes:
        stage, attempt, launch: Whose.
        device: cpu or cuda.
        device_count: Devices held; on a CPU one core for each rank.
        started, until: Unix seconds; `until` is when the entry was last known to be true.
        outcome: running, done, stopped, failed; `running` in the last line of a supervisor that was killed.
        images_from, images_to: The stage's clock at start and at `until`.
        source: How the figures are known.
    """

    stage: str
    attempt: int
    launch: int
    device: str
    device_count: int
    started: float
    until: float
    outcome: str
    images_from: int
    images_to: int
    source: Source = "estimate"

    @classmethod
    def start(
        cls, stage: str, attempt: int, launch: int, device: str, device_count: int, started: float, images_seen: int
    ) -> Entry:
        """The entry as a launch begins."""
        return cls(stage, attempt, launch, device, device_count, started, started, "running", images_seen, images_seen)

    def from_clock(self, images_seen: int) -> Entry:
        """The entry once it is known at which clock the launch has started: earlier than its forerunners' if it was sent back."""
        if self.images_from == images_seen:
            return self
        return replace(self, images_from=images_seen, images_to=images_seen)

    def still_running(self, now: float, metrics: Mapping[str, Any]) -> Entry:
        """The entry at a later moment, from the newest line of the metrics."""
        return replace(self, until=now, images_to=int(metrics.get("images_seen", self.images_to)))

    def ended_as(self, outcome: str) -> Entry:
        """The entry with its ending."""
        return replace(self, outcome=outcome)

    @property
    def device_time(self) -> DeviceTime:
        return DeviceTime((self.until - self.started) * self.device_count)

    @property
    def images(self) -> int:
        """Images that the launch trained on; rework counts."""
        return max(0, self.images_to - self.images_from)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Entry:
        return cls(**values)
