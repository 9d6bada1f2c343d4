"""S3 as boto3 speaks it: addresses, clients, and its errors in words. What is stored there is for others to say."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pixart_ds.errors import DataError

PART_BYTES = 16 << 20
"""Of an upload in parts: a store admits 10,000, enough for 160 GB."""
PIECE_BYTES = 1 << 20
"""Read at once from an answer."""

_CONNECT_TIMEOUT_SECONDS = 10.0
_READ_TIMEOUT_SECONDS = 30.0
_KINDS = {
    **dict.fromkeys(("400", "401", "403", "AccessDenied", "AllAccessDisabled", "AccountProblem"), "refused"),
    **dict.fromkeys(("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "ExpiredToken"), "refused"),
    **dict.fromkeys(("404", "NoSuchKey"), "missing"),
    **dict.fromkeys(("NoSuchBucket", "InvalidBucketName"), "bucket"),
    **dict.fromkeys(("301", "AuthorizationHeaderMalformed", "PermanentRedirect"), "region"),
    "RequestTimeTooSkewed": "clock",
    **dict.fromkeys(("412", "PreconditionFailed"), "taken"),
    **dict.fromkeys(("416", "InvalidRange"), "short"),
}


class StoreError(DataError):
    """A store did not give what was asked for.

    Attributes:
        final: Asking again will not help: it is not there, or may not be read.
        missing: It is not there.
        taken: It was to be new, but is there.
    """

    def __init__(
        self, what: str, *, where: object, remedy: str, final: bool, missing: bool = False, taken: bool = False
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.final, self.missing, self.taken = final, missing, taken


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


class Connection:
    """A client that is made when it is first needed; a forked process gets its own, because two would read each other's answers.

    Args:
        attempts: Of `s3_client`.
    """

    def __init__(self, attempts: int) -> None:
        self._attempts = attempts
        self._lock = threading.Lock()
        self._client: Any = None
        self._process = 0

    def client(self) -> Any:
        with self._lock:
            if self._process != os.getpid():
                self._client, self._process = s3_client(attempts=self._attempts), os.getpid()
            return self._client


@contextmanager
def s3_errors(url: str, name: str, *, writing: bool = False, if_missing: str = "check the address") -> Iterator[None]:
    """Errors of boto3 about the file `name` as StoreError; those of the disk stay what they are.

    Args:
        writing: Whether it was to be written.
        if_missing: What to do if it is not there.
    """
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
        raise _store_error(url, name, reason, writing, if_missing) from cause


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


def _store_error(url: str, name: str, cause: Exception, writing: bool, if_missing: str) -> StoreError:
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
            if_missing,
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
        "taken": (f"{name} is in the store already (error {code})", "choose another address"),
        "short": (f"{name} ends too early (error {code})", if_missing),
        "silent": (
            f"the store did not {'take' if writing else 'give'} {name}: {code}: {cause}",
            f"check that {s3_endpoint()} can be reached from this node",
        ),
    }[kind]
    return StoreError(
        what,
        where=url,
        remedy=remedy,
        final=kind != "silent",
        missing=kind == "missing",
        taken=kind == "taken",
    )
