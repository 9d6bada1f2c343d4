"""Where prepared sets lie: a folder, or a prefix of an S3 bucket; and how a set gets there."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pixart_ds.errors import DataError
from pixart_ds.log import si

_CONNECT_TIMEOUT_SECONDS = 10.0
_READ_TIMEOUT_SECONDS = 30.0
_REPORT_SECONDS = 5.0
_PART_BYTES = 16 << 20  # a store admits 10,000 parts: enough for the largest shard there can be
_PIECE_BYTES = 1 << 20
_READ_ATTEMPTS = 3
_MANIFEST = "manifest.json"
_BROKEN_OFF = ("IncompleteReadError", "ResponseStreamingError")
"""botocore's errors of an answer that began well; those of a store that gives none were asked again by boto3 already."""
_KINDS = {
    **dict.fromkeys(("400", "401", "403", "AccessDenied", "AllAccessDisabled", "AccountProblem"), "refused"),
    **dict.fromkeys(("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "ExpiredToken"), "refused"),
    **dict.fromkeys(("404", "NoSuchKey"), "missing"),
    **dict.fromkeys(("NoSuchBucket", "InvalidBucketName"), "bucket"),
    **dict.fromkeys(("301", "AuthorizationHeaderMalformed", "PermanentRedirect"), "region"),
    "RequestTimeTooSkewed": "clock",
}


class StoreError(DataError):
    """A store did not give what was asked for.

    Attributes:
        final: Asking again will not help: it is not there, or may not be read.
        missing: It is not there.
    """

    def __init__(self, what: str, *, where: object, remedy: str, final: bool, missing: bool = False) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.final, self.missing = final, missing


class Store(Protocol):
    """One place that holds files by name."""

    url: str

    def fetch(self, name: str, to: Path) -> None:
        """Copies a file to a path that is not there yet; on an error nothing whole lies there.

        Raises:
            StoreError: With the store, the file and what to do.
        """
        ...

    def read(self, name: str) -> bytes:
        """A small file's content; the same errors."""
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
        self._lock = threading.Lock()
        self._client: Any = None
        self._process = 0

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
        for _ in range(_READ_ATTEMPTS - 1):  # boto3 asks again for an answer, not for one that breaks off
            try:
                return b"".join(self._pieces(name))
            except StoreError as error:
                if type(error.__cause__).__name__ not in _BROKEN_OFF:
                    raise
        return b"".join(self._pieces(name))

    def _pieces(self, name: str) -> Iterator[bytes]:
        """The content of an object; the errors of boto3 as StoreError."""
        with _s3_errors(self.url, name):
            answer = self._connected().get_object(Bucket=self.bucket, Key=self.prefix + name)
            with closing(answer["Body"]) as body:
                yield from body.iter_chunks(_PIECE_BYTES)

    def _connected(self) -> Any:
        """The client; a forked process gets its own, because two of them would read each other's answers."""
        with self._lock:
            if self._process != os.getpid():
                self._client, self._process = s3_client(attempts=_READ_ATTEMPTS), os.getpid()
            return self._client


def split_url(url: str) -> tuple[str, str]:
    """Bucket and prefix of an s3:// address; the prefix is empty or ends with a slash.

    Raises:
        DataError: It is no such address.
    """
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket:
        raise DataError(f"{url} is not an address in an object store", remedy="write it as s3://bucket/prefix")
    prefix = prefix.strip("/")
    return bucket, f"{prefix}/" if prefix else ""


def s3_client(*, attempts: int = 4, connections: int = 10) -> Any:
    """A boto3 client of the store that the environment names; several threads may share it.

    Args:
        attempts: Times that a request is tried while the store is silent or overloaded.
        connections: To keep open.
    """
    from boto3.session import Session
    from botocore.config import Config  # type: ignore[import-untyped]

    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_SECONDS,
        read_timeout=_READ_TIMEOUT_SECONDS,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=connections,
    )
    return Session().client("s3", config=config, endpoint_url=os.environ.get("S3_ENDPOINT_URL") or None)


def s3_endpoint() -> str:
    """The endpoint in words."""
    names = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    return next((os.environ[name] for name in names if os.environ.get(name)), "s3.amazonaws.com")


@contextmanager
def _s3_errors(url: str, name: str, *, writing: bool = False) -> Iterator[None]:
    """Errors of boto3 about the file `name` as StoreError; those of the disk stay what they are."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

    try:
        yield
    except (Boto3Error, BotoCoreError, ClientError, OSError, ValueError) as cause:  # a wrong endpoint is a ValueError
        if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, ConnectionError):
            raise
        reason: Exception = cause
        if type(cause).__name__ == "S3UploadFailedError" and isinstance(cause.__context__, Exception):
            reason = cause.__context__  # of which it keeps only the text
        raise _store_error(url, name, reason, writing=writing) from cause


def _kind(cause: Exception) -> tuple[str, str]:
    """What kind of error it is, by boto's class or the store's code, and that name."""
    answer = getattr(cause, "response", None)
    if isinstance(answer, dict):  # some refusals have no body that says why
        code = str(answer.get("Error", {}).get("Code") or answer["ResponseMetadata"]["HTTPStatusCode"])
        return _KINDS.get(code, "silent"), code
    from botocore import exceptions  # type: ignore[import-untyped]

    name, words = type(cause).__name__, str(cause)
    if name == "SSLError" and "No such file" in words:
        return "no authority", name
    if "CERTIFICATE_VERIFY_FAILED" in words:
        return "certificate", name
    if "Credential" in name:
        return "no keys", name
    network = (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError)
    if isinstance(cause, exceptions.BotoCoreError | ValueError) and not isinstance(cause, network):
        return "setting", name
    return "silent", name


def _store_error(url: str, name: str, cause: Exception, *, writing: bool) -> StoreError:
    """The error of one file, in words."""
    kind, code = _kind(cause)
    bucket, _ = split_url(url)
    what, remedy = {
        "refused": (
            f"the store refuses {name} (error {code})",
            f"check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights on the bucket {bucket}",
        ),
        "no keys": (
            f"there are no keys for the store, which {name} is {'for' if writing else 'to come from'} ({cause})",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        ),
        "missing": (
            f"{name} is not in the store (error {code})",
            "check bucket and prefix in data.sets.…path, or copy the set there again with `pixart-ds upload`",
        ),
        "bucket": (
            f"there is no bucket {bucket} (error {code}), which {name} is {'for' if writing else 'to come from'}",
            f"check the address and the endpoint, {s3_endpoint()}{', or make the bucket' if writing else ''}",
        ),
        "region": (
            f"the store expects another region (error {code}): {cause}",
            "set AWS_DEFAULT_REGION to the store's",
        ),
        "clock": (
            f"the store refuses {name} because this node's clock is wrong (error {code})",
            "set the clock, for example with chrony",
        ),
        "certificate": (
            f"the certificate of {s3_endpoint()} is not trusted: {cause}",
            "name the file with the certificate of its authority in AWS_CA_BUNDLE",
        ),
        "no authority": (
            f"there is no file {os.environ.get('AWS_CA_BUNDLE') or os.environ.get('REQUESTS_CA_BUNDLE')} of certificates",
            "correct AWS_CA_BUNDLE",
        ),
        "setting": (
            f"a setting of the store is wrong: {cause}",
            "check the address, AWS_ENDPOINT_URL_S3 (http://host:port or https://…) and the other AWS_… variables",
        ),
        "silent": (
            f"the store did not {'take' if writing else 'give'} {name}: {code}: {cause}",
            f"check that {s3_endpoint()} can be reached from this node",
        ),
    }[kind]
    return StoreError(what, where=url, remedy=remedy, final=kind != "silent", missing=kind == "missing")


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
        with _s3_errors(self.url, _MANIFEST, writing=True):
            self.client = s3_client(connections=threads)
            self.there = self._list()
        self._told = time.monotonic()
        self._sent_bytes = 0

    def check_address(self) -> None:
        """No finished set is written over by another one: jobs may be reading it."""
        if _MANIFEST not in self.there:
            return
        with _s3_errors(self.url, _MANIFEST, writing=True):
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
        from boto3.s3.transfer import TransferConfig

        path = self.folder / name
        digest = _digest(path)
        size = path.stat().st_size
        with _s3_errors(self.url, name, writing=True):
            if self.there.get(name) == size and self._digest_there(name) == digest:
                return None
            if not self.dry_run:
                config = TransferConfig(
                    use_threads=False, multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES
                )
                self.client.upload_file(
                    str(path), self.bucket, self.prefix + name, ExtraArgs={"Metadata": {"xxh3": digest}}, Config=config
                )
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


def _digest(path: Path) -> str:
    """xxh3 of a file's content, in hexadecimal."""
    from xxhash import xxh3_64

    hashed = xxh3_64()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            hashed.update(piece)
    return hashed.hexdigest()
