"""A node's cache of shards: shared by processes, bounded, checked, and nothing left behind after kill -9."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pixart_ds.config.schema import CacheConfig, SetConfig
from pixart_ds.data.cache import CacheOptions, ShardCache, options_of, remove_unused
from pixart_ds.data.loader import Loader
from pixart_ds.data.shards import PreparedSet
from pixart_ds.data.store import FolderStore
from pixart_ds.errors import DataError
from pixart_ds.plan.order import Order
from pixart_ds.s3 import StoreError
from tests.helpers.sets import shard_file, tiny_set

ROOT = Path(__file__).resolve().parents[2]
GROUPS = tuple((number % 3, 6) for number in range(12))
BLOCK = 4096
"""What each of these small shards takes on a disk."""


class Flaky(FolderStore):
    """A folder that sometimes does not answer: test double of a store."""

    def __init__(self, folder: Path, fault: Callable[[int, str, Path], None] = lambda *_: None) -> None:
        super().__init__(folder)
        self.asked: list[str] = []
        self.fault = fault

    def fetch(self, name: str, to: Path) -> None:
        self.asked.append(name)
        self.fault(len(self.asked), name, to)
        super().fetch(name, to)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return tiny_set(tmp_path_factory.mktemp("set") / "set", GROUPS)


def cache_of(made: PreparedSet, folder: Path, store: Any = None, **options: Any) -> ShardCache:
    options = {"patience_seconds": 1.0, **options}
    store = store or Flaky(Path(made.path) / "captions")
    return ShardCache(made.index("captions"), store, CacheOptions(folder, **options))


def lost(*_: Any) -> None:
    raise StoreError("the store is silent", where="s", remedy="wait", final=False)


def test_a_shard_is_fetched_once_and_then_read_from_the_disk(made: PreparedSet, tmp_path: Path) -> None:
    cache = cache_of(made, tmp_path)
    first = cache.open(3).read(0)
    assert bytes(first["name"]).startswith(b"pictures/")
    assert cache.open(3).read(0) == first
    again = cache_of(made, tmp_path)  # as another process would
    assert again.open(3).read(0) == first
    assert (cache.downloads, again.downloads) == (1, 0)
    assert sorted(os.listdir(cache.root)) == ["00000003.mds", "table", "users"]


def test_threads_share_one_download(made: PreparedSet, tmp_path: Path) -> None:
    store = Flaky(Path(made.path) / "captions", lambda *_: time.sleep(0.1))
    cache = cache_of(made, tmp_path, store)
    threads = [threading.Thread(target=cache.open, args=(2,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.asked == [made.index("captions").names[2]]


def test_a_store_that_comes_back_is_waited_for(made: PreparedSet, tmp_path: Path) -> None:
    store = Flaky(Path(made.path) / "captions", lambda tries, *_: lost() if tries < 3 else None)
    assert len(cache_of(made, tmp_path, store, patience_seconds=30.0).open(0)) == 6
    assert len(store.asked) == 3


def test_a_store_that_stays_away_is_an_error_after_the_patience(made: PreparedSet, tmp_path: Path) -> None:
    cache = cache_of(made, tmp_path, Flaky(Path(made.path) / "captions", lost), patience_seconds=1.0)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"the store is silent, in \d tries and \d s"):
        cache.open(0)
    assert 1.0 <= time.monotonic() - began < 5
    assert not cache._table.used.any()


@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing"])
def test_what_the_store_holds_wrongly_is_named_and_not_kept(made: PreparedSet, tmp_path: Path, fault: str) -> None:
    folder = shutil.copytree(Path(made.path) / "captions", tmp_path / "store")
    path = folder / made.index("captions").names[1]
    if fault == "flipped":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif fault == "truncated":
        os.truncate(path, 100)
    else:
        path.unlink()
    cache = cache_of(made, tmp_path / "cache", Flaky(folder), patience_seconds=60.0)
    words = {
        "flipped": "is damaged in the store: its xxh3",
        "truncated": "100 bytes instead of",
        "missing": "is missing",
    }
    with pytest.raises(DataError, match=words[fault]) as caught:
        cache.open(1)
    assert "in 3 tries" in str(caught.value)
    assert "part-00001" in str(caught.value)
    assert sorted(os.listdir(cache.root)) == ["table", "users"]


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_file_of_the_cache_is_fetched_anew(made: PreparedSet, tmp_path: Path, damage: str) -> None:
    cache_of(made, tmp_path).open(4)
    cache = cache_of(made, tmp_path)
    path = cache.path(4)
    if damage == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 8
        path.write_bytes(data)
    else:
        os.truncate(path, 50)
    assert len(cache.open(4)) == 6
    assert cache.downloads == 1
    assert path.stat().st_size == made.index("captions").sizes[4]


def test_a_start_removes_what_a_killed_job_left_and_adopts_what_is_whole(made: PreparedSet, tmp_path: Path) -> None:
    first = cache_of(made, tmp_path)
    first.open(0)
    first.open(1)
    (first.root / "00000005.mds.part.A088fb93").write_bytes(b"half")
    os.truncate(first.path(1), 10)
    first._table.use(7, 100)  # booked by a process that died
    os.unlink(first.root / "table")
    second = cache_of(made, tmp_path)
    assert sorted(os.listdir(second.root)) == ["00000000.mds", "table", "users"]
    assert second._table.used.nonzero()[0].tolist() == [0]
    assert len(second.open(0)) == 6
    assert second.downloads == 0


def test_another_index_is_another_folder(made: PreparedSet, tmp_path: Path) -> None:
    other = tiny_set(tmp_path / "other", GROUPS[:5])
    assert cache_of(made, tmp_path / "c").root != cache_of(other, tmp_path / "c").root


def test_a_deleted_cache_is_filled_again(made: PreparedSet, tmp_path: Path) -> None:
    cache = cache_of(made, tmp_path)
    cache.open(0)
    shutil.rmtree(tmp_path)
    assert len(cache.open(0)) == 6
    assert len(cache.open(1)) == 6


def test_the_limit_holds_and_the_newest_old_shard_goes_first(made: PreparedSet, tmp_path: Path) -> None:
    cache = cache_of(made, tmp_path, limit_bytes=5 * BLOCK, guard_seconds=0.0)
    held = cache.open(0)
    for number in (*range(1, 12), 0, 5):
        assert len(cache.open(number)) == 6
        assert len(list(cache.root.glob("*.mds"))) <= 5
        time.sleep(0.002)
    assert bytes(held.read(0)["name"]).startswith(b"pictures/")  # an evicted shard stays readable
    with pytest.raises(DataError, match="below 4 times the largest shard"):
        cache_of(made, tmp_path, limit_bytes=3 * BLOCK)


def test_repeated_passes_hit_what_fits(made: PreparedSet, tmp_path: Path) -> None:
    cache = cache_of(made, tmp_path, limit_bytes=8 * BLOCK, guard_seconds=0.0)
    for _ in range(4):
        for number in range(12):
            cache.open(number)
            time.sleep(0.002)
    assert cache.downloads <= 12 + 3 * 6  # the least recently used first would fetch all 48


def test_sets_of_one_folder_share_the_limit(made: PreparedSet, tmp_path: Path) -> None:
    limit = 8 * BLOCK
    text = cache_of(made, tmp_path, limit_bytes=limit, guard_seconds=0.0)
    options = CacheOptions(tmp_path, limit_bytes=limit, guard_seconds=0.0)
    image = ShardCache(made.index("48-buckets"), FolderStore(Path(made.path) / "latents-48-buckets"), options)
    for number in range(12):
        text.open(number)
        image.open(number)
        assert sum(file.stat().st_blocks * 512 for file in tmp_path.glob("*/*.mds")) <= limit


def test_a_table_that_another_process_is_just_making_is_no_error(made: PreparedSet, tmp_path: Path) -> None:
    (tmp_path / "0123456789abcdef").mkdir()
    (tmp_path / "0123456789abcdef" / "table").touch()
    assert len(cache_of(made, tmp_path).open(0)) == 6


def test_a_full_disk_evicts_and_then_is_an_error(made: PreparedSet, tmp_path: Path) -> None:
    full = {"on": False}

    def fault(tries: int, name: str, to: Path) -> None:
        if full["on"] and list(to.parent.glob("*.mds")):
            to.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(to))
        if full["on"] == "always":
            raise OSError(28, "No space left on device", str(to))

    cache = cache_of(made, tmp_path, Flaky(Path(made.path) / "captions", fault), guard_seconds=0.0)
    for number in range(3):
        cache.open(number)
    full["on"] = True
    assert len(cache.open(7)) == 6
    assert [path.name for path in cache.root.glob("*.mds*")] == ["00000007.mds"]
    full["on"] = "always"  # type: ignore[assignment]
    with pytest.raises(DataError, match="cannot be written into the cache: No space left on device") as caught:
        cache.open(8)
    assert "limit_gb" in str(caught.value)


def test_a_folder_that_cannot_be_written_is_said_at_once(made: PreparedSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="the cache cannot be used: Not a directory") as caught:
        cache_of(made, tmp_path / "file" / "cache")
    assert "execution.cache.folder" in str(caught.value)


HOLDER = """
    import sys, time
    from pathlib import Path
    from pixart_ds.data.cache import CacheOptions, ShardCache
    from pixart_ds.data.shards import PreparedSet
    from pixart_ds.data.store import FolderStore
    made = PreparedSet.open(sys.argv[1])
    class Slow(FolderStore):
        def fetch(self, name, to):
            to.write_bytes(b"half")
            print("downloading", flush=True)
            time.sleep(60)
    cache = ShardCache(made.index("captions"), Slow(Path(made.path) / "captions"), CacheOptions(Path(sys.argv[2])))
    cache.open(2)
