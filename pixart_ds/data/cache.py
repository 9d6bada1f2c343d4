"""Shards of a store on a node's disk, shared by all ranks and jobs of the node.

    <folder>/evict                   its only byte is locked by whoever makes room
    <folder>/<fingerprint>/table     for each shard: when it was last used (0: not here), and its bytes
    <folder>/<fingerprint>/users     locked, shared, by every process that reads here
    <folder>/<fingerprint>/00000042.mds          shard 42, whole
    <folder>/<fingerprint>/00000042.mds.part…    shard 42, being downloaded

Byte k of the table is the lock of shard k. All locks are of open file descriptions (OFD): the kernel frees them when a process
dies, however it dies, so that nothing is left behind that the next start would stumble over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixart_ds.config.schema import CacheConfig
from pixart_ds.data.mds import OpenShard, ShardIndex, damage
from pixart_ds.data.store import Fetcher
from pixart_ds.errors import DataError
from pixart_ds.s3 import StoreError

_UNTOUCHED_SECONDS = 600.0
"""A job's folder younger than this may be one that its job is just making."""
_EVICT, _TABLE, _USERS = "evict", "table", "users"
_ENTRY_BYTES = 16
_POLL_SECONDS = 0.02
_LEAST_SHARDS = 4
_PART_OF_DISK = 0.95
_BLOCK_BYTES = 4096
_TRIES_IF_FINAL = 3


@dataclass(frozen=True)
class CacheOptions:
    """How shards are kept on a node.

    Attributes:
        folder: On a local disk; shared by jobs.
        limit_bytes: Of all sets in the folder together; None: as much as the disk holds when the cache is opened.
        patience_seconds: How long a shard is asked for before the error is raised.
        guard_seconds: Shards used within this time are evicted last.
        keep: Whether the folder outlives its last user.
        evict: Whether shards go to make room for others; without it, a full disk is an error.
        in_place: All nodes read the folder as it is, without locks: it was filled before.
    """

    folder: Path
    limit_bytes: int | None = None
    patience_seconds: float = 120.0
    guard_seconds: float = 600.0
    keep: bool = True
    evict: bool = True
    in_place: bool = False


def options_of(config: CacheConfig, job: str) -> CacheOptions | None:
    """The cache of a job as the recipe says; None where sets are read in place. What ended jobs have left is removed.

    Args:
        job: The same for all ranks and launches of one allocation, and for no other job.
    """
    limit = None if config.limit_gb is None else int(config.limit_gb * 1e9)
    if config.mode == "shared":
        if config.folder is None:
            return None
        return CacheOptions(Path(config.folder) / "shared", limit, config.patience_seconds, in_place=True)
    user = f"pixart_ds-{os.getuid()}"
    base = Path(config.folder) if config.folder else Path(os.environ.get("TMPDIR", "/tmp")) / user
    folder = base / (f"job-{job}" if config.mode == "node-job" else "kept")
    now = time.time()
    for other in base.glob("job-*"):
        with contextlib.suppress(FileNotFoundError):  # another rank removes it, too
            if other != folder and other.stat().st_mtime < now - _UNTOUCHED_SECONDS:
                remove_unused(other)
    return CacheOptions(
        folder, limit_bytes=limit, patience_seconds=config.patience_seconds, keep=config.mode == "node-persistent"
    )


