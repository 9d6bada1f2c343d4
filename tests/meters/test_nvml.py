"""NVML's readings, of a module that answers as nvidia-ml-py does: no machine of the tests has every fault."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from pixart_ds.errors import MachineError
from pixart_ds.meters.energy import EnergyMeter
from pixart_ds.meters.nvml import NvmlReader, visible_gpus
from pixart_ds.meters.readers import board_power

UNSUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
LOST = pynvml.NVML_ERROR_GPU_IS_LOST


class Gpu:
    """One GPU of the fake node; a code in place of a value is the error that NVML answers with."""

    def __init__(self, number: int) -> None:
        self.uuid = f"GPU-{number}f4e1c00-0000-4000-8000-00000000000{number}"
        self.code: dict[str, int] = {}
        self.values: dict[str, float] = {"energy": 1000, "power": 250_000, "used": 40}
        self.mig: int | None = None

    def ask(self, what: str) -> float:
        if what in self.code:
            raise pynvml.NVMLError(self.code[what])
        return self.values[what]


class FakeNvml:
    """The part of pynvml that is used, over a few `Gpu`s; names and errors that it does not have are the module's own."""

    def __init__(self, gpus: int = 8) -> None:
        self.gpus = [Gpu(number) for number in range(gpus)]
        self.init_code: int | None = None
        self.open = 0
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("NVML"):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def nvmlInit(self) -> None:
        if self.init_code is not None:
            raise pynvml.NVMLError(self.init_code)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        if index >= len(self.gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        for gpu in self.gpus:
            if gpu.uuid == uuid:
                return gpu
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> list[int]:
        if gpu.mig is None:
            raise pynvml.NVMLError(UNSUPPORTED)
        return [gpu.mig, gpu.mig]

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: Gpu) -> int:
        self.asked.append("energy")
        return int(gpu.ask("energy"))

    def nvmlDeviceGetPowerUsage(self, gpu: Gpu) -> int:
        self.asked.append("power")
        return int(gpu.ask("power"))

    def nvmlDeviceGetUtilizationRates(self, gpu: Gpu) -> Any:
        self.asked.append("used")
        return SimpleNamespace(gpu=int(gpu.ask("used")), memory=1)


def reader_of(fake: FakeNvml, count: int = 8, visible: str | None = None) -> NvmlReader:
    return NvmlReader(count, tdp=board_power("v100-sxm2"), visible=visible, nvml=fake)


def meter_of(
    fake: FakeNvml,
    count: int = 8,
    visible: str | None = None,
    between: Callable[[float], None] = lambda now: None,
    until: int = 20,
) -> dict[str, Any]:
    """What a meter says after a sample every 5 s; `between` sets what the GPUs say at each."""
    meter = EnergyMeter("cuda", count, reader=reader_of(fake, count, visible))
    for now in range(0, until + 1, 5):
        between(now)
        meter.sample(now)
    return meter.to_json()


def unsupported(fake: FakeNvml, *what: str, numbers: range | list[int] = range(8)) -> None:
    for number in numbers:
        fake.gpus[number].code |= dict.fromkeys(what, UNSUPPORTED)


def test_the_functions_that_are_used_are_pynvmls() -> None:
    for name in vars(FakeNvml):
        if name.startswith("nvml"):
            assert callable(getattr(pynvml, name))


def test_counters_of_eight_gpus() -> None:
    fake = FakeNvml()

    def count_on(now: float) -> None:
        for number, gpu in enumerate(fake.gpus):
            gpu.values["energy"] = 12_345_678 + 1000 * (100 + number) * now  # mJ: of (100 + number) W

    said = meter_of(fake, between=count_on)
    assert said["joules"] == 20 * sum(range(100, 108))
    assert (said["source"], said["boundary"], said["note"]) == ("nvml-energy", "board", None)
    assert (said["devices"], said["device_seconds"]) == (8, 160)


def test_without_a_counter_power_is_integrated() -> None:
    fake = FakeNvml()
    unsupported(fake, "energy")
    said = meter_of(fake)
    assert (said["joules"], said["source"]) == (8 * 20 * 250, "nvml-power")
    assert said["note"] == "NVML: no energy counter of a GPU (Not Supported) (8 times)"
    assert fake.asked.count("energy") == 8  # not again and again


def test_without_power_the_utilisation_of_the_tdp_counts() -> None:
    fake = FakeNvml()
    unsupported(fake, "energy", "power")
    said = meter_of(fake)
    assert (said["joules"], said["source"]) == (pytest.approx(8 * 20 * 0.4 * 300), "nvml-utilisation")


def test_with_nothing_at_all_the_tdp_counts() -> None:
    fake = FakeNvml()
    unsupported(fake, "energy", "power", "used")
    said = meter_of(fake)
    assert (said["joules"], said["source"], said["boundary"]) == (8 * 20 * 300, "tdp", "board")
    assert (
        "NVML: no utilisation of a GPU (Not Supported); 300 W for each GPU assumed (TDP of v100-sxm2)" in said["note"]
    )


def test_each_gpu_has_its_own_best_and_the_weakest_gives_the_name() -> None:
    fake = FakeNvml(2)
    unsupported(fake, "energy", numbers=[1])
    said = meter_of(fake, 2, between=lambda now: fake.gpus[0].values.update(energy=200_000 * now))
    assert said["joules"] == 20 * (200 + 250)
    assert said["source"] == "nvml-power"
    assert "50.0% by nvml-energy, 50.0% by nvml-power" in said["note"]