"""


def holder(made: PreparedSet, folder: Path) -> subprocess.Popen[str]:
    """A process in the middle of the download of shard 2."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(made.path), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "downloading\n"
    return process


def test_a_process_killed_in_a_download_leaves_neither_lock_nor_file(made: PreparedSet, tmp_path: Path) -> None:
    process = holder(made, tmp_path)
    process.kill()
    process.wait()
    cache = cache_of(made, tmp_path)
    assert not list(cache.root.glob("*.part*"))
    assert len(cache.open(2)) == 6


def test_a_stopped_process_is_waited_for_and_then_named(made: PreparedSet, tmp_path: Path) -> None:
    process = holder(made, tmp_path)
    process.send_signal(signal.SIGSTOP)
    try:
        cache = cache_of(made, tmp_path, patience_seconds=0.5)
        assert list(cache.root.glob("*.part*"))  # another's download is left alone
        with pytest.raises(DataError, match="another process has held its lock"):
            cache.open(2)
        assert len(cache.open(3)) == 6
    finally:
        process.kill()
        process.wait()
    assert len(cache.open(2)) == 6


def test_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: PreparedSet) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert options_of(CacheConfig(mode="shared"), "7") is None
    job, kept = options_of(CacheConfig(), "7"), options_of(CacheConfig(mode="node-persistent", limit_gb=2.5), "7")
    assert job is not None
    assert kept is not None
    assert job.folder == tmp_path / f"pixart_ds-{os.getuid()}" / "job-7"
    assert (kept.folder.name, kept.keep, kept.limit_bytes) == ("kept", True, 2_500_000_000)
    folder = Path(made.path) / "captions"
    for options, stays in ((job, False), (kept, True)):
        caches = [ShardCache(made.index("captions"), FolderStore(folder), options) for _ in range(2)]
        caches[0].open(0)
        caches[0].close()
        assert options.folder.exists()  # the other one still reads there
        caches[1].open(0)
        caches[1].close()
        assert options.folder.exists() == stays