class ShardCache:
    """One shard set's part of a node's cache.

    Args:
        index: The shards.
        store: Where they come from; the cache never writes there.
        options: Folder, limit, patience.

    Raises:
        DataError: The folder cannot be written, or the limit is below four shards.
    """

    def __init__(self, index: ShardIndex, store: Fetcher, options: CacheOptions) -> None:
        self.index, self.store, self.options = index, store, options
        self.root = options.folder / index.fingerprint
        self.closing = threading.Event()
        self.downloads = 0
        self._sound: set[tuple[int, int, int]] = set()
        self._evicting = threading.Lock()
        self._asked: set[int] = set()
        self._turn = threading.Condition()
        with self._of_the_disk():
            self.root.mkdir(parents=True, exist_ok=True)
            self._users = os.open(self.root / _USERS, os.O_RDWR | os.O_CREAT, 0o666)
            _lock(self._users, fcntl.F_RDLCK, 0, wait=self.options.patience_seconds)
            self._table = _Table(self.root / _TABLE, len(index))
            self._evict_file = os.open(options.folder / _EVICT, os.O_RDWR | os.O_CREAT, 0o666)
        self._adopt()
        self.limit_bytes = self._limit()

    def _limit(self) -> int:
        """As the options say, else what the disk holds now; what other programs write later is met by evicting."""
        stated, largest = self.options.limit_bytes, on_disk(int(self.index.sizes.max(initial=0)))
        disk = os.statvfs(self.root)
        limit = _part_of(disk, self._used_bytes()) if stated is None else stated
        if limit < _LEAST_SHARDS * largest:
            what = "what the disk has free" if stated is None else "the cache limit"
            raise DataError(
                f"{what}, {limit:,} bytes, is below {_LEAST_SHARDS} times the largest shard ({largest:,})",
                where=self.options.folder if stated is None else "execution.cache.limit_gb",
                remedy="free the disk, or name another execution.cache.folder" if stated is None else "raise the limit",
            )
        return limit

    # ---- opening ---------------------------------------------------------------------------------------------------

    def open(self, number: int) -> OpenShard:
        """A whole shard, downloaded if it is not here. It stays readable when it is evicted.

        Raises:
            DataError: Shard, store and remedy, at most `patience_seconds` and one try after the first failure.
        """
        with self._alone(number):  # the locks of files do not exclude threads of one process
            if (descriptor := self._present(number)) is None:
                descriptor = self._locked(number)
        return OpenShard(descriptor, self.index, number, self.path(number))

    def _locked(self, number: int) -> int:
        """Waits for the shard's lock, and downloads it unless another process was faster."""
        if not _lock(self._table.file, fcntl.F_WRLCK, number, self.options.patience_seconds, self.closing):
            raise DataError(
                f"{self.index.names[number]}: another process has held its lock for {self.options.patience_seconds:.0f} s",
                where=self.root,
                remedy="look for a stopped process that reads this cache, and end it",
            )
        try:
            descriptor = self._present(number)
            return self._download(number) if descriptor is None else descriptor
        finally:
            _unlock(self._table.file, number)

    @contextlib.contextmanager
    def _alone(self, number: int) -> Iterator[None]:
        with self._turn:
            self._turn.wait_for(lambda: number not in self._asked)
            self._asked.add(number)
        try:
            yield
        finally:
            with self._turn:
                self._asked.discard(number)
                self._turn.notify_all()

    def path(self, number: int) -> Path:
        return self.root / file_name(number)

    def _present(self, number: int) -> int | None:
        try:
            descriptor = os.open(self.path(number), os.O_RDONLY)
        except FileNotFoundError:
            return None
        key = self._key(number, descriptor)
        if key not in self._sound:  # once in each process: a file may be damaged long after its download
            try:
                damaged = damage(descriptor, self.index, number) is not None
            except OSError:  # the disk cannot read it
                damaged = True
            if damaged:
                os.close(descriptor)
                return None  # it is downloaded anew, under the lock, and replaced
            self._sound.add(key)
        self._table.use(number, int(self.index.sizes[number]))
        return descriptor

    def _key(self, number: int, descriptor: int) -> tuple[int, int, int]:
        about = os.fstat(descriptor)
        return number, about.st_ino, about.st_mtime_ns

    # ---- downloading -----------------------------------------------------------------------------------------------

    def _download(self, number: int) -> int:
        began, tries = time.monotonic(), 0
        while True:
            try:
                return self._try(number)
            except (StoreError, OSError, _Damaged) as error:
                tries += 1
                self._sweep(number)
                if isinstance(error, OSError) and error.errno == errno.ENOSPC and self._evict():
                    continue
                lasted = time.monotonic() - began
                hopeless = not isinstance(error, StoreError) or error.final
                if (
                    lasted > self.options.patience_seconds
                    or (hopeless and tries >= _TRIES_IF_FINAL)
                    or self.closing.is_set()
                ):
                    self._table.forget(number)
                    raise self._failed(number, error, tries, lasted) from error
                self.closing.wait(min(0.25 * 2**tries, 10.0))

    def _try(self, number: int) -> int:
        part = Path(f"{self.path(number)}.part")
        self.root.mkdir(parents=True, exist_ok=True)  # somebody may have deleted the cache under us
        self._table.use(number, int(self.index.sizes[number]))  # booked before it is here
        self._make_room()
        self._sweep(number)
        self.store.fetch(self.index.names[number], part)
        self.downloads += 1
        descriptor = os.open(part, os.O_RDONLY)
        try:
            if (what := damage(descriptor, self.index, number)) is not None:
                raise _Damaged(what)
            os.replace(part, self.path(number))
        except BaseException:
            os.close(descriptor)
            raise
        self._sound.add(self._key(number, descriptor))
        return descriptor

    def _sweep(self, number: int) -> None:
        """Removes what an unfinished download of a shard has left; the shard's lock is held."""
        for left in self.root.glob(f"{number:08d}.mds.*"):
            left.unlink(missing_ok=True)

    def _failed(self, number: int, error: Exception, tries: int, lasted: float) -> DataError:
        name, how = self.index.names[number], f"in {tries} tries and {lasted:.0f} s"
        if isinstance(error, _Damaged):
            return DataError(
                f"{name} is damaged in the store: {error}, {how}",
                where=f"{self.store.url}/{name}",
                remedy="copy the shard there again, or prepare the set again",
            )
        if isinstance(error, OSError):
            return DataError(
                f"{name} cannot be written into the cache: {error.strerror} ({how})",
                where=self.root,
                remedy="free the disk, set execution.cache.limit_gb below its size, or name another execution.cache.folder",
            )
        assert isinstance(error, StoreError)
        return DataError(f"{error.what}, {how}", where=error.where, remedy=error.remedy)

    # ---- room ------------------------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        while self._used_bytes() > self.limit_bytes and self._evict():
            pass

    def _used_bytes(self) -> int:
        return sum(int(table.bytes[table.used > 0].sum()) for table in self._tables())

    def _tables(self) -> Iterator[_Table]:
        """The tables of all sets in the folder; this one's own stays mapped."""
        for path in self.options.folder.glob(f"*/{_TABLE}"):
            if path.parent == self.root:
                yield self._table
                continue
            with contextlib.suppress(FileNotFoundError):  # removed by its last user
                if path.stat().st_size:  # else another process is just making it
                    yield _Table(path, None)

    def _evict(self) -> bool:
        """Removes one shard of any set: the newest outside the guard time, because passes repeat and it is needed last (the oldest
        first would never hit); if all are within it, the oldest. False if there is none.
        """
        if not self.options.evict:
            return False
        with self._evicting:
            if not _lock(self._evict_file, fcntl.F_WRLCK, 0, self.options.patience_seconds, self.closing):
                return False
            try:
                shards = [(float(t.used[k]), t, int(k)) for t in self._tables() for k in np.flatnonzero(t.used > 0)]
                shards.sort(key=lambda entry: entry[0])
                now = time.time()
                old = [entry for entry in shards if entry[0] < now - self.options.guard_seconds]
                for used, table, number in (*reversed(old), *shards[len(old) :]):
                    path = table.path.parent / f"{number:08d}.mds"
                    if (
                        path.exists() or used < now - 2 * self.options.patience_seconds
                    ):  # or a booking whose process died
                        path.unlink(missing_ok=True)
                        table.forget(number)
                        return True
                return False
            finally:
                _unlock(self._evict_file, 0)

    # ---- start and end ---------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Brings the table and the folder together: shards of the right size count, all else that nobody is writing goes."""
        here = set()
        with self._of_the_disk():
            for entry in os.scandir(self.root):
                number, _, rest = entry.name.partition(".")
                if entry.name in (_TABLE, _USERS) or not number.isdigit() or int(number) >= len(self.index):
                    continue
                k = int(number)
                if rest == "mds" and entry.stat().st_size == self.index.sizes[k]:
                    here.add(k)
                    if not self._table.used[k]:
                        self._table.use(k, int(self.index.sizes[k]), entry.stat().st_mtime)
                elif _lock(self._table.file, fcntl.F_WRLCK, k, 0):
                    try:
                        Path(entry.path).unlink(missing_ok=True)
                    finally:
                        _unlock(self._table.file, k)
        for k in np.flatnonzero(self._table.used > 0).tolist():
            if k not in here and _lock(self._table.file, fcntl.F_WRLCK, k, 0):  # booked by a process that died
                try:
                    if not self.path(k).exists():
                        self._table.forget(k)
                finally:
                    _unlock(self._table.file, k)

    @contextlib.contextmanager
    def _of_the_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as cause:
            raise DataError(
                f"the cache cannot be used: {cause.strerror}",
                where=self.options.folder,
                remedy="name a folder on a local disk that can be written: execution.cache.folder",
            ) from cause

    def stop(self) -> None:
        """Ends waiting for downloads and locks, with an error."""
        self.closing.set()

    def close(self) -> None:
        """Leaves the folder to others, once no thread asks for a shard any more; the last one of a job removes it."""
        for descriptor in (self._users, self._evict_file):
            os.close(descriptor)
        self._table.close()
        if not self.options.keep:
            remove_unused(self.options.folder)


