"""From entries to device-days, kilowatt-hours, kilograms of CO2e and money; and what Slurm's own account changes in them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pixart_ds.errors import ConfigError
from pixart_ds.ledger.entries import PARTS, Entry
from pixart_ds.ledger.sacct import Allocation
from pixart_ds.rates import Assumptions, assume, rate_table
from pixart_ds.units import DeviceTime, Energy

MEASURED = ("nvml-energy", "nvml-power", "rapl")
"""Sources that are measurements; the others, such as a TDP, are assumptions."""
_JOULES_PER_KWH = 3.6e6
_STEPS = ("productive", "data_wait", "rework")


@dataclass(frozen=True)
class Use:
    """What something consumed, in amounts that add up.

    Attributes:
        seconds: Wall time of its allocations.
        parts: Device-seconds by category; they are all of its device-seconds.
        images: That it trained on; rework counts.
        images_gained: By which training came further.
        flops: Of the model.
        peak_flops: What its devices could have done in the time of its steps.
        v100_days, a100_days: Device-days of V100s, and A100-equivalents; None where a device has no stated conversion.
        kwh: With the node's share and PUE.
        kwh_measured: The measured part of it, with PUE.
        energy_s: Device-seconds by how their energy is known; `assumed` is a device's power in the table.
        kg, kg_embodied, usd: Emissions, those of making the devices (None if unknown), dollars.
    """

    seconds: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    images: int = 0
    images_gained: int = 0
    flops: float = 0.0
    peak_flops: float | None = 0.0
    v100_days: float | None = 0.0
    a100_days: float | None = 0.0
    kwh: float = 0.0
    kwh_measured: float = 0.0
    energy_s: Mapping[str, float] = field(default_factory=dict)
    kg: float = 0.0
    kg_embodied: float | None = 0.0
    usd: float = 0.0

    @property
    def device_seconds(self) -> float:
        return sum(self.parts.values())

    def __add__(self, other: Use) -> Use:
        return total((self, other))

    @property
    def _undivided(self) -> bool:
        """Whether nothing is known of where its time went."""
        return not any(seconds for name, seconds in self.parts.items() if name != "unattributed")

    def to_json(self) -> dict[str, Any]:
        """With the ratios that follow; null for what is not known."""
        seconds, millions = self.device_seconds, self.images_gained / 1e6
        measured = sum(self.energy_s.get(source, 0.0) for source in MEASURED)
        return {
            "device_seconds": seconds,
            "device_hours": seconds / 3600,
            "device_days": seconds / 86400,
            "v100_days": self.v100_days,
            "a100_days": self.a100_days,
            "kwh": self.kwh,
            "kwh_measured": self.kwh_measured,
            "energy_coverage": _ratio(measured, seconds),
            "energy_sources": {name: part for name, s in self.energy_s.items() if (part := _ratio(s, seconds))},
            "kg_co2e": self.kg,
            "kg_co2e_embodied": self.kg_embodied,
            "usd": self.usd,
            "images": self.images,
            "images_gained": self.images_gained,
            "seconds": self.seconds,
            "flops": self.flops,
            "parts": {name: self.parts.get(name, 0.0) for name in PARTS},
            "goodput": None if self._undivided else _ratio(self.parts.get("productive", 0.0), seconds),
            "mfu": _ratio(self.flops, self.peak_flops),
            "images_per_second_per_device": _ratio(self.images_gained, seconds),
            "usd_per_million_images": _ratio(self.usd, millions),
            "kwh_per_million_images": _ratio(self.kwh, millions),
            "kg_co2e_per_million_images": _ratio(self.kg, millions),
        }


def total(uses: Iterable[Use]) -> Use:
    """All of them together."""
    every = list(uses)
    found: dict[str, Any] = {}
    for each in fields(Use):
        values = [getattr(use, each.name) for use in every]
        if each.name in ("parts", "energy_s"):
            summed: dict[str, float] = {}
            for value in values:
                for name, seconds in value.items():
                    summed[name] = summed.get(name, 0.0) + seconds
            found[each.name] = summed
        else:
            found[each.name] = None if None in values else sum(values)
    return Use(**found)


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in (*one, *(n for n in other if n not in one))}


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None


def a100_days(v100_days: float, a100_days_per_v100_day: float) -> float:
    """V100-days as A100-days, by a stated ratio."""
    return v100_days * a100_days_per_v100_day


class RatesOf:
    """Which assumptions hold for an entry: options first, then what its job's profile said, then the table.

    Args:
        options: Arguments of `rates.assume`, those that are None being left open.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self._options = {name: value for name, value in (options or {}).items() if value is not None}
        self._known: dict[tuple[Any, ...], Assumptions] = {}

    def __call__(self, entry: Entry) -> Assumptions:
        """The assumptions.

        Raises:
            ConfigError: A device or country that is not in the table; a device of which nobody knows what it is.
        """
        site = {name: value for name, value in entry.site.items() if value is not None and name in _SITE}
        chosen = {**site, **self._options}
        gpu = chosen.pop("gpu", None)
        device = (
            self._options.get("device") or entry.device_kind or (entry.device == "cuda" and _device_of(gpu)) or None
        )
        if device is None and entry.device == "cpu":
            device = "cpu-core"
        if device is None:
            model = (
                "an unknown GPU"
                if entry.device_model is None
                else f"{entry.device_model!r}, which the table does not have"
            )
            raise ConfigError(
                f"{entry.stage}, attempt {entry.attempt} ran on {model}",
                remedy=f"say what to reckon it as: --device {' | '.join(rate_table().devices)}",
            )
        chosen["device"] = device
        key = tuple(sorted(chosen.items()))
        if key not in self._known:
            self._known[key] = assume(**chosen)
        return self._known[key]

    @property
    def used(self) -> list[Assumptions]:
        """Those that were asked for."""
        return list(self._known.values())


