"""Stage-in: what is fetched, what is kept, what does not fit, and what the loader finds afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pixart_ds.config.load import load_stage
from pixart_ds.config.schema import CacheConfig, SetConfig, StageConfig
from pixart_ds.data import store as store_module
from pixart_ds.data.cache import CacheOptions, ShardCache, options_of, room_of, shards_here
from pixart_ds.data.loader import Loader
from pixart_ds.data.shards import PreparedSet
from pixart_ds.data.stage_in import StageIn, stage_in
from pixart_ds.data.store import FolderStore
from pixart_ds.errors import ConfigError, DataError, MachineError
from pixart_ds.plan.order import Order
from pixart_ds.train.stage_in import check_folder, needless, part_of
from tests.helpers.sets import tiny_set

GROUPS = tuple((number % 3, 8) for number in range(24))
BLOCK, LATENTS = 4096, "48-buckets"


@pytest.fixture
def made(tmp_path: Path) -> PreparedSet:
    return tiny_set(tmp_path / "set", GROUPS)


def order_of(made: PreparedSet) -> Order:
    return Order([made.rows_for(LATENTS, SetConfig(path="x"))], seed=3, lanes=4, strip_length=4, window=2)


def fill(made: PreparedSet, options: CacheOptions, part: tuple[int, int] = (1, 0), *, dry_run: bool = False) -> StageIn:
    order, (nodes, node) = order_of(made), part
    places = order.place_of(order.groups_of(node, 1, nodes))
    return stage_in([made], LATENTS, places, options, report=lambda text: None, dry_run=dry_run)


def walk(made: PreparedSet, options: CacheOptions, rank: int = 0, world_size: int = 1) -> list[int]:
    with Loader(
        [made], order_of(made), latents=LATENTS, stage="s", seed=8, condition_dropout=0.1, micro_batch_size=8,
        global_batch_size=16, rank=rank, world_size=world_size, cache=options,
    ) as loader:  # fmt: skip
        return [sum(batch.digest for batch in loader.micro_batches(at)) for at in loader.steps(0, 12 * 16)]


class Asked:
    """The shards that were asked of stores in folders."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        fetch = FolderStore.fetch

        def counted(store: FolderStore, name: str, to: Path) -> None:
            self.names.append(f"{store.folder.name}/{name}")
            fetch(store, name, to)

        monkeypatch.setattr(store_module.FolderStore, "fetch", counted)


