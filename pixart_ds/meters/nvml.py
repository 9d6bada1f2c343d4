"""NVIDIA's GPUs: an energy counter, else power, else utilisation × TDP, else the TDP; for each GPU the first that it has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from pixart_ds.errors import MachineError
from pixart_ds.meters.readers import BoardPower, Notes, Reading, Source

_MIG = "MIG: a slice of a GPU has no energy of its own, and the whole board is charged for each"


class NvmlReader:
    """The GPUs that this process may use.

    Args:
        count: How many of them the job uses: the first ones.
        tdp: Of a board, for what NVML does not tell.
        visible: Value of CUDA_VISIBLE_DEVICES; None if it is not set.
        nvml: To ask instead of the module pynvml.

    Raises:
        MachineError: There is no NVML: no package, no driver, no permission.
    """

    def __init__(self, count: int, *, tdp: BoardPower, visible: str | None, nvml: Any = None) -> None:
        self.source: Source = "nvml-energy"
        self._tdp = tdp
        self._notes = Notes()
        self._lacks: set[tuple[int, str]] = set()
        self._nvml = nvml if nvml is not None else load_pynvml()
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as cause:
            raise MachineError(f"NVML: {cause}", remedy="check that nvidia-smi works on this node") from cause
        self._final = (
            self._nvml.NVML_ERROR_NOT_SUPPORTED,
            self._nvml.NVML_ERROR_NO_PERMISSION,
            self._nvml.NVML_ERROR_FUNCTION_NOT_FOUND,  # a driver older than the call
        )
        names = visible_gpus(visible, count)
        if len(names) < count:
            self._notes.add(f"CUDA_VISIBLE_DEVICES names {len(names)} of {count} GPUs; for the others {tdp.words}")
        self._handles = [self._handle(name) for name in names] + [None] * (count - len(names))

    def read(self, now: float) -> list[Reading]:
        return [self._read(number, handle) for number, handle in enumerate(self._handles)]

    def note(self) -> str | None:
        return self._notes.text()

    def close(self) -> None:
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _read(self, number: int, handle: Any) -> Reading:
        nvml, assumed = self._nvml, Reading(watts=self._tdp.watts, watts_from="tdp")
        if handle is None:
            return assumed
        counter = self._ask(number, "energy counter", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        joules = None if counter is None else counter / 1000
        # power is asked for, too, where there is a counter: the counter may run back, and a trapezoid needs the sample before
        if (milliwatts := self._ask(number, "power", lambda: nvml.nvmlDeviceGetPowerUsage(handle))) is not None:
            return Reading(joules, watts=milliwatts / 1000, watts_from="nvml-power")
        if (
            used := self._ask(number, "utilisation", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        ) is not None:
            return Reading(joules, watts=used / 100 * self._tdp.watts, watts_from="nvml-utilisation")
        if {(number, "power"), (number, "utilisation")} <= self._lacks:
            return Reading(joules, watts=assumed.watts, watts_from="tdp")
        return Reading(joules)  # a GPU that was lost takes nobody knows what

    def _ask(self, number: int, what: str, call: Callable[[], float]) -> float | None:
        """The answer, or None; what a GPU can never say it is not asked again."""
        if (number, what) in self._lacks:
            return None
        try:
            return call()
        except self._nvml.NVMLError as cause:
            if cause.value in self._final:
                self._lacks.add((number, what))
                instead = f"; {self._tdp.words}" if what == "utilisation" else ""
                self._notes.add(f"NVML: no {what} of a GPU ({cause}){instead}")
            else:
                self._notes.add(f"NVML: GPU {number} did not tell its {what} ({cause})")
            return None

    def _handle(self, name: str) -> Any:
        """NVML's handle of a GPU; None, with a note, where there is nothing to ask."""
        if name.startswith("MIG-"):
            self._notes.add(f"{_MIG}; {self._tdp.words}")
            return None
        try:
            # NVML counts in PCI order. CUDA does so only with CUDA_DEVICE_ORDER=PCI_BUS_ID, else fastest first, which is
            # the same sequence where all GPUs of a node are alike, as they are in a cluster's.
            handle = self._nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else self._by_uuid(name)
        except self._nvml.NVMLError as cause:
            self._notes.add(f"NVML: GPU {name} cannot be asked ({cause}); {self._tdp.words}")
            return None
        if self._is_cut(handle):
            self._notes.add(f"{_MIG}; {self._tdp.words}")
            return None
        return handle

    def _by_uuid(self, name: str) -> Any:
        nvml = self._nvml
        try:
            return nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError:  # CUDA takes a UUID's beginning for the whole, NVML does not
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                if nvml.nvmlDeviceGetUUID(handle).startswith(name):
                    return handle
            raise

    def _is_cut(self, handle: Any) -> bool:
        """Whether CUDA sees a slice of this GPU in place of it."""
        try:
            current, _ = self._nvml.nvmlDeviceGetMigMode(handle)
        except self._nvml.NVMLError:  # a GPU that cannot be cut
            return False
        return bool(current == self._nvml.NVML_DEVICE_MIG_ENABLE)


def visible_gpus(value: str | None, count: int) -> list[str]:
    """The first `count` GPUs, as CUDA reads CUDA_VISIBLE_DEVICES: indices, UUIDs or their beginnings, MIG slices.

    Args:
        value: Of the variable; None if it is not set.
    """
    if value is None:
        return [str(index) for index in range(count)]
    names: list[str] = []
    for name in (part.strip() for part in value.split(",")):
        if not name.isdigit() and not name.startswith(("GPU-", "MIG-")):
            break  # what comes after a name that is none, such as -1, CUDA does not see
        names.append(name)
    return names[:count]


def load_pynvml() -> Any:
    """NVIDIA's module, where it is installed.

    Raises:
        MachineError: It is not.
    """
    try:
        import pynvml
    except ImportError as cause:
        raise MachineError(
            "NVML: the package nvidia-ml-py is not installed", remedy="pip install nvidia-ml-py"
        ) from cause
    return pynvml
