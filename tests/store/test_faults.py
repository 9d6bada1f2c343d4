"""The loader over a real object store through every fault: it recovers, or ends in a stated time with store, shard and remedy."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pixart_ds.config.schema import SetConfig
from pixart_ds.data.cache import CacheOptions
from pixart_ds.data.loader import Loader
from pixart_ds.data.shards import PreparedSet
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.plan.order import Order
from tests.helpers.disk import small_disk
from tests.helpers.faulty_proxy import Fault, FaultyProxy
from tests.helpers.s3 import S3Server
from tests.helpers.sets import tiny_set

pytestmark = pytest.mark.store

GROUPS = tuple((number % 3, 8) for number in range(24))
STEPS, BATCH = 24, 16  # two passes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return tiny_set(tmp_path_factory.mktemp("set") / "set", GROUPS)


@pytest.fixture(scope="module")
def wanted(made: PreparedSet) -> list[int]:
    """The digest of each step, read in place."""
    return walk(made, None)


@pytest.fixture
def stored(s3: S3Server, bucket: str, made: PreparedSet) -> str:
    """The set's address in the store."""
    s3.put_folder(Path(made.path), bucket, "set")
    return f"s3://{bucket}/set"


@pytest.fixture
def own(own_server: S3Server, made: PreparedSet) -> str:
    """The set's address in a store that the test may stop."""
    own_server.put_folder(Path(made.path), "own", "set")
    return "s3://own/set"


def loader_of(made: PreparedSet, cache: CacheOptions | None, **changes: Any) -> Loader:
    order = Order([made.rows_for("48-buckets", SetConfig(path="x"))], seed=3, lanes=4, strip_length=4, window=2)
    options: dict[str, Any] = {"rank": 0, "world_size": 1, "fetchers": 2, "ahead": 2, **changes}
    return Loader(
        [made], order, latents="48-buckets", stage="s", seed=8, condition_dropout=0.1, micro_batch_size=8,
        global_batch_size=BATCH, cache=cache, **options,
    )  # fmt: skip


def walk(made: PreparedSet, cache: CacheOptions | None) -> list[int]:
    """The digest of each of the planned steps: none may be missing."""
    digests = []
    with loader_of(made, cache) as loader:
        for at in loader.steps(0, STEPS * BATCH):
            digests.append(sum(batch.digest for batch in loader.micro_batches(at)) % 2**64)
    assert len(digests) == STEPS
    return digests


def small(tmp_path: Path, **changes: Any) -> CacheOptions:
    """A cache that holds a third of the set, so that the store is asked all the time."""
    options = {"limit_bytes": 16 * 4096, "guard_seconds": 0.0, "patience_seconds": 60.0, **changes}
    return CacheOptions(tmp_path / "cache", **options)


def test_a_store_delivers_what_a_folder_delivers_and_is_asked_once(
    s3: S3Server, stored: str, wanted: list[int], tmp_path: Path
) -> None:
    assert walk(PreparedSet.open(stored), CacheOptions(tmp_path / "cache")) == wanted
    bucket = stored.split("/")[2]
    fetched = [request.path for request in s3.requests("GET", f"/{bucket}/set/") if request.path.endswith(".mds")]
    assert len(fetched) == len(set(fetched)) == 2 * len(GROUPS)  # two passes, one download of each shard
    assert walk(PreparedSet.open(stored), CacheOptions(tmp_path / "cache")) == wanted
    again = [request.path for request in s3.requests("GET", f"/{bucket}/set/") if request.path.endswith(".mds")]
    assert again == fetched


def test_a_small_cache_asks_more_often_and_delivers_the_same(stored: str, wanted: list[int], tmp_path: Path) -> None:
    remote = PreparedSet.open(stored)
    assert walk(remote, small(tmp_path)) == wanted


def test_ranks_of_a_node_share_each_download(s3: S3Server, stored: str, tmp_path: Path) -> None:
    remote = PreparedSet.open(stored)
    cache = CacheOptions(tmp_path / "cache")

    def rank(number: int) -> None:
        with loader_of(remote, cache, rank=number, world_size=3) as loader:
            for at in loader.steps(0, 12 * BATCH):
                list(loader.micro_batches(at))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bucket = stored.split("/")[2]
    fetched = [request.path for request in s3.requests("GET", f"/{bucket}/set/") if request.path.endswith(".mds")]
    assert len(fetched) == len(set(fetched)) == 2 * len(GROUPS)


