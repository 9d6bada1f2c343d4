"""One row group of a prepared set, checked whole: its marker, its lines of rows.parquet, its shards and each of their rows."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from pixart_ds.data.codecs import CODECS
from pixart_ds.data.format import (
    ALIGNMENT,
    CAPTION_COLUMNS,
    CAPTIONS,
    LARGE_COLUMNS,
    LATENT_COLUMNS,
    MAX_SHARD_BYTES,
    PADDING,
    ROWS,
    SetDescription,
    latents_folder,
    marker_name,
    part_name,
)
from pixart_ds.data.shards import PreparedSet
from pixart_ds.data.store import is_remote
from pixart_ds.data.writer import table_lines
from pixart_ds.plan.buckets import cut, nearest_of
from pixart_ds.s3 import StoreError

SHOWN = 10
"""Problems of one kind that are told; the others are counted."""
_ATTEMPTS = 3
_MOST_UNREADABLE = 16
"""Files that are there and cannot be read: with more of them, it is the store or the disk that fails, not the set."""
_CHUNK_BYTES = 1 << 20
"""Latents that are looked at together: so many stay in a core's cache."""
_INFINITE = 0x7C00
"""The bits of fp16's infinity: those of finite numbers that are not negative are below it."""
_SIZES = {
    "str": None,
    "bytes": None,
    "int": 8,
    "ndarray:int32:2": 8,
    "ndarray:int32:3": 12,
    "ndarray:int32:4": 16,
}
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a set.

    Attributes:
        kind: In a word: only so many of one kind are told.
        what: With the value that is there, and the one that should be.
        where: The file, and the row.
    """

    kind: str
    what: str
    where: str


class Problems:
    """What was found: the first of each kind, and how many there are."""

    def __init__(self) -> None:
        self.told: list[Problem] = []
        self.counts: Counter[str] = Counter()
        self._told: Counter[str] = Counter()

    def add(self, kind: str, what: str, where: str) -> None:
        self.counts[kind] += 1
        self._tell(Problem(kind, what, where))

    def _tell(self, problem: Problem) -> None:
        if self._told[problem.kind] < SHOWN:
            self._told[problem.kind] += 1
            self.told.append(problem)

    def rows(self, kind: str, wrong: Mask, what: Callable[[int], str], where: str, first: int = 0) -> None:
        """One for each row that is marked.

        Args:
            kind: Of all of them.
            wrong: (n,) marks.
            what: Says what is wrong with a row.
            where: The file.
            first: Number of the first row.
        """
        numbers = np.flatnonzero(wrong).tolist()
        for number in numbers[:SHOWN]:
            self._tell(Problem(kind, what(number), f"{where}, row {first + number}"))
        self.counts[kind] += len(numbers)

    def merge(self, other: Problems) -> None:
        for problem in other.told:
            self._tell(problem)
        self.counts += other.counts


@dataclass(frozen=True)
class Index:
    """The entries of one index.json that are well formed, an entry for each row group; None where it is not.

    Attributes:
        folder: Of its shards.
        names: Of the files.
        sizes: In bytes.
        hashes: xxh3_64, hexadecimal.
    """

    folder: str
    names: list[str | None]
    sizes: list[int]
    hashes: list[str]

    def has(self, number: int) -> bool:
        return number < len(self.names) and self.names[number] is not None


class Skipped(BaseModel):
    """A line of skipped.jsonl."""

    model_config = ConfigDict(extra="forbid", strict=True)

    picture: str
    kind: Literal["broken", "filtered", "caption"]
    reason: str

    @property
    def hash(self) -> int:
        """Of 64 bits."""
        return xxhash.xxh3_64_intdigest("\0".join((self.picture, self.kind, self.reason)).encode())


class Marker(BaseModel):
    """What says that a part is whole."""

    model_config = ConfigDict(extra="forbid", strict=True)

    part: int
    partition: int
    count: int
    plan: str
    encoders: dict[str, str]
    shards: dict[str, dict[str, Any]]
    skipped: list[Skipped]
    caption_squares: float
    caption_squared_error: float
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Group:
    """One row group: its place in every index, its part, its aspect ratio's index, its rows, and its first row's id."""

    number: int
    part: int
    partition: int
    count: int
    first: int


@dataclass
class Found:
    """What came of one row group.

    Attributes:
        problems: Of it.
        names: (count,) hashes of the pictures' names; 0 where nobody knows.
        plan: That its marker names.
        truncated: Captions that were cut, as far as somebody knows.
        squares, squared_error: Of its marker.
        left_out: Hashes of its lines of pictures that were left out.
        bytes: That were read of its shards.
    """

    problems: Problems
    names: npt.NDArray[np.uint64]
    plan: str | None = None
    truncated: int | None = None
    squares: float = 0.0
    squared_error: float = 0.0
    left_out: list[int] = field(default_factory=list)
    bytes: int = 0


class Files:
    """A set's files; several threads may read.

    Args:
        made: The set.
        scratch: An empty folder for what is fetched from an object store.
    """

    def __init__(self, made: PreparedSet, scratch: Path) -> None:
        self.store, self.url = made.store, made.path
        self._folder = None if is_remote(made.path) else Path(made.path)
        self._scratch, self._numbers = scratch, itertools.count()
        self._unreadable = itertools.count(1)
        self._own = threading.local()

    def read(self, name: str, problems: Problems) -> bytes | None:
        """A small file's content, or None with a problem."""
        with self._told(name, problems):
            return self.store.read(name)
        return None

    def shard(self, name: str, problems: Problems) -> Bytes | None:
        """A shard's content, or None with a problem; it is valid until this thread reads the next one."""
        with self._told(name, problems):
            if self._folder is not None:
                return self._whole(self._folder / name)
            path = self._scratch / str(next(self._numbers))
            try:
                self._fetch(name, path)
                return self._whole(path)
            finally:
                path.unlink(missing_ok=True)
        return None

    @contextmanager
    def _told(self, name: str, problems: Problems) -> Iterator[None]:
        """Makes a problem of a file that is not there or cannot be read, and an error only where too many cannot."""
        try:
            yield
        except (StoreError, OSError) as error:
            where = f"{self.url}/{name}"
            if isinstance(error, FileNotFoundError) or getattr(error, "missing", False):
                problems.add("missing", "the file is not there", where)
                return
            if next(self._unreadable) > _MOST_UNREADABLE:
                raise
            words = error.what if isinstance(error, StoreError) else error.strerror
            problems.add("unreadable", f"the file cannot be read: {words}", where)

    def _fetch(self, name: str, to: Path) -> None:
        for attempt in range(1, _ATTEMPTS):
            try:
                return self.store.fetch(name, to)
            except StoreError as error:
                if error.final:
                    raise
            time.sleep(attempt)
        return self.store.fetch(name, to)

    def _whole(self, path: Path) -> Bytes:
        with open(path, "rb", buffering=0) as file:
            size, at = os.fstat(file.fileno()).st_size, 0
            content = self._buffer(size)
            while at < size and (count := file.readinto(content.data[at:])):
                at += count
        return content[:at]

    def _buffer(self, size: int) -> Bytes:
        """Memory of this thread: to touch new memory for each shard takes as long as to read it."""
        buffer: Bytes | None = getattr(self._own, "buffer", None)
        if buffer is None or len(buffer) < size:
            self._own.buffer = None  # the old one goes first
            self._own.buffer = buffer = np.empty(size, np.uint8)
        return buffer[:size]


