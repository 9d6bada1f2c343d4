"""Which pictures make which part: fixed once, before any of them is decoded, in files that hold millions of rows.

plan/rows-00000.parquet     rows by part, a row group for each part
plan/plan.json              counts, partitions of the parts, classes, fingerprint
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixart_ds import files
from pixart_ds.config.load import fingerprint
from pixart_ds.config.schema import PrepareConfig
from pixart_ds.data.format import FORMAT
from pixart_ds.plan.buckets import nearest_of
from pixart_ds.plan.random import key_of, permutation, raw_words
from pixart_ds.prepare.items import Item, Place

PARTS_PER_FILE = 1024
BLOCK_ROWS, WINDOW_BLOCKS = 1000, 64
"""Where single rows cannot be read cheaply, blocks of neighbours are shuffled, then the rows within a window of some blocks."""
_RATIOS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Plan:
    """The parts of a set.

    Attributes:
        folder: Where the plan's files are.
        about: What plan.json says.
    """

    folder: Path
    about: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Plan:
        """Raises DataError if there is no finished plan."""
        return cls(
            folder, files.read_json(folder / "plan.json", remedy="run `pixart-ds prepare RECIPE --only scan` first")
        )

    @property
    def num_parts(self) -> int:
        return len(self.about["partitions"])

    @property
    def partitions(self) -> list[int]:
        """Index of each part's aspect ratio."""
        return list(self.about["partitions"])

    @property
    def counts(self) -> list[int]:
        """Pictures of each part."""
        return list(self.about["counts"])

    @property
    def fingerprint(self) -> str:
        """Of all rows and the parts that they are in."""
        return str(self.about["fingerprint"])

    def key(self, config: PrepareConfig) -> str:
        """Of the rows and of all that decides what is written of them and how: parts of another key are never joined with these."""
        return fingerprint([FORMAT, self.fingerprint, {**decisions(config), "source": None}])

    def items(self, part: int) -> list[Item]:
        """The pictures of one part, in the sequence of its rows."""
        table = _rows_file(self.folder / _rows_name(part // PARTS_PER_FILE)).read_row_group(part % PARTS_PER_FILE)
        numbers = [name for name in table.column_names if name.startswith("number.")]
        return [_item(row, numbers) for row in table.to_pylist()]

    def captions(self, part: int) -> list[str]:
        """What the source says of the pictures of one part, as far as it says something."""
        file = _rows_file(self.folder / _rows_name(part // PARTS_PER_FILE))
        column = file.read_row_group(part % PARTS_PER_FILE, columns=["caption"])["caption"]
        return [caption for caption in column.to_pylist() if caption is not None]

    @cached_property
    def labels(self) -> dict[str, int]:
        """The number of each class, by its key."""
        return {key: number for number, key in enumerate(self.about["class_keys"])}


_FREE = {"output", "work", "batch_size", "batch_pixels"}
"""Keys that may change while a set is being made: they decide where and how fast, and by rounding the last bit of a feature."""


def decisions(config: PrepareConfig) -> dict[str, Any]:
    """What decides a set's content, by key."""
    values = config.model_dump(mode="json", exclude=_FREE)
    values["captions"].pop("batch_size")
    return values


@lru_cache(maxsize=4)
def _rows_file(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)


def _rows_name(number: int) -> str:
    return f"rows-{number:05d}.parquet"


def _item(row: dict[str, Any], numbers: Sequence[str]) -> Item:
    return Item(
        name=row["name"],
        place=Place(row["container"], row["start"], row["length"]),
        height=row["height"],
        width=row["width"],
        caption=row["caption"],
        class_key=row["class_key"],
        numbers={name.removeprefix("number."): row[name] for name in numbers if row[name] is not None},
    )


def make_plan(
    folder: Path,
    tables: Iterable[Any],
    *,
    ratios: tuple[float, ...],
    rows_per_group: int,
    seed: int,
    random_access: bool,
    about: dict[str, Any],
) -> Plan:
    """Assigns every picture to a part and writes the plan; it is there whole, or not at all. Only one process may do it at a time.

    Args:
        folder: Of the plan; it is not there yet.
        tables: The scanned pictures: pyarrow tables of one schema, which can be gone through repeatedly.
        ratios: Aspect ratios of the partitions.
        rows_per_group: Pictures of a part.
        seed: Of the shuffle.
        random_access: Whether single pictures can be read cheaply.
        about: What else plan.json is to say; `class_keys` among it.
    """
    partitions = _partitions(tables, ratios)
    part_of, row_of, part_partitions, counts = assign(
        partitions, len(ratios), rows_per_group, seed, random_access=random_access
    )
    for stale in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(stale)
    temporary = files.temporary_name(folder)
    temporary.mkdir(parents=True)
    try:
        _distribute(temporary, tables, part_of, row_of)
        digest = _sort(temporary, len(counts))
        plan = {
            "rows": int(sum(counts)),
            "parts": len(counts),
            "fingerprint": digest,
            **about,
            "partitions": part_partitions,
            "counts": counts,
        }
        files.write_json(temporary / "plan.json", plan)
        files.sync_folder(temporary)
        os.rename(temporary, folder)
        files.sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Plan(folder, plan)


def assign(
    partitions: npt.NDArray[np.int16], num_partitions: int, rows_per_group: int, seed: int, *, random_access: bool
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], list[int], list[int]]:
    """Deals shuffled pictures to parts of one partition each.

    Parts are numbered by where their first picture stands in the shuffled sequence: neighbours in number are neighbours in the
    source, where the shuffle keeps neighbours together.

    Args:
        partitions: (n,) partition of each picture.

    Returns:
        (n,) part of each picture; (n,) its row there; for each part its partition; and its count.
    """
    total = len(partitions)
    sequence = _shuffled(total, seed) if random_access else _shuffled_in_blocks(total, seed)
    shuffled = partitions[sequence]
    groups: list[tuple[int, int, npt.NDArray[np.int64]]] = []
    for partition in range(num_partitions):
        places = np.flatnonzero(shuffled == partition)
        for start in range(0, len(places), rows_per_group):
            mine = places[start : start + rows_per_group]
            groups.append((int(mine[0]), partition, sequence[mine]))
    groups.sort(key=lambda group: group[0])
    part_of, row_of = np.empty(total, np.int32), np.empty(total, np.int32)
    for number, (_, _, pictures) in enumerate(groups):
        part_of[pictures] = number
        row_of[pictures] = np.arange(len(pictures))
    return part_of, row_of, [partition for _, partition, _ in groups], [len(pictures) for _, _, pictures in groups]


def _shuffled(total: int, seed: int) -> npt.NDArray[np.int64]:
    return permutation(raw_words(key_of("prepare", seed), (0, 0, 0), total))


def _shuffled_in_blocks(total: int, seed: int) -> npt.NDArray[np.int64]:
    blocks = permutation(raw_words(key_of("prepare", seed), (1, 0, 0), -(-total // BLOCK_ROWS)))
    pieces = []
    for window in range(0, len(blocks), WINDOW_BLOCKS):
        rows = np.concatenate(
            [
                np.arange(block * BLOCK_ROWS, min(total, (block + 1) * BLOCK_ROWS))
                for block in blocks[window : window + WINDOW_BLOCKS]
            ]
        )
        pieces.append(rows[permutation(raw_words(key_of("prepare", seed), (2, window, 0), len(rows)))])
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def _partitions(tables: Iterable[Any], ratios: tuple[float, ...]) -> npt.NDArray[np.int16]:
    """(n,) partition of all pictures."""
    partitions = [np.zeros(0, np.int16)]
    for table in tables:
        heights, widths = (table[name].to_numpy() for name in ("height", "width"))
        for start in range(0, len(heights), _RATIOS_AT_ONCE):
            piece = slice(start, start + _RATIOS_AT_ONCE)
            partitions.append(nearest_of(ratios, heights[piece], widths[piece]).astype(np.int16))
    return np.concatenate(partitions)


def _distribute(
    folder: Path, tables: Iterable[Any], part_of: npt.NDArray[np.int32], row_of: npt.NDArray[np.int32]
) -> None:
    """Writes each row into the file of its part, unsorted."""
    import pyarrow as pa

    writers: dict[int, Any] = {}
    first = 0
    for table in tables:
        here = slice(first, first + len(table))
        parts = part_of[here]
        placed = table.append_column("part", pa.array(parts)).append_column("row", pa.array(row_of[here]))
        for number in np.unique(parts // PARTS_PER_FILE).tolist():
            if number not in writers:
                writers[number] = pa.ipc.new_file(folder / f"{number}.arrow", placed.schema)
            writers[number].write_table(placed.take(pa.array(np.flatnonzero(parts // PARTS_PER_FILE == number))))
        first += len(table)
    for writer in writers.values():
        writer.close()


def _sort(folder: Path, parts: int) -> str:
    """Sorts each file by part and row, a row group for each part; returns a hash of all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    digest = hashlib.blake2b(digest_size=16)
    for number in range(-(-parts // PARTS_PER_FILE)):
        unsorted = folder / f"{number}.arrow"
        with pa.ipc.open_file(unsorted) as file:
            table = file.read_all().sort_by([("part", "ascending"), ("row", "ascending")])
        for name in sorted(table.column_names):
            digest.update(name.encode())
            digest.update("\0".join(map(str, table[name].to_pylist())).encode())
        numbers = table["part"].to_numpy()
        starts = np.searchsorted(
            numbers, np.arange(number * PARTS_PER_FILE, min(parts, (number + 1) * PARTS_PER_FILE) + 1)
        )
        with pq.ParquetWriter(folder / _rows_name(number), table.schema, compression="zstd") as writer:
            for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
                writer.write_table(table.slice(begin, end - begin))
        unsorted.unlink()
    return digest.hexdigest()


def share(num_parts: int, number: int, count: int) -> range:
    """The parts of task `number` of `count`: neighbours, because they may lie in one file of the source."""
    return range(number * num_parts // count, (number + 1) * num_parts // count)
