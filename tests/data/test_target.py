"""Scratch folders of writers: each has its own, whatever label, host or set others have; what a kill leaves goes away."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from pixart_ds.data import target as target_module
from pixart_ds.data.target import FolderTarget, S3Target, Target, scratch_of
from pixart_ds.data.writer import SetWriter
from tests.helpers.sets import description, row

_HOLDER = """
    import sys
    from pathlib import Path
    from pixart_ds.data.target import FolderTarget, scratch_of
    with scratch_of(FolderTarget(Path(sys.argv[1])), "all") as folder:
        (folder / "captions").mkdir()
        (folder / "captions/shard.00000.mds").write_bytes(b"half")
        print(folder, flush=True)
        sys.stdin.read()
"""
_WRITER = """
    import sys
    from pathlib import Path
    from pixart_ds.data.target import FolderTarget, scratch_of
    for _ in range(100):
        with scratch_of(FolderTarget(Path(sys.argv[1])), "all") as folder:
            assert not list(folder.iterdir())
            (folder / "file").write_text(sys.argv[2])
            assert (folder / "file").read_text() == sys.argv[2]
"""


def started(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def holder(place: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that has a scratch folder of the label `all`, and the folder."""
    process = started(_HOLDER, place)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def left(target: Target) -> list[str]:
    return sorted(os.listdir(target.scratch))


@pytest.fixture
def target(tmp_path: Path) -> FolderTarget:
    return FolderTarget(tmp_path)


def test_threads_and_processes_of_one_label_have_each_a_folder(target: FolderTarget) -> None:
    def use(number: int) -> None:
        for _ in range(100):
            with scratch_of(target, "all") as folder:
                assert not list(folder.iterdir())
                (folder / "file").write_text(str(number))
                assert (folder / "file").read_text() == str(number)

    processes = [started(_WRITER, target.folder, str(number)) for number in range(3)]
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(use, range(5)))
    for process in processes:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert left(target) == []


def test_one_inside_another_of_the_same_label(target: FolderTarget) -> None:
    with scratch_of(target, "all") as outer, scratch_of(target, "all") as inner:
        assert outer != inner
        (outer / "file").touch()
        assert not list(inner.iterdir())
    assert left(target) == []


def test_a_killed_processs_folder_goes_with_the_next_use_of_any_label(target: FolderTarget) -> None:
    process, folder = holder(target.folder)
    with scratch_of(target, "all"):
        assert (folder / "captions/shard.00000.mds").read_bytes() == b"half"  # it is in use
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (folder / "captions/shard.00000.mds").exists()
    with scratch_of(target, "task-3-of-64"):
        assert not folder.exists()
    assert left(target) == []


def test_another_hosts_folder_and_one_without_a_lock_are_left_alone(target: FolderTarget) -> None:
    here = target_module._this_host()
    name, _, boot = here.rpartition(".")
    assert Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "").startswith(boot)
    others = [f"all-{name}.0123456789ab-00", f"all-x{here}-00"]  # of one name, on another cluster
    for other in others:
        (target.scratch / other).mkdir(parents=True)
        (target.scratch / f"{other}.lock").touch()
    (target.scratch / f"all-{here}-00").mkdir()
    (target.scratch / "all/captions").mkdir(parents=True)  # as it was made by earlier versions
    before = left(target)
    with scratch_of(target, "all") as folder:
        assert folder.name.startswith(f"all-{here}-")
    assert left(target) == before


def test_a_lock_without_its_folder_goes_too(target: FolderTarget) -> None:
    target.scratch.mkdir()
    (target.scratch / f"all-{target_module._this_host()}-00.lock").touch()  # killed between the two
    with scratch_of(target, "all"):
        assert len(left(target)) == 2
    assert left(target) == []


@pytest.mark.parametrize("busy", [False, True])
def test_one_who_looks_for_left_overs_may_find_a_lock_not_yet_taken(
    target: FolderTarget, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    flock, seen = fcntl.flock, []

    def late(file: Any, how: int) -> None:
        monkeypatch.setattr(target_module.fcntl, "flock", flock)
        (lock,) = target.scratch.iterdir()
        seen.append(lock)
        if busy:
            held.append(open(lock, "r+b"))  # noqa: SIM115  # held until the test ends
            flock(held[0], fcntl.LOCK_EX)
        else:
            target_module._remove_left_overs(target.scratch)
            assert not lock.exists()
        flock(file, how)

    held: list[Any] = []
    monkeypatch.setattr(target_module.fcntl, "flock", late)
    with scratch_of(target, "all") as folder:
        assert f"{folder.name}.lock" != seen[0].name
        target_module._remove_left_overs(target.scratch)
        assert folder.exists()
    for file in held:
        file.close()
    target_module._remove_left_overs(target.scratch)
    assert left(target) == []


def test_without_locks_a_folder_is_nobodys_to_reclaim(target: FolderTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(target_module.fcntl, "flock", none)
        scratch = scratch_of(target, "all")
        folder = scratch.__enter__()
    assert left(target) == [folder.name]
    with scratch_of(target, "all"):
        assert folder.exists()
    scratch.__exit__(None, None, None)
    assert left(target) == []


def test_an_error_inside_comes_out_as_it_is(target: FolderTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "shard.00000.mds")
    with pytest.raises(OSError, match="No space left") as caught, scratch_of(target, "all"):
        raise full
    assert caught.value is full
    assert left(target) == []

    def refuse(*_: Any, **__: Any) -> None:
        raise full

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ValueError, match="first"), scratch_of(target, "all"):
        raise ValueError("first")
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        with pytest.raises(OSError, match="No space left"), scratch_of(target, "all"):
            pass
    with scratch_of(target, "all"):
        pass
    assert left(target) == []


def test_sets_of_a_store_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one, two = S3Target("s3://b/one"), S3Target("s3://b/two")
    assert one.scratch == S3Target("s3://b/one/").scratch
    assert one.scratch != two.scratch
    with scratch_of(one, "all") as first, scratch_of(two, "all") as second, scratch_of(one, "all") as third:
        assert len({first, second, third}) == 3
        assert first.parent == third.parent == one.scratch
        assert tmp_path in second.parents
    assert left(one) == left(two) == []


def test_two_writers_of_one_label_and_output_make_whole_parts(tmp_path: Path) -> None:
    """As two clusters on one file system, whose locks do not reach each other, that take the same share."""

    def write(parts: range) -> None:
        writer = SetWriter(tmp_path, description(), plan="p", label="task-3-of-64")
        for part in parts:
            rows = [row(number, 0) for number in range(4)]
            writer.write_part(part, 0, [replace(each, name=f"part{part}-{each.name}") for each in rows])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (range(40), range(39, -1, -1))))
    markers = [json.loads(path.read_text()) for path in (tmp_path / "parts").iterdir()]
    assert len(markers) == 40
    for marker in markers:
        for folder, entry in marker["shards"].items():
            shard = (tmp_path / folder / entry["raw_data"]["basename"]).read_bytes()
            assert xxhash.xxh3_64(shard).hexdigest() == entry["raw_data"]["hashes"]["xxh3_64"]
            assert folder != "captions" or f"part{marker['part']}-".encode() in shard
    assert left(FolderTarget(tmp_path)) == []
