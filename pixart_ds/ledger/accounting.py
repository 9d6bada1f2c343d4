"""From entries to device-hours, kilowatt-hours, kilograms of CO2e and money."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pixart_ds.ledger.entries import Entry
from pixart_ds.rates import Assumptions
from pixart_ds.units import DeviceTime


@dataclass(frozen=True)
class Account:
    """What something consumed."""

    device_hours: float
    kwh: float
    kg_co2e: float
    dollars: float
    images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "images_per_second": self.images_per_second}


def account(entries: Sequence[Entry], assumptions: Mapping[str, Assumptions]) -> Account:
    """The sum over entries; `assumptions` by kind of device."""
    hours = kwh = kilograms = dollars = 0.0
    for entry in entries:
        rates = assumptions[entry.device]
        energy = rates.energy(entry.device_time)
        hours += entry.device_time.hours
        kwh += energy.kwh
        kilograms += rates.emissions(energy).kg
        dollars += rates.price(entry.device_time).dollars
    seconds = sum(entry.until - entry.started for entry in entries)
    return Account(hours, kwh, kilograms, dollars, sum(entry.images for entry in entries), seconds)


def a100_days(v100_days: float, a100_days_per_v100_day: float) -> float:
    """V100-days as A100-days, by a stated ratio."""
    return DeviceTime(v100_days * 86400).days * a100_days_per_v100_day
