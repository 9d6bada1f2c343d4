"""One entry: the devices that one launch of an attempt held, from when to when, where the time went, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

FORMAT = 2
"""Of a line; those of format 1 have no parts, energy or names of devices, and no number of a format."""

PARTS = ("productive", "startup", "data_wait", "checkpoint", "evaluation", "rework", "idle", "unattributed")
"""What an allocation's time is divided into; together they are all of it (docs/cost.md)."""


@dataclass(frozen=True)
class Entry:
    """A launch's account. It is written at its start, while it runs, and at its end; the last line counts.

    Attributes:
        stage, attempt, launch: Whose.
        device: cpu or cuda.
        device_count: Devices held; on a CPU one core for each rank.
        started, until: Unix seconds; `until` is when the entry was last known to be true.
        outcome: running, done, stopped, failed, rolled back; `running` in the last line of a supervisor that was killed.
        images_from, images_to: The stage's clock at start and at `until`.
        cause: Why it ended, where it was not done.
        job: Number of Slurm's job.
        user: Whose processes they are.
        hosts: Where the ranks were.
        device_model: What the devices call themselves.
        device_kind: What the table of rates calls them; None for those that it does not have.
        pause_s: Seconds between `started` and the start of the ranks.
        parts: Seconds by category, see `PARTS`; what is missing to the whole is unattributed.
        flops: Of the model, over all ranks, without recomputation.
        peak_flops: What all devices together can do in a second.
        energy: What was measured, see `energy_of`; empty if nothing was.
        site: What the job's profile says of price, grid and PUE.
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
    cause: str | None = None
    job: str | None = None
    user: str | None = None
    hosts: tuple[str, ...] = ()
    device_model: str | None = None
    device_kind: str | None = None
    pause_s: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    flops: float = 0.0
    peak_flops: float | None = None
    energy: Mapping[str, Any] = field(default_factory=dict)
    site: Mapping[str, Any] = field(default_factory=dict)

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

    def divided(self, pulses: Sequence[Mapping[str, Any]], *, ended: bool) -> Entry:
        """The entry with what the ranks have last said of themselves (`train.pulse`).

        Args:
            pulses: Of this launch; none if no rank has come that far.
            ended: Whether the ranks have left.
        """
        first = next((pulse for pulse in pulses if pulse["rank"] == 0), {})
        hosts = sorted({str(pulse["host"]) for pulse in pulses if "host" in pulse})
        return replace(
            self,
            hosts=tuple(hosts) or self.hosts,
            device_model=first.get("device_model", self.device_model),
            device_kind=first.get("device_kind", self.device_kind),
            peak_flops=first.get("peak_flops", self.peak_flops),
            flops=float(first.get("flops", self.flops)),
            parts=parts_of(self, first, ended=ended),
            energy=energy_of([pulse["energy"] for pulse in pulses if pulse.get("energy")]) or self.energy,
        )

    def ended_as(self, outcome: str, cause: str | None = None) -> Entry:
        """The entry with its ending."""
        return replace(self, outcome=outcome, cause=cause)

    @property
    def seconds(self) -> float:
        return max(0.0, self.until - self.started)

    @property
    def images(self) -> int:
        """Images that the launch trained on; rework counts."""
        return max(0, self.images_to - self.images_from)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Entry:
        """An entry from a line's values.

        Raises:
            ValueError: It is of a later format, or keys are missing or no numbers.
        """
        if not isinstance(values, Mapping):
            raise ValueError("it is no entry")
        if int(values.get("format", 1)) > FORMAT:
            raise ValueError(f"it is of the later format {values['format']}; this version reads up to {FORMAT}")
        known = {name: value for name, value in values.items() if name in _NAMES}
        missing = [name for name in _REQUIRED if name not in known]
        if missing:
            raise ValueError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        made = cls(**{**known, "hosts": tuple(known.get("hosts") or ())})
        if not all(isinstance(getattr(made, name), int | float) for name in _NUMBERS):
            raise ValueError(f"one of {', '.join(_NUMBERS)} is no number")
        return made


_NAMES = frozenset(each.name for each in fields(Entry))
_NUMBERS = ("attempt", "launch", "device_count", "started", "until", "images_from", "images_to", "flops")
_REQUIRED = ("stage", "attempt", "launch", "device", "device_count", "started", "until", "outcome", *_NUMBERS[5:7])


def parts_of(entry: Entry, first: Mapping[str, Any], *, ended: bool) -> dict[str, float]:
    """Seconds of a launch by category: what rank 0 has told, and what lies before and after it.

    Before rank 0 was there, all is start-up; a pause before another launch is idle. When the ranks have left, what came after rank
    0's last word is idle: ranks that hang, or that leave; of a launch that runs, or that nobody saw the end of, it is unattributed.

    Args:
        entry: With `until` as it shall be.
        first: Rank 0's last sign of life; empty if there was none.
        ended: Whether the ranks are known to have left.
    """
    whole = entry.seconds
    pause = min(entry.pause_s, whole)
    told = {name: max(0.0, float(seconds)) for name, seconds in dict(first.get("parts", {})).items() if name in PARTS}
    alive = sum(told.values())
    room = whole - pause
    if alive > room:  # clocks of two processes: a matter of milliseconds
        told = {name: seconds * room / alive for name, seconds in told.items()}
        alive = room
    began = float(first.get("began", entry.started + pause))
    before = min(max(0.0, began - entry.started - pause), room - alive) if first else (room if ended else 0.0)
    after = room - alive - before
    parts = dict.fromkeys(PARTS, 0.0) | told
    parts["startup" if entry.launch == 1 else "idle"] += pause
    parts["startup"] += before
    parts["idle" if ended else "unattributed"] += after
    return {name: round(seconds, 3) for name, seconds in parts.items() if seconds > 0}


def energy_of(readings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The readings of all nodes together: joules, the device-seconds that they cover by source, and notes."""
    if not readings:
        return {}
    sources: dict[str, float] = {}
    joules: dict[str, float] = {}
    for reading in readings:
        source = str(reading["source"])
        sources[source] = sources.get(source, 0.0) + float(reading["device_seconds"])
        joules[source] = joules.get(source, 0.0) + float(reading["joules"])
    notes = sorted({str(reading["note"]) for reading in readings if reading.get("note")})
    return {"joules": joules, "device_seconds": sources, "notes": notes}
