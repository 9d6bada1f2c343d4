"""Where checkpoints lie: a folder, or a prefix of an S3 bucket. No torch."""

from __future__ import annotations

import errno
import functools
import io
import itertools
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import xxhash

from pixart_ds import files
from pixart_ds.errors import ConfigError, MachineError
from pixart_ds.layout import StageLayout
from pixart_ds.s3 import PART_BYTES, PIECE_BYTES, Connection, StoreError, s3_endpoint, s3_errors, split_url

Result = TypeVar("Result")
Pieces = Callable[[], Iterable[bytes | memoryview]]
"""Gives a file's content in pieces; called again where a store has to be told again."""

_PATIENCE_SECONDS = 300.0
"""How long an object store that gives no answer is asked again: nobody waits meanwhile, checkpoints are written behind training.
It counts from the first failure: what is transferred before, however long it takes, is no silence."""
_LONGEST_PAUSE_SECONDS = 10.0
_ATTEMPTS = 3
_CHUNK_BYTES = 1 << 22
_IF_MISSING = "put it back, or go on from another checkpoint"
_IF_NOT_WRITTEN = "free or enlarge the disk, or make it writable, then start again"
_IF_NOT_READ = "have the file system or the disk checked, and the permissions of the file"
_IF_NOT_DELETED = "see who holds a file in it open; the next save deletes it"


class Storage(Protocol):
    """One folder of files, wherever it is. Names are relative and may have slashes.

    Missing files are FileNotFoundErrors; everything else that goes wrong is a MachineError that says where and what to do.
    """

    where: str

    def sub(self, name: str) -> Storage:
        """A folder in it, which may be empty or not there."""
        ...

    def make(self) -> None:
        """Makes the folder, where folders are made."""
        ...

    def sync(self) -> None:
        """Makes the folder itself durable."""
        ...

    def folders(self) -> list[str]:
        """Names of the folders in it, sorted; none if it is not there."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of the files directly in it; none if it is not there."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if it is not there."""
        ...

    def pieces(self, name: str, start: int = 0, count: int | None = None) -> Iterator[memoryview]:
        """The bytes [start, start + count) of a file; each piece is valid until the next one is asked for."""
        ...

    def write(self, name: str, pieces: Pieces, *, new: bool = False) -> None:
        """Makes a file: afterwards it is whole and durable; after an error or a crash it is whole or absent.

        Args:
            name: Of the file.
            pieces: Its content.
            new: Take nobody's place.

        Raises:
            FileExistsError: It was to be new, but another writer's is there.
        """
        ...

    def delete(self, first: str) -> None:
        """Deletes the folder, the file `first` before all others; what is gone already is passed over."""
        ...

    def free_bytes(self) -> int | None:
        """How much more fits; None if there is no limit that one can see."""
        ...


def file_is_damaged(error: MachineError) -> bool:
    """Whether a disk said that it cannot give a file; a store that is silent says nothing about the file."""
    return isinstance(error.__cause__, OSError)


def read(storage: Storage, name: str) -> bytes:
    """A whole small file."""
    return b"".join(bytes(piece) for piece in storage.pieces(name))


def read_into(storage: Storage, name: str, start: int, place: memoryview) -> None:
    """Fills `place` from a file.

    Raises:
        EOFError: The file is too short.
    """
    at = 0
    for piece in storage.pieces(name, start, len(place)):
        place[at : at + len(piece)] = piece
        at += len(piece)
    if at != len(place):
        raise EOFError(f"{name} ends {len(place) - at} bytes too early")


def storage_of(layout: StageLayout) -> Storage:
    """Where a stage's checkpoints are: in its folder, unless its `checkpoints.json` names another place."""
    if not layout.checkpoints_elsewhere.exists():
        return FolderStorage(layout.checkpoints)
    return storage_at(files.read_json(layout.checkpoints_elsewhere, error=ConfigError)["path"])


def storage_at(location: str | Path) -> Storage:
    """The storage of a path or an s3:// address.

    Raises:
        ConfigError: Another kind of address.
    """
    text = str(location)
    if text.startswith("s3://"):
        return S3Storage(text)
    if "://" in text:
        raise ConfigError(
            f"checkpoints are kept in folders and at s3:// addresses, not at {text}",
            remedy="use the S3 interface of the store, or a folder",
        )
    return FolderStorage(Path(text))


