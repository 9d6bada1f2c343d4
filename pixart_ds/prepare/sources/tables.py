"""Parquet files with a row for each picture: its bytes, or its path."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from pixart_ds.config.schema import SourceConfig
from pixart_ds.data.range_file import RangeFile
from pixart_ds.data.store import is_remote
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.prepare.items import BrokenPicture, Item, Place, Rejected
from pixart_ds.prepare.pictures import size_of
from pixart_ds.prepare.sources.base import (
    THREADS,
    Chunk,
    Files,
    Pictures,
    caption_key_of,
    caption_of,
    class_of,
    find_files,
    first_key,
    in_order,
    numbers_of,
)
from pixart_ds.prepare.sources.lists import PICTURE_KEYS

_CACHED_BYTES = 1 << 30
_ROWS_PER_CHUNK, _MOST_ROWS_PER_CHUNK = 5000, 20_000
_ROWS_AT_ONCE = 64


class ParquetSource:
    """Rows whose picture is a binary column, a struct {bytes, path} as Hugging Face writes it, or a path. A chunk is some row
    groups, or a slice of a very long one.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._row_starts: dict[str, Any] = {}
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()

    @property
    def root(self) -> str:
        return self._files.root

    @property
    def random_access(self) -> bool:
        return not self._embedded

    @cached_property
    def _files(self) -> Files:
        return find_files(self.config, (".parquet",), "parquet files")

    @cached_property
    def _pictures(self) -> Pictures:
        return Pictures(self._files.root if self.config.root is None else self.config.root)

    def chunks(self) -> list[Chunk]:
        """Chunks of (file, row group, row groups, first row, first row in the group, rows)."""
        self._check_columns()
        threads = THREADS if is_remote(self._files.root) else 1
        chunks: list[Chunk] = []
        for name, rows in in_order(lambda name: (name, self._rows_of_groups(name)), self._files.sizes, threads):
            chunks += [Chunk(f"{name}, from row {content[3]}", content) for content in _cut(name, rows)]
        if not chunks:
            raise DataError("the parquet files hold no row", where=self.config.path, remedy="correct source.path")
        return chunks

    def _rows_of_groups(self, name: str) -> list[int]:
        with self._file(name) as file:
            return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]

    def listing(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name, size in self._files.sizes.items():
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @contextmanager
    def _file(self, name: str) -> Iterator[Any]:
        """A file opened anew; damage to it as a DataError."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if is_remote(self._files.root):
                made = pq.ParquetFile(RangeFile(self._files.store, name, self._files.sizes[name]), pre_buffer=True)
            else:
                made = pq.ParquetFile(os.path.join(self._files.root, name))
            with made as file:
                yield file
        except (pa.ArrowException, OSError) as cause:
            if isinstance(cause, OSError) and cause.errno is not None:
                raise
            raise DataError(
                f"{name} cannot be read as parquet: {str(cause).splitlines()[0]}",
                where=self._files.root,
                remedy="fetch or write it again, or move it away",
            ) from cause

    @cached_property
    def _first_schema(self) -> Any:
        with self._file(next(iter(self._files.sizes))) as file:
            return file.schema_arrow

    @cached_property
    def _picture_key(self) -> str:
        names = self._first_schema.names
        key = first_key(dict.fromkeys(names), self.config.picture_key, PICTURE_KEYS)
        if key is None:
            raise ConfigError(
                f"no column holds a picture or its path: there is {', '.join(names)}",
                where=self.config.path,
                remedy="name one in source.picture_key",
            )
        return key

    @cached_property
    def _embedded(self) -> bool:
        from pyarrow import types

        kind = self._first_schema.field(self._picture_key).type
        if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
            return True
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return True
        if types.is_string(kind) or types.is_large_string(kind):
            return False
        raise ConfigError(
            f"the column {self._picture_key} holds {kind}, neither pictures nor paths",
            where=self.config.path,
            remedy="name another one in source.picture_key",
        )

    def _check_columns(self) -> None:
        """What the recipe names is there."""
        names = self._first_schema.names
        for key, value in (("caption_key", self.config.caption_key), ("class_key", self.config.class_key)):
            if value is not None and value not in names:
                raise ConfigError(
                    f"source.{key}: there is no column {value}, only {', '.join(names)}",
                    where=self.config.path,
                    remedy="correct it",
                )
        _ = self._embedded

    def scan(self, chunk: Chunk) -> Iterator[Item | Rejected]:
        name, group, groups, first, skipped, count = chunk.content
        with self._file(name) as file:
            columns = self._columns(file.schema_arrow, name)
            batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=list(range(group, group + groups)), columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            wanted = ((first + at - skipped, row) for at, row in enumerate(rows) if at >= skipped)
            limited = (entry for _, entry in zip(range(count), wanted, strict=False))
            threads = 1 if self._embedded else self._pictures.threads
            yield from in_order(lambda entry: self._item(name, *entry), limited, threads)

    def _columns(self, schema: Any, name: str) -> list[str]:
        """The columns that are read: no lists or structs but the picture's."""
        from pyarrow import types

        if self._picture_key not in schema.names:
            raise DataError(
                f"{name} has no column {self._picture_key}, unlike the first file",
                where=self._files.root,
                remedy="move it",
            )
        columns = [self._picture_key]
        caption_key = caption_key_of(dict.fromkeys(schema.names), self.config.caption_key)
        for entry in schema:
            named = entry.name in (caption_key, self.config.class_key)
            if entry.name != self._picture_key and (
                (named and not types.is_nested(entry.type))
                or types.is_integer(entry.type)
                or types.is_floating(entry.type)
                or types.is_decimal(entry.type)
            ):
                columns.append(entry.name)
        return columns

    def _item(self, file: str, number: int, row: dict[str, Any]) -> Item | Rejected:
        name = f"{file}#{number}"
        picture = row[self._picture_key]
        try:
            if self._embedded:
                data = _bytes_of(picture)
                place = Place(file, number, len(data))
                height, width = size_of(data)
            else:
                if not picture:
                    raise BrokenPicture("the row has no path")
                begin = posixpath.dirname(file) if self.config.root is None else ""
                path = self._pictures.place_of(picture, begin)
                self._pictures.check_links(path)
                length, height, width = self._pictures.measure(path)
                place = Place(path, 0, length)
        except BrokenPicture as error:
            return Rejected(name, "broken", str(error))
        caption_key = caption_key_of(row, self.config.caption_key)
        return Item(
            name,
            place,
            height,
            width,
            caption_of(row, caption_key) if caption_key is not None else None,
            class_of(row, self.config.class_key),
            numbers_of(row, self._picture_key, caption_key, self.config.class_key),
        )

    def read(self, place: Place) -> bytes:
        if not self._embedded:
            return self._pictures.read(place)
        with self._lock:
            starts = self._starts(place.container)
            group = int(np.searchsorted(starts, place.start, side="right")) - 1
            if place.start >= starts[-1]:
                raise BrokenPicture("the file has fewer rows than when it was listed")
            pictures = self._row_group(place.container, group)
        data = _bytes_of(pictures[int(place.start - starts[group])].as_py())
        if len(data) != place.length:
            raise BrokenPicture(f"it had {place.length} bytes when it was listed, and has {len(data)} now")
        return data

    def _starts(self, name: str) -> Any:
        """(row groups + 1,) the row that each row group of a file begins with."""
        if name not in self._row_starts:
            self._row_starts[name] = np.cumsum([0, *self._rows_of_groups(name)])
        return self._row_starts[name]

    def _row_group(self, name: str, group: int) -> Any:
        """The pictures of a row group; the last few are kept."""
        key = (name, group)
        if key not in self._groups:
            with self._file(name) as file:
                self._groups[key] = file.read_row_group(group, columns=[self._picture_key])[self._picture_key]
            while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > _CACHED_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def titles(self, class_keys: Iterable[str]) -> list[str]:
        """Hugging Face's names of a class label's numbers, if the files say them."""
        names = self._label_names()
        keys = list(class_keys)
        return [names[int(key)] if key.isdigit() and int(key) < len(names) else key for key in keys]

    def _label_names(self) -> list[str]:
        metadata = (self._first_schema.metadata or {}).get(b"huggingface")
        try:
            features = json.loads(metadata)["info"]["features"] if metadata else {}
            return list(map(str, features.get(self.config.class_key, {}).get("names", [])))
        except (ValueError, KeyError, TypeError, AttributeError):  # it is only a courtesy of those who wrote it
            return []


def _cut(name: str, rows: list[int]) -> Iterator[tuple[str, int, int, int, int, int]]:
    group = first = 0
    while group < len(rows):
        if rows[group] > _MOST_ROWS_PER_CHUNK:
            for skipped in range(0, rows[group], _MOST_ROWS_PER_CHUNK):
                count = min(_MOST_ROWS_PER_CHUNK, rows[group] - skipped)
                yield name, group, 1, first + skipped, skipped, count
            first, group = first + rows[group], group + 1
            continue
        end, count = group, 0
        while end < len(rows) and (end == group or count + rows[end] <= _ROWS_PER_CHUNK):
            count += rows[end]
            end += 1
        if count:
            yield name, group, end - group, first, 0, count
        first, group = first + count, end


def _bytes_of(value: Any) -> bytes:
    """The picture in a row.

    Raises:
        BrokenPicture: There is none.
    """
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes) or not value:
        raise BrokenPicture("the row holds no picture")
    return value
