"""How much energy the devices of this node have used since a launch began: sampled in a thread, once for a node."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixart_ds.errors import MachineError
from pixart_ds.meters.nvml import NvmlReader
from pixart_ds.meters.rapl import POWERCAP, RaplReader
from pixart_ds.meters.readers import ConstantReader, Notes, PowerReader, Reading, Source, board_power, core_watts

_BEST_FIRST: tuple[Source, ...] = ("nvml-energy", "rapl", "nvml-power", "nvml-utilisation", "tdp", "estimate")
_BOUNDARY: dict[Source, str] = {"rapl": "socket share", "estimate": "core"}
_GAP = 10
"""Times the usual interval: over a longer one, watts at its ends say nothing of what was between."""
_STILL_S = 1.0
"""A counter that shows the same for so long does not count: no device takes no power."""
_STOP_S = 10.0
"""Patience with the last sample: a driver that hangs must not keep a rank from ending."""


class EnergyMeter:
    """Adds up what the devices of this node use. It never raises: where nothing can be measured it assumes, and says so.

    Args:
        device: cuda or cpu.
        count: GPUs of this node that the job uses, or CPU cores.
        kind: Of the GPUs, as the rate table calls it, for what cannot be measured.
        every_s: Seconds between two samples.
        reader: To ask instead of the best that the node has.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        device: str,
        count: int,
        *,
        kind: str | None = None,
        every_s: float = 5.0,
        reader: PowerReader | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device, self._count, self._kind, self._every_s = device, count, kind, every_s
        self._reader, self._clock = reader, clock
        self._why: str | None = None
        self._notes = Notes()
        self._accounts: list[_Account] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="energy", daemon=True)
        self._state = self._sum()

    def start(self) -> EnergyMeter:
        """Begins to sample."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Samples once more, and no more."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(_STOP_S)

    def to_json(self) -> dict[str, Any]:
        """What was used until the last sample. Any thread may ask, at any time.

        Returns:
            source: the weakest that joules come from; joules; device_seconds: that they cover, less than devices × time where
            nothing was known; devices; boundary: what they are of (the GPU boards alone, a share of the CPU sockets, or CPU cores);
            note: for people, what it rests on, or None.
        """
        return dict(self._state)

    def sample(self, now: float) -> None:
        """Asks the devices once, and adds what they used since the last time; one thread at a time.

        Args:
            now: Monotonic seconds.
        """
        try:
            reader = self._opened()
            readings = reader.read(now)
            self._why = reader.note()
            if not self._accounts:
                self._accounts = [_Account(self._count / len(readings), _GAP * self._every_s) for _ in readings]
            for account, reading in zip(self._accounts, readings, strict=True):
                if trouble := account.add(now, reading, reader.source):
                    self._notes.add(trouble)
        except Exception as cause:  # whatever a driver does: nobody's training ends because of a meter
            self._notes.add(f"a sample failed ({type(cause).__name__}: {cause})")
        self._state = self._sum()  # replaced whole, so that readers need no lock

    def _opened(self) -> PowerReader:
        if self._reader is None:
            self._reader = best_reader(self._device, self._count, self._kind)
        return self._reader

    def _watch(self) -> None:
        with contextlib.suppress(Exception):  # `sample` tries again, and tells
            self._opened()  # takes a while, which is not to lie between the first moment and its sample
        over = False
        while True:
            self.sample(self._clock())
            if over:
                break
            over = self._over.wait(self._every_s)
        with contextlib.suppress(Exception):  # nothing more is asked of it
            self._opened().close()

    def _sum(self) -> dict[str, Any]:
        seconds: dict[Source, float] = {}
        for account in self._accounts:
            for source, covered in account.seconds.items():
                seconds[source] = seconds.get(source, 0.0) + covered
        total = sum(seconds.values())
        used = [source for source in _BEST_FIRST if source in seconds]
        notes = Notes(*filter(None, (self._why, self._notes.text())))
        if len(used) > 1 and total:
            notes.add("of the time, " + ", ".join(f"{seconds[each] / total:.1%} by {each}" for each in used))
        nothing: Source = "tdp" if self._device == "cuda" else "estimate"
        source = used[-1] if used else self._reader.source if self._reader else nothing
        return {
            "source": source,
            "joules": round(sum(account.joules for account in self._accounts), 3),
            "device_seconds": round(total, 3),
            "devices": self._count,
            "boundary": _BOUNDARY.get(source, "board"),
            "note": notes.text(),
        }


class _Account:
    """Adds up one device's energy, from its counter where that goes on, else from its watts at both ends of an interval.

    Args:
        devices: How many it stands for.
        gap_s: The longest interval over which watts count.
    """

    def __init__(self, devices: float, gap_s: float) -> None:
        self.joules = 0.0
        self.seconds: dict[Source, float] = {}
        """Device-seconds that the joules cover."""
        self._devices, self._gap_s = devices, gap_s
        self._counted: tuple[float, float, int] | None = None  # when, joules, era: up to there the counter is used up
        self._powered: tuple[float, float, Source] | None = None  # when, watts, from

    def add(self, now: float, reading: Reading, counter: Source) -> str | None:
        """Covers the time up to now, or leaves it uncovered; says what was wrong, if anything.

        Args:
            counter: What the reading's counter is called.
        """
        covered, trouble = False, None
        if self._counted is not None and reading.joules is not None and self._counted[2] == reading.era:
            since, joules, _ = self._counted
            if reading.joules < joules:
                trouble = "an energy counter ran back (was the driver reloaded?)"
            elif reading.joules == joules and now - since >= _STILL_S:
                trouble = "an energy counter stands still"
            else:
                covered = self._cover(reading.joules - joules, now - since, counter)
        if not covered and self._powered is not None and reading.watts is not None:
            since, watts, source = self._powered
            if now - since > self._gap_s:  # whoever was stopped, the devices may have been, too, or not
                trouble = "a gap between two samples is not covered"
            else:
                weaker = max(source, reading.watts_from, key=_BEST_FIRST.index)
                covered = self._cover((watts + reading.watts) / 2 * (now - since), now - since, weaker)
        # what was not covered yet, a later reading may still cover from the same mark
        if covered or reading.joules is not None:
            self._counted = None if reading.joules is None else (now, reading.joules, reading.era)
        if covered or reading.watts is not None:
            self._powered = None if reading.watts is None else (now, reading.watts, reading.watts_from)
        return trouble

    def _cover(self, joules: float, seconds: float, source: Source) -> bool:
        self.joules += joules
        self.seconds[source] = self.seconds.get(source, 0.0) + seconds * self._devices
        return True


def best_reader(device: str, count: int, kind: str | None = None, *, powercap: Path = POWERCAP) -> PowerReader:
    """The best that this node has for its devices, arguments as of `EnergyMeter`; it always has one."""
    reader: PowerReader
    if device == "cuda":
        tdp = board_power(kind)
        try:
            reader = NvmlReader(count, tdp=tdp, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
        except Exception as cause:  # such as an AttributeError, of another package that is called pynvml as well
            reader = ConstantReader(count, tdp.watts, "tdp", f"{_words(cause)}; {tdp.words}")
        return reader
    watts = core_watts()
    try:
        reader = RaplReader(count, core_watts=watts, root=powercap)
    except MachineError as cause:
        reader = ConstantReader(count, watts, "estimate", f"{_words(cause)}: {watts:g} W for each core assumed")
    return reader


def _words(cause: Exception) -> str:
    return cause.what if isinstance(cause, MachineError) else f"NVML: {type(cause).__name__}: {cause}"
