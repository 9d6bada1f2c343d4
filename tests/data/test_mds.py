"""Single samples of a shard that changed after it was hashed: each kind of damage has its words, and nothing is delivered."""

from __future__ import annotations

import errno
import gc
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from pixart_ds.data import mds
from pixart_ds.data.mds import OpenShard
from pixart_ds.data.shards import PreparedSet
from pixart_ds.errors import DataError
from tests.helpers.sets import tiny_set


def opened(folder: Path, name: str) -> tuple[OpenShard, Path]:
    """The first shard, open, and its file, which may be changed in place."""
    source = tiny_set(folder).source(name, None)
    shard = source.open(0)
    return shard, Path(str(shard.name))


def overwrite(path: Path, at: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


def begin_of(path: Path, row: int) -> int:
    found: tuple[int] = struct.unpack_from("<I", path.read_bytes(), 4 + 4 * row)
    return found[0]


@pytest.mark.parametrize("name", ["captions", "latents-48-buckets"])
def test_a_head_that_is_not_the_rows_is_refused(tmp_path: Path, name: str) -> None:
    shard, path = opened(tmp_path, name.removeprefix("latents-"))
    assert bytes(shard.read(1)["row"]) == struct.pack("<q", 1)
    overwrite(path, begin_of(path, 1), struct.pack("<I", 5000))
    with pytest.raises(DataError, match=r"row 1 has \d+ bytes, its columns \d+") as caught:
        shard.read(1)
    assert str(path) in str(caught.value)
    assert bytes(shard.read(2)["row"]) == struct.pack("<q", 2)


LATENTS_BYTES = 8 * 6 * 6 * 2


def test_a_row_of_latents_is_read_without_its_head_first(tmp_path: Path) -> None:
    shard, path = opened(tmp_path, "48-buckets")
    extent = shard.extent(3)
    overwrite(path, begin_of(path, 3), b"????")
    assert shard.extent(3, LATENTS_BYTES) == extent
    assert extent.varying == (extent.before - 8 - 16, LATENTS_BYTES)  # behind the head and the crop
    with pytest.raises(DataError, match=r"row 3 has \d+ bytes, its columns \d+"):
        shard.read_into(extent, bytearray(LATENTS_BYTES))


@pytest.mark.parametrize("wrong", [LATENTS_BYTES - 64, LATENTS_BYTES + 64])
def test_latents_of_another_size_than_expected_are_told_from_padding(tmp_path: Path, wrong: int) -> None:
    shard, _ = opened(tmp_path, "48-buckets")
    assert shard.extent(3, wrong) == shard.extent(3)


def test_columns_of_other_sizes_with_the_same_sum_are_refused(tmp_path: Path) -> None:
    shard, path = opened(tmp_path, "48-buckets")
    extent = shard.extent(3)
    overwrite(path, begin_of(path, 3), struct.pack("<II", extent.varying[0] + 8, LATENTS_BYTES - 8))
    with pytest.raises(DataError, match="row 3 has columns of .* bytes instead of"):
        shard.read_into(extent, bytearray(LATENTS_BYTES))


def test_what_is_behind_the_large_column_is_read_alone(tmp_path: Path) -> None:
    shard, _ = opened(tmp_path, "captions")
    extent = shard.extent(3)
    whole = shard.read_into(extent, bytearray(extent.size))
    assert shard.read_into(extent, None)[extent.before :] == whole[extent.before :]


@pytest.mark.parametrize("name", ["captions", "48-buckets"])
def test_a_row_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    shard, path = opened(tmp_path, name)
    extent = shard.extent(7)
    length = extent.end - extent.begin
    for missing in (3, length + 1):
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - missing)
        found = f"row 7: {length - 3} bytes instead of {length}" if missing == 3 else "the file ends before row 7"
        with pytest.raises(DataError, match=found):
            shard.read(7)


