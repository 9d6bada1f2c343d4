"""Sets written straight into an object store: the same as in a folder, also through kills, outages and two writers at once."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pixart_ds.data import target as target_module
from pixart_ds.data.shards import PreparedSet
from pixart_ds.demo.pictures import write_pictures
from pixart_ds.errors import DataError
from pixart_ds.prepare.pipeline import Task, prepare
from pixart_ds.s3 import StoreError
from tests.helpers.s3 import S3Server
from tests.prepare.test_prepare import ENCODERS, config_of, content, overrides

pytestmark = pytest.mark.store


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "pictures"
    write_pictures(folder, 40, seed=2)
    prepare(config_of(folder, folder.parent / "set", "rows_per_group=2"))
    return folder


def stored(s3: S3Server, bucket: str) -> dict[str, bytes]:
    names = (name for name in s3.list(bucket, "set/v1/") if not name.endswith("summary.html"))
    return {name.removeprefix("set/v1/"): s3.get(bucket, name) for name in names}


def test_a_set_in_the_store_is_the_set_in_a_folder(s3: S3Server, bucket: str, pictures: Path, tmp_path: Path) -> None:
    s3.put_folder(pictures, bucket, "pictures")
    url = f"s3://{bucket}/set/v1"
    more = ("rows_per_group=2", f"work={tmp_path / 'work'}", f"source.path=s3://{bucket}/pictures")
    config = config_of(pictures, url, *more)
    assert prepare(config, only="scan").parts_written == 0
    for number in range(2):
        prepare(config, task=Task(number, 2))
    wanted = content(pictures.parent / "set")
    made = stored(s3, bucket)
    assert made.keys() == wanted.keys()
    different = [name for name in wanted if made[name] != wanted[name]]
    assert different == ["manifest.json"]  # which says where the pictures came from
    assert PreparedSet.open(url).num_samples == 40
    assert b"<html" in s3.get(bucket, "set/v1/summary.html")
    shutil.rmtree(tmp_path / "work")  # whoever has finished may throw it away
    again = prepare(config)
    assert (again.parts_written, again.samples) == (0, 40)
    assert stored(s3, bucket) == made
    for change in ("seed=3", "max_tokens=39", "prompts=[a blue circle]"):
        with pytest.raises(DataError, match="begun with another recipe"):
            prepare(config_of(pictures, url, *more, change))
        shutil.rmtree(tmp_path / "work")
        with pytest.raises(DataError, match="holds parts of other pictures, of another recipe"):
            prepare(config_of(pictures, url, *more, change))
        shutil.rmtree(tmp_path / "work")
        prepare(config)
    assert stored(s3, bucket) == made


def test_an_outage_while_writing_is_waited_for(own_server: S3Server, pictures: Path, tmp_path: Path) -> None:
    own_server.make_bucket("kept")
    config = config_of(pictures, "s3://kept/set/v1", "rows_per_group=2", f"work={tmp_path / 'work'}")
    prepare(config, only="scan")
    over = threading.Event()

    def fail() -> None:
        while not own_server.list("kept", "set/v1/parts"):
            time.sleep(0.05)
        own_server.kill()
        time.sleep(3)
        own_server.restart()
        over.wait()  # the server ends with the thread that started it

    thread = threading.Thread(target=fail)
    thread.start()
    try:
        report = prepare(config)
        made = stored(own_server, "kept")
    finally:
        over.set()
        thread.join()
    assert report.samples == 40
    assert made == content(pictures.parent / "set")


def test_a_store_that_is_gone_for_good_is_an_error_and_nothing_is_lost(
    own_server: S3Server, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_module, "_PATIENCE_SECONDS", 2.0)
    own_server.make_bucket("kept")
    config = config_of(pictures, "s3://kept/set/v1", "rows_per_group=2", f"work={tmp_path / 'work'}")
    prepare(config, only="scan")
    prepare(config, task=Task(0, 3))
    before = stored(own_server, "kept")
    own_server.kill()
    began = time.monotonic()
    with pytest.raises(StoreError, match="the store did not take") as caught:
        prepare(config)
    assert "can be reached from this node" in str(caught.value)
    assert time.monotonic() - began < 60
    own_server.restart()
    assert stored(own_server, "kept") == before
    assert prepare(config).parts_kept >= len([name for name in before if name.startswith("parts/")])
    assert stored(own_server, "kept") == content(pictures.parent / "set")


def test_two_writers_of_one_part_leave_one_set(s3: S3Server, bucket: str, pictures: Path, tmp_path: Path) -> None:
    url = f"s3://{bucket}/set/v1"
    more = ("rows_per_group=2", f"work={tmp_path / 'work'}")
    prepare(config_of(pictures, url, *more), only="scan")
    sets = [word for each in overrides(pictures, url, *more) for word in ("--set", each)]
    command = [sys.executable, "-m", "pixart_ds", "prepare", "smoke/prepare", "--only", "encode", *sets]
    both = [
        subprocess.Popen([*command, "--task", task], cwd=ENCODERS.parents[2]) for task in ("0/1", "0/2")
    ]  # two shares that overlap, and do not know of each other
    assert [process.wait() for process in both] == [0, 0]
    prepare(config_of(pictures, url, *more))
    assert stored(s3, bucket) == content(pictures.parent / "set")
