"""Prices, powers, carbon intensities and the paper's own figures, read from rates.yaml."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pixart_ds.config.load import parse_yaml
from pixart_ds.errors import ConfigError
from pixart_ds.units import CarbonIntensity, DeviceTime, Emissions, Energy, Money, Power

_FILE = Path(__file__).with_name("rates.yaml")


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DeviceRate(_Closed):
    """One kind of device."""

    watts: float
    boundary: str
    price_per_hour: float
    priced: str
    peak_tflops_fp16: float
    source: str


class Sourced(_Closed):
    """A number and where it is from."""

    value: float
    source: str


class Grid(_Closed):
    """A country's electricity."""

    grams_per_kwh: float
    year: int


class Paper(_Closed):
    """What the paper states."""

    gpu_days: dict[str, float]
    a100_days: float
    dollars: float
    tonnes_co2: float
    co2_note: str


class RateTable(_Closed):
    """The whole file."""

    devices: dict[str, DeviceRate]
    default_device: dict[str, str]
    a100_days_per_v100_day: Sourced
    pue: Sourced
    default_country: str
    carbon: dict[str, Grid]
    paper: Paper


@cache
def rate_table() -> RateTable:
    """The table of rates.yaml."""
    return RateTable.model_validate(parse_yaml(_FILE.read_text(encoding="utf-8"), _FILE))


class Assumptions(_Closed):
    """What turns device time into energy, emissions and money; every figure of a report rests on these."""

    device: str
    watts: float
    boundary: str
    price_per_hour: float
    priced: str
    pue: float
    country: str
    grams_per_kwh: float
    year: int

    def energy(self, time: DeviceTime) -> Energy:
        """Device time × power × PUE."""
        return time.at(Power(self.watts)) * self.pue

    def emissions(self, energy: Energy) -> Emissions:
        """Location-based emissions of an energy."""
        return CarbonIntensity(self.grams_per_kwh).of(energy)

    def price(self, time: DeviceTime) -> Money:
        """Device time × price."""
        return Money(time.hours * self.price_per_hour)

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"device {self.device}: {self.watts:g} W ({self.boundary}), ${self.price_per_hour:g} an hour ({self.priced})",
            f"PUE {self.pue:g}; grid {self.country}, {self.grams_per_kwh:g} g CO2e/kWh ({self.year}), location-based",
            "energy is device time × power × PUE, from start to end of each attempt; embodied emissions are not in it",
        ]


def assume(
    kind: str,
    *,
    device: str | None = None,
    country: str | None = None,
    pue: float | None = None,
    price_per_hour: float | None = None,
    watts: float | None = None,
) -> Assumptions:
    """Assumptions for devices of a kind (cpu or cuda), with a user's own values in place of the table's.

    Raises:
        ConfigError: An unknown device or country (the known are listed), or an impossible number.
    """
    table = rate_table()
    device = device or table.default_device[kind]
    country = country or table.default_country
    if device not in table.devices:
        raise ConfigError(
            f"there is no device {device!r} in the table",
            where=_FILE,
            remedy=f"choose one of: {', '.join(table.devices)}",
        )
    if country not in table.carbon:
        raise ConfigError(
            f"there is no country {country!r} in the table",
            where=_FILE,
            remedy=f"choose one of: {', '.join(table.carbon)}",
        )
    for name, value, least in (("pue", pue, 1.0), ("price", price_per_hour, 0.0), ("watts", watts, 0.0)):
        if value is not None and value < least:
            raise ConfigError(f"{name} {value:g} is below {least:g}")
    about, grid = table.devices[device], table.carbon[country]
    return Assumptions(
        device=device,
        watts=about.watts if watts is None else watts,
        boundary=about.boundary if watts is None else "as given",
        price_per_hour=about.price_per_hour if price_per_hour is None else price_per_hour,
        priced=about.priced if price_per_hour is None else "as given",
        pue=table.pue.value if pue is None else pue,
        country=country,
        grams_per_kwh=grid.grams_per_kwh,
        year=grid.year,
    )
