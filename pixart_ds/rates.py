"""Prices, powers, carbon intensities and the paper's own figures, read from rates.yaml."""

from __future__ import annotations

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
    default_device: dict[str, str]
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