def remove_unused(folder: Path) -> None:
    """Removes the sets of a cache's folder that no process reads, and the folder itself if it is empty then."""
    for root in sorted(path.parent for path in folder.glob(f"*/{_USERS}")):
        with contextlib.suppress(FileNotFoundError):  # somebody else is removing it
            descriptor = os.open(root / _USERS, os.O_RDWR)
            try:
                if _lock(descriptor, fcntl.F_WRLCK, 0, 0):
                    shutil.rmtree(root)
            finally:
                os.close(descriptor)
    with contextlib.suppress(OSError):
        if not any(path.is_dir() for path in folder.iterdir()):
            (folder / _EVICT).unlink(missing_ok=True)
            folder.rmdir()


class _Damaged(Exception):
    """What came from the store is not what the index says."""


class _Table:
    """Times of last use and sizes, in memory that all processes of the node share."""

    def __init__(self, path: Path, count: int | None) -> None:
        self.path = path
        self.file = os.open(path, os.O_RDWR | (os.O_CREAT if count is not None else 0), 0o666)
        if count is not None:
            os.ftruncate(self.file, max(1, count) * _ENTRY_BYTES)
        self._map = mmap.mmap(self.file, 0)
        values: npt.NDArray[Any] = np.frombuffer(self._map, np.float64).reshape(-1, 2)
        self.used, self.bytes = values[:, 0], values[:, 1]

    def use(self, number: int, size: int, when: float | None = None) -> None:
        self.bytes[number] = on_disk(size)
        self.used[number] = time.time() if when is None else when

    def forget(self, number: int) -> None:
        self.used[number] = 0

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def __del__(self) -> None:
        self.close()


