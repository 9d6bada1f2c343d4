"""What all kinds of sources share: the protocol, names that stay inside their root, patterns of files, captions and numbers."""

from __future__ import annotations

import glob
import io
import itertools
import json
import math
import os
import posixpath
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pixart_ds.config.schema import SourceConfig
from pixart_ds.data.range_file import RangeFile
from pixart_ds.data.store import Store, is_remote, open_store
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.prepare.items import BrokenPicture, Item, Place, Rejected
from pixart_ds.prepare.pictures import size_of
from pixart_ds.s3 import StoreError

ENTRIES_PER_CHUNK = 5000
HEADER_BYTES = 1 << 16
"""Read at once of a picture, most of which have their header there."""
BLOCK_BYTES = 8 << 20
"""Read at once of a file that is read from its beginning to its end."""
THREADS = 16
"""Headers that are asked of an object store at once."""
_CAPTION_KEYS = ("prompt", "caption", "text", "txt")
_OWN_NUMBERS = ("width", "height", "ratio")
"""Of the picture itself, which is asked instead."""
_MAGIC = re.compile(r"[*?\[{]")

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """A fixed piece of a source, scanned by one process.

    Attributes:
        label: For messages.
        content: What the source needs to scan it; can be sent to another process.
    """

    label: str
    content: Any


class Source(Protocol):
    """Pictures, and what is said of them."""

    @property
    def root(self) -> str:
        """Where names begin: a folder or an s3:// address."""
        ...

    @property
    def random_access(self) -> bool:
        """Whether single pictures are read cheaply; in parquet files that hold them, a whole row group is read for one."""
        ...

    def chunks(self) -> list[Chunk]:
        """All pieces, fixed by what is there.

        Raises:
            DataError: There is nothing, or something that contradicts itself.
        """
        ...

    def listing(self) -> str:
        """A hash over names and sizes of everything that is read, not over pixels; changes when the source does."""
        ...

    def scan(self, chunk: Chunk) -> Iterator[Item | Rejected]:
        """Every picture of a chunk, in a fixed sequence; headers are read.

        Raises:
            StoreError: The disk or store fails; no picture is called broken for that.
        """
        ...

    def read(self, place: Place) -> bytes:
        """A picture's file; several threads may ask.

        Raises:
            BrokenPicture: It is gone, or has changed.
            StoreError: The disk or store fails.
        """
        ...

    def titles(self, class_keys: Iterable[str]) -> list[str]:
        """Readable names of classes."""
        ...


def in_order(function: Callable[[S], T], arguments: Iterable[S], threads: int) -> Iterator[T]:
    """`map` by threads, in the sequence of the arguments; not far ahead of what is asked for."""
    if threads == 1:
        yield from map(function, arguments)
        return
    rest = iter(arguments)
    with ThreadPoolExecutor(threads, "headers") as pool:
        try:
            while batch := list(itertools.islice(rest, 16 * threads)):
                yield from pool.map(function, batch)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def pack(entries: list[Any]) -> bytes:
    """A piece of a listing in little memory: there may be thousands, each with thousands of names."""
    return zlib.compress(json.dumps(entries).encode(), 1)


def unpack(packed: bytes) -> list[Any]:
    entries: list[Any] = json.loads(zlib.decompress(packed))
    return entries