def test_a_counter_that_runs_back_takes_that_interval_from_power() -> None:
    fake = FakeNvml(1)
    shown = {0: 5e6, 5: 6e6, 10: 3e3, 15: 1.003e6, 20: 2.003e6}
    said = meter_of(fake, 1, between=lambda now: fake.gpus[0].values.update(energy=shown[int(now)]))
    assert said["joules"] == 1000 + 5 * 250 + 1000 + 1000
    assert said["device_seconds"] == 20


def test_a_gpu_that_is_lost_is_noted_and_the_others_go_on() -> None:
    fake = FakeNvml(2)

    def lose(now: float) -> None:
        for gpu in fake.gpus:
            gpu.values["energy"] = 300_000 * now
        fake.gpus[1].code = dict.fromkeys(("energy", "power", "used"), LOST) if now >= 10 else {}

    said = meter_of(fake, 2, between=lose)
    assert (said["joules"], said["device_seconds"]) == (300 * 20 + 300 * 5, 25)
    assert "NVML: GPU 1 did not tell its energy counter (GPU is lost) (3 times)" in said["note"]


def test_a_passing_error_costs_nothing() -> None:
    fake = FakeNvml(1)

    def stumble(now: float) -> None:
        fake.gpus[0].values["energy"] = 300_000 * now
        fake.gpus[0].code = dict.fromkeys(("energy", "power", "used"), pynvml.NVML_ERROR_UNKNOWN) if now == 10 else {}

    said = meter_of(fake, 1, between=stumble)
    assert (said["joules"], said["device_seconds"], said["source"]) == (6000, 20, "nvml-energy")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "NVML: NVML Shared Library Not Found"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "NVML: Driver Not Loaded"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "NVML: Insufficient Permissions"),
        (4711, "NVML: NVML Error with code 4711"),
    ],
)
def test_no_driver_is_an_error_with_its_reason(code: int, words: str) -> None:
    fake = FakeNvml()
    fake.init_code = code
    with pytest.raises(MachineError, match="NVML") as caught:
        reader_of(fake)
    assert caught.value.what == words


def test_the_real_module_without_a_driver_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", no_library)
    meter = EnergyMeter("cuda", 2, kind="h200")
    for now in (0, 5):
        meter.sample(now)
    said = meter.to_json()
    assert (said["source"], said["joules"]) == ("tdp", 2 * 5 * 700)
    assert said["note"] == "NVML: NVML Shared Library Not Found; 700 W for each GPU assumed (TDP of h200)"


def test_it_lets_go_of_nvml() -> None:
    fake = FakeNvml()
    reader = reader_of(fake)
    assert fake.open == 1
    reader.close()
    assert fake.open == 0


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, ["0", "1", "2"]),
        ("4,5,6,7", ["4", "5", "6"]),
        ("7, 2", ["7", "2"]),
        ("GPU-1f4e,GPU-2f4e", ["GPU-1f4e", "GPU-2f4e"]),
        ("MIG-GPU-1f4e/1/0", ["MIG-GPU-1f4e/1/0"]),
        ("0,-1,1", ["0"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
def test_which_gpus_cuda_sees(value: str | None, names: list[str]) -> None:
    assert visible_gpus(value, 3) == names


@pytest.mark.parametrize(
    "value",
    ["5,2", "GPU-5f4e1c00-0000-4000-8000-000000000005,GPU-2f4e1c00-0000-4000-8000-000000000002", "GPU-5f4,GPU-2f4"],
)
def test_the_gpus_that_are_visible_are_read(value: str) -> None:
    fake = FakeNvml()
    for number, gpu in enumerate(fake.gpus):
        gpu.values["power"] = 1000 * number
    readings = reader_of(fake, 2, value).read(0)
    assert [reading.watts for reading in readings] == [5, 2]


def test_a_gpu_that_there_is_not_counts_with_its_tdp() -> None:
    for value in ("0,8", "0,GPU-9"):
        reader = reader_of(FakeNvml(), 2, value)
        assert [reading.watts for reading in reader.read(0)] == [250, 300]
        assert "cannot be asked" in str(reader.note())


def test_fewer_visible_gpus_than_ranks_count_with_their_tdp() -> None:
    reader = reader_of(FakeNvml(), 8, "3")  # --gpus-per-task=1
    assert [reading.watts for reading in reader.read(0)] == [250] + [300] * 7
    assert str(reader.note()).startswith("CUDA_VISIBLE_DEVICES names 1 of 8 GPUs; for the others 300 W")


def test_slices_of_a_gpu_have_no_energy_of_their_own() -> None:
    fake = FakeNvml(2)
    fake.gpus[0].mig, fake.gpus[1].mig = 1, 0
    reader = reader_of(fake, 2)
    assert [reading.watts_from for reading in reader.read(0)] == ["tdp", "nvml-power"]
    assert "MIG" in str(reader.note())
    reader = reader_of(fake, 1, "MIG-6b2f0a5e-9f10-5d0a-8d2e-1f6b6a2c8a11")
    assert [reading.watts_from for reading in reader.read(0)] == ["tdp"]
    assert "MIG" in str(reader.note())