class FolderStorage:
    """A folder of a file system that all nodes see."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.where = folder, str(folder)

    def sub(self, name: str) -> FolderStorage:
        return FolderStorage(self.folder / name)

    def make(self) -> None:
        with self._errors("make the folder", _IF_NOT_WRITTEN):
            self.folder.mkdir(parents=True, exist_ok=True)

    def sync(self) -> None:
        with self._errors("sync the folder", _IF_NOT_WRITTEN):
            files.sync_folder(self.folder.parent)

    def folders(self) -> list[str]:
        with self._errors("read the folder", _IF_NOT_READ):
            return sorted(each.name for each in self._entries() if each.is_dir())

    def sizes(self) -> dict[str, int]:
        found = {each.name: self.size(each.name) for each in self._entries()}
        return {name: size for name, size in found.items() if size is not None}

    def _entries(self) -> list[Path]:
        with self._errors("read the folder", _IF_NOT_READ), suppress(FileNotFoundError, NotADirectoryError):
            return list(self.folder.iterdir())
        return []

    def size(self, name: str) -> int | None:
        with self._errors(f"look at {name}", _IF_NOT_READ):
            try:
                found = os.stat(self.folder / name)
            except (FileNotFoundError, NotADirectoryError):  # perhaps deleted a moment ago
                return None
            return found.st_size if stat.S_ISREG(found.st_mode) else None

    def pieces(self, name: str, start: int = 0, count: int | None = None) -> Iterator[memoryview]:
        reading = self._errors(f"read {name}", _IF_NOT_READ, answers=FileNotFoundError)
        with reading, open(self.folder / name, "rb", buffering=0) as file:
            left = os.fstat(file.fileno()).st_size - start if count is None else count
            buffer = memoryview(bytearray(max(0, min(left, _CHUNK_BYTES))))
            file.seek(start)
            while left > 0 and (got := file.readinto(buffer[: min(left, len(buffer))])):
                left -= got
                yield buffer[:got]

    def write(self, name: str, pieces: Pieces, *, new: bool = False) -> None:
        with self._errors(f"write {name}", _IF_NOT_WRITTEN):
            (files.write_new if new else files.write_durable)(self.folder / name, pieces())

    def delete(self, first: str) -> None:
        with self._errors("delete the folder", _IF_NOT_DELETED):
            with suppress(FileNotFoundError):
                (self.folder / first).unlink()
                files.sync_folder(self.folder)
            for root, _, names in os.walk(self.folder, topdown=False):
                for name in names:
                    Path(root, name).unlink(missing_ok=True)
                with suppress(FileNotFoundError):
                    os.rmdir(root)

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self.folder).free

    def _errors(self, what: str, remedy: str, answers: type[OSError] = FileExistsError) -> _DiskErrors:
        return _DiskErrors(what, self.folder, remedy, answers)


class _DiskErrors:
    """Errors of a disk, in words; those of the class `answers` are answers, not errors."""

    def __init__(self, what: str, where: Path, remedy: str, answers: type[OSError]) -> None:
        self.what, self.where, self.remedy, self.answers = what, where, remedy, answers

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, cause: BaseException | None, trace: Any) -> None:
        if isinstance(cause, OSError) and not isinstance(cause, self.answers):
            raise MachineError(
                f"cannot {self.what}: {cause.strerror or cause}", where=self.where, remedy=self.remedy
            ) from cause


class S3Storage:
    """A prefix of an S3 bucket; endpoint and keys as boto3 takes them from the environment.

    Args:
        url: s3://bucket/prefix.
        patience_seconds: How long a store that gives no answer is asked again.
    """

    def __init__(
        self, url: str, patience_seconds: float = _PATIENCE_SECONDS, connection: Connection | None = None
    ) -> None:
        self.bucket, self.prefix = split_url(url)
        self.where = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self.patience_seconds = patience_seconds
        self._connection = connection or _connection(s3_endpoint(), os.environ.get("AWS_ACCESS_KEY_ID"))

    def sub(self, name: str) -> S3Storage:
        return S3Storage(f"{self.where}/{name}", self.patience_seconds, self._connection)

    def make(self) -> None:
        """A prefix needs no making."""

    def sync(self) -> None:
        """Nor syncing."""

    def folders(self) -> list[str]:
        return [key.rstrip("/") for key in self._list(delimiter="/")[0]]

    def sizes(self) -> dict[str, int]:
        return self._list(delimiter="/")[1]

    def _list(self, delimiter: str = "") -> tuple[list[str], dict[str, int]]:
        """Common prefixes, and the sizes of objects, by their names below ours."""

        def ask() -> tuple[list[str], dict[str, int]]:
            pages = self._client().get_paginator("list_objects_v2")
            prefixes: list[str] = []
            sizes: dict[str, int] = {}
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix, Delimiter=delimiter):
                prefixes += [each["Prefix"].removeprefix(self.prefix) for each in page.get("CommonPrefixes", [])]
                sizes |= {each["Key"].removeprefix(self.prefix): each["Size"] for each in page.get("Contents", [])}
            return sorted(prefixes), sizes

        return self._patiently("the list of files", ask)

    def size(self, name: str) -> int | None:
        def ask() -> int:
            return int(self._client().head_object(Bucket=self.bucket, Key=self.prefix + name)["ContentLength"])

        try:
            return self._patiently(name, ask)
        except FileNotFoundError:
            return None

    def pieces(self, name: str, start: int = 0, count: int | None = None) -> Iterator[memoryview]:
        at, end = start, None if count is None else start + count
        patience = _Patience(self.patience_seconds)
        while end is None or at < end:
            try:
                with s3_errors(self.where, name, if_missing=_IF_MISSING):
                    until = "" if end is None else end - 1
                    wanted = {"Range": f"bytes={at}-{until}"} if at or end is not None else {}
                    answer = self._client().get_object(Bucket=self.bucket, Key=self.prefix + name, **wanted)
                    with closing(answer["Body"]) as body:
                        for piece in body.iter_chunks(PIECE_BYTES):
                            at += len(piece)
                            patience.renew()
                            yield memoryview(piece)
                return
            except StoreError as error:  # an answer that broke off goes on where it broke
                self._raise_or_pause(error, name, patience)

    def write(self, name: str, pieces: Pieces, *, new: bool = False) -> None:
        """What fits into one request is new by the store's own word; of longer files it is asked before."""
        from boto3.s3.transfer import TransferConfig

        parts = TransferConfig(use_threads=False, multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)
        where: dict[str, Any] = {"Bucket": self.bucket, "Key": self.prefix + name}

        def send() -> None:
            body = io.BufferedReader(_Stream(pieces()), PIECE_BYTES)
            head = body.read(PART_BYTES)
            if len(head) < PART_BYTES:
                self._client().put_object(Body=head, **where, **({"IfNoneMatch": "*"} if new else {}))
                return
            if new and self.size(name) is not None:
                raise FileExistsError(errno.EEXIST, "it is in the store already", f"{self.where}/{name}")
            whole = io.BufferedReader(_Stream(itertools.chain([head], iter(lambda: body.read(PIECE_BYTES), b""))))
            self._client().upload_fileobj(whole, Config=parts, **where)

        try:
            self._patiently(name, send, writing=True)
        except FileExistsError:
            if _digest(self.pieces(name)) != _digest(
                pieces()
            ):  # else it is ours: the answer to an earlier request was lost
                raise

    def delete(self, first: str) -> None:
        names = sorted(self._list()[1], key=lambda name: name != first)
        for name in names:
            self._patiently(
                name,
                lambda name=name: self._client().delete_object(Bucket=self.bucket, Key=self.prefix + name),  # type: ignore[misc]
                writing=True,
            )

    def free_bytes(self) -> int | None:
        return None

    def _client(self) -> Any:
        return self._connection.client()

    def _patiently(self, name: str, action: Callable[[], Result], *, writing: bool = False) -> Result:
        """The action's result, asked for again while the store gives no answer."""
        patience = _Patience(self.patience_seconds)
        while True:
            try:
                with s3_errors(self.where, name, writing=writing, if_missing=_IF_MISSING):
                    return action()
            except StoreError as error:
                self._raise_or_pause(error, name, patience)

    def _raise_or_pause(self, error: StoreError, name: str, patience: _Patience) -> None:
        if error.missing:
            raise FileNotFoundError(errno.ENOENT, "it is not in the store", f"{self.where}/{name}") from error
        if error.taken:
            raise FileExistsError(errno.EEXIST, "it is in the store already", f"{self.where}/{name}") from error
        left = patience.left()
        if error.final or left <= 0:
            raise MachineError(error.what, where=error.where, remedy=error.remedy) from error
        time.sleep(min(left, _LONGEST_PAUSE_SECONDS, 1 + (self.patience_seconds - left) / 10))


class _Patience:
    """How long a silent store is asked again: it begins with the first failure, and anew after what came in between."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._deadline: float | None = None

    def renew(self) -> None:
        """The store has given something."""
        self._deadline = None

    def left(self) -> float:
        """Seconds left after a failure."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self.seconds
        return self._deadline - now


@functools.lru_cache
def _connection(endpoint: str, key: str | None) -> Connection:
    """One client for all checkpoints of a process: to make one takes a tenth of a second."""
    return Connection(_ATTEMPTS)


def _digest(pieces: Iterable[bytes | memoryview]) -> str:
    hashed = xxhash.xxh3_128()
    for piece in pieces:
        hashed.update(piece)
    return hashed.hexdigest()


class _Stream(io.RawIOBase):
    """Pieces as a file that can be read once."""

    def __init__(self, pieces: Iterable[bytes | memoryview]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece).cast("B")
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
