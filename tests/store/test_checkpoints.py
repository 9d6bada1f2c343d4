"""Checkpoints in a real object store: the same shelf, the same errors, and training that resumes from there."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pixart_ds import files
from pixart_ds.engine import line
from pixart_ds.engine.checkpoint import Reader
from pixart_ds.engine.shelf import Shelf
from pixart_ds.engine.storage import S3Storage, read, storage_of
from pixart_ds.errors import CheckpointError, MachineError
from pixart_ds.layout import MARKER_NAME, StageLayout, rank_file_name
from pixart_ds.s3 import PART_BYTES
from tests.e2e.test_demo import call
from tests.e2e.test_same_run import create, data, start, wait_for  # noqa: F401 - data is a fixture
from tests.engine.flat import FlatEngine
from tests.engine.test_checkpoint import load, saved, shelf_at, stands_at
from tests.helpers.s3 import S3Server

pytestmark = pytest.mark.store


def stage_in(root: Path, url: str) -> StageLayout:
    """A stage whose checkpoints lie at an address."""
    layout = StageLayout(root)
    root.mkdir(exist_ok=True)
    files.write_json(layout.checkpoints_elsewhere, {"path": url})
    return layout


def save(shelf: Shelf, clock: int) -> None:
    shelf.save(clock, {})
    shelf.wait()


def test_a_shelf_in_a_store_saves_keeps_resumes_and_deletes(tmp_path: Path, s3: S3Server, bucket: str) -> None:
    layout = stage_in(tmp_path, f"s3://{bucket}/runs/a/stage1")
    shelf = shelf_at(tmp_path, 1, keep=1)
    shelf.write_start({})
    for clock, milestone in ((10, True), (20, False), (30, False)):
        shelf.engine.train_to(clock)  # type: ignore[attr-defined]
        shelf.save(clock, {"clock": clock}, milestone)
    shelf.wait()
    assert [name.images_seen for name in line.line(layout)] == [10, 30]
    assert not (tmp_path / "checkpoints").exists()
    assert {key.split("/")[3] for key in s3.list(bucket)} == {str(name) for name in line.line(layout)}
    with pytest.raises(CheckpointError, match="another writer has begun the same checkpoint"):
        save(shelf, 30)
    later = shelf_at(tmp_path, 2)
    resumed = later.resume()
    assert resumed is not None
    assert (resumed.state, stands_at(later, 30)) == ({"clock": 30}, True)


def test_a_rank_of_another_world_asks_for_its_own_ranges_only(tmp_path: Path, s3: S3Server, bucket: str) -> None:
    layout = stage_in(tmp_path, f"s3://{bucket}/stage")
    saved(tmp_path, (10,))
    (name,) = line.committed(layout)
    where = storage_of(layout).sub(str(name)).where
    before = len(s3.requests("GET"))
    engine, count = load(where, 3, 5)  # type: ignore[arg-type]
    assert engine.stands_at(10)
    assert count == 16 * len(engine.layout.own(3))
    assert sum(one.sent for one in s3.requests("GET")[before:]) < count + 8000, "its ranges, and the small files"


def test_a_file_of_many_parts(tmp_path: Path, s3: S3Server, bucket: str) -> None:
    content = bytes(range(256)) * (2 * PART_BYTES // 256 + 11)
    storage = S3Storage(f"s3://{bucket}/large")
    storage.write(
        "file", lambda: (memoryview(content)[at : at + 100_000] for at in range(0, len(content), 100_000)), new=True
    )
    assert storage.size("file") == len(content)
    assert read(storage, "file") == content
    assert b"".join(map(bytes, storage.pieces("file", 17_000_001, 5_000_000))) == content[17_000_001:22_000_001]
    with pytest.raises(FileExistsError):
        storage.write("file", lambda: [bytes(len(content))], new=True)


def test_the_marker_is_put_only_if_it_is_not_there(s3: S3Server, bucket: str) -> None:
    storage = S3Storage(f"s3://{bucket}/c")
    storage.write(MARKER_NAME, lambda: [b"ours"], new=True)
    storage.write(MARKER_NAME, lambda: [b"ours"], new=True)  # as when the first answer was lost
    with pytest.raises(FileExistsError):
        storage.write(MARKER_NAME, lambda: [b"another writer's"], new=True)
    assert read(storage, MARKER_NAME) == b"ours"
    with pytest.raises(FileNotFoundError):
        read(storage, "none")
    assert storage.size("none") is None


def test_an_outage_during_a_save_is_waited_out(tmp_path: Path, own_server: S3Server) -> None:
    layout = stage_in(tmp_path, "s3://own/stage")
    shelf = saved(tmp_path, (10,))
    shelf.engine.train_to(20)  # type: ignore[attr-defined]
    shelf.save(20, {})
    own_server.kill()
    time.sleep(3)
    own_server.start()
    shelf.wait()
    assert [name.images_seen for name in line.line(layout)] == [20]
    later = shelf_at(tmp_path, 2)
    assert later.resume() is not None
    assert stands_at(later, 20)


def test_an_outage_for_good_ends_the_save_with_the_stores_name(tmp_path: Path, own_server: S3Server) -> None:
    stage_in(tmp_path, "s3://own/stage")
    shelf = saved(tmp_path, (10,))
    shelf.storage.patience_seconds = 2.0  # type: ignore[attr-defined]
    stop = threading.Timer(0, own_server.kill)
    stop.start()
    stop.join()
    with pytest.raises(MachineError, match=r"the store did not (give|take)") as error:
        save(shelf, 20)
    assert "s3://own/stage" in str(error.value)


def test_a_damaged_object_is_passed_over_and_a_missing_bucket_named(tmp_path: Path, s3: S3Server, bucket: str) -> None:
    layout = stage_in(tmp_path, f"s3://{bucket}/stage")
    saved(tmp_path, (10, 20))
    newest = line.line(layout)[-1]
    key = f"stage/{newest}/{rank_file_name(0, 1)}"
    content = bytearray(s3.get(bucket, key))
    content[-9] ^= 1
    s3.put(bucket, key, bytes(content))
    shelf = shelf_at(tmp_path, 2)
    resumed = shelf.resume()
    assert resumed is not None
    assert resumed.name.images_seen == 10
    assert f"s3://{bucket}/stage/{newest}" in resumed.damaged[0]
    stage_in(tmp_path / "other", "s3://no-such-bucket/stage")
    other = shelf_at(tmp_path / "other", 1)
    with pytest.raises(MachineError, match="there is no bucket no-such-bucket"):
        save(other, 10)


def test_training_stops_and_resumes_from_the_store_on_another_number_of_ranks(
    tmp_path: Path,
    s3: S3Server,
    bucket: str,
    data: Path,  # noqa: F811
) -> None:
    stage = create(tmp_path / "run", data, f"stage1.checkpoint.path=s3://{bucket}/runs")
    process = start(tmp_path / "run", 2)
    wait_for(stage, 1, 32 * 9, process)
    process.terminate()
    assert process.wait() == 75, process.stdout.read() if process.stdout else ""
    assert not stage.checkpoints.exists()
    rows = json.loads(call("checkpoint", "list", tmp_path / "run", "--stage", "stage1", "--json").stdout)
    assert rows[-1]["newest"]
    assert rows[-1]["path"].startswith(f"s3://{bucket}/runs/run-")
    shown = json.loads(call("checkpoint", "show", rows[-1]["path"], "--json").stdout)
    assert (shown["world_size"], shown["images_seen"]) == (2, rows[-1]["images_seen"])
    assert call("checkpoint", "verify", rows[-1]["path"]).returncode == 0
    process = start(tmp_path / "run", 1)
    assert process.wait() == 0, process.stdout.read() if process.stdout else ""
    assert f"from {rows[-1]['checkpoint']}" in stage.attempt(2).log.read_text()
    assert call("audit", tmp_path / "run").returncode == 0
    assert call("status", tmp_path / "run").returncode == 0


def test_two_runs_of_one_name_do_not_meet(tmp_path: Path, s3: S3Server, bucket: str, data: Path) -> None:  # noqa: F811
    places = set()
    for parent in ("a", "b"):
        stage = create(tmp_path / parent / "run", data, f"stage1.checkpoint.path=s3://{bucket}/runs")
        places.add(storage_of(stage).where)
    assert len(places) == 2
    engine: Any = FlatEngine()
    assert Shelf(stage, 1, 1, engine, engine.world, keep=1).resume() is None
    with pytest.raises(CheckpointError, match="is not there"):
        Reader.at(f"{places.pop()}/img-000000000010-a0001-l01")
