"""Lists of pictures in JSON, JSONL and CSV files."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import posixpath
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache
from typing import Any

from pixart_ds.config.schema import SourceConfig
from pixart_ds.data.store import is_remote
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.prepare.items import BrokenPicture, Item, Place, Rejected, is_unicode
from pixart_ds.prepare.sources.base import (
    ENTRIES_PER_CHUNK,
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

PICTURE_KEYS = ("path", "image", "file_name", "filename", "jpg", "png", "webp")
_ENDINGS = (".json", ".jsonl", ".csv")
Entry = tuple[str, dict[str, Any] | None]
"""Where it stands, for messages, and what it says; None: nothing that can be read."""


class ListSource:
    """Files with an entry for each picture: its path, caption, class and numbers. The released code's JSON is one."""

    random_access = True

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        csv.field_size_limit(sys.maxsize)

    @property
    def root(self) -> str:
        return self._pictures.root

    @cached_property
    def _files(self) -> Files:
        return find_files(self.config, _ENDINGS, "lists of pictures (.json, .jsonl, .csv)")

    @cached_property
    def _pictures(self) -> Pictures:
        return Pictures(self._files.root if self.config.root is None else self.config.root)

    def chunks(self) -> list[Chunk]:
        return self._listed[0]

    def listing(self) -> str:
        return self._listed[1]

    @cached_property
    def _listed(self) -> tuple[list[Chunk], str]:
        """Lists are read once as a whole to cut them, so that the hash can be over their content."""
        if not is_remote(self._pictures.root) and not os.path.isdir(self._pictures.root):
            raise DataError(
                "there is no folder of pictures",
                where=os.path.abspath(self._pictures.root),
                remedy="correct `source.root` in the prepare recipe",
            )
        digest = hashlib.blake2b(digest_size=16)
        chunks = []
        for name, size in self._files.sizes.items():
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
            cuts = {".json": self._cut_json, ".jsonl": self._cut_lines, ".csv": self._cut_csv}
            chunks += cuts[_ending(name)](name, digest)
        if not chunks:
            raise DataError(
                "the lists are empty", where=self.config.path, remedy="write entries, or another source.path"
            )
        return chunks, digest.hexdigest()

    def _cut_json(self, name: str, digest: Any) -> list[Chunk]:
        data = self._files.store.read(name)
        digest.update(data)
        count = len(_parsed(name, self._files.root, data))
        starts = range(0, count, ENTRIES_PER_CHUNK)
        return [
            Chunk(f"{name}, from entry {start + 1}", (name, start, min(ENTRIES_PER_CHUNK, count - start)))
            for start in starts
        ]

    def _cut_lines(self, name: str, digest: Any) -> list[Chunk]:
        """Chunks of (name, first byte, bytes, first line)."""
        chunks, first, begin, at = [], 1, 0, 0
        with self._files.open(name) as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                at += len(line)
                if number - first + 1 == ENTRIES_PER_CHUNK:
                    chunks.append((name, begin, at - begin, first))
                    first, begin = number + 1, at
        if at > begin:
            chunks.append((name, begin, at - begin, first))
        return [Chunk(f"{name}, from line {content[3]}", content) for content in chunks]

    def _cut_csv(self, name: str, digest: Any) -> list[Chunk]:
        """Chunks of (name, first byte, bytes, first line, names of columns); a quoted field may go over several lines."""
        at = 0

        def lines(file: Iterable[bytes]) -> Iterator[str]:
            nonlocal at
            for line in file:
                digest.update(line)
                at += len(line)
                yield line.decode("utf-8", "surrogateescape")

        chunks: list[tuple[Any, ...]] = []
        with self._files.open(name) as file:
            rows = csv.reader(lines(file))
            try:
                header = [word.strip().removeprefix("\ufeff") for word in next(rows, [])]
                if not all(map(is_unicode, header)):
                    raise DataError(
                        f"{name} is not UTF-8: its first line names columns in another encoding",
                        where=self._files.root,
                        remedy="save it as UTF-8",
                    )
                begin, first, count = at, rows.line_num + 1, 0
                for _ in rows:
                    count += 1
                    if count == ENTRIES_PER_CHUNK:
                        chunks.append((name, begin, at - begin, first, header))
                        begin, first, count = at, rows.line_num + 1, 0
            except csv.Error as cause:
                raise DataError(
                    f"{name} is not CSV: line {rows.line_num}: {cause}", where=self._files.root, remedy="correct it"
                ) from cause
        if count:
            chunks.append((name, begin, at - begin, first, header))
        return [Chunk(f"{name}, from line {content[3]}", content) for content in chunks]

    def scan(self, chunk: Chunk) -> Iterator[Item | Rejected]:
        name = chunk.content[0]
        readers: dict[str, Callable[..., Iterator[Entry]]] = {
            ".json": self._of_json,
            ".jsonl": self._of_lines,
            ".csv": self._of_csv,
        }
        entries = readers[_ending(name)](*chunk.content)
        begin = posixpath.dirname(name) if self.config.root is None else ""
        yield from in_order(lambda entry: self._item(begin, *entry), entries, self._pictures.threads)

    def _of_json(self, name: str, start: int, count: int) -> Iterator[Entry]:
        entries = _last_json(self, name)
        for number in range(start, start + count):
            entry = entries[number]
            yield f"{name}#{number + 1}", entry if isinstance(entry, dict) else None

    def _of_lines(self, name: str, begin: int, length: int, first: int) -> Iterator[Entry]:
        data = self._files.store.read_range(name, begin, length)
        for number, line in enumerate(io.BytesIO(data), first):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError:  # also of bytes that are not UTF-8
                entry = None
            yield f"{name}#{number}", entry if isinstance(entry, dict) else None

    def _of_csv(self, name: str, begin: int, length: int, first: int, header: list[str]) -> Iterator[Entry]:
        data = self._files.store.read_range(name, begin, length)
        lines = (line.decode("utf-8", "surrogateescape") for line in io.BytesIO(data))
        rows = csv.reader(lines)
        number = first
        for row in rows:
            if row:
                entry: dict[str, Any] | None = dict(zip(header, row, strict=False)) if len(row) == len(header) else None
                yield f"{name}#{number}", entry
            number = first + rows.line_num

    def _item(self, begin: str, where: str, entry: dict[str, Any] | None) -> Item | Rejected:
        name = where
        try:
            if entry is None:
                raise BrokenPicture("its entry in the list cannot be read")
            picture_key = first_key(entry, self.config.picture_key, PICTURE_KEYS)
            path = entry[picture_key] if picture_key is not None else None
            if not isinstance(path, str) or not path:
                raise BrokenPicture("its entry in the list has no path")
            if not is_unicode(path):
                raise BrokenPicture("its path in the list is not UTF-8")
            name = self._pictures.place_of(path, begin)
            self._pictures.check_links(name)
            length, height, width = self._pictures.measure(name)
        except BrokenPicture as error:
            return Rejected(name, "broken", str(error))
        caption_key = caption_key_of(entry, self.config.caption_key)
        others = (picture_key, caption_key, self.config.class_key)
        written = _ending(where.rpartition("#")[0]) == ".csv"
        values = {key: _number(value) for key, value in entry.items()} if written else entry
        return Item(
            name,
            Place(name, 0, length),
            height,
            width,
            caption_of(entry, self.config.caption_key),
            class_of(entry, self.config.class_key),
            numbers_of(values, *others),
        )

    def read(self, place: Place) -> bytes:
        return self._pictures.read(place)

    def titles(self, class_keys: Iterable[str]) -> list[str]:
        return list(class_keys)


def _ending(name: str) -> str:
    ending = posixpath.splitext(name)[1].lower()
    if ending not in _ENDINGS:
        raise ConfigError(
            f"source.path: a list ends in {', '.join(_ENDINGS)}, unlike {name}", remedy="rename it, or name other files"
        )
    return ending


def _number(text: object) -> object:
    try:
        return float(str(text))
    except ValueError:
        return text


@lru_cache(maxsize=1)
def _last_json(source: ListSource, name: str) -> list[Any]:
    """The array of the file that the last chunk was in, and very likely the next one."""
    files = source._files
    return _parsed(name, files.root, files.store.read(name))


def _parsed(name: str, root: str, data: bytes) -> list[Any]:
    remedy = "write one array of entries in it; for an entry in each line call it .jsonl"
    try:
        entries = json.loads(data)
    except ValueError as cause:
        raise DataError(f"{name} is not JSON: {cause}", where=root, remedy=remedy) from cause
    if not isinstance(entries, list):
        raise DataError(f"{name} holds no array", where=root, remedy=remedy)
    return entries