def _device_of(gpu: str | None) -> str | None:
    """What the list of devices calls a GPU that a profile names."""
    table = rate_table().estimate.gpus
    if gpu is not None and gpu not in table:
        raise ConfigError(f"there is no gpu {gpu!r} in the table", remedy=f"choose one of: {', '.join(table)}")
    return None if gpu is None else table[gpu].device


_SITE = ("gpu", "country", "pue", "price_per_hour", "grams_per_kwh", "watts", "host_watts")


def use_of(entry: Entry, rates: Assumptions) -> Use:
    """What a launch consumed, by the ledger alone."""
    parts = {name: seconds * entry.device_count for name, seconds in whole_parts(entry).items()}
    return _priced(entry, parts, entry.seconds, rates)


def whole_parts(entry: Entry) -> dict[str, float]:
    """Seconds by category, with what nobody wrote down as `unattributed`: together they are the launch's time."""
    parts = {name: float(seconds) for name, seconds in entry.parts.items() if name in PARTS}
    known = sum(parts.values())
    if known > entry.seconds > 0:
        parts = {name: seconds * entry.seconds / known for name, seconds in parts.items()}
    parts["unattributed"] = parts.get("unattributed", 0.0) + max(0.0, entry.seconds - known)
    return parts


def _priced(entry: Entry, parts: Mapping[str, float], seconds: float, rates: Assumptions) -> Use:
    """With energy, emissions and money.

    What was not measured is taken for as much as the measured part of the same launch, else for the device's power in the table.
    """
    time = DeviceTime(sum(parts.values()))
    joules: Mapping[str, float] = entry.energy.get("joules", {})
    covered: dict[str, float] = dict(entry.energy.get("device_seconds", {}))
    known_s = sum(covered.values())
    if known_s > time.value > 0:  # Slurm's account is a second shorter, or two clocks differ
        joules = {name: value * time.value / known_s for name, value in joules.items()}
        covered = {name: value * time.value / known_s for name, value in covered.items()}
        known_s = time.value
    told, rest = sum(joules.values()), max(0.0, time.value - known_s)
    watts = told / known_s if known_s > 0 else rates.board_watts
    host = rates.host_watts * time.value
    energy = Energy((told + watts * rest + host) / _JOULES_PER_KWH) * rates.pue
    measured = sum(value for name, value in joules.items() if name in MEASURED)
    days, kind = time.days, rates.device.split("-")[0]
    ratio = rate_table().a100_days_per_v100_day.value
    embodied = rates.embodied(time)
    step_s = sum(entry.parts.get(name, 0.0) for name in _STEPS)
    return Use(
        seconds=seconds,
        parts=parts,
        images=entry.images,
        flops=entry.flops,
        peak_flops=None if entry.peak_flops is None else entry.peak_flops * step_s,
        v100_days=days if kind == "v100" else None,
        a100_days={"v100": a100_days(days, ratio), "a100": days}.get(kind),
        kwh=energy.kwh,
        kwh_measured=measured / _JOULES_PER_KWH * rates.pue,
        energy_s={**covered, "assumed": rest} if rest else covered,
        kg=rates.emissions(energy).kg,
        kg_embodied=None if embodied is None else embodied.kg,
        usd=rates.price(time).dollars,
    )


