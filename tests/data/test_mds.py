"""Single samples of a shard that changed after it was hashed: each kind of damage has its words, and nothing is delivered."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pixart_ds.data.mds import OpenShard
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
    sizes = shard.sizes(3)
    overwrite(path, begin_of(path, 3), b"????")
    assert shard.sizes(3, latents=LATENTS_BYTES) == sizes == [sizes[0], 16, LATENTS_BYTES, 8, 8, 8, 12]
    with pytest.raises(DataError, match=r"row 3 has \d+ bytes, its columns \d+"):
        shard.read_into(3, sizes, 2, bytearray(LATENTS_BYTES))


@pytest.mark.parametrize("wrong", [LATENTS_BYTES - 64, LATENTS_BYTES + 64])
def test_latents_of_another_size_than_expected_are_told_from_padding(tmp_path: Path, wrong: int) -> None:
    shard, _ = opened(tmp_path, "48-buckets")
    assert shard.sizes(3, latents=wrong) == shard.sizes(3)


def test_columns_of_other_sizes_with_the_same_sum_are_refused(tmp_path: Path) -> None:
    shard, path = opened(tmp_path, "48-buckets")
    sizes = shard.sizes(3)
    overwrite(path, begin_of(path, 3), struct.pack("<II", sizes[0] + 8, sizes[2] - 8))
    with pytest.raises(DataError, match="row 3 has columns of .* bytes instead of"):
        shard.read_into(3, sizes, 2, bytearray(LATENTS_BYTES))


@pytest.mark.parametrize("name", ["captions", "48-buckets"])
def test_a_row_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    shard, path = opened(tmp_path, name)
    sizes = shard.sizes(7)
    length = 4 * (4 if name == "captions" else 2) + sum(sizes)
    for missing in (3, length + 1):
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - missing)
        found = f"row 7: {length - 3} bytes instead of {length}" if missing == 3 else "row 7: the file ends before it"
        with pytest.raises(DataError, match=found):
            shard.read(7)


def test_a_row_beyond_the_last_is_refused(tmp_path: Path) -> None:
    shard, _ = opened(tmp_path, "captions")
    for row in (-1, 8):
        with pytest.raises(DataError, match=f"there is no row {row} among 8"):
            shard.sizes(row)
