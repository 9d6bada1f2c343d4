"""CPUs by RAPL, the energy counters of their sockets, as Linux shows them in sysfs."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pixart_ds.errors import MachineError
from pixart_ds.meters.readers import Notes, Reading, Source

POWERCAP = Path("/sys/class/powercap")

_PACKAGE = re.compile(r"intel-rapl:\d+")  # AMD's are called so, too; intel-rapl-mmio: would be the same sockets again
_MOST_WATTS = 1000.0
"""No socket takes more: within a counter's range by this it begins anew once at most."""


class _Counter:
    """One domain's counter, made to go on where it begins anew."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range_uj = int((folder / "max_energy_range_uj").read_text())
        self._last_uj = self.read_uj()
        self._total_uj = 0
        self.sure_for_s = self._range_uj / 1e6 / _MOST_WATTS

    def read_uj(self) -> int:
        return int(self._file.read_text())

    def follow(self, shown_uj: int) -> float:
        """Joules since the beginning."""
        # 0 … range are range + 1 values: a counter that shows the range shows 0 a microjoule later
        self._total_uj += (shown_uj - self._last_uj) % (self._range_uj + 1)
        self._last_uj = shown_uj
        return self._total_uj / 1e6


class RaplReader:
    """The sockets with their memory, where that has a counter; of both, the share of the cores that the job uses.

    Args:
        cores: How many those are.
        core_watts: Assumed for each while no counter can be read.
        root: Where sysfs shows them.
        cpus: Cores of the machine; all of them if None.

    Raises:
        MachineError: There are no counters, or they may not be read.
    """

    def __init__(self, cores: int, *, core_watts: float, root: Path = POWERCAP, cpus: int | None = None) -> None:
        cpus = cpus or os.cpu_count() or cores
        self.source: Source = "rapl"
        self._share = min(1.0, cores / cpus)
        self._watts = cores * core_watts
        self._era = 0
        self._last: float | None = None
        try:
            packages = [path for path in sorted(root.glob("intel-rapl:*")) if _is_package(path)]
            memories = [
                path for each in packages for path in sorted(each.glob("intel-rapl:*")) if _name(path) == "dram"
            ]
            self._counters = [_Counter(path) for path in (*packages, *memories)]
        except PermissionError as cause:  # since the attack PLATYPUS, Linux lets root alone read them
            raise MachineError(
                "RAPL cannot be read (energy_uj needs root)", where=cause.filename, remedy="chmod a+r it"
            ) from cause
        except (OSError, ValueError) as cause:
            raise MachineError(f"RAPL cannot be read ({cause})", where=root) from cause
        if not packages:
            raise MachineError("there is no RAPL", where=root)
        what = "whole sockets with their memory" if memories else "whole sockets without their memory"
        self._notes = Notes(f"RAPL measures {what}: charged for {cores} of {cpus} cores")

    def read(self, now: float) -> list[Reading]:
        watts: Reading = Reading(watts=self._watts, watts_from="estimate")
        try:
            shown = [each.read_uj() for each in self._counters]
        except (OSError, ValueError) as cause:
            self._notes.add(f"RAPL could not be read ({cause})")
            return [watts]
        joules = sum(each.follow(uj) for each, uj in zip(self._counters, shown, strict=True))
        if self._last is not None and now - self._last > min(each.sure_for_s for each in self._counters):
            self._era += 1
            self._notes.add("RAPL: so long without a sample that a counter may have begun anew more than once")
        self._last = now
        return [Reading(joules * self._share, self._era, watts.watts, watts.watts_from)]

    def note(self) -> str | None:
        return self._notes.text()

    def close(self) -> None:
        pass


def _name(folder: Path) -> str:
    return (folder / "name").read_text().strip()


def _is_package(folder: Path) -> bool:
    """Whether it is a socket: a domain of the top, but not psys, the whole machine."""
    return _PACKAGE.fullmatch(folder.name) is not None and _name(folder).startswith("package")