# ---- Slurm's account ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """Slurm's rows held against the attempts of a run.

    Attributes:
        of_attempt: By (stage, attempt): the rows of the allocations that it ran in.
        alone: Rows of the run's jobs in which no attempt began.
    """

    of_attempt: Mapping[tuple[str, int], list[Allocation]]
    alone: list[Allocation]


def match(attempts: Mapping[tuple[str, int], Sequence[Entry]], rows: Iterable[Allocation]) -> Match:
    """Which rows belong to which attempt: those of its job that its time overlaps most."""
    by_job: dict[str, list[tuple[tuple[str, int], float, float]]] = {}
    for key, entries in attempts.items():
        job = next((entry.job for entry in entries if entry.job is not None), None)
        if job is not None:
            by_job.setdefault(job, []).append((key, entries[0].started, max(e.until for e in entries)))
    found: dict[tuple[str, int], list[Allocation]] = {}
    alone: list[Allocation] = []
    for row in rows:
        if row.start is None:
            continue
        start, end = row.start, row.start + row.seconds
        # a second of slack: Slurm's times are whole seconds
        overlaps = [
            (min(end + 1.0, until) - max(start - 1.0, began), key)
            for key, began, until in by_job.get(row.key[0], by_job.get(row.job, []))
        ]
        best = max(overlaps, default=(0.0, None))
        if best[1] is None or best[0] <= 0:
            alone.append(row)
        else:
            found.setdefault(best[1], []).append(row)
    return Match(found, alone)


def divided_by(rows: Sequence[Allocation], entries: Sequence[Entry], uses: Sequence[Use], rates: RatesOf) -> Use:
    """What an attempt consumed where Slurm's rows are the device-seconds and the ledger only divides them.

    From a row's start to the attempt's is start-up: the job's script was on its way. What is left at the end is unattributed.
    """
    gpu_seconds, row_s = sum(row.gpu_seconds for row in rows), sum(row.seconds for row in rows)
    summed = total(uses)
    if not row_s or not gpu_seconds:
        return summed
    parts: dict[str, float] = {}
    for entry in entries:
        parts = _sum(parts, whole_parts(entry))
    known = sum(parts.values())
    before = min(max(0.0, entries[0].started - min(row.start or 0 for row in rows)), max(0.0, row_s - known))
    parts["startup"] = parts.get("startup", 0.0) + before
    known += before
    if known > row_s:
        parts = {name: seconds * row_s / known for name, seconds in parts.items()}
    else:
        parts["unattributed"] = parts.get("unattributed", 0.0) + row_s - known
    shares = {name: seconds / row_s * gpu_seconds for name, seconds in parts.items()}
    whole = replace(entries[-1], energy=_together(entries), parts={}, flops=0.0, peak_flops=None)
    priced = _priced(whole, shares, float(row_s), rates(entries[-1]))
    return replace(
        priced,
        images=summed.images,
        images_gained=summed.images_gained,
        flops=summed.flops,
        peak_flops=summed.peak_flops,
    )


def alone_use(row: Allocation, like: Entry | None, rates: RatesOf) -> Use | None:
    """What an allocation consumed in which no attempt began; None if the run has no entry that says on what."""
    if like is None:
        return None
    bare = replace(like, energy={}, parts={}, flops=0.0, peak_flops=None, images_from=0, images_to=0)
    return _priced(bare, {"unattributed": float(row.gpu_seconds)}, float(row.seconds), rates(like))


def _together(entries: Sequence[Entry]) -> dict[str, Any]:
    joules: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for entry in entries:
        joules = _sum(joules, entry.energy.get("joules", {}))
        seconds = _sum(seconds, entry.energy.get("device_seconds", {}))
    return {"joules": joules, "device_seconds": seconds} if joules else {}
