"""Prices, powers, carbon intensities and the paper's own figures, read from rates.yaml."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pixart_ds.config.load import parse_yaml
from pixart_ds.errors import ConfigError
from pixart_ds.units import CarbonIntensity, DeviceTime, Emissions, Energy, Money, Power

_FILE = Path(__file__).with_name("rates.yaml")


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DeviceRate(_Closed):
    """One kind of device."""

    board_watts: float
    host_watts: float
    """Its share of the node around it."""
    boundary: str
    embodied_grams_per_hour: float | None = None
    """CO2e of making it, spread over its life; None where nobody has published it."""
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


class Rival(_Closed):
    """What the paper states of another model."""

    a100_days: float
    dollars: float
    tonnes_co2: float


class Price(_Closed):
    """Dollars for a GPU-hour, as somebody asks them."""

    device: Literal["a100", "v100"]
    per_hour: float
    what: str
    dated: str
    source: str


class Boundary(_Closed):
    """What counts as a run's energy."""

    watts: float
    """For a GPU."""
    pue: float
    what: str


class Paper(_Closed):
    """What the paper states, and what its totals depend on."""

    gpu_days: dict[str, float]
    """V100-days of each stage."""
    gpus: dict[str, int]
    """V100s of each stage."""
    a100_days: float
    dollars: float
    tonnes_co2: float
    co2_watts: float
    """For an A100, of the method that gives its tonnes."""
    co2_country: str
    source: str
    rivals: dict[str, Rival]
    prices: tuple[Price, ...]
    boundaries: tuple[Boundary, ...]
    grids: tuple[str, ...]
    co2_note: str


class Gpu(_Closed):
    """One GPU that an estimate is made for, beside what the list of devices says of it."""

    device: str
    """Its key in the list of devices: power, price, peak in 16 bit."""
    memory_gib: float
    """What CUDA can allocate."""
    peak_tflops_fp32: float
    """Without tensor cores."""
    gbytes_per_second: float
    """Device memory."""
    cache_mib: float
    """Second-level cache."""
    multiprocessors: int
    gpu_link_gbytes_per_second: float
    """To the other GPUs of its node, one way."""
    node_link_gbytes_per_second: float
    """From node to node, one way, shared by the GPUs of the node."""
    bf16: bool
    dated: str
    source: str


class Efficiency(_Closed):
    """Which part of a peak is reached; one set for all stages, resolutions and GPUs."""

    gemm: float
    attention_fp32: float
    attention_16bit: float
    memory: float
    link: float
    seconds_per_micro_batch: float
    seconds_per_step: float


class Kernels(_Closed):
    """Tiles of the memory-efficient attention kernels (CUTLASS), from their launch bounds."""

    queries_per_block: int
    blocks_per_multiprocessor: int
    source: str


class MemoryRule(_Closed):
    """How much of a GPU's memory a plan may fill."""

    usable: float
    context_gib: float
    source: str


class Published(_Closed):
    """What only the paper's runs had: their kernels and their storage."""

    backward_blocks_per_multiprocessor: int
    feed_mbytes_per_second: float
    """For each GPU."""
    overlapped_communication: float
    """Part of the backward pass behind which the all-reduce can hide."""
    source: str


class PublishedStage(_Closed):
    """One row of the paper's Table 4."""

    kind: Literal["pixart", "dit"]
    base_size: int
    micro_conditions: bool
    steps: int
    batch_per_gpu: int
    gpus: int

    def images_per_second_per_gpu(self, gpu_days: float) -> float:
        """The rate that steps, batch and GPU-days amount to."""
        return self.steps * self.batch_per_gpu * self.gpus / (gpu_days * 86400)


class EstimateRates(_Closed):
    """What `pixart-ds estimate` reckons with."""

    default_gpu: str
    gpus: dict[str, Gpu]
    efficiency: Efficiency
    kernels: Kernels
    memory: MemoryRule
    published: Published
    table4: dict[str, PublishedStage]


class RateTable(_Closed):
    """The whole file."""

    devices: dict[str, DeviceRate]
    embodied: Sourced
    a100_days_per_v100_day: Sourced
    pue: Sourced
    default_country: str
    carbon: dict[str, Grid]
    paper: Paper
    estimate: EstimateRates