# ---- shards as arrays ---------------------------------------------------------------------------------------------------


def entry_flaw(entry: Any, columns: Mapping[str, str]) -> str | None:
    """What is wrong with a shard's entry in an index or a marker, whatever shard it is."""
    wanted = {
        "column_encodings": list(columns.values()),
        "column_names": list(columns),
        "column_sizes": [_SIZES[encoding] for encoding in columns.values()],
        "compression": None,
        "format": "mds",
        "hashes": ["xxh3_64"],
        "version": 2,
    }
    if not isinstance(entry, dict):
        return f"{short(entry)} is no shard's entry"
    for key, value in wanted.items():
        if entry.get(key) != value:
            return f"{key} is {short(entry.get(key))} instead of {short(value)}"
    raw, samples = entry.get("raw_data"), entry.get("samples")
    if not isinstance(samples, int) or not 1 <= samples <= MAX_SHARD_BYTES:
        return f"samples is {short(samples)}"
    if not isinstance(raw, dict) or not isinstance(raw.get("hashes"), dict):
        return f"raw_data is {short(raw)}"
    name, size, digest = raw.get("basename"), raw.get("bytes"), raw["hashes"].get("xxh3_64")
    if not isinstance(name, str) or not isinstance(digest, str) or not isinstance(size, int):
        return f"raw_data is {short(raw)}"
    return None


