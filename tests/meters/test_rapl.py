"""RAPL, of files that lie as sysfs lays them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pixart_ds.errors import MachineError
from pixart_ds.meters.energy import EnergyMeter
from pixart_ds.meters.rapl import RaplReader

RANGE_UJ = 262_143_328_850


class Sysfs:
    """`/sys/class/powercap` of a machine: zones inside each other, and flat links to all of them."""

    def __init__(self, root: Path) -> None:
        self.links = root / "class"
        self._devices = root / "devices" / "intel-rapl"
        self.links.mkdir()

    def zone(self, number: str, name: str, uj: int = 0) -> None:
        parts = number.split(":")
        folder = self._devices.joinpath(*(f"intel-rapl:{':'.join(parts[: n + 1])}" for n in range(len(parts))))
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
        (folder / "energy_uj").write_text(f"{uj}\n")
        (self.links / folder.name).symlink_to(folder)

    def show(self, number: str, uj: int) -> None:
        (self.links / f"intel-rapl:{number}" / "energy_uj").write_text(f"{uj}\n")


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    """Two sockets with memory, and what is not to be counted: cores, and the whole machine."""
    made = Sysfs(tmp_path)
    (made.links / "intel-rapl").mkdir()  # the control type itself
    for socket in "01":
        made.zone(socket, f"package-{socket}", 1_000_000)
        made.zone(f"{socket}:0", "core", 1_000_000)
        made.zone(f"{socket}:1", "dram", 1_000_000)
    made.zone("2", "psys", 1_000_000)
    return made


def reader_of(sysfs: Sysfs, cores: int = 8, cpus: int = 8) -> RaplReader:
    return RaplReader(cores, core_watts=10, root=sysfs.links, cpus=cpus)


def test_sockets_and_their_memory_count_each_once(sysfs: Sysfs) -> None:
    meter = EnergyMeter("cpu", 8, reader=reader_of(sysfs))
    meter.sample(0)
    for number, joules in {"0": 500, "1": 300, "0:0": 450, "0:1": 50, "1:1": 30, "2": 2000}.items():
        sysfs.show(number, 1_000_000 + joules * 1_000_000)
    meter.sample(5)
    assert meter.to_json() == {
        "source": "rapl",
        "joules": 500 + 300 + 50 + 30,
        "device_seconds": 8 * 5,
        "devices": 8,
        "boundary": "socket share",
        "note": "RAPL measures whole sockets with their memory: charged for 8 of 8 cores",
    }


def test_a_job_on_a_part_of_the_cores_is_charged_that_part(sysfs: Sysfs) -> None:
    meter = EnergyMeter("cpu", 2, reader=reader_of(sysfs, 2, 64))
    meter.sample(0)
    sysfs.show("0", 641_000_000)
    meter.sample(5)
    said = meter.to_json()
    assert (said["joules"], said["device_seconds"]) == (20, 10)
    assert said["note"] == "RAPL measures whole sockets with their memory: charged for 2 of 64 cores"


def test_a_counter_that_begins_anew_goes_on(sysfs: Sysfs) -> None:
    sysfs.show("0", RANGE_UJ - 3_000_000)
    meter = EnergyMeter("cpu", 8, reader=reader_of(sysfs))
    meter.sample(0)
    for now, uj in ((5, RANGE_UJ), (10, 4_999_999), (15, 6_999_999)):
        sysfs.show("0", uj)
        meter.sample(now)
    assert meter.to_json()["joules"] == 3 + 5 + 2
    assert meter.to_json()["source"] == "rapl"


def test_a_gap_is_covered_unless_a_counter_may_have_gone_round_twice(sysfs: Sysfs) -> None:
    meter = EnergyMeter("cpu", 8, reader=reader_of(sysfs))
    meter.sample(0)
    for now, uj in ((200, 51_000_000), (600, 3_000_000), (605, 8_000_000)):
        sysfs.show("0", uj)
        meter.sample(now)
    said = meter.to_json()
    assert (said["joules"], said["device_seconds"]) == (50 + 5, 8 * 205)
    assert "more than once" in said["note"]


def test_without_memory_zones_the_note_says_so(tmp_path: Path) -> None:
    sysfs = Sysfs(tmp_path)
    sysfs.zone("0", "package-0-die-1")
    assert reader_of(sysfs, 1).note() == "RAPL measures whole sockets without their memory: charged for 1 of 8 cores"


def test_a_counter_that_shows_nothing_is_replaced_by_the_estimate(sysfs: Sysfs) -> None:
    meter = EnergyMeter("cpu", 4, reader=reader_of(sysfs, 4))  # as under some hypervisors
    for now in (0, 5, 10):
        meter.sample(now)
    said = meter.to_json()
    assert (said["source"], said["joules"], said["boundary"]) == ("estimate", 4 * 10 * 10, "core")
    assert "stands still" in said["note"]


def test_a_read_that_fails_in_the_middle_is_noted_and_bridged_by_the_estimate(sysfs: Sysfs) -> None:
    meter = EnergyMeter("cpu", 8, reader=reader_of(sysfs))
    meter.sample(0)
    (sysfs.links / "intel-rapl:0/energy_uj").rename(sysfs.links / "intel-rapl:0/away")
    meter.sample(5)
    sysfs.show("0", 501_000_000)
    meter.sample(10)
    sysfs.show("0", 601_000_000)
    meter.sample(15)
    said = meter.to_json()
    assert said["joules"] == 80 * 10 + 100
    assert said["source"] == "estimate"
    assert "could not be read" in said["note"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_counters_of_root_alone(sysfs: Sysfs) -> None:
    (sysfs.links / "intel-rapl:0/energy_uj").chmod(0)
    with pytest.raises(MachineError, match="energy_uj needs root"):
        reader_of(sysfs)


def test_counters_that_may_not_be_read(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text

    def refuse(path: Path, *args: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(MachineError) as caught:
        reader_of(sysfs)
    assert caught.value.what == "RAPL cannot be read (energy_uj needs root)"
    assert str(caught.value.where).endswith("energy_uj")


@pytest.mark.parametrize("text", ["", "none\n"])
def test_counters_that_are_no_numbers(sysfs: Sysfs, text: str) -> None:
    (sysfs.links / "intel-rapl:1/max_energy_range_uj").write_text(text)
    with pytest.raises(MachineError, match="RAPL cannot be read"):
        reader_of(sysfs)


def test_a_machine_without_rapl(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "class"):
        with pytest.raises(MachineError, match="there is no RAPL"):
            RaplReader(1, core_watts=10, root=root)
