"""Captions as they lie on disk, one after the other: a prepared set's, or a file's in one of the usual forms."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from pixart_ds.data.format import MANIFEST, ROWS
from pixart_ds.data.range_file import RangeFile
from pixart_ds.data.store import is_remote, open_store
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.s3 import StoreError

COLUMNS = ("caption", "prompt", "text")
"""Names that a column of captions usually has; the first that is there is taken."""

_BATCH_ROWS = 1024
_CHUNK_CHARS = 1 << 20
_MAX_RECORD_CHARS = 1 << 26
_OPENING = re.compile(r"\s*\[")
_BETWEEN = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Captions:
    """The captions of one place.

    Attributes:
        where: The place as it was named.
        total: How many entries it has, with and without a caption; None where only reading tells.
        read: Gives the entries in their sequence, None for one without a caption; raises DataError for what is damaged.
    """

    where: str
    total: int | None
    read: Callable[[], Iterator[str | None]]


def open_captions(where: str, column: str | None = None) -> Captions:
    """Finds out what is there; captions are read later, a few at a time.

    Args:
        where: Folder or s3:// address of a prepared set, or a file: .parquet, .jsonl, .json, .csv, .tsv, .txt.
        column: Of a file with columns; None for the first of `COLUMNS` that it has.

    Raises:
        ConfigError: There is no such place, form or column.
        DataError: The set is unfinished or has no list of its rows, or the file is damaged.
        StoreError: The store refuses or cannot be reached.
    """
    path = Path(where)
    if is_remote(where) or path.is_dir():
        return _of_set(where)
    readers = {".parquet": None, ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_array}
    readers |= {".csv": _separated, ".tsv": _separated, ".txt": _lines}
    if path.suffix.lower() not in readers:
        raise ConfigError(
            f"captions are not read from a file {f'that ends with {path.suffix}' if path.suffix else 'whose name has no ending'}",
            where=where,
            remedy=f"name a prepared set, or a file that ends with {', '.join(readers)}",
        )
    if not path.is_file():
        raise ConfigError("there is no such file", where=where, remedy="check the path")
    reader = readers[path.suffix.lower()]
    if reader is None:
        return _of_parquet(where, lambda: path, column)
    if reader is _lines and column is not None:
        raise ConfigError(f"--column {column}: a text file has no columns", where=where, remedy="leave --column out")
    read = partial(_read_text, path, column, reader)
    with closing(read()) as entries:
        next(entries, None)  # a wrong column or form is best told before hours of other files
    return Captions(where, None, read)


def _of_set(where: str) -> Captions:
    if not is_remote(where) and not (Path(where) / MANIFEST).is_file():
        raise DataError(
            f"there is no finished set in this folder: {MANIFEST} is missing",
            where=where,
            remedy="name the folder of a prepared set, or the files that hold the captions",
        )
    store = open_store(where)
    store.read(MANIFEST)  # a set without it is not finished
    try:
        store.size(ROWS)
    except StoreError as cause:
        if not cause.missing:
            raise
        raise DataError(
            f"the set has no {ROWS}, where its captions would be: an earlier version prepared it",
            where=where,
            remedy="name the files that its captions came from, or prepare it again",
        ) from cause
    return _of_parquet(where, lambda: RangeFile(store, ROWS), COLUMNS[0])


def _of_parquet(where: str, source: Callable[[], Path | RangeFile], column: str | None) -> Captions:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(source()) as file:
            schema, total = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as cause:
        raise DataError(f"the parquet file cannot be read: {cause}", where=where, remedy="fetch it again") from cause
    name = _column(schema.names, column, where)
    kind = schema.field(name).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_null(value)):
        raise ConfigError(f"column {name} holds {kind}, not text", where=where, remedy="name another one with --column")

    def read() -> Iterator[str | None]:
        try:
            with parquet.ParquetFile(source()) as file:
                for batch in file.iter_batches(_BATCH_ROWS, columns=[name]):
                    yield from batch.column(0).to_pylist()
        except (pa.ArrowException, OSError) as cause:
            raise DataError(f"the parquet file breaks off: {cause}", where=where, remedy="fetch it again") from cause

    return Captions(where, total, read)


def _column(names: Iterable[str], column: str | None, where: Path | str) -> str:
    there = list(names)
    found = next((name for name in ((column,) if column else COLUMNS) if name in there), None)
    if found is None:
        wanted = f"no column {column}" if column else f"none of the columns {', '.join(COLUMNS)}"
        raise ConfigError(
            f"the file has {wanted}; it has {', '.join(there[:20]) or 'none'}",
            where=where,
            remedy="name the column of the captions with --column",
        )
    return found


def _read_text(
    path: Path, column: str | None, reader: Callable[[TextIO, Path, str | None], Iterator[str | None]]
) -> Generator[str | None]:
    with open(path, encoding="utf-8-sig", newline="" if reader is _separated else None) as file:
        try:
            yield from reader(file, path, column)
        except UnicodeDecodeError as cause:
            raise DataError(
                f"the file is not UTF-8: {cause}", where=path, remedy="convert it, or name another"
            ) from cause


def _lines(file: TextIO, path: Path, column: str | None) -> Iterator[str | None]:
    for line in file:
        yield line.rstrip("\n")


def _separated(file: TextIO, path: Path, column: str | None) -> Iterator[str | None]:
    rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        name = _column(rows.fieldnames or (), column, path)
        for row in rows:
            yield row[name]
    except csv.Error as cause:
        raise DataError(f"line {rows.line_num}: {cause}", where=path, remedy="mend the line") from cause


def _json_lines(file: TextIO, path: Path, column: str | None) -> Iterator[str | None]:
    def records() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as cause:
                    raise DataError(
                        f"line {number} is not JSON: {cause}", where=path, remedy="mend the line"
                    ) from cause

    return _of_records(records(), path, column)


def _json_array(file: TextIO, path: Path, column: str | None) -> Iterator[str | None]:
    return _of_records(((f"entry {n}", item) for n, item in enumerate(_items(file, path), 1)), path, column)


def _items(file: TextIO, path: Path) -> Iterator[Any]:
    """The entries of a JSON list, without the whole of it in memory."""
    decoder = json.JSONDecoder()
    text = file.read(_CHUNK_CHARS)
    opening = _OPENING.match(text)
    if opening is None:
        raise DataError("the file is not a JSON list", where=path, remedy="make it a list of objects or of captions")
    at = opening.end()
    while True:
        if (between := _BETWEEN.match(text, at)) is not None:
            at = between.end()
        if text.startswith("]", at):
            return
        try:
            item, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as cause:
            rest = len(text) - at
            more = file.read(max(_CHUNK_CHARS, rest)) if rest < _MAX_RECORD_CHARS else ""
            if not more:
                raise DataError(
                    f"the JSON list breaks off: {cause.msg}", where=path, remedy="fetch it again"
                ) from cause
            text, at = text[at:] + more, 0
        else:
            yield item


def _of_records(records: Iterator[tuple[str, Any]], path: Path, column: str | None) -> Iterator[str | None]:
    """Captions of objects, or of texts that are captions themselves.

    A record may lack the column, as where empty values are left out, but not every one.
    """
    name, seen, keys = column, False, ""
    for place, record in records:
        if isinstance(record, str) and column is None:
            yield record
            seen = True
            continue
        if not isinstance(record, dict):
            raise DataError(f"{place} is neither an object nor a caption", where=path, remedy="mend the file")
        if name is None:
            name = _column(record, None, path)
        keys = keys or ", ".join(record)
        seen |= name in record
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{place}: {name} is {json.dumps(value)[:60]}, not a text",
                where=path,
                remedy="mend it, or name another column with --column",
            )
        yield value
    if keys and not seen:
        _column(keys.split(", "), name, path)
