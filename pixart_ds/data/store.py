"""Where prepared sets lie: a folder, or a prefix of an S3 bucket; and how a set gets there."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pixart_ds.errors import DataError
from pixart_ds.log import si
from pixart_ds.s3 import PART_BYTES, PIECE_BYTES, Connection, StoreError, s3_client, s3_errors, split_url

_REPORT_SECONDS = 5.0
_READ_ATTEMPTS = 3
_MANIFEST = "manifest.json"
_BROKEN_OFF = ("IncompleteReadError", "ResponseStreamingError")
"""botocore's errors of an answer that began well; those of a store that gives none were asked again by boto3 already."""
_IF_MISSING = "check bucket and prefix in data.sets.…path, or copy the set there again with `pixart-ds upload`"
_IF_CHANGED = "put the file back as it was, or begin anew with what is there now"


class Fetcher(Protocol):
    """What a cache needs of a store."""

    url: str

    def fetch(self, name: str, to: Path) -> None:
        """Copies a file to a path that is not there yet; on an error nothing whole lies there.

        Raises:
            StoreError: With the store, the file and what to do.
        """
        ...


class Store(Fetcher, Protocol):
    """One place that holds files by name."""

    def read(self, name: str) -> bytes:
        """A small file's content; the errors of `fetch`."""
        ...

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """So many bytes of a file from `start`; the same errors, and one if it ends before."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file; the same errors."""
        ...

    def names(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Names that begin with `prefix`, and their sizes in bytes, sorted; the same errors. Linked folders are not entered: they
        are names of no bytes.
        """
        ...


def is_remote(location: str | Path) -> bool:
    """Whether a set's path names an object store."""
    return "://" in str(location)


def open_store(location: str | Path) -> Store:
    """The store of a folder or of an s3:// address.

    Raises:
        DataError: Another kind of address.
    """
    if not is_remote(location):
        return FolderStore(Path(location))
    if not str(location).startswith("s3://"):
        raise DataError(
            f"sets are read from folders and from s3:// addresses, not from {location}",
            remedy="use the S3 interface of the store, or copy the set to a folder",
        )
    return S3Store(str(location))


def exists(store: Store, name: str) -> bool:
    """Whether a file is there.

    Raises:
        StoreError: Nobody can say.
    """
    try:
        store.size(name)
    except StoreError as error:
        if not error.missing:
            raise
        return False
    return True


class FolderStore:
    """A local or shared folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, str(folder)

    def fetch(self, name: str, to: Path) -> None:
        try:
            shutil.copyfile(self.folder / name, to)
        except OSError as cause:
            if cause.filename is not None and Path(cause.filename) == self.folder / name:
                raise self._error(name, cause) from cause
            raise

    def read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as cause:
            raise self._error(name, cause) from cause

    def read_range(self, name: str, start: int, length: int) -> bytes:
        try:
            with open(self.folder / name, "rb", buffering=0) as file:
                file.seek(start)
                pieces = []
                while length and (piece := file.read(length)):  # a raw read may be short without being an error
                    pieces.append(piece)
                    length -= len(piece)
        except OSError as cause:
            raise self._error(name, cause) from cause
        if length:
            raise _ends_early(name, self.url)
        return b"".join(pieces)

    def size(self, name: str) -> int:
        try:
            return (self.folder / name).stat().st_size
        except OSError as cause:
            raise self._error(name, cause) from cause

    def names(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        folder = prefix.rpartition("/")[0]
        if folder and not (self.folder / folder).is_dir():
            return
        for name, size in self._walk(f"{folder}/" if folder else ""):
            if name.startswith(prefix):
                yield name, size

    def _walk(self, folder: str) -> Iterator[tuple[str, int]]:
        """Everything under a folder (empty, or with a slash behind it), in the sequence in which object stores list it."""
        try:
            with os.scandir(self.folder / folder) as found:
                entries = sorted((e.name + "/" * e.is_dir(follow_symlinks=False), e) for e in found)
        except OSError as cause:
            raise self._error(folder, cause) from cause
        for name, entry in entries:
            if name.endswith("/"):
                yield from self._walk(folder + name)
            else:
                linked = entry.is_symlink() and (entry.is_dir() or not os.path.exists(entry))
                yield folder + name, 0 if linked else self._entry_size(folder + name, entry)

    def _entry_size(self, name: str, entry: os.DirEntry[str]) -> int:
        try:
            return entry.stat().st_size
        except OSError as cause:
            raise self._error(name, cause) from cause

    def _error(self, name: str, cause: OSError) -> StoreError:
        missing = isinstance(cause, FileNotFoundError)
        return StoreError(
            f"{self.folder / name} is missing" if missing else f"{self.folder / name}: {cause.strerror}",
            where=self.folder,
            remedy="put the file back, or prepare the set again" if missing else "look after the file system",
            final=missing or isinstance(cause, PermissionError),
            missing=missing,
        )


class S3Store:
    """A prefix of an S3 bucket. Endpoint, region, keys and certificates are taken from the environment, as boto3 takes them.

    Several threads may use it. A store that is silent for 30 s, or cannot be connected to in 10 s, is asked three times in all.
    Streaming's own downloader is not used: it calls every refusal "not found", and sends hundreds of requests after an answer 400.
    """

    def __init__(self, url: str) -> None:
        self.bucket, self.prefix = split_url(url)
        self.url = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self._connection = Connection(_READ_ATTEMPTS)

    def fetch(self, name: str, to: Path) -> None:
        try:
            with open(to, "xb") as file:
                for piece in self._pieces(name):
                    file.write(piece)
        except FileExistsError:
            raise
        except BaseException:
            to.unlink(missing_ok=True)
            raise

    def read(self, name: str) -> bytes:
        return self._whole(name)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        if not length:
            return b""
        data = self._whole(name, Range=f"bytes={start}-{start + length - 1}")
        if len(data) != length:
            raise _ends_early(name, self.url)
        return data

    def names(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        with s3_errors(self.url, prefix or "its list of names", if_missing=_IF_MISSING):
            pages = self._connection.client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                for item in page.get("Contents", []):
                    yield item["Key"].removeprefix(self.prefix), item["Size"]

    def size(self, name: str) -> int:
        with s3_errors(self.url, name, if_missing=_IF_MISSING):
            answer = self._connection.client().head_object(Bucket=self.bucket, Key=self.prefix + name)
        return int(answer["ContentLength"])

    def _whole(self, name: str, **options: str) -> bytes:
        for _ in range(_READ_ATTEMPTS - 1):  # boto3 asks again for an answer, not for one that breaks off
            try:
                return b"".join(self._pieces(name, **options))
            except StoreError as error:
                if type(error.__cause__).__name__ not in _BROKEN_OFF:
                    raise
        return b"".join(self._pieces(name, **options))

    def _pieces(self, name: str, **options: str) -> Iterator[bytes]:
        """The content of an object; the errors of boto3 as StoreError."""
        with s3_errors(self.url, name, if_missing=_IF_MISSING):
            answer = self._connection.client().get_object(Bucket=self.bucket, Key=self.prefix + name, **options)
            with closing(answer["Body"]) as body:
                yield from body.iter_chunks(PIECE_BYTES)


def _ends_early(name: str, url: str) -> StoreError:
    return StoreError(f"{name} ends too early", where=url, remedy=_IF_CHANGED, final=True)


@dataclass(frozen=True)
class Upload:
    """What an upload did, or with `dry_run` would do.

    Attributes:
        url: Where the set is now.
        files, bytes: The whole set.
        sent_files, sent_bytes: What was not there yet.
        dry_run: Nothing was sent.
    """

    url: str
    files: int
    bytes: int
    sent_files: int
    sent_bytes: int
    dry_run: bool = False

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        there = self.files - self.sent_files
        return (
            f"{'would send' if self.dry_run else 'sent'} {self.sent_files} of {self.files} files ({si(self.sent_bytes, 'B')}) "
            f"to {self.url}" + (f"; {there} {'was' if there == 1 else 'were'} there" if there else "")
        )


def upload_folder(
    folder: Path, url: str, *, report: Callable[[str], None] | None = None, threads: int = 8, dry_run: bool = False
) -> Upload:
    """Copies a finished set into an object store: shards first, then the small files, the manifest last, so that what has a
    manifest is whole. An interrupted upload goes on: what is there with the same size and hash is not sent again. The hash lies
    with each object (metadata `xxh3`), because an ETag is not always one.

    Args:
        folder: The set.
        url: s3://bucket/prefix; the bucket is there already.
        report: Is told every few seconds how far it is, in words.
        threads: Files that are sent at once.
        dry_run: Only look.

    Raises:
        DataError: The set is not finished, or another one is at that address.
        StoreError: The store refuses or cannot be reached.
    """
    bucket, prefix = split_url(url)
    url = f"s3://{bucket}/{prefix}".rstrip("/")
    phases = _phases(folder)
    transfer = _Transfer(folder, url, threads, dry_run, report)
    transfer.check_address()
    sent = [size for phase in phases for size in transfer.send(phase)]
    sizes = [(folder / name).stat().st_size for phase in phases for name in phase]
    return Upload(url, len(sizes), sum(sizes), sum(size is not None for size in sent), sum(filter(None, sent)), dry_run)


def _phases(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """The names of a set's files in the order that they are sent: shards, small files, manifest. Hidden files are left out."""
    if not (folder / _MANIFEST).is_file():
        raise DataError(
            f"there is no finished set: {_MANIFEST} is missing",
            where=folder,
            remedy="name the folder of a prepared set, or finish it: run the same `pixart-ds prepare` again",
        )
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    shards = [name for name in names if ".mds" in Path(name).suffixes]
    rest = [name for name in names if name not in {*shards, _MANIFEST}]
    return shards, rest, [_MANIFEST]


class _Transfer:
    """One upload."""

    def __init__(
        self, folder: Path, url: str, threads: int, dry_run: bool, report: Callable[[str], None] | None
    ) -> None:
        self.folder, self.url, self.threads, self.dry_run, self.report = folder, url, threads, dry_run, report
        self.bucket, self.prefix = split_url(url)
        with s3_errors(self.url, _MANIFEST, writing=True):
            self.client = s3_client(connections=threads)
            self.there = self._list()
        self._told = time.monotonic()
        self._sent_bytes = 0

    def check_address(self) -> None:
        """No finished set is written over by another one: jobs may be reading it."""
        if _MANIFEST not in self.there:
            return
        with s3_errors(self.url, _MANIFEST, writing=True):
            answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + _MANIFEST)
            if answer["Body"].read() == (self.folder / _MANIFEST).read_bytes():
                return
        raise DataError(
            f"another finished set is at {self.url}: its {_MANIFEST} differs from that of {self.folder}",
            where=self.url,
            remedy="choose another prefix, or delete what is there if nobody reads it",
        )

    def send(self, names: list[str]) -> list[int | None]:
        """Sends the files that are not there; returns the bytes of each, None for what was there. The first error ends it."""
        if not names:
            return []
        with ThreadPoolExecutor(min(self.threads, len(names)), "upload") as pool:
            futures = [pool.submit(self._send, name) for name in names]
            try:
                sent = []
                for number, future in enumerate(futures, 1):
                    sent.append(future.result())
                    self._tell(number, len(names), sent[-1])
                return sent
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _list(self) -> dict[str, int]:
        """Sizes of what is there, by name."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        return {
            item["Key"].removeprefix(self.prefix): item["Size"] for page in pages for item in page.get("Contents", [])
        }

    def _send(self, name: str) -> int | None:
        path = self.folder / name
        digest = digest_of(path)
        size = path.stat().st_size
        with s3_errors(self.url, name, writing=True):
            if self.there.get(name) == size and self._digest_there(name) == digest:
                return None
            if not self.dry_run:
                send_file(self.client, path, self.bucket, self.prefix + name, digest)
        return size

    def _digest_there(self, name: str) -> str | None:
        metadata = self.client.head_object(Bucket=self.bucket, Key=self.prefix + name)["Metadata"]
        digest: str | None = metadata.get("xxh3")
        return digest

    def _tell(self, number: int, count: int, size: int | None) -> None:
        self._sent_bytes += size or 0
        if self.report is not None and time.monotonic() - self._told >= _REPORT_SECONDS:
            self._told = time.monotonic()
            self.report(f"{number} of {count} files, {si(self._sent_bytes, 'B')} sent")


def send_file(client: Any, path: Path, bucket: str, key: str, digest: str) -> None:
    """Copies a file to an object; its hash lies with it. The errors are boto3's."""
    from boto3.s3.transfer import TransferConfig

    config = TransferConfig(use_threads=False, multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)
    client.upload_file(str(path), bucket, key, ExtraArgs={"Metadata": {"xxh3": digest}}, Config=config)


def digest_of(path: Path) -> str:
    """xxh3 of a file's content, in hexadecimal."""
    from xxhash import xxh3_64

    hashed = xxh3_64()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            hashed.update(piece)
    return hashed.hexdigest()