def test_what_ended_jobs_left_goes_and_what_live_ones_use_stays(made: PreparedSet, tmp_path: Path) -> None:
    config = CacheConfig(folder=str(tmp_path))
    for job in ("dead", "alive", "young"):
        options = options_of(config, job)
        assert options is not None
        cache = ShardCache(made.index("captions"), FolderStore(Path(made.path) / "captions"), options)
        cache.open(0)
        if job != "alive":
            os.close(cache._users)  # as when its process is killed
        if job != "young":
            os.utime(options.folder, (0, 0))
    options_of(config, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job-alive", "job-young"]
    remove_unused(tmp_path / "job-young")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job-alive"]


@pytest.mark.parametrize("limit", [None, 40 * BLOCK])
def test_a_loader_over_a_cache_delivers_what_one_in_place_delivers(
    made: PreparedSet, tmp_path: Path, limit: int | None
) -> None:
    order = Order([made.rows_for("48-buckets", SetConfig(path="x"))], seed=3, lanes=4, strip_length=4, window=2)
    digests = []
    for cache in (None, CacheOptions(tmp_path, limit_bytes=limit, guard_seconds=0.0)):
        with Loader(
            [made], order, latents="48-buckets", stage="s", seed=1, condition_dropout=0.1, micro_batch_size=5,
            global_batch_size=10, rank=0, world_size=1, cache=cache,
        ) as loader:  # fmt: skip
            digests.append([[b.digest for b in loader.micro_batches(at)] for at in loader.steps(0, 300)])
    assert digests[0] == digests[1]


def test_errors_of_a_shard_name_the_sample_that_needs_it(made: PreparedSet, tmp_path: Path) -> None:
    copy = PreparedSet.open(shutil.copytree(made.path, tmp_path / "copy"))
    order = Order([copy.rows_for("48-buckets", SetConfig(path="x"))], seed=3, lanes=4, strip_length=4, window=2)
    shard_file(copy.path, "latents-48-buckets", 3).unlink()
    loader = Loader(
        [copy], order, latents="48-buckets", stage="s", seed=1, condition_dropout=0.1, micro_batch_size=5,
        global_batch_size=10, rank=0, world_size=1, cache=CacheOptions(tmp_path / "cache", patience_seconds=1.0),
    )  # fmt: skip
    began = time.monotonic()

    def walk() -> None:
        with loader:
            for at in loader.steps(0, 100):
                list(loader.micro_batches(at))

    with pytest.raises(DataError, match=r"part-00003-[0-9a-f]{16}.mds is missing.*\(needed for sample \d+\)"):
        walk()
    assert time.monotonic() - began < 10
