"""Reading MDS shards: the index as arrays, and single samples by position.

A shard is `u32 n | u32 offsets[n + 1] | JSON header | samples`, offsets from the file's start. A sample is one u32 for each column
of variable size, then the columns in the index's sequence, which is sorted by name.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from pixart_ds import files
from pixart_ds.data.format import ALIGNMENT, LARGE_COLUMNS
from pixart_ds.errors import DataError

_CHUNK_BYTES = 1 << 20
PREPARE_AGAIN = "prepare the set again into a new folder, or restore the file from a copy"


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one index.json, as arrays: there may be hundreds of thousands.

    Attributes:
        names: Of the files, from the index's folder.
        samples: (n,) samples of each.
        sizes: (n,) bytes of each.
        hashes: xxh3_64 of each, hexadecimal.
        columns: Names of a sample's columns.
        column_sizes: Bytes of each column, None where they vary.
        fingerprint: Hash of the whole index.
    """

    names: list[str]
    samples: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    hashes: list[str]
    columns: tuple[str, ...]
    column_sizes: tuple[int | None, ...]
    fingerprint: str

    @classmethod
    def parse(cls, raw: bytes, where: Path) -> ShardIndex:
        """The index of an index.json's content.

        Raises:
            DataError: It is unreadable, or of another kind than `prepare` writes.
        """
        value = files.parse_json(raw, where, remedy=PREPARE_AGAIN)
        try:
            shards = value["shards"]
            kinds = {
                (s["format"], s["compression"], tuple(s["column_names"]), tuple(s["column_sizes"])) for s in shards
            }
            hashes = [s["raw_data"]["hashes"]["xxh3_64"] for s in shards]
            names = [s["raw_data"]["basename"] for s in shards]
            samples = np.array([s["samples"] for s in shards], np.int64)
            lengths = np.array([s["raw_data"]["bytes"] for s in shards], np.int64)
        except (KeyError, TypeError, ValueError, OverflowError) as cause:
            raise DataError(
                f"the index is not one of plain MDS shards with xxh3_64 hashes: {cause!r}",
                where=where,
                remedy=PREPARE_AGAIN,
            ) from cause
        if len(kinds) != 1:
            raise DataError(f"the index holds shards of {len(kinds)} kinds", where=where, remedy=PREPARE_AGAIN)
        form, compression, columns, sizes = next(iter(kinds))
        if form != "mds" or compression is not None:
            raise DataError(f"shards must be uncompressed MDS, not {form} with {compression}", where=where)
        return cls(
            names=names,
            samples=samples,
            sizes=lengths,
            hashes=hashes,
            columns=columns,
            column_sizes=sizes,
            fingerprint=xxhash.xxh3_128_hexdigest(raw),
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def large(self) -> int:
        """The number of the column that nearly all bytes are in."""
        return next(place for place, name in enumerate(self.columns) if name in LARGE_COLUMNS)


def damage(descriptor: int, index: ShardIndex, number: int) -> str | None:
    """What is wrong with a shard's file, by size and hash; None if it is whole. Reading it warms the page cache."""
    size = os.fstat(descriptor).st_size
    if size != index.sizes[number]:
        return f"{size} bytes instead of {index.sizes[number]}"
    digest, at, buffer = xxhash.xxh3_64(), 0, bytearray(_CHUNK_BYTES)
    while count := os.preadv(descriptor, [buffer], at):  # in small pieces: hashing holds the interpreter's lock
        digest.update(memoryview(buffer)[:count])
        at += count
    if digest.hexdigest() != index.hashes[number]:
        return f"its xxh3 hash is {digest.hexdigest()} instead of {index.hashes[number]}"
    return None


def _unreadable(what: str, where: object, cause: OSError) -> DataError:
    return DataError(
        f"{what} cannot be read: {cause.strerror}",
        where=where,
        remedy="look after the disk or file system, then start again",
    )


class Extent(NamedTuple):
    """Where a sample lies.

    Attributes:
        row: Of the shard.
        begin, end: In the file.
        before: Bytes in front of its large column: the head, and other columns.
        size: Bytes of the large column.
        varying: Bytes of all columns whose size varies, as the head says them.
    """

    row: int
    begin: int
    end: int
    before: int
    size: int
    varying: tuple[int, ...]


class OpenShard:
    """A whole shard, open for reading; closed when nobody holds it any more.

    Args:
        descriptor: Of its file; the shard closes it.
        index, number: Which shard.
        name: For errors.
    """

    def __init__(self, descriptor: int, index: ShardIndex, number: int, name: object) -> None:
        self._descriptor, self._index, self.name = descriptor, index, name
        sizes, large = index.column_sizes, index.large
        self._heads = struct.Struct(f"<{sizes.count(None)}I")
        self._least = self._heads.size + sum(size or 0 for size in sizes)
        self._front = self._heads.size + sum(size or 0 for size in sizes[:large])
        self._large = sizes[:large].count(None)
        (count,) = struct.unpack("<I", self._pread(4, 0, "its count"))
        self._offsets = np.frombuffer(self._pread(4 * (count + 1), 4, "the places of its rows"), "<u4").tolist()

    def __del__(self) -> None:
        os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def extent(self, row: int, size: int | None = None) -> Extent:
        """Where a sample lies. Without a read if the large column has the `size` that is given, and beside it only the padding
        varies: that follows from the sample's length.

        Raises:
            DataError: There is no such row, or it cannot be read.
        """
        begin, end = self._span(row)
        if size is not None and self._large == 1 and 0 <= (padding := end - begin - self._least - size) < ALIGNMENT:
            return Extent(row, begin, end, self._front + padding, size, (padding, size))
        return self._extent(row, begin, end, self._pread(self._heads.size, begin, f"row {row}"))

    def _span(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self._offsets) - 1:
            raise DataError(f"there is no row {row} among {len(self)}", where=self.name)
        return self._offsets[row], self._offsets[row + 1]

    def _extent(self, row: int, begin: int, end: int, head: bytes | bytearray) -> Extent:
        varying = self._heads.unpack_from(head)
        self._check(row, begin, end, varying)
        return Extent(row, begin, end, self._front + sum(varying[: self._large]), varying[self._large], varying)

    def _pread(self, count: int, at: int, what: str) -> bytes:
        try:
            content = os.pread(self._descriptor, count, at)
        except OSError as cause:
            raise _unreadable(what, self.name, cause) from cause
        if len(content) < count:
            raise DataError(f"the file ends before {what}", where=self.name, remedy=PREPARE_AGAIN)
        return content

    def _check(self, row: int, begin: int, end: int, varying: Sequence[int]) -> None:
        """Raises DataError unless the columns' sizes are together what the sample has."""
        if self._least + sum(varying) != end - begin:
            raise DataError(
                f"row {row} has {end - begin} bytes, its columns {self._least + sum(varying)}",
                where=self.name,
                remedy=PREPARE_AGAIN,
            )

    def read_into(self, extent: Extent, place: Any) -> bytearray:
        """Reads a sample in one go: its large column into a place, and all around it.

        Args:
            extent: Which sample.
            place: Memory of the large column's size, whose bytes lie one behind the other; None leaves it and what is before it
                unread.

        Returns:
            The sample without its large column: the head, which was compared with the extent, and the other columns; zeros for
            what was not read.

        Raises:
            DataError: It cannot be read, or its columns have other sizes.
        """
        row, begin, end, before, size, varying = extent
        around = bytearray(end - begin - size)
        view = memoryview(around)
        if place is None:
            at = begin + before + size
            view[before:] = self._pread(end - at, at, f"row {row}")
            return around
        self._fill(row, begin, end, [view[:before], place, view[before:]])
        if (there := self._heads.unpack_from(around)) != varying:
            self._check(row, begin, end, there)
            raise DataError(
                f"row {row} has columns of {there} bytes instead of {varying}", where=self.name, remedy=PREPARE_AGAIN
            )
        return around

    def room(self, row: int) -> int:
        """Bytes that `read_first` may need for a sample."""
        begin, end = self._span(row)
        return max(0, end - begin - self._front)

    def read_first(self, row: int, room: memoryview) -> tuple[Extent, bytearray]:
        """Reads a sample in one go whose large column may have any size: it comes to the beginning of a room, and behind it what
        follows in the file, which may be overwritten afterwards.

        Args:
            row: Which sample.
            room: Memory of at least `room` bytes.

        Returns:
            Where it lies, and the sample without its large column, as `read_into` gives it.

        Raises:
            DataError: There is no such row, or it cannot be read.
        """
        begin, end = self._span(row)
        if end - begin < self._least:
            self._check(row, begin, end, ())
        # ours lets it begin at the next multiple, so the head need not be read before
        before = min(self._front + (-(begin + self._front) % ALIGNMENT if self._large else 0), end - begin)
        head, rest = bytearray(before), end - begin - before
        self._fill(row, begin, end, [head, room[:rest]])
        extent = self._extent(row, begin, end, head)
        if extent.before != before:  # another writer's
            return extent, self.read_into(extent, room[: extent.size])
        return extent, head + room[extent.size : rest]

    def _fill(self, row: int, begin: int, end: int, places: list[Any]) -> None:
        """Reads a sample into places, one behind the other."""
        try:
            count = os.preadv(self._descriptor, places, begin)
            if count != end - begin:  # a file system may stop in between
                count = self._read_slowly([memoryview(place).cast("B") for place in places], begin)
        except OSError as cause:
            raise _unreadable(f"row {row}", self.name, cause) from cause
        if count != end - begin:
            raise DataError(f"row {row}: {count} bytes instead of {end - begin}", where=self.name, remedy=PREPARE_AGAIN)

    def _read_slowly(self, places: Sequence[memoryview], begin: int) -> int:
        """Fills places from `begin` on until the file ends; returns how many bytes there were."""
        at = begin
        for place in places:
            filled = 0
            while filled < len(place) and (count := os.preadv(self._descriptor, [place[filled:]], at)):
                filled, at = filled + count, at + count
        return at - begin

    def read(self, row: int) -> dict[str, bytearray]:
        """The columns of one sample, by name."""
        extent = self.extent(row)
        large = bytearray(extent.size)
        around, at = self.read_into(extent, large), self._heads.size
        columns, varying = {}, iter(extent.varying)
        for place, (name, given) in enumerate(zip(self._index.columns, self._index.column_sizes, strict=True)):
            size = next(varying) if given is None else given
            if place == self._index.large:
                columns[name] = large
            else:
                columns[name], at = around[at : at + size], at + size
        return columns


class ShardSource(Protocol):
    """Whole shards of one index, wherever they are."""

    index: ShardIndex

    def open(self, number: int) -> OpenShard:
        """Raises DataError with shard and remedy."""
        ...

    def stop(self) -> None:
        """Ends waiting, with an error."""
        ...

    def close(self) -> None:
        """After the last `open`."""
        ...


class FolderSource:
    """Shards that are read in place. Each is hashed when it is first opened."""

    def __init__(self, index: ShardIndex, folder: Path) -> None:
        self.index, self.folder = index, folder
        self._sound: set[tuple[int, int, int]] = set()
        self._lock = threading.Lock()

    def open(self, number: int) -> OpenShard:
        path = self.folder / self.index.names[number]
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as cause:
            raise DataError("the shard is not there", where=path, remedy=PREPARE_AGAIN) from cause
        except OSError as cause:
            raise DataError(
                f"the shard cannot be opened: {cause.strerror}",
                where=path,
                remedy="look after its permissions, the file system, or the limit of open files (ulimit -n), then start again",
            ) from cause
        about = os.fstat(descriptor)
        key = (number, about.st_ino, about.st_mtime_ns)
        if key not in self._sound:
            try:
                if (what := damage(descriptor, self.index, number)) is not None:
                    raise DataError(f"the shard is damaged: {what}", where=path, remedy=PREPARE_AGAIN)
            except BaseException as error:
                os.close(descriptor)
                if isinstance(error, OSError):
                    raise _unreadable("the shard", path, error) from error
                raise
            with self._lock:
                self._sound.add(key)
        return OpenShard(descriptor, self.index, number, path)

    def stop(self) -> None:
        """Nothing is waited for."""

    def close(self) -> None:
        """Nothing is held."""

    def check_files(self) -> None:
        """Raises DataError naming the first shard that is missing or has another size than the index says, and how many are."""
        problems = []
        for name, wanted in zip(self.index.names, self.index.sizes.tolist(), strict=True):
            path = self.folder / name
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                problems.append(f"{path} is missing")
                continue
            if size != wanted:
                problems.append(f"{path} has {size} bytes instead of {wanted}")
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise DataError(f"{problems[0]}{more}", where=self.folder, remedy=PREPARE_AGAIN)