class _Damaged(Exception):
    """A shard's bytes are no samples of the columns."""


class _Samples:
    """A shard's samples, column by column.

    Args:
        raw: The whole shard.
        columns: Encodings of its columns.
        count: Samples that it must have.

    Raises:
        _Damaged: It has others.
    """

    def __init__(self, raw: Bytes, columns: Mapping[str, str], count: int) -> None:
        self.raw = raw
        offsets = self._offsets(count)
        self._check_header(int(offsets[0]), columns)
        sizes = {name: _SIZES[encoding] for name, encoding in columns.items()}
        varying = [name for name, size in sizes.items() if size is None]
        head = 4 * len(varying)
        least = head + sum(size or 0 for size in sizes.values())
        whole = np.diff(offsets)  # (n,) bytes of each sample
        if (whole < least).any():
            number = int((whole < least).argmax())
            raise _Damaged(f"row {number} has {whole[number]} bytes, its columns {least} at least")
        heads = raw[offsets[:-1, None] + np.arange(head)].view("<u4").astype(np.int64)  # (n, columns that vary)
        differing = least + heads.sum(1) != whole
        if differing.any():
            number = int(differing.argmax())
            raise _Damaged(f"row {number} has {whole[number]} bytes, its columns {least + heads[number].sum()}")
        self.starts: dict[str, Ints] = {}
        self.lengths: dict[str, Ints] = {}
        at = offsets[:-1] + head
        for name, size in sizes.items():
            length = heads[:, varying.index(name)] if size is None else np.full(count, size)
            self.starts[name], self.lengths[name] = at, length
            at = at + length

    def _offsets(self, count: int) -> Ints:
        raw = self.raw
        if len(raw) < 8 + 4 * count:
            raise _Damaged(f"it has {len(raw)} bytes, too few for {count} rows")
        (there,) = raw[:4].view("<u4").tolist()
        if there != count:
            raise _Damaged(f"it has {there} rows instead of {count}")
        offsets = raw[4 : 8 + 4 * count].view("<u4").astype(np.int64)
        if offsets[0] < 8 + 4 * count or offsets[-1] != len(raw) or (np.diff(offsets) < 0).any():
            raise _Damaged("the places of its rows are none within the file")
        return offsets

    def _check_header(self, begin: int, columns: Mapping[str, str]) -> None:
        at = 4 * (int(self.raw[:4].view("<u4")[0]) + 2)
        try:
            header = json.loads(self.raw[at:begin].tobytes())
            there = dict(zip(header["column_names"], header["column_encodings"], strict=True))
        except (ValueError, KeyError, TypeError) as cause:
            raise _Damaged(f"its header is none: {cause}") from cause
        if there != columns:
            raise _Damaged(f"its header names the columns {there} instead of {dict(columns)}")

    def numbers(self, name: str, kind: str) -> npt.NDArray[Any]:
        """(n, k) numbers of a column of one size."""
        size = int(self.lengths[name][0])
        return self.raw[self.starts[name][:, None] + np.arange(size)].view(kind)

    def content(self, name: str, row: int) -> Bytes:
        """(bytes,) of one sample's column."""
        start = self.starts[name][row]
        return self.raw[start : start + self.lengths[name][row]]

    def words(self, name: str) -> list[str | None]:
        """(n,) texts; None for one that is not UTF-8."""
        return [_text(self.content(name, row).tobytes()) for row in range(len(self.starts[name]))]