def test_wrong_credentials_and_absent_sets_are_told_apart_at_once(
    s3: S3Server, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"no finished set: manifest.json is not in the store") as caught:
        PreparedSet.open(stored + "-absent")
    assert "data.sets" in str(caught.value)
    with pytest.raises(DataError, match="bucket"):
        PreparedSet.open("s3://no-such-bucket/set")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    began = time.monotonic()
    with pytest.raises(DataError, match="refuse") as caught:
        PreparedSet.open(stored)
    assert "AWS_SECRET_ACCESS_KEY" in str(caught.value)
    assert time.monotonic() - began < 15


def test_a_store_is_not_read_in_place(stored: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read in place: it is an object store") as caught:
        walk(PreparedSet.open(stored), None)
    assert "execution.cache.mode" in str(caught.value)


def test_refusals_and_resets_in_the_middle_of_an_epoch_change_nothing(
    s3: S3Server, stored: str, wanted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(number: int) -> Fault:
        return "500" if number % 5 == 2 else "reset" if number % 7 == 3 else "pass"

    with FaultyProxy(s3.port, fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        remote = PreparedSet.open(stored)
        assert walk(remote, small(tmp_path)) == wanted
        assert min(proxy.counts.values()) > 10


@pytest.mark.parametrize("seconds", [3, 20])
def test_an_outage_is_waited_for(
    own_server: S3Server, own: str, wanted: list[int], tmp_path: Path, seconds: int
) -> None:
    remote, digests = PreparedSet.open(own), []
    there, away = threading.Event(), threading.Event()

    def train() -> None:
        with loader_of(remote, small(tmp_path)) as loader:
            for number, at in enumerate(loader.steps(0, STEPS * BATCH)):
                if number == 4:
                    there.set()
                    away.wait()
                digests.append(sum(batch.digest for batch in loader.micro_batches(at)) % 2**64)

    trainer = threading.Thread(target=train)
    trainer.start()
    there.wait()
    own_server.stop()
    away.set()
    time.sleep(seconds)
    own_server.start()
    trainer.join()
    assert digests == wanted


def test_a_store_that_is_gone_for_good_is_an_error_after_the_patience(
    own_server: S3Server, own: str, tmp_path: Path
) -> None:
    remote = PreparedSet.open(own)
    cache = small(tmp_path, patience_seconds=3.0)
    remote.rows_for("48-buckets", SetConfig(path="x"))  # the indexes are here
    own_server.stop()
    began = time.monotonic()
    with pytest.raises(DataError, match=r"did not give.*in \d+ tries and \d+ s \(needed for sample \d+\)") as caught:
        walk(remote, cache)
    assert own in str(caught.value)
    assert "can be reached" in str(caught.value)
    assert time.monotonic() - began < 3 + 30


def test_a_store_that_freezes_is_an_error_within_the_stated_time(
    own_server: S3Server, own: str, tmp_path: Path
) -> None:
    remote = PreparedSet.open(own)
    loader = loader_of(remote, small(tmp_path, patience_seconds=2.0))
    own_server.freeze()
    began = time.monotonic()

    def first() -> None:
        with loader:
            for at in loader.steps(0, STEPS * BATCH):
                list(loader.micro_batches(at))

    try:
        with pytest.raises(DataError, match=r"no micro-batch for|did not give") as caught:
            first()
        assert "shard" in str(caught.value)
        assert time.monotonic() - began < loader.patience_seconds + 10
    finally:
        own_server.thaw()


def test_a_store_that_freezes_for_a_while_is_waited_for(
    own_server: S3Server, own: str, wanted: list[int], tmp_path: Path
) -> None:
    remote = PreparedSet.open(own)
    own_server.freeze()
    threading.Timer(5, own_server.thaw).start()
    assert walk(remote, small(tmp_path)) == wanted


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", r"part-00003-[0-9a-f]{16}.mds is not in the store"),
        ("truncated", r"part-00003-[0-9a-f]{16}.mds is damaged in the store: 100 bytes instead of"),
        ("flipped", r"part-00003-[0-9a-f]{16}.mds is damaged in the store: its xxh3 hash is"),
    ],
)
def test_a_bad_shard_is_named_with_the_sample_that_needs_it(
    s3: S3Server, stored: str, tmp_path: Path, fault: str, words: str
) -> None:
    bucket = stored.split("/")[2]
    (key,) = (name for name in s3.list(bucket) if name.startswith("set/latents-48-buckets/part-00003-"))
    content = s3.get(bucket, key)
    if fault == "missing":
        s3.delete(bucket, key)
    elif fault == "truncated":
        s3.put(bucket, key, content[:100])
    else:
        s3.put(bucket, key, content[:-1] + bytes([content[-1] ^ 1]))
    began = time.monotonic()
    with pytest.raises(DataError, match=words) as caught:
        walk(PreparedSet.open(stored), CacheOptions(tmp_path / "cache", patience_seconds=60.0))
    assert "needed for sample" in str(caught.value)
    assert bucket in str(caught.value)
    assert time.monotonic() - began < 20
    assert not list((tmp_path / "cache").rglob("*.part*"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 320 kB."""
    with small_disk(tmp_path / "disk", "size=320k") as folder:
        yield folder


def test_a_disk_that_fills_makes_room_for_itself(s3: S3Server, bucket: str, tmp_path: Path, disk: Path) -> None:
    made = tiny_set(tmp_path / "large", tuple((number % 3, 3) for number in range(64)))  # twice 64 blocks: 512 kB
    s3.put_folder(Path(made.path), bucket, "large")
    remote, digests = PreparedSet.open(f"s3://{bucket}/large"), []
    with loader_of(remote, CacheOptions(disk / "cache", guard_seconds=0.0)) as loader:
        for number, at in enumerate(loader.steps(0, STEPS * BATCH)):
            if number == 6:  # another program takes what the cache counted on
                (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * 4096))
            digests.append(sum(batch.digest for batch in loader.micro_batches(at)) % 2**64)
    assert digests == walk(made, None)


def test_a_disk_that_is_full_of_other_things_is_an_error(stored: str, disk: Path) -> None:
    (disk / "cache").mkdir()
    with open(disk / "filler", "wb") as file:
        try:
            while True:
                file.write(bytes(4096))
                file.flush()
        except OSError:
            os.truncate(disk / "filler", (disk / "filler").stat().st_size // 4096 * 4096 - 16384)
    with pytest.raises(DataError, match=r"what the disk has free, [\d,]+ bytes, is below 4 times the largest shard"):
        walk(PreparedSet.open(stored), CacheOptions(disk / "cache", guard_seconds=0.0, patience_seconds=5.0))


def test_a_read_only_disk_is_said_at_once(stored: str, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(DataError, match="the cache cannot be used: Read-only file system") as caught:
        walk(PreparedSet.open(stored), CacheOptions(disk / "cache"))
    assert "execution.cache.folder" in str(caught.value)


def delete(folder: Path) -> None:
    """Until it was gone once: a loader may write there between the look at a folder and its end."""
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise
        else:
            return


def test_a_cache_that_is_deleted_while_it_is_read_is_filled_again(
    stored: str, wanted: list[int], tmp_path: Path
) -> None:
    remote, digests = PreparedSet.open(stored), []
    with loader_of(remote, CacheOptions(tmp_path / "cache")) as loader:
        for number, at in enumerate(loader.steps(0, STEPS * BATCH)):
            if number in (3, 15):
                delete(tmp_path / "cache")
            digests.append(sum(batch.digest for batch in loader.micro_batches(at)) % 2**64)
    assert digests == wanted


def test_two_jobs_on_one_small_cache_both_finish(stored: str, wanted: list[int], tmp_path: Path) -> None:
    remote = PreparedSet.open(stored)
    made: dict[int, list[int]] = {}
    threads = [threading.Thread(target=lambda n=n: made.update({n: walk(remote, small(tmp_path))})) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == {0: wanted, 1: wanted}
