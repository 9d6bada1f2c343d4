"""The node's disks, clock and limits, on real file systems."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pixart_ds.doctor.probes import machine
from pixart_ds.layout import RunLayout
from tests.doctor.subjects import make_run, subject
from tests.helpers.disk import small_disk


@pytest.fixture
def run(tmp_path: Path) -> RunLayout:
    return make_run(tmp_path)


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB with 100 inodes."""
    with small_disk(tmp_path / "disk", "size=400k,nr_inodes=100") as folder:
        yield folder


def files_of(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_the_runs_folder_is_written_and_left_as_it_was(run: RunLayout) -> None:
    before = files_of(run.root)
    check = machine.run_folder(subject(run))
    assert (check.verdict, check.evidence) == ("ok", f"{run.root / 'stage1'} can be written and read")
    clock = machine.clock(subject(run))
    assert clock.verdict == "ok"
    assert clock.evidence.startswith("within 5 s of the run's file system (")
    assert files_of(run.root) == before


def test_a_folder_that_is_read_only(run: RunLayout, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    there = subject(RunLayout(small_disk), stage=None)
    check = machine.run_folder(there)
    assert (check.verdict, check.evidence) == ("failed", f"{small_disk}: Read-only file system")
    assert check.remedy == "make the folder writable for you on this node, or see that its file system is mounted here"
    assert machine.clock(there).evidence == (
        "no file can be made in the run's folder (Read-only file system): see machine.run_folder"
    )


def test_a_folder_that_has_gone(run: RunLayout) -> None:
    check = machine.run_folder(subject(RunLayout(run.root / "gone"), stage=None))
    assert check.evidence == f"{run.root / 'gone'}: No such file or directory"


def test_a_clock_that_is_wrong(run: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr(machine.time, "time", lambda: now() - 120)
    check = machine.clock(subject(run))
    assert check.verdict == "failed"
    assert check.evidence == "120.0 s behind the run's file system"
    assert check.remedy == "have the node's clock set (chrony, ntp)"


def test_little_space(run: RunLayout, small_disk: Path) -> None:
    small = subject(RunLayout(small_disk), stage=None)
    check = machine.run_space(small)
    assert check.verdict == "failed"
    assert check.evidence == f"{small_disk}: 410 kB and 99 inodes free; 100 MB are needed for an attempt's logs"
    check = machine.tmp_space(subject(run, environment={"TMPDIR": str(small_disk)}))
    assert check.evidence == f"{small_disk}: 410 kB and 99 inodes free; 50 MB are needed for temporary files"
    assert check.remedy == "free the disk, or name another folder in TMPDIR"
    stage = make_run(run.root / "other", None, "*.execution.cache={mode: node-job}")
    cached = subject(stage, environment={"TMPDIR": str(small_disk)})
    check = machine.cache_space(cached)
    assert check.verdict == "failed"
    assert check.evidence == (
        f"{small_disk}/pixart_ds-{os.getuid()}: 410 kB and 99 inodes free; 500 MB are needed for the cache of shards"
    )
    assert list(small_disk.iterdir()) == []


def test_room_for_a_checkpoint_of_the_papers_net() -> None:
    from pixart_ds.config.load import load_stage

    size = machine.checkpoint_bytes(subject(stage=load_stage("stage2", [])))
    assert size == pytest.approx(11.0e9, rel=0.01)  # weights, master, moments, EMA
    assert machine.checkpoint_bytes(subject()) == 0


def test_what_is_cached_already_makes_room(tmp_path: Path) -> None:
    limit = "*.execution.cache={mode: node-persistent, limit_gb: 100000, folder: '" + str(tmp_path / "cache") + "'}"
    run = make_run(tmp_path, None, limit)
    folder = tmp_path / "cache" / "kept" / "0f"
    folder.mkdir(parents=True)
    (folder / "00000000.mds").write_bytes(bytes(1 << 20))
    assert machine._cached_bytes(tmp_path / "cache") == 1 << 20
    check = machine.cache_space(subject(run))
    assert check.verdict == "warning"
    assert check.evidence.endswith("; 100 TB would be enough for the cache of shards")


def test_a_cache_in_place_and_a_missing_tmpdir(run: RunLayout, tmp_path: Path) -> None:
    check = machine.cache_space(subject(run))
    assert (check.verdict, check.evidence) == (
        "skipped",
        "execution.cache.mode shared: nothing is copied to the node",
    )
    check = machine.tmp_space(subject(environment={"TMPDIR": str(tmp_path / "none")}))
    assert (check.verdict, check.evidence) == ("failed", f"TMPDIR {tmp_path / 'none'} is not there")


def test_without_a_run_its_places_are_skipped() -> None:
    found = [machine.run_folder(subject()), machine.clock(subject()), machine.run_space(subject())]
    assert {check.verdict for check in found} == {"skipped"}
    assert machine.cache_space(subject()).evidence == "no run was given"


def test_checkpoints_that_lie_elsewhere_need_no_room_in_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, None, f"*.checkpoint.path={tmp_path / 'elsewhere'}")
    assert machine.run_space(subject(run)).verdict in ("ok", "warning")
    assert run.stage("stage1").checkpoints_elsewhere.exists()


def program(folder: Path, name: str, text: str) -> None:
    """A program of the system that says what a test needs."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_quota_as_the_program_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.quota(subject()).evidence == "there is no program quota here; run_space is what statvfs says"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    program(tmp_path, "quota", "echo '  nas:/home 110* 100 120'; exit 1")
    check = machine.quota(subject())
    assert (check.verdict, check.evidence) == ("failed", "above the quota: nas:/home 110* 100 120")
    assert check.remedy == "delete files, or have the quota raised"
    program(tmp_path, "quota", "echo 'cannot ask nas' >&2; exit 1")
    assert machine.quota(subject()).evidence == "quota says nothing: cannot ask nas"


def test_this_environment_is_as_it_should_be() -> None:
    assert machine.packages(subject()).verdict == "ok"
    assert machine.open_files(subject()).evidence.startswith("a process may open ")
    assert machine.shm(subject()).verdict in ("ok", "warning")
