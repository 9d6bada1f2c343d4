"""Reading from an object store: what is there, and what is said, how soon, when something is wrong."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pixart_ds import s3 as s3_module
from pixart_ds.data.store import FolderStore, S3Store, open_store, upload_folder
from pixart_ds.errors import EXIT_DATA, DataError
from pixart_ds.s3 import StoreError
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
        list(pool.map(lambda n: store.fetch(f"{n}.mds", tmp_path / str(n)), range(6)))
    assert [(tmp_path / str(number)).read_bytes() for number in range(6)] == content

    def read_again(offset: int) -> None:
        numbers = [(number + offset) % 6 for number in range(6)]
        os._exit(0 if all(store.read(f"{number}.mds") == content[number] for number in numbers) else 1)

    forked = [multiprocessing.get_context("fork").Process(target=read_again, args=(offset,)) for offset in range(3)]
    for process in forked:
        process.start()
    for process in forked:
        process.join()
    assert [process.exitcode for process in forked] == [0, 0, 0]


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
        assert (
            len(s3.requests("GET", f"/{bucket}/shard.mds")) == 2
        )  # one for each of fetch and read: nothing is tried again
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    error = failure(f"s3://{bucket}", tmp_path)
    assert "there are no keys for the store" in error.what
    assert "set AWS_ACCESS_KEY_ID" in str(error)
    assert error.final


def test_another_region_than_the_stores_still_works(s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    patience, silence = 2.0, 0.5  # while it still answers, on a busy machine; when it no longer does
    own_server.put("own", "shard.mds", os.urandom(32 << 20))  # more than the buffers of a connection hold
    pieces = S3Store._pieces

    def frozen_after_the_first(self: S3Store, name: str) -> Iterator[bytes]:
        for number, piece in enumerate(pieces(self, name)):
            yield piece
            if number == 0:
                assert (tmp_path / "part").exists()
                own_server.freeze()

    with monkeypatch.context() as slow:
        slow.setattr(s3_module, "_READ_TIMEOUT_SECONDS", patience)
        slow.setattr(S3Store, "_pieces", frozen_after_the_first)
        error = failure("s3://own", tmp_path)
    assert "the store did not give shard.mds: ReadTimeoutError" in error.what
    assert not error.final
    with monkeypatch.context() as silent:
        silent.setattr(s3_module, "_READ_TIMEOUT_SECONDS", silence)
        began = time.monotonic()
        assert not failure("s3://own", tmp_path).final  # silent from the beginning: asked three times
        assert time.monotonic() - began > 2 * 3 * silence
    own_server.thaw()
    open_store("s3://own").fetch("shard.mds", tmp_path / "part")
    assert (tmp_path / "part").stat().st_size == 32 << 20


def test_a_fault_of_the_disk_is_no_fault_of_the_store(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    s3.put(bucket, "shard.mds", bytes(4 << 20))
    store = open_store(f"s3://{bucket}")
    with pytest.raises(FileNotFoundError):
        store.fetch("shard.mds", tmp_path / "no-folder" / "part")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.fetch("shard.mds", tmp_path / "part")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "part").exists()


def test_https_with_a_private_authority_works_and_without_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3Server(tmp_path / "s3", https=True)
    try:
        server.start()
        server.use(monkeypatch)
        assert server.endpoint.startswith("https://")
        server.make_bucket("own")
        content = os.urandom(20 << 20)
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "manifest.json").write_text("{}")
        (tmp_path / "set" / "shard.mds").write_bytes(content)
        upload_folder(tmp_path / "set", "s3://own/set")
        assert open_store("s3://own/set").read("shard.mds") == content
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
        error = failure("s3://own/set", tmp_path)
        assert "none.pem" in error.what
        assert error.final
        monkeypatch.delenv("AWS_CA_BUNDLE")
        error = failure("s3://own/set", tmp_path)
        assert f"the certificate of {server.endpoint} is not trusted" in error.what
        assert "name the file with the certificate of its authority in AWS_CA_BUNDLE" in str(error)
        assert error.final
    finally:
        server.stop()


def test_a_folder_is_a_store_too(tmp_path: Path) -> None:
    tiny_set(tmp_path / "set")
    store = open_store(tmp_path / "set")
    assert isinstance(store, FolderStore)
    store.fetch("manifest.json", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == store.read("manifest.json")
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(StoreError, match="is missing") as caught:
        store.fetch("manifest.json", tmp_path / "other")
    assert caught.value.final
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("address", ["gs://bucket/set", "s3://", "s3:///set"])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(DataError, match="s3://"):
        open_store(address)
