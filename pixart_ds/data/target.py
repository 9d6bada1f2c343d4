"""Where a prepared set is written: a folder, or a prefix of an S3 bucket. What is put there is whole or not there at all."""

from __future__ import annotations

import fcntl
import functools
import glob
import hashlib
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

from pixart_ds import files
from pixart_ds.data.store import digest_of, is_remote, send_file
from pixart_ds.s3 import Connection, StoreError, s3_errors, split_url

_PATIENCE_SECONDS = 120.0
_LONGEST_PAUSE_SECONDS = 10.0
_ATTEMPTS = 4
_LOCK = ".lock"
T = TypeVar("T")


class Target(Protocol):
    """One place that takes files by name."""

    url: str

    @property
    def scratch(self) -> Path:
        """Where `scratch_of` makes the folders for files on their way: of this set alone."""
        ...

    def send(self, path: Path, name: str) -> None:
        """Moves a file of the scratch folder there. One of that name is replaced: names of shards hold their hash."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """A small file; one of that name is replaced."""
        ...

    def put_new(self, name: str, content: bytes) -> bool:
        """A small file that must not be there yet: of several writers one succeeds. Whether it was this one."""
        ...

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder, sorted."""
        ...


def open_target(location: str | Path) -> Target:
    """The place of a folder's path or of an s3:// address; the folder is made when something is written to it."""
    return S3Target(str(location)) if is_remote(location) else FolderTarget(Path(location))


class FolderTarget:
    """A folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, str(folder)

    @property
    def scratch(self) -> Path:
        return self.folder / ".scratch"  # on the same file system, so that a rename is enough

    def send(self, path: Path, name: str) -> None:
        to = self.folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(path, to)
        files.sync_folder(to.parent)

    def put(self, name: str, content: bytes) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        files.write_durable(self.folder / name, [content])

    def put_new(self, name: str, content: bytes) -> bool:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            files.write_new(self.folder / name, [content])
        except FileExistsError:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.folder / folder) if not name.startswith("."))
        except FileNotFoundError:
            return []


class S3Target:
    """A prefix of an S3 bucket. A store that does not answer is asked again for two minutes.

    Args:
        url: s3://bucket/prefix; the bucket is there already.
        patience_seconds: How long a store may be silent; None: two minutes.
    """

    def __init__(self, url: str, patience_seconds: float | None = None) -> None:
        self.bucket, self.prefix = split_url(url)
        self.url = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self.patience_seconds = _PATIENCE_SECONDS if patience_seconds is None else patience_seconds
        self._connection = Connection(_ATTEMPTS)

    @property
    def scratch(self) -> Path:
        digest = hashlib.blake2b(self.url.encode(), digest_size=8).hexdigest()
        return Path(tempfile.gettempdir()) / f"pixart_ds-{os.getuid()}-prepare" / digest

    def send(self, path: Path, name: str) -> None:
        digest = digest_of(path)
        self._patiently(
            name, lambda: send_file(self._connection.client(), path, self.bucket, self.prefix + name, digest)
        )
        path.unlink()

    def put(self, name: str, content: bytes) -> None:
        key = self.prefix + name
        self._patiently(name, lambda: self._connection.client().put_object(Bucket=self.bucket, Key=key, Body=content))

    def put_new(self, name: str, content: bytes) -> bool:
        about = {"Bucket": self.bucket, "Key": self.prefix + name}

        def put() -> None:
            self._connection.client().put_object(**about, Body=content, IfNoneMatch="*")

        def get() -> bytes:
            return bytes(self._connection.client().get_object(**about)["Body"].read())

        try:
            self._patiently(name, put)
        except StoreError as error:
            if not error.taken:
                raise
            return self._patiently(name, get) == content  # an attempt of ours whose answer was lost counts
        return True

    def names(self, folder: str) -> list[str]:
        prefix = f"{self.prefix}{folder}/"

        def ask() -> list[str]:
            pages = (
                self._connection.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            )
            return sorted(item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", []))

        return self._patiently(folder, ask)

    def _patiently(self, name: str, ask: Callable[[], T]) -> T:
        """Asks until the store answers, or refuses, or patience is at its end."""
        until, pause = time.monotonic() + self.patience_seconds, 1.0
        while True:
            try:
                with s3_errors(self.url, name, writing=True):
                    return ask()
            except StoreError as error:
                if error.final or time.monotonic() + pause > until:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


# ---- scratch -------------------------------------------------------------------------------------------------------------


@contextmanager
def scratch_of(target: Target, label: str) -> Iterator[Path]:
    """An empty folder that nobody else has, whatever their label, removed at the end; what killed holders left goes first.

        <scratch>/<label>-<host>-<random>        the folder
        <scratch>/<label>-<host>-<random>.lock   locked as long as it is used; made before it, and removed after it

    The kernel frees a lock with its process, however that ends, but one cluster may not see another's locks on the same file
    system: a folder is reclaimed only by the host that made it, and only if its lock is free. One without a lock is left alone.

    Args:
        target: Of the set.
        label: Says to people whose folder it is; without a slash.

    Raises:
        OSError: The disk is full, the folder is read-only, …
    """
    parent = target.scratch
    parent.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(parent)
    while True:
        folder = parent / f"{label}-{_this_host()}-{secrets.token_hex(6)}"
        lock = folder.with_name(folder.name + _LOCK)
        with open(lock, "xb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # one who looks for left-overs was faster, and removes it
            except OSError:
                # no locks on this file system: nobody can tell later whether the folder is in use, so its name has no host
                lock.unlink(missing_ok=True)
                folder = parent / f"{label}-{secrets.token_hex(6)}"
            else:
                if not lock.exists():
                    continue  # the same, and it has done so already
            try:
                folder.mkdir()
                yield folder
            finally:
                _remove(folder, lock)
        return


def _remove_left_overs(parent: Path) -> None:
    """Removes the folders of this host's killed processes, of any label: a later start may have other ones."""
    for lock in parent.glob(f"*-{glob.escape(_this_host())}-*{_LOCK}"):
        # an error: it is in use, has just gone, is another user's, or there are no locks; it is in nobody's way, so let it be
        with suppress(OSError), open(lock, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists():  # else its holder has ended well since; no second file ever has its name
                _remove(lock.with_name(lock.name.removesuffix(_LOCK)), lock)


def _remove(folder: Path, lock: Path) -> None:
    """Removes a folder, then its lock, which the caller holds; what cannot be removed now keeps its lock for a later one.

    It raises nothing: an error on the way here is the one to tell.
    """
    with suppress(OSError):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            lock.unlink(missing_ok=True)


@functools.cache
def _this_host() -> str:
    """What tells the running kernel from every other: two clusters may both have a host of one name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:12]
    except OSError:
        boot = secrets.token_hex(6)  # a host of its own: then nothing that others left is reclaimed
    return f"{socket.gethostname()}.{boot}"