@cache
def rate_table() -> RateTable:
    """The table of rates.yaml."""
    return RateTable.model_validate(parse_yaml(_FILE.read_text(encoding="utf-8"), _FILE))


class Assumptions(_Closed):
    """What turns device time into energy, emissions and money; every figure of a report rests on these."""

    device: str
    board_watts: float
    """Of a device, where its energy was not measured."""
    host_watts: float
    """Of its share of the node around it, which is not measured."""
    boundary: str
    price_per_hour: float
    priced: str
    pue: float
    pue_source: str
    country: str
    grams_per_kwh: float
    grid: str
    """Where the intensity is from."""
    embodied_grams_per_hour: float | None

    @property
    def watts(self) -> float:
        """Of a device and its share of the node."""
        return self.board_watts + self.host_watts

    def energy(self, time: DeviceTime) -> Energy:
        """Device time × power × PUE, where nothing was measured."""
        return time.at(Power(self.watts)) * self.pue

    def emissions(self, energy: Energy) -> Emissions:
        """Location-based emissions of an energy."""
        return CarbonIntensity(self.grams_per_kwh).of(energy)

    def embodied(self, time: DeviceTime) -> Emissions | None:
        """The part of the devices' making that falls on this time; None where it is not known."""
        grams = self.embodied_grams_per_hour
        return None if grams is None else Emissions(time.hours * grams / 1000)

    def price(self, time: DeviceTime) -> Money:
        """Device time × price."""
        return Money(time.hours * self.price_per_hour)

    def lines(self) -> list[str]:
        """For people."""
        host = f" + {self.host_watts:g} W of the node around it" if self.host_watts else ""
        return [
            f"device {self.device}: {self.board_watts:g} W{host} ({self.boundary}), where it was not measured",
            f"${self.price_per_hour:g} for an hour of it ({self.priced})",
            f"PUE {self.pue:g} ({self.pue_source})",
            f"grid {self.country}: {self.grams_per_kwh:g} g CO2e/kWh ({self.grid}), location-based",
        ]


def assume(
    device: str,
    *,
    country: str | None = None,
    pue: float | None = None,
    price_per_hour: float | None = None,
    watts: float | None = None,
    host_watts: float | None = None,
    grams_per_kwh: float | None = None,
) -> Assumptions:
    """Assumptions for a device, with a user's own values in place of the table's.

    Args:
        device: A key of the table.
        country: Whose electricity.
        pue: Power usage effectiveness of the site.
        price_per_hour: Dollars for a device-hour.
        watts: Of the device alone, where it was not measured.
        host_watts: Of its share of the node around it.
        grams_per_kwh: CO2e of the site's own electricity; location-based, without certificates bought.

    Raises:
        ConfigError: An unknown device or country (the known are listed), or an impossible number.
    """
    table = rate_table()
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
    given = {"price": price_per_hour, "watts": watts, "host_watts": host_watts, "grams_per_kwh": grams_per_kwh}
    for name, value, least in (("pue", pue, 1.0), *((name, value, 0.0) for name, value in given.items())):
        if value is not None and not least <= value < math.inf:
            raise ConfigError(
                f"{name} {value:g} is below {least:g}" if value < least else f"{name} {value:g} is no finite number"
            )
    about, grid = table.devices[device], table.carbon[country]
    own_power = watts is not None or host_watts is not None
    return Assumptions(
        device=device,
        board_watts=about.board_watts if watts is None else watts,
        host_watts=(about.host_watts if watts is None else 0.0) if host_watts is None else host_watts,
        boundary="as given" if own_power else about.boundary,
        price_per_hour=about.price_per_hour if price_per_hour is None else price_per_hour,
        priced=f"{about.priced}; {about.source}" if price_per_hour is None else "as given",
        pue=table.pue.value if pue is None else pue,
        pue_source=table.pue.source if pue is None else "as given",
        country=country,
        grams_per_kwh=grid.grams_per_kwh if grams_per_kwh is None else grams_per_kwh,
        grid=str(grid.year) if grams_per_kwh is None else "as given",
        embodied_grams_per_hour=about.embodied_grams_per_hour,
    )