@pytest.mark.parametrize("name", ["captions", "32-square", "48-buckets"])
@pytest.mark.parametrize("alignment", [64, 128, 1])
def test_a_row_whose_size_is_not_known_comes_in_one_read(
    tmp_path: Path, name: str, alignment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another alignment stands for another writer, whose large columns do not begin where they are looked for."""
    shard, _ = opened(tmp_path, name)
    calls, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *words: calls.append(words[0]) or preadv(*words))
    monkeypatch.setattr(mds, "ALIGNMENT", alignment)
    for row in range(len(shard)):
        extent = shard.extent(row)
        large = bytearray(extent.size)
        around = shard.read_into(extent, large)
        room = bytearray(shard.room(row))
        calls.clear()
        assert shard.read_first(row, memoryview(room)) == (extent, around)
        assert room[: extent.size] == large
        assert alignment != 64 or len(calls) == 1


def test_a_row_whose_size_is_not_known_is_refused_if_it_is_damaged(tmp_path: Path) -> None:
    shard, path = opened(tmp_path, "captions")
    index = PreparedSet.open(tmp_path).index("captions")
    room = memoryview(bytearray(shard.room(7) + shard.room(1) + shard.room(4)))
    overwrite(path, begin_of(path, 1), struct.pack("<I", 5000))
    with pytest.raises(DataError, match=r"row 1 has \d+ bytes, its columns \d+"):
        shard.read_first(1, room)
    with pytest.raises(DataError, match="there is no row 8 among 8"):
        shard.read_first(8, room)
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(DataError, match=r"row 7: \d+ bytes instead of \d+"):
        shard.read_first(7, room)
    for bad in (
        begin_of(path, 4) + 9,
        begin_of(path, 4) - 9,
    ):  # a row that is too short, and one that ends before it begins
        overwrite(path, 4 + 4 * 5, struct.pack("<I", bad))
        damaged = OpenShard(os.open(path, os.O_RDONLY), index, 0, path)
        with pytest.raises(DataError, match=r"row 4 has -?9 bytes, its columns \d+"):
            damaged.read_first(4, room[: damaged.room(4)])


def descriptors_in(folder: Path) -> list[str]:
    """Files of a folder that this process has open."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists them
            found.append(os.readlink(path))
    return [name for name in found if name.startswith(str(folder))]


@pytest.mark.parametrize("call", ["pread", "preadv"])
def test_a_disk_that_cannot_read_is_told_with_the_shard(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_set(tmp_path).source("captions", None)
    shard = source.open(0)
    assert len(descriptors_in(tmp_path)) == 1

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, broken)
    for number in range(3):
        with pytest.raises(DataError, match="cannot be read: Input/output error") as caught:
            shard.read(0) if number == 0 else source.open(number)
        assert f"part-{0 if number == 0 else number:05d}-" in str(caught.value)
        assert "look after the disk" in str(caught.value)
    del caught  # it holds the frames, and they the last shard
    gc.collect()
    assert len(descriptors_in(tmp_path)) == 1


def test_a_read_that_stops_in_between_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, _ = opened(tmp_path, "captions")
    wanted, read = shard.read(2), os.preadv

    def little(descriptor: int, places: Sequence[memoryview], at: int) -> int:
        return read(descriptor, [memoryview(place).cast("B")[:7] for place in places[:1]], at)

    monkeypatch.setattr(os, "preadv", little)
    assert shard.read(2) == wanted


def test_a_shard_that_is_too_short_for_its_rows_is_refused(tmp_path: Path) -> None:
    index = tiny_set(tmp_path).index("captions")
    for size in (0, 2, 6, 30):
        path = tmp_path / f"{size}.mds"
        path.write_bytes((b"\x09\0\0\0" + bytes(40))[:size])
        with pytest.raises(DataError, match="the file ends before"):
            OpenShard(os.open(path, os.O_RDONLY), index, 0, path)


def test_a_row_beyond_the_last_is_refused(tmp_path: Path) -> None:
    shard, _ = opened(tmp_path, "captions")
    for row in (-1, 8):
        with pytest.raises(DataError, match=f"there is no row {row} among 8"):
            shard.extent(row)
