"""Quantities that cannot be added by accident: energy, power, mass of CO2e, money, device time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, order=True)
class _Quantity:
    """A number in one base unit; only like is added to like."""

    value: float

    def __add__(self, other: Self) -> Self:
        if type(other) is not type(self):
            raise TypeError(f"{type(self).__name__} and {type(other).__name__} cannot be added")
        return type(self)(self.value + other.value)

    def __mul__(self, factor: float) -> Self:
        return type(self)(self.value * factor)


@dataclass(frozen=True, order=True)
class Power(_Quantity):
    """Watts."""


@dataclass(frozen=True, order=True)
class Energy(_Quantity):
    """Kilowatt-hours."""

    @property
    def kwh(self) -> float:
        return self.value


@dataclass(frozen=True, order=True)
class DeviceTime(_Quantity):
    """Device-seconds: seconds times devices."""

    @property
    def hours(self) -> float:
        return self.value / 3600

    @property
    def days(self) -> float:
        return self.value / 86400

    def at(self, power: Power) -> Energy:
        """Energy of these device-seconds at a power for each device."""
        return Energy(self.hours * power.value / 1000)


@dataclass(frozen=True, order=True)
class Emissions(_Quantity):
    """Kilograms of CO2 equivalent."""

    @property
    def kg(self) -> float:
        return self.value


@dataclass(frozen=True, order=True)
class Money(_Quantity):
    """US dollars."""

    @property
    def dollars(self) -> float:
        return self.value


@dataclass(frozen=True, order=True)
class CarbonIntensity(_Quantity):
    """Grams of CO2 equivalent for each kilowatt-hour."""

    def of(self, energy: Energy) -> Emissions:
        """Emissions of an energy."""
        return Emissions(energy.kwh * self.value / 1000)