class Pictures:
    """Pictures that are files of their own under a root.

    Args:
        root: A folder or an s3:// address.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.store = open_store(root)
        self.threads = THREADS if is_remote(root) else 1
        self._folder = None if is_remote(root) else Path(root)
        self._real = os.path.realpath(root)

    def place_of(self, path: str, begin: str = "") -> str:
        """A picture's path from the root.

        Args:
            path: As somebody wrote it: absolute, or relative to `begin`.
            begin: A folder under the root.

        Raises:
            BrokenPicture: It is outside of the root.
        """
        base = self.store.url.rstrip("/") + "/"
        if is_remote(path) or path.startswith("/"):
            roots = [base] if is_remote(self.root) else [os.path.abspath(self.root).rstrip("/") + "/", f"{self._real}/"]
            inside = next((path[len(root) :] for root in roots if path.startswith(root)), None)
            if inside is None:
                raise BrokenPicture(f"its path {path} is outside of {self.root}")
        else:
            inside = posixpath.join(begin, path)
        inside = posixpath.normpath(inside)
        if inside in (".", "..") or inside.startswith(("../", "/")) or "\0" in inside:
            raise BrokenPicture(f"its path {path!r} is outside of {self.root}")
        return inside

    def check_links(self, name: str) -> None:
        """Refuses what lies elsewhere by a link.

        Raises:
            BrokenPicture: It does.
        """
        if self._folder is not None:
            real = os.path.realpath(self._folder / name)
            if not real.startswith(self._real.rstrip("/") + "/"):
                raise BrokenPicture(f"it is a link to {real}, outside of {self.root}")

    def is_link(self, name: str) -> bool:
        return self._folder is not None and os.path.islink(self._folder / name)

    def is_linked_folder(self, name: str) -> bool:
        return self._folder is not None and os.path.isdir(self._folder / name)

    def measure(self, name: str, length: int | None = None) -> tuple[int, int, int]:
        """(bytes, height, width) of a picture from its header.

        Args:
            length: Its bytes, if they are known.

        Raises:
            BrokenPicture: It is missing, or is no picture.
        """
        with self._gone_is_broken(name):
            length = self.store.size(name) if length is None else length
            if not length:
                raise BrokenPicture("it is empty")
            file = RangeFile(self.store, name, length)
            return length, *size_of(io.BufferedReader(file, min(length, HEADER_BYTES)))

    def read(self, place: Place) -> bytes:
        """The picture's file, if it still has the bytes that it had."""
        with self._gone_is_broken(place.container):
            data = self.store.read(place.container)
        if len(data) != place.length:
            raise BrokenPicture(f"it had {place.length} bytes when it was listed, and has {len(data)} now")
        return data

    def _gone_is_broken(self, name: str) -> _GoneIsBroken:
        return _GoneIsBroken(self._folder)


