"""What an energy meter asks: a reader says of each device what its counter shows, or the watts of the moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from pixart_ds.rates import rate_table

Source = Literal["nvml-energy", "nvml-power", "nvml-utilisation", "tdp", "rapl", "estimate"]

CPU_CORE = "cpu-core"
"""In the rate table."""

_MOST_NOTES = 8
"""They go into a small file that is rewritten all the time."""


@dataclass(frozen=True)
class Reading:
    """What a device says of itself at one moment; an empty one if it does not answer.

    Attributes:
        joules: Shown by a counter that only grows, from any start.
        era: Counters of different eras have different starts.
        watts: Now, as well as they are known.
        watts_from: How they are known.
    """

    joules: float | None = None
    era: int = 0
    watts: float | None = None
    watts_from: Source = "tdp"


class PowerReader(Protocol):
    """A way to ask devices; one thread at a time uses it."""

    @property
    def source(self) -> Source:
        """What its counters are called, or its watts if it has no counters."""

    def read(self, now: float) -> list[Reading]:
        """A reading for each device, always in the same sequence, or a single one for all of them together.

        Args:
            now: Monotonic seconds.
        """

    def note(self) -> str | None:
        """Why it is not as good as it could be, for people."""

    def close(self) -> None:
        """Lets go of what it holds."""


class Notes:
    """What people are to know, each thing once, with the number of times."""

    def __init__(self, *texts: str) -> None:
        self._times: dict[str, int] = dict.fromkeys(texts, 1)

    def add(self, text: str) -> None:
        if text in self._times or len(self._times) < _MOST_NOTES:
            self._times[text] = self._times.get(text, 0) + 1

    def text(self) -> str | None:
        """All of them; None if there are none."""
        texts = (text if times == 1 else f"{text} ({times} times)" for text, times in self._times.items())
        return "; ".join(texts) or None


class ConstantReader:
    """Devices that are assumed to take the same power all the time.

    Args:
        devices: How many.
        watts: Of each.
        source: What the assumption is called.
        note: Why nothing better was to be had.
    """

    def __init__(self, devices: int, watts: float, source: Source, note: str | None = None) -> None:
        self.source: Source = source
        self._readings = [Reading(watts=watts, watts_from=source)] * devices
        self._note = note

    def read(self, now: float) -> list[Reading]:
        return self._readings

    def note(self) -> str | None:
        return self._note

    def close(self) -> None:
        pass


class BoardPower(NamedTuple):
    """What a GPU board takes at most."""

    watts: float
    words: str
    """For people: how many watts, and whose."""


def board_power(kind: str | None) -> BoardPower:
    """TDP of the boards of a kind in the rate table; of the table's usual GPU if the kind is not one of its GPUs."""
    table = rate_table()
    if kind in table.devices and kind != CPU_CORE:
        device, whose = kind, f"TDP of {kind}"
    else:
        device = table.estimate.gpus[table.estimate.default_gpu].device
        whose = f"GPU of unknown kind; TDP of {device}"
    watts = table.devices[device].board_watts
    return BoardPower(watts, f"{watts:g} W for each GPU assumed ({whose})")


def core_watts() -> float:
    """What the rate table assumes for a CPU core."""
    return rate_table().devices[CPU_CORE].board_watts
