"""Reading MDS shards: the index as arrays, and single samples by position, checked against their hashes.

A shard is `u32 n | u32 offsets[n + 1] | JSON header | samples`, offsets from the file's start. A sample is one u32 for each column
of variable size, then the columns in the index's sequence, which is sorted by name.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pixart_ds import files
from pixart_ds.errors import DataError

_CHUNK_BYTES = 1 << 20
_PREPARE_AGAIN = "prepare the set again into a new folder, or restore the file from a copy"


@dataclass(frozen=True)
class ShardFile:
    """One shard as the index describes it."""

    path: Path
    samples: int
    size_bytes: int
    xxh3: str


class ShardSet:
    """The shards of one folder with an index.json.

    Args:
        folder: Holds index.json and the shards that it names.

    Raises:
        DataError: The index is missing, unreadable, or of another kind than `prepare` writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shards = files.read_json(folder / "index.json", remedy="finish preparing the set")["shards"]
        try:
            self.shards = [self._shard(entry) for entry in shards]
            kinds = {(tuple(entry["column_names"]), tuple(entry["column_sizes"])) for entry in shards}
        except (KeyError, TypeError) as cause:
            raise DataError(
                f"the index is not one of plain MDS shards with xxh3_64 hashes: {cause!r}", where=folder
            ) from cause
        if len(kinds) > 1:
            raise DataError(f"the index holds shards of {len(kinds)} kinds", where=folder, remedy=_PREPARE_AGAIN)
        names, self.sizes = next(iter(kinds)) if kinds else ((), ())
        self.columns: tuple[str, ...] = names

    def _shard(self, entry: dict[str, Any]) -> ShardFile:
        raw = entry["raw_data"]
        if entry["format"] != "mds" or entry["zip_data"] is not None:
            raise KeyError("shards must be uncompressed MDS")
        return ShardFile(self.folder / raw["basename"], entry["samples"], raw["bytes"], raw["hashes"]["xxh3_64"])

    def check_files(self) -> None:
        """Raises DataError naming the first shard that is missing or has another size than the index says, and how many are."""
        problems = []
        for shard in self.shards:
            try:
                size = shard.path.stat().st_size
            except FileNotFoundError:
                problems.append(f"{shard.path} is missing")
                continue
            if size != shard.size_bytes:
                problems.append(f"{shard.path} has {size} bytes instead of {shard.size_bytes}")
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise DataError(f"{problems[0]}{more}", where=self.folder, remedy=_PREPARE_AGAIN)


class OpenShard:
    """A shard that was found whole; samples are read by position. Closed when nobody holds it any more.

    Raises:
        DataError: The file is missing, truncated, or its bytes are not those that were written.
    """

    def __init__(self, shard: ShardFile, sizes: tuple[int | None, ...], columns: tuple[str, ...]) -> None:
        self.shard, self.columns, self._sizes = shard, columns, sizes
        self._heads = sum(size is None for size in sizes)
        try:
            self._descriptor = os.open(shard.path, os.O_RDONLY)
        except OSError as cause:
            raise DataError(
                f"the shard cannot be opened: {cause.strerror}", where=shard.path, remedy=_PREPARE_AGAIN
            ) from cause
        self._check()
        (count,) = struct.unpack("<I", os.pread(self._descriptor, 4, 0))
        self._offsets = np.frombuffer(os.pread(self._descriptor, 4 * (count + 1), 4), "<u4").tolist()

    def __del__(self) -> None:
        if (descriptor := getattr(self, "_descriptor", None)) is not None:
            os.close(descriptor)

    def _check(self) -> None:
        digest, at, buffer = xxhash.xxh3_64(), 0, bytearray(_CHUNK_BYTES)
        while count := os.preadv(self._descriptor, [buffer], at):
            digest.update(memoryview(buffer)[:count])
            at += count
        if digest.hexdigest() != self.shard.xxh3:
            raise DataError(
                f"the shard is damaged: its xxh3 hash is {digest.hexdigest()} instead of {self.shard.xxh3}",
                where=self.shard.path,
                remedy=_PREPARE_AGAIN,
            )

    def read(self, row: int) -> dict[str, memoryview]:
        """The columns of one sample, by name, in one read."""
        if not 0 <= row < len(self._offsets) - 1:
            raise DataError(f"there is no row {row} among {len(self._offsets) - 1}", where=self.shard.path)
        begin, end = self._offsets[row], self._offsets[row + 1]
        data = memoryview(os.pread(self._descriptor, end - begin, begin))
        heads = iter(struct.unpack_from(f"<{self._heads}I", data))
        at = 4 * self._heads
        values = {}
        for name, size in zip(self.columns, self._sizes, strict=True):
            length = next(heads) if size is None else size
            values[name] = data[at : at + length]
            at += length
        if at != len(data):
            raise DataError(
                f"row {row} has {len(data)} bytes, its columns {at}", where=self.shard.path, remedy=_PREPARE_AGAIN
            )
        return values


class ShardCache:
    """Open shards of several sets, the least recently used closed first; each is hashed once when it is opened.

    Args:
        capacity: Shards that stay open. One that is being read is closed only afterwards.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._open: OrderedDict[Path, OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shards: ShardSet, number: int) -> OpenShard:
        """The `number`-th shard of a set."""
        shard = shards.shards[number]
        with self._lock:
            if (found := self._open.get(shard.path)) is not None:
                self._open.move_to_end(shard.path)
                return found
        made = OpenShard(shard, shards.sizes, shards.columns)  # two threads may both open it: one copy is dropped
        with self._lock:
            self._open[shard.path] = made
            while len(self._open) > self.capacity:
                self._open.popitem(last=False)
        return made

    def clear(self) -> None:
        """Lets go of all shards."""
        with self._lock:
            self._open.clear()