class _GoneIsBroken:
    """A missing picture is broken; a missing root is not a matter of one picture."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, StoreError) or (self.folder is not None and not self.folder.is_dir()):
            return
        if error.missing:
            raise BrokenPicture("there is no such file") from error
        if isinstance(error.__cause__, IsADirectoryError | NotADirectoryError) or _too_long(error.__cause__):
            raise BrokenPicture(f"it is no file: {error.__cause__}") from error
        if error.what.endswith("ends too early"):
            raise BrokenPicture("it is shorter than when it was listed") from error


def _too_long(cause: BaseException | None) -> bool:
    import errno

    return isinstance(cause, OSError) and cause.errno in (errno.ENAMETOOLONG, errno.ELOOP)


@dataclass(frozen=True)
class Files:
    """The files that a path or pattern names.

    Attributes:
        root: The folder, or s3:// address, that names begin at.
        store: Of the root.
        sizes: Bytes, by name, sorted.
    """

    root: str
    store: Store
    sizes: dict[str, int]

    def open(self, name: str, block_bytes: int = BLOCK_BYTES) -> io.BufferedReader:
        """A file to be read piece by piece."""
        size = self.sizes[name]
        return io.BufferedReader(RangeFile(self.store, name, size), max(1, min(size, block_bytes)))


def find_files(config: SourceConfig, endings: tuple[str, ...], what: str) -> Files:
    """Files by a folder, a file's name, or patterns with `*`, `**`, `?`, `[…]`, `{a,b}` and `{000..999}`. Hidden ones are left out.

    Args:
        endings: Of files that are looked for in a folder.
        what: They are, for messages.

    Raises:
        DataError: There is none.
    """
    path = config.path
    there = not is_remote(path) and os.path.exists(path)  # a pattern's signs may also be in the name of what is there
    patterns: list[str] | None = None
    if there and os.path.isfile(path):
        root, patterns = os.path.dirname(path) or ".", [os.path.basename(path)]
    elif there or not (_MAGIC.search(path) or path.lower().endswith(endings)):
        root = path
    else:
        root, patterns = _split(path)
    store = open_store(root)
    if not is_remote(root) and not os.path.isdir(root):
        raise DataError(f"there is no folder of {what}", where=os.path.abspath(root), remedy=_REMEDY)
    if patterns is None:
        found = {name: size for name, size in store.names() if name.lower().endswith(endings)}
    elif there:
        found = {patterns[0]: store.size(patterns[0])}
    else:
        found = dict(_matching(root, store, patterns))
    sizes = {name: found[name] for name in sorted(found) if not is_hidden(name)}
    if not sizes:
        raise DataError(f"there are no {what}", where=config.path, remedy=_REMEDY)
    return Files(root, store, sizes)


_REMEDY = "correct source.path in the prepare recipe"


def _split(path: str) -> tuple[str, list[str]]:
    """A pattern's folder, and the patterns under it without braces."""
    first = _MAGIC.search(path)
    cut = path.rfind("/", 0, first.start() if first else len(path))
    root = path[:cut] if cut > 0 else "/" if cut == 0 else "."
    return root, expand_braces(path[cut + 1 :])


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}.tar` and `a{x,y}.tar` written out."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    inside = found[1]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers:
        first, last = numbers[1], numbers[2]
        if int(last) - int(first) > 1_000_000:
            raise ConfigError(f"{pattern} names more than a million files", where="source.path", remedy="use a *")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        words = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        words = inside.split(",")
    return [done for word in words for done in expand_braces(pattern[: found.start()] + word + pattern[found.end() :])]


def _matching(root: str, store: Store, patterns: list[str]) -> Iterator[tuple[str, int]]:
    plain = [pattern for pattern in patterns if not _MAGIC.search(pattern)]
    magic = [pattern for pattern in patterns if _MAGIC.search(pattern)]
    there = dict(store.names(_common(plain))) if len(plain) > 1 and is_remote(root) else {}
    for name in plain:  # one that is missing is an error, with its name
        yield name, there[name] if name in there else store.size(name)
    for pattern in magic:
        if is_remote(root):
            first = _MAGIC.search(pattern)
            wanted = re.compile(_regex(pattern))
            listed = store.names(pattern[: first.start()] if first else pattern)
            yield from ((name, size) for name, size in listed if wanted.fullmatch(name))
        else:
            names = glob.glob(pattern, root_dir=root, recursive=True)
            yield from ((name, store.size(name)) for name in names if os.path.isfile(os.path.join(root, name)))


def _common(names: list[str]) -> str:
    """What all names begin with."""
    first, last = min(names), max(names)
    return first[: next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _regex(pattern: str) -> str:
    """A shell's pattern as a regular expression; `*` stays inside of one folder."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern)
    return "".join(
        pieces.get(token) or (token.replace("[!", "[^") if token[0] == "[" and len(token) > 1 else re.escape(token))
        for token in tokens
    )


def is_hidden(name: str) -> bool:
    """Whether a part of a path begins with a dot."""
    return name.startswith(".") or "/." in name


def first_key(entry: Mapping[str, Any], wanted: str | None, usual: tuple[str, ...]) -> str | None:
    """The key that the recipe names, or the first usual one that is there."""
    keys = usual if wanted is None else (wanted,)
    return next((key for key in keys if key in entry), None)


def caption_of(entry: Mapping[str, Any], wanted: str | None) -> str | None:
    """The caption in an entry, stripped; None if it is empty or no text."""
    key = first_key(entry, wanted, _CAPTION_KEYS)
    return tidy(entry[key]) if key is not None else None


def caption_key_of(entry: Mapping[str, Any], wanted: str | None) -> str | None:
    return first_key(entry, wanted, _CAPTION_KEYS)


def tidy(text: object) -> str | None:
    """Stripped text; None if nothing is left."""
    return text.strip() or None if isinstance(text, str) else None


def class_of(entry: Mapping[str, Any], wanted: str | None) -> str | None:
    """The class in an entry, as text."""
    value = entry.get(wanted) if wanted is not None else None
    if value is None or isinstance(value, list | dict):
        return None
    if isinstance(value, float) and value.is_integer():  # pandas writes numbers so where some are missing
        value = int(value)
    return tidy(str(value))


def numbers_of(entry: Mapping[str, Any], *others: str | None) -> dict[str, float]:
    """All finite numbers in an entry but those of the picture itself and those under the keys `others`; truth values are none."""
    return {
        key: float(value)
        for key, value in entry.items()
        if isinstance(value, int | float | Decimal)
        and not isinstance(value, bool)
        and -1e308 < value < 1e308  # not of integers too large for a float
        and math.isfinite(value)
        and key not in others
        and key.lower() not in _OWN_NUMBERS
    }
