"""Reading from an object store: what is there, and what is said, how soon, when something is wrong."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pixart_ds.data import store as store_module
from pixart_ds.data.store import FolderStore, S3Store, StoreError, open_store, upload_folder
from pixart_ds.errors import EXIT_DATA, DataError
from tests.helpers.s3 import S3Server
from tests.helpers.sets import tiny_set

pytestmark = pytest.mark.store

SOON_SECONDS = 20.0
"""A refusal comes back well within this on a busy machine; a silent store is given up after what the constants say."""


def failure(url: str, tmp_path: Path, name: str = "shard.mds") -> StoreError:
    """The error of fetching a file, which comes soon and leaves no file behind."""
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        open_store(url).fetch(name, tmp_path / "part")
    assert time.monotonic() - began < SOON_SECONDS
    assert not (tmp_path / "part").exists()
    assert caught.value.where == url
    assert caught.value.remedy
    assert caught.value.exit_code == EXIT_DATA
    with pytest.raises(StoreError) as again:
        open_store(url).read(name)
    assert str(again.value) == str(caught.value) or not caught.value.final
    return caught.value


def test_what_was_uploaded_is_fetched_and_read(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    tiny_set(tmp_path / "set")
    upload_folder(tmp_path / "set", f"s3://{bucket}/sets/one/")
    store = open_store(f"s3://{bucket}/sets/one/")
    assert isinstance(store, S3Store)
    assert store.url == f"s3://{bucket}/sets/one"
    paths = [path for path in (tmp_path / "set").rglob("*") if path.is_file()]
    assert len(paths) > 20
    for path in paths:
        name = path.relative_to(tmp_path / "set").as_posix()
        store.fetch(name, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == path.read_bytes() == store.read(name)
        (tmp_path / "copy").unlink()


def test_a_bucket_may_be_a_set_and_threads_and_forks_share_a_store(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    content = [os.urandom(3 << 20) for _ in range(6)]
    for number, words in enumerate(content):
        s3.put(bucket, f"{number}.mds", words)
    store = open_store(f"s3://{bucket}")
    with ThreadPoolExecutor(6) as pool:
        pool.map(lambda n: store.fetch(f"{n}.mds", tmp_path / str(n)), range(6))
    assert [(tmp_path / str(number)).read_bytes() for number in range(6)] == content
    with multiprocessing.get_context("fork").Pool(2) as processes:
        assert processes.map(store.read, [f"{number}.mds" for number in range(6)]) == content


def test_a_file_that_is_there_is_not_written_over(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    s3.put(bucket, "shard.mds", b"new")
    (tmp_path / "part").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        open_store(f"s3://{bucket}").fetch("shard.mds", tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == b"old"


def test_streamings_own_name_for_the_endpoint_is_understood(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put(bucket, "index.json", b"{}")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv("S3_ENDPOINT_URL", s3.endpoint)
    assert open_store(f"s3://{bucket}").read("index.json") == b"{}"


def test_a_missing_file_and_a_missing_bucket_are_told_apart(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    error = failure(f"s3://{bucket}/prefix", tmp_path)
    assert (error.what, error.final) == ("shard.mds is not in the store (error NoSuchKey)", True)
    assert "pixart-ds upload" in str(error)
    error = failure("s3://there-is-none/prefix", tmp_path)
    assert "there is no bucket there-is-none (error NoSuchBucket)" in error.what
    assert s3.endpoint in str(error)
    assert error.final


def test_wrong_keys_are_refused_and_not_called_missing(
    s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put(bucket, "shard.mds", b"content")
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        error = failure(f"s3://{bucket}", tmp_path)
        assert (error.what, error.final) == ("the store refuses shard.mds (error SignatureDoesNotMatch)", True)
        assert "AWS_SECRET_ACCESS_KEY" in str(error)
        assert len(s3.requests("GET", f"/{bucket}/shard.mds")) == 2  # one for each of fetch and read: nothing is tried again
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    error = failure(f"s3://{bucket}", tmp_path)
    assert "there are no keys for the store" in error.what
    assert "set AWS_ACCESS_KEY_ID" in str(error)
    assert error.final


def test_another_region_than_the_stores_still_works(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put(bucket, "index.json", b"{}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert open_store(f"s3://{bucket}").read("index.json") == b"{}"  # the store's answer names the right one


def test_a_wrong_endpoint_or_profile_is_a_setting(
    s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_ENDPOINT_URL_S3", f"127.0.0.1:{s3.port}")
        error = failure(f"s3://{bucket}", tmp_path)
        assert "Invalid endpoint" in error.what
        assert "http://host:port" in str(error)
        assert error.final
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    error = failure(f"s3://{bucket}", tmp_path)
    assert "nobody" in error.what
    assert error.final


def test_an_endpoint_that_refuses_connections_may_come_back(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as bound:  # bound, but not listening: nobody else gets this port meanwhile
        bound.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        error = failure("s3://bucket/prefix", tmp_path)
    assert "the store did not give shard.mds: EndpointConnectionError" in error.what
    assert f"check that {endpoint} can be reached" in str(error)
    assert not error.final


def test_a_store_that_falls_silent_is_given_up_and_leaves_no_partial_file(
    own_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_READ_TIMEOUT_SECONDS", 0.5)
    own_server.put("own", "shard.mds", os.urandom(32 << 20))
    store = open_store("s3://own")
    began = time.monotonic()
    threading.Timer(0.0, lambda: _freeze_when(own_server, tmp_path / "part")).start()
    with pytest.raises(StoreError) as caught:
        store.fetch("shard.mds", _Slow(tmp_path / "part"))
    assert not caught.value.final
    assert "the store did not give shard.mds" in caught.value.what
    assert not (tmp_path / "part").exists()
    error = failure("s3://own", tmp_path)
    assert "ReadTimeoutError" in error.what
    assert not error.final
    assert time.monotonic() - began < 2 * SOON_SECONDS
    own_server.thaw()
    store.fetch("shard.mds", tmp_path / "part")
    assert (tmp_path / "part").stat().st_size == 32 << 20


class _Slow(type(Path())):  # type: ignore[misc]
    """A path that is written to slowly, so that a test can act in the middle."""


def _freeze_when(server: S3Server, path: Path) -> None:
    while not (path.exists() and path.stat().st_size):
        time.sleep(0.001)
    server.freeze()


def test_a_full_disk_is_no_fault_of_the_store(
    s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    s3.put(bucket, "shard.mds", b"content")
    with pytest.raises(FileNotFoundError):
        open_store(f"s3://{bucket}").fetch("shard.mds", tmp_path / "no-folder" / "part")
    with pytest.raises(OSError, match="No space left"):
        open_store(f"s3://{bucket}").fetch("shard.mds", Path("/dev/full"))