def file_name(number: int) -> str:
    """Of a shard in a cache."""
    return f"{number:08d}.mds"


def shards_here(index: ShardIndex, options: CacheOptions) -> npt.NDArray[np.bool_]:
    """(shards,) which of them a cache's folder holds, by their sizes; seen from outside, nothing is made or removed."""
    here = np.zeros(len(index), bool)
    for number, size in _files(options.folder / index.fingerprint):
        if number < len(index):
            here[number] = size == index.sizes[number]
    return here


def room_of(options: CacheOptions) -> tuple[int, int]:
    """Bytes that a cache's folder holds, and those that it may hold; seen from outside."""
    used = sum(on_disk(size) for root in options.folder.glob("*") for _, size in _files(root))
    if options.limit_bytes is not None:
        return used, options.limit_bytes
    there = next(folder for folder in (options.folder, *options.folder.absolute().parents) if folder.exists())
    return used, _part_of(os.statvfs(there), used)


def _files(root: Path) -> Iterator[tuple[int, int]]:
    """Number and size of each whole shard of a set's folder, if it is there."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(root):
            number, _, rest = entry.name.partition(".")
            if number.isdigit() and rest == "mds":
                with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                    yield int(number), entry.stat().st_size


def _part_of(disk: os.statvfs_result, used: int) -> int:
    """What a cache that has no limit may hold, by what its disk has free and what is its own already."""
    return int(_PART_OF_DISK * (disk.f_bavail * disk.f_frsize + used))


def on_disk(size: int) -> int:
    """Bytes of a file in whole blocks."""
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def _lock(descriptor: int, kind: int, byte: int, wait: float, closing: threading.Event | None = None) -> bool:
    """Takes the lock of one byte; False if it cannot be had within `wait` seconds."""
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi", kind, os.SEEK_SET, byte, 1, 0))
            return True
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= end or (closing is not None and closing.wait(_POLL_SECONDS)):
                return False
            if closing is None:
                time.sleep(_POLL_SECONDS)


def _unlock(descriptor: int, byte: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))