def _text(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


# ---- the table ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lines:
    """A row group's lines of rows.parquet: an entry for each row in all of them."""

    columns: dict[str, npt.NDArray[Any]]
    names: list[str]
    captions: list[str]
    crops: dict[str, npt.NDArray[np.int32]] = field(default_factory=dict)

    def __getitem__(self, column: str) -> npt.NDArray[Any]:
        return self.columns[column]


_PLAIN = ("id", "class_label", "partition", "part", "shard", "row", "height", "width", "num_tokens", "truncated")


class GroupChecker:
    """Checks row groups; several threads may.

    Args:
        files: Of the set.
        about: What its rows are made of.
        indexes: By folder, those that can be read.
    """

    def __init__(self, files: Files, about: SetDescription, indexes: Mapping[str, Index]) -> None:
        self._files, self._about, self._indexes, self._url = files, about, indexes, files.url
        self._codec = CODECS[about.caption_codec]
        self._token_bytes = self._codec.bytes_per_token(about.caption_channels)

    def check(self, group: Group, table: Any | None) -> Found:
        """Everything of one group.

        Args:
            group: Which.
            table: Its lines of rows.parquet; None if there are none.
        """
        found = Found(Problems(), np.zeros(group.count, np.uint64))
        lines = None if table is None else self._lines(group, table, found.problems)
        if lines is not None:
            found.truncated = int(lines["truncated"].sum())
        self._marker(group, table if lines is not None else None, found)
        if (opened := self._shard(CAPTIONS, CAPTION_COLUMNS, group, found)) is not None:
            self._captions(group, *opened, lines, found)
        for name in self._about.latents:
            if (opened := self._shard(latents_folder(name), LATENT_COLUMNS, group, found)) is not None:
                self._latents(group, name, *opened, lines, found.problems)
        return found

    # ---- table and marker ----------------------------------------------------------------------------------------------

    def _lines(self, group: Group, table: Any, problems: Problems) -> _Lines | None:
        where = f"{self._url}/{ROWS}"
        if empty := [name for name in table.column_names if not name.startswith("number.") and table[name].null_count]:
            problems.add("table", f"{', '.join(empty)}: no value", f"{where}, rows from {group.first}")
            return None
        lines = _Lines(
            {name: table[name].to_numpy() for name in _PLAIN},
            table["name"].to_pylist(),
            table["caption"].to_pylist(),
            {
                name: table[f"crop.{name}"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
                for name in self._about.latents
            },
        )
        numbers = np.arange(group.count)
        for column, wanted in (
            ("id", group.first + numbers),
            ("shard", np.full(group.count, group.number)),
            ("row", numbers),
            ("part", np.full(group.count, group.part)),
            ("partition", np.full(group.count, group.partition)),
        ):
            there = lines[column]

            def differs(row: int, c: str = column, a: Any = there, b: Any = wanted) -> str:
                return f"{c} is {a[row]} instead of {b[row]}"

            problems.rows("table", there != wanted, differs, where, group.first)
        tokens, most = lines["num_tokens"], self._about.max_tokens
        problems.rows(
            "table",
            lines["truncated"] & (tokens != most),
            lambda row: f"the caption was cut, but has {tokens[row]} tokens instead of {most}",
            where,
            group.first,
        )
        return lines

    def _marker(self, group: Group, table: Any | None, found: Found) -> None:
        name, problems = marker_name(group.part), found.problems
        where = f"{self._url}/{name}"
        if (raw := self._files.read(name, problems)) is None:
            return
        marker = marker_of(raw, where, problems)
        if marker is None:
            return
        found.plan, found.squares, found.squared_error = (
            marker.plan,
            marker.caption_squares,
            marker.caption_squared_error,
        )
        found.left_out = [line.hash for line in marker.skipped]
        for key, there, wanted in (
            ("part", marker.part, group.part),
            ("partition", marker.partition, group.partition),
            ("count", marker.count, group.count),
            ("encoders", marker.encoders, self._about.encoders),
            ("the number of its lines", len(marker.rows), group.count),
            ("shards", sorted(marker.shards), sorted([CAPTIONS, *map(latents_folder, self._about.latents)])),
        ):
            if there != wanted:
                problems.add("marker", f"{key} is {there} instead of {wanted}", where)
        for folder, index in self._indexes.items():
            if folder in marker.shards and index.has(group.number):
                self._marked_shard(marker.shards[folder], index, group, where, problems)
        if table is not None and len(marker.rows) == group.count:
            self._compare(marker, table, group, where, problems)

    def _marked_shard(self, entry: dict[str, Any], index: Index, group: Group, where: str, problems: Problems) -> None:
        flaw = entry_flaw(entry, CAPTION_COLUMNS if index.folder == CAPTIONS else LATENT_COLUMNS)
        if flaw is not None:
            problems.add("marker", f"{index.folder}: {flaw}", where)
            return
        raw, number = entry["raw_data"], group.number
        for key, there, wanted in (
            ("name", raw["basename"], index.names[number]),
            ("bytes", raw["bytes"], index.sizes[number]),
            ("hash", raw["hashes"]["xxh3_64"], index.hashes[number]),
            ("samples", entry["samples"], group.count),
        ):
            if there != wanted:
                problems.add("marker", f"{index.folder}: {key} is {there}, in the index {wanted}", where)

    def _compare(self, marker: Marker, table: Any, group: Group, where: str, problems: Problems) -> None:
        """A marker's lines with those of rows.parquet, which were made of them."""
        import pyarrow as pa

        try:
            lines = list(table_lines(marker.model_dump(), group.number, group.first, self._about.latents))
            wanted = pa.Table.from_pylist(lines, schema=table.schema)
        except (pa.ArrowException, KeyError, TypeError, AttributeError, ValueError, OverflowError) as cause:
            problems.add("marker", f"its lines are none of {ROWS}: {cause!r}", where)
            return
        numbers = {name for line in lines for name in line if name.startswith("number.")}
        if absent := sorted(numbers - set(table.column_names)):
            problems.add("table", f"there is no column {absent[0]}, which {where} has", f"{self._url}/{ROWS}")
        for name in table.column_names:
            if wanted[name].equals(table[name]):
                continue
            there, here = table[name].to_pylist(), wanted[name].to_pylist()
            differing = np.array([not _same(one, two) for one, two in zip(there, here, strict=True)])

            def differs(row: int, column: str = name, a: Any = there, b: Any = here) -> str:
                return f"{column} is {short(a[row])}, in {marker_name(group.part)} {short(b[row])}"

            problems.rows("table", differing, differs, f"{self._url}/{ROWS}", group.first)

    # ---- shards --------------------------------------------------------------------------------------------------------

    def _shard(
        self, folder: str, columns: Mapping[str, str], group: Group, found: Found
    ) -> tuple[_Samples, str] | None:
        """One shard of the group, and its name; None, with a problem, if it is not whole."""
        index = self._indexes.get(folder)
        if index is None or not index.has(group.number):
            return None
        name = f"{folder}/{index.names[group.number]}"
        where = f"{self._url}/{name}"
        raw = self._files.shard(name, found.problems)
        if raw is None:
            return None
        found.bytes += len(raw)
        if len(raw) != index.sizes[group.number]:
            found.problems.add(
                "damaged", f"the shard has {len(raw)} bytes instead of {index.sizes[group.number]}", where
            )
            return None
        digest = xxhash.xxh3_64_hexdigest(raw.data)
        if digest != index.hashes[group.number]:
            found.problems.add(
                "damaged", f"the shard's xxh3 hash is {digest} instead of {index.hashes[group.number]}", where
            )
            return None
        try:
            samples = _Samples(raw, columns, group.count)
        except _Damaged as error:
            found.problems.add("damaged", f"the shard has the right hash, but {error}", where)
            return None
        self._places(samples, group, where, found.problems)
        self._padding(samples, where, found.problems)
        return samples, where

    def _places(self, samples: _Samples, group: Group, where: str, problems: Problems) -> None:
        parts, rows = samples.numbers("part", "<i8")[:, 0], samples.numbers("row", "<i8")[:, 0]
        problems.rows("place", parts != group.part, lambda row: f"part is {parts[row]} instead of {group.part}", where)
        problems.rows(
            "place", rows != np.arange(group.count), lambda row: f"row is {rows[row]} instead of {row}", where
        )

    def _padding(self, samples: _Samples, where: str, problems: Problems) -> None:
        (large,) = samples.starts.keys() & set(LARGE_COLUMNS)
        starts, lengths = samples.starts[large], samples.lengths[PADDING]
        dirty = np.array([bool(samples.content(PADDING, row).any()) for row in range(len(lengths))])
        problems.rows("padding", dirty, lambda row: "the padding holds other bytes than zeros", where)
        problems.rows(
            "padding",
            (starts % ALIGNMENT != 0) | (lengths >= ALIGNMENT),
            lambda row: f"{lengths[row]} bytes of padding put {large} at byte {starts[row]} of the file",
            where,
        )

    def _captions(self, group: Group, samples: _Samples, where: str, lines: _Lines | None, found: Found) -> None:
        problems, about = found.problems, self._about
        names, captions = samples.words("name"), samples.words("caption_text")
        found.names[:] = [0 if name is None else xxhash.xxh3_64_intdigest(name.encode()) for name in names]
        for kind, there, told in (
            ("name", names, lines.names if lines else names),
            ("caption", captions, lines.captions if lines else captions),
        ):

            def differs(row: int, k: str = kind, a: Any = there, b: Any = told) -> str:
                return (
                    f"the {k} is not UTF-8"
                    if a[row] is None
                    else f"the {k} is {short(a[row])}, in {ROWS} {short(b[row])}"
                )

            wrong = np.array([one is None or one != two for one, two in zip(there, told, strict=True)])
            problems.rows(kind, wrong, differs, where)
        labels, classes = samples.numbers("class_label", "<i8")[:, 0], len(about.classes)
        outside = (labels < -1) | (labels >= classes)
        problems.rows(
            "class", outside, lambda row: f"class_label is {labels[row]}, and there are {classes} classes", where
        )
        if lines:
            told_labels = lines["class_label"]
            problems.rows(
                "class",
                labels != told_labels,
                lambda row: f"class_label is {labels[row]}, in {ROWS} {told_labels[row]}",
                where,
            )
        for row in range(group.count):
            tokens = None if lines is None else int(lines["num_tokens"][row])
            if (flaw := self._features_flaw(samples.content("caption_embeds", row), tokens)) is not None:
                problems.add("features", flaw, f"{where}, row {row}")

    def _features_flaw(self, raw: Bytes, told: int | None) -> str | None:
        """What is wrong with a caption's features.

        Args:
            raw: As they are stored.
            told: Tokens that the table gives it.
        """
        tokens, rest = divmod(len(raw), self._token_bytes)
        if rest:
            return f"the caption features have {len(raw)} bytes, and a token {self._token_bytes}"
        if not 1 <= tokens <= self._about.max_tokens:
            return f"the caption has {tokens} tokens, not 1 to {self._about.max_tokens}"
        if told is not None and tokens != told:
            return f"the caption has {tokens} tokens, in {ROWS} {told}"
        flaw = self._codec.flaw(raw.copy().reshape(tokens, -1), self._about.caption_channels)  # a copy is aligned
        return None if flaw is None else f"the caption features hold {flaw}"

    def _latents(
        self, group: Group, name: str, samples: _Samples, where: str, lines: _Lines | None, problems: Problems
    ) -> None:
        about, info = self._about, self._about.latents[name]
        size = info.sizes[0 if info.square else group.partition]
        shape = (2 * about.latent_channels, *size)
        shapes = samples.numbers("shape", "<i4")
        problems.rows(
            "latents",
            (shapes != shape).any(1),
            lambda row: f"shape is {tuple(shapes[row].tolist())} instead of {shape}",
            where,
        )
        originals, crops = samples.numbers("original_size", "<i4"), samples.numbers("crop", "<i4")
        if lines:
            told, told_crops = np.stack([lines["height"], lines["width"]], 1), lines.crops[name]
            problems.rows(
                "size",
                (originals != told).any(1),
                lambda row: f"original_size is {originals[row].tolist()}, in {ROWS} {told[row].tolist()}",
                where,
            )
            problems.rows(
                "crop",
                (crops != told_crops).any(1),
                lambda row: f"crop is {crops[row].tolist()}, in {ROWS} {told_crops[row].tolist()}",
                where,
            )
        possible: Mask = np.all(originals >= 1, axis=1)
        problems.rows("size", ~possible, lambda row: f"original_size is {originals[row].tolist()}", where)
        self._cuts(group, name, originals, crops, possible, where, problems)
        self._numbers(samples, shape, where, problems)

    def _cuts(
        self,
        group: Group,
        name: str,
        originals: npt.NDArray[np.int32],
        crops: npt.NDArray[np.int32],
        possible: Mask,
        where: str,
        problems: Problems,
    ) -> None:
        """Whether each picture is in the partition of its ratio and was cut as it must be, given its size."""
        about, info = self._about, self._about.latents[name]
        height, width = info.sizes[0 if info.square else group.partition]
        pixels = (height * about.downsampling_factor, width * about.downsampling_factor)
        sizes = np.where(possible[:, None], originals, 1)
        ratios = nearest_of(about.ratios, sizes[:, 0], sizes[:, 1])
        problems.rows(
            "ratio",
            possible & (ratios != group.partition),
            lambda row: (
                f"{sizes[row, 0]} x {sizes[row, 1]} (height x width) is nearest to ratio {about.ratios[ratios[row]]}, "
                f"the part is of {about.ratios[group.partition]}"
            ),
            where,
        )
        cuts = [cut(high, wide, pixels) for high, wide in sizes.tolist()]
        wanted = np.array([(*each.resized, each.top, each.left) for each in cuts], np.int64).reshape(-1, 4)
        problems.rows(
            "crop",
            possible & (crops != wanted).any(1),
            lambda row: f"crop is {crops[row].tolist()}, and {wanted[row].tolist()} follows from its size",
            where,
        )

    def _numbers(self, samples: _Samples, shape: tuple[int, int, int], where: str, problems: Problems) -> None:
        """Whether all means are finite, and all standard deviations finite and not negative."""
        size = 2 * int(np.prod(shape))
        lengths = samples.lengths["latents"]
        problems.rows(
            "latents",
            lengths != size,
            lambda row: f"the latents have {lengths[row]} bytes instead of {size} for {shape}",
            where,
        )
        rows = np.flatnonzero(lengths == size)
        wrong = np.zeros(len(lengths), bool)
        at_once = max(1, _CHUNK_BYTES // size)
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            bits = np.stack([samples.content("latents", row) for row in some]).view("<u2").reshape(len(some), 2, -1)
            means = (bits[:, 0] & 0x7FFF).max(1)
            wrong[some] = (means >= _INFINITE) | (bits[:, 1].max(1) >= _INFINITE)
        for row in np.flatnonzero(wrong).tolist():  # which -0 may have marked, too
            means, stds = samples.content("latents", row).copy().view("<f2").reshape(2, -1)
            infinite, negative = int((~np.isfinite(means)).sum() + (~np.isfinite(stds)).sum()), int((stds < 0).sum())
            if infinite:
                problems.add(
                    "latents", f"{infinite} of {size // 2} latents are no finite numbers", f"{where}, row {row}"
                )
            if negative:
                problems.add("latents", f"{negative} standard deviations are negative", f"{where}, row {row}")

    def name_of(self, group: Group, row: int) -> str:
        """What the picture of a row that was checked is called."""
        opened = self._shard(CAPTIONS, CAPTION_COLUMNS, group, Found(Problems(), np.zeros(0, np.uint64)))
        name = None if opened is None else _text(opened[0].content("name", row).tobytes())
        return "?" if name is None else name

    def place_of(self, group: Group, row: int) -> str:
        """The shard and row of a caption."""
        index = self._indexes.get(CAPTIONS)
        name = index.names[group.number] if index is not None and index.has(group.number) else part_name(group.part)
        return f"{CAPTIONS}/{name}, row {row}"


def marker_of(raw: bytes, where: str, problems: Problems) -> Marker | None:
    """A part's marker, or None with a problem."""
    try:
        return Marker.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        problems.add("marker", f"it is no marker of a part: {place + ': ' if place else ''}{first['msg']}", where)
        return None


def short(value: Any) -> str:
    """A value in at most 60 letters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _same(one: Any, two: Any) -> bool:
    """Equal, or both not a number."""
    return bool(one == two or (one != one and two != two))  # noqa: PLR0124 - that is what NaN is known by
