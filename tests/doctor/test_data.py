"""Sets and checkpoints: in folders, and in a real S3 store."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pixart_ds.doctor.check import Check
from pixart_ds.doctor.probes import data
from pixart_ds.layout import RunLayout
from tests.doctor.subjects import make_run, subject
from tests.helpers.s3 import S3Server
from tests.helpers.sets import shard_file, tiny_set


@pytest.fixture
def run(tmp_path: Path) -> RunLayout:
    return make_run(tmp_path)


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_sound_set_in_a_folder(run: RunLayout, tmp_path: Path) -> None:
    found = by_name(data.sets(subject(run)))
    assert {check.verdict for check in found.values()} == {"ok"}
    assert found["data.sets"].evidence == f"{tmp_path / 'set'}: 33 samples in 6 row groups, read"
    assert found["data.shards"].evidence.startswith(f"{tmp_path / 'set'}: shard")
    assert found["data.shards"].evidence.endswith(" of 6 whole, captions and latents")
    assert found["data.throughput"].evidence.startswith(f"{tmp_path / 'set'}: ")
    assert data.recipe(subject(run)).evidence == "1 set fits the recipe of stage1"
    assert data.store_clock(subject(run)).evidence == "no set lies in an object store"


def test_a_damaged_shard(run: RunLayout, tmp_path: Path) -> None:
    shard = shard_file(tmp_path / "set", "captions", 0)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    check = by_name(data.sets(subject(run)))["data.shards"]
    assert check.verdict == "failed"
    assert check.evidence.startswith(f"{shard} is damaged: its xxh3 hash is ")
    assert check.remedy == "copy the shard there again, or prepare the set again"


def test_a_set_that_is_not_there_is_said_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, tmp_path / "none")
    found = by_name(data.sets(subject(run)))
    check = found["data.sets"]
    assert check.verdict == "failed"
    assert check.evidence.startswith(f"{tmp_path / 'none'}: there is no prepared set: the folder does not exist")
    assert check.remedy == "prepare one with `pixart-ds prepare`, or correct data.sets.…path in the recipe"
    assert found["data.shards"].evidence == found["data.throughput"].evidence == "see data.sets"


def test_the_place_of_checkpoints_is_left_as_it_was(run: RunLayout, tmp_path: Path) -> None:
    check = data.checkpoints(subject(run))
    place = run.stage("stage1").checkpoints
    assert (check.verdict, check.evidence) == ("ok", f"{place}: a file was written, read and removed")
    assert not place.exists()
    (place / "img-000000000032-a0001-l01").mkdir(parents=True)
    (place / "img-000000000032-a0001-l01" / "COMMITTED").write_text("…")
    assert data.checkpoints(subject(run)).verdict == "ok"
    assert [path.name for path in place.rglob("*")] == ["img-000000000032-a0001-l01", "COMMITTED"]


def test_a_place_of_checkpoints_that_cannot_be_written(run: RunLayout) -> None:
    run.stage("stage1").checkpoints.write_text("a file in its place")
    check = data.checkpoints(subject(run))
    assert check.verdict == "failed"
    assert check.evidence.startswith(f"{run.stage('stage1').checkpoints}: cannot make the folder: ")
    assert check.remedy == "free or enlarge the disk, or make it writable, then start again"


def test_without_a_run_nothing_of_the_data_can_be_looked_at() -> None:
    found = [*data.sets(subject()), data.recipe(subject()), data.store_clock(subject()), data.checkpoints(subject())]
    assert {(check.verdict, check.evidence) for check in found} == {("skipped", "no run was given")}


def test_measuring_ends_with_the_time_or_with_the_shards() -> None:
    def reader() -> int:
        time.sleep(0.01)
        return 10

    size, _ = data.measure(iter([reader] * 7), 3, 60.0)
    assert size == 70
    size, seconds = data.measure(iter(lambda: reader, None), 3, 1.0)
    assert size >= 10
    assert seconds >= 1.0


def test_the_first_error_of_a_reader_is_the_measures() -> None:
    def broken() -> int:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        data.measure(iter([broken]), 2, 60.0)


# ---- a store -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path: Path, s3: S3Server, bucket: str) -> RunLayout:
    """A run that reads from, and saves to, a store."""
    tiny_set(tmp_path / "set")
    s3.put_folder(tmp_path / "set", bucket, "set")
    return make_run(tmp_path, f"s3://{bucket}/set", f"*.checkpoint.path=s3://{bucket}/checkpoints")


@pytest.mark.store
def test_a_sound_set_in_a_store(remote: RunLayout, s3: S3Server, bucket: str) -> None:
    before = s3.list(bucket)
    found = by_name(data.sets(subject(remote)))
    assert {check.verdict for check in found.values()} == {"ok"}
    assert found["data.sets"].evidence == (
        f"s3://{bucket}/set: 33 samples in 6 row groups, read through {s3.endpoint} with these keys"
    )
    assert data.recipe(subject(remote)).verdict == "ok"
    clock = data.store_clock(subject(remote))
    assert clock.verdict == "ok"
    assert clock.evidence.startswith(f"within 5 s of the store's, {s3.endpoint} (")
    check = data.checkpoints(subject(remote))
    assert check.verdict == "ok"
    assert check.evidence.startswith(f"s3://{bucket}/checkpoints/run-")
    assert s3.list(bucket) == before


@pytest.mark.store
def test_wrong_keys(remote: RunLayout, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    check = by_name(data.sets(subject(remote)))["data.sets"]
    assert check.verdict == "failed"
    assert check.evidence == f"s3://{bucket}/set: the store refuses manifest.json (error SignatureDoesNotMatch)"
    assert check.remedy == f"check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights on the bucket {bucket}"


@pytest.mark.store
def test_a_shard_that_is_missing_in_the_store(remote: RunLayout, s3: S3Server, bucket: str) -> None:
    (name,) = (name for name in s3.list(bucket) if name.startswith("set/captions/part-00000-"))
    s3.delete(bucket, name)
    found = by_name(data.sets(subject(remote)))
    assert found["data.sets"].verdict == "ok"
    assert found["data.shards"].verdict == "failed"
    assert f"{Path(name).name} is not in the store (error NoSuchKey)" in found["data.shards"].evidence
    assert found["data.throughput"].verdict == "failed"