def test_what_was_staged_in_is_not_asked_of_the_store_again(
    made: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, options = Asked(monkeypatch), CacheOptions(tmp_path / "cache")
    done = fill(made, options)
    assert (done.shards, done.fetched_shards, done.left_shards) == (48, 48, 0)
    assert done.fetched_bytes == done.bytes > 0
    assert len(asked.names) == len(set(asked.names)) == 48
    again = fill(made, options)
    assert (again.fetched_shards, again.fetched_bytes) == (0, 0)
    assert "fetched 0 of 48 shards" in str(again)
    assert "48 were there" in str(again)
    assert walk(made, options)
    assert len(asked.names) == 48


def test_each_node_fetches_the_lanes_that_it_reads(
    made: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [CacheOptions(tmp_path / str(node)) for node in range(2)]
    assert [fill(made, options, (2, node)).fetched_shards for node, options in enumerate(caches)] == [24, 24]
    here = [shards_here(made.index(LATENTS), options) for options in caches]
    assert (here[0] ^ here[1]).all(), "lanes share no row group"
    assert order_of(made).shares_follow_lanes(2)
    asked = Asked(monkeypatch)
    for node, options in enumerate(caches):
        assert walk(made, options, node, 2)
    assert not asked.names


def test_a_dry_run_makes_nothing(made: PreparedSet, tmp_path: Path) -> None:
    options = CacheOptions(tmp_path / "cache")
    done = fill(made, options, dry_run=True)
    assert (done.fetched_shards, done.dry_run) == (48, True)
    assert str(done).startswith("would fetch 48 of 48 shards")
    assert not options.folder.exists()


def test_what_does_not_fit_is_left_and_nothing_is_evicted(made: PreparedSet, tmp_path: Path) -> None:
    other = tiny_set(tmp_path / "other", GROUPS[:6], source="elsewhere")
    fill(other, CacheOptions(tmp_path / "cache"))
    held, _ = room_of(CacheOptions(tmp_path / "cache"))
    group = held // 6  # captions and latents of a row group
    options = CacheOptions(tmp_path / "cache", limit_bytes=held + 4 * group, guard_seconds=0.0)
    told: list[str] = []
    order = order_of(made)
    places = order.place_of(order.groups_of(0, 1, 1))
    done = stage_in([made], LATENTS, places, options, report=told.append)
    assert (done.fetched_shards, done.left_shards, done.held_bytes) == (8, 40, held)
    assert "DO NOT FIT" in str(done)
    assert "48 shards" in told[0]
    assert "8 (" in told[0]
    assert shards_here(other.index("captions"), options).all()
    assert room_of(options) == (held + 4 * group, held + 4 * group)
    assert fill(made, options).fetched_shards == 0
    assert walk(made, options), "the loader makes room for the rest itself"


def test_a_damaged_shard_of_the_cache_is_fetched_anew_and_left_overs_go(made: PreparedSet, tmp_path: Path) -> None:
    options = CacheOptions(tmp_path / "cache")
    fill(made, options)
    root = options.folder / made.index(LATENTS).fingerprint
    spoilt, cut = root / "00000003.mds", root / "00000005.mds"
    content = spoilt.read_bytes()
    spoilt.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    cut.write_bytes(b"")
    (root / "00000007.mds.part").write_bytes(b"half")
    done = fill(made, options)
    assert done.fetched_shards == 2
    assert spoilt.read_bytes() == content
    assert not list(root.glob("*.part*"))


def test_a_shard_that_is_damaged_in_the_store_ends_it_and_the_rest_stays(made: PreparedSet, tmp_path: Path) -> None:
    options = CacheOptions(tmp_path / "cache")
    bad = Path(made.path) / "captions" / made.index("captions").names[4]
    good = bad.read_bytes()
    bad.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DataError, match="is damaged in the store"):
        fill(made, options)
    bad.write_bytes(good)
    done = fill(made, options)
    assert 0 < done.fetched_shards <= 48
    assert fill(made, options).fetched_shards == 0


def test_a_killed_stage_in_goes_on(made: PreparedSet, tmp_path: Path) -> None:
    code = f"""
import os, threading
from pathlib import Path
from pixart_ds.data.cache import CacheOptions
from pixart_ds.data.shards import PreparedSet
from pixart_ds.data.store import FolderStore
from tests.data.test_stage_in import fill

fetch, turn = FolderStore.fetch, threading.Lock()
def slow(store, name, to, count=[0]):
    with turn:
        count[0] += 1
        if count[0] > 20:
            to.write_bytes(b"half")
            os._exit(9)
        fetch(store, name, to)
FolderStore.fetch = slow
fill(PreparedSet.open({made.path!r}), CacheOptions(Path({str(tmp_path / "cache")!r})))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    options = CacheOptions(tmp_path / "cache")
    before = sum(int(shards_here(made.index(name), options).sum()) for name in ("captions", LATENTS))
    assert 10 < before <= 20
    assert fill(made, options).fetched_shards == 48 - before


def test_another_process_that_fills_the_same_cache_fetches_nothing_twice(
    made: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, options = Asked(monkeypatch), CacheOptions(tmp_path / "cache")
    reading = ShardCache(made.index("captions"), FolderStore(Path(made.path) / "captions"), options)
    shard = reading.open(2)
    fill(made, options)
    reading.close()
    assert len(shard) == 8
    assert len(asked.names) == 48


def test_a_copy_that_all_nodes_read_is_whole_or_refused(
    made: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`shared` with an object store: the store of this test is a folder under another name."""
    monkeypatch.setattr("pixart_ds.data.shards.is_remote", lambda path: True)
    config = CacheConfig(mode="shared", folder=str(tmp_path / "scratch"))
    options = options_of(config, "7")
    assert options is not None
    places = np.zeros(24, np.int64), np.arange(24)
    with pytest.raises(DataError, match="24 of 24 shards of .*/captions are not in the copy that all nodes read"):
        made.source("captions", options)
    small = options_of(config.model_copy(update={"limit_gb": 20 * BLOCK / 1e9}), "7")
    assert small is not None
    with pytest.raises(MachineError, match="do not fit, and a part is of no use"):
        stage_in([made], LATENTS, places, small, report=lambda text: None)
    assert not (tmp_path / "scratch").exists()
    stage_in([made], LATENTS, places, options, report=lambda text: None)
    asked = Asked(monkeypatch)
    staged = walk(made, options)
    assert not asked.names
    assert staged == walk(made, CacheOptions(tmp_path / "cache"))
    next((tmp_path / "scratch").rglob("00000001.mds")).unlink()
    with pytest.raises(DataError, match="1 of 24 shards") as caught:
        walk(made, options)
    assert "pixart-ds stage-in RUN STAGE" in str(caught.value)


def stage_with(path: str, **cache: object) -> StageConfig:
    stage = load_stage("stage2", [f"data.sets=[{{path: {path}}}]"])
    execution = stage.execution.model_copy(update={"cache": CacheConfig.model_validate(cache)})
    return stage.model_copy(update={"execution": execution})


def test_where_there_is_nothing_to_stage_in() -> None:
    job, folder = needless(stage_with("s3://b/set")), needless(stage_with("/scratch/set", mode="shared"))
    assert job is not None
    assert "each job makes this cache anew, and the loader fetches ahead itself" in job
    assert folder is not None
    assert "they are read in place" in folder
    assert needless(stage_with("/scratch/set", mode="node-persistent")) is None
    remote = stage_with("s3://b/set", mode="shared")
    assert needless(remote) is None
    with pytest.raises(ConfigError, match="no folder is named for the copy that all nodes read"):
        check_folder(remote)


def test_a_part_needs_both_numbers() -> None:
    assert part_of(None, None) is None
    assert part_of("8", 7) == (8, 7)
    for nodes, node in (("8", None), (None, 0), ("8", 8), ("4-8", 0)):
        with pytest.raises(ConfigError, match="names no part of the stage"):
            part_of(nodes, node)


def test_a_set_without_a_folder_is_told_as_training_tells_it(made: PreparedSet, tmp_path: Path) -> None:
    shutil.rmtree(Path(made.path) / "captions")
    with pytest.raises(DataError):
        fill(PreparedSet.open(made.path), CacheOptions(tmp_path / "cache"))


def test_the_answer_for_programs(made: PreparedSet, tmp_path: Path) -> None:
    answer = json.loads(json.dumps(fill(made, CacheOptions(tmp_path / "cache")).to_json()))
    assert answer["fetched_shards"] == 48
    assert answer["folder"] == str(tmp_path / "cache")
