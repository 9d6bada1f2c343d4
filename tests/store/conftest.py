"""One S3 server for all tests of this folder, and a bucket of its own for each of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.s3 import S3Server

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running server; a test that stops or freezes one makes its own."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The running server, named by this process's environment."""
    s3_server.use(monkeypatch)
    return s3_server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """The name of an empty bucket."""
    name = f"bucket-{next(_numbers)}"
    s3.make_bucket(name)
    return name


@pytest.fixture
def own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server of the test's own, for it to stop, kill or freeze, with a bucket `own`."""
    server = S3Server(tmp_path / "s3")
    try:
        server.start()
        server.use(monkeypatch)
        server.make_bucket("own")
        yield server
    finally:
        server.stop()
