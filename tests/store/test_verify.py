"""A prepared set in an object store is verified where it lies."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from pixart_ds.prepare.verify import verify
from tests.helpers.s3 import S3Server
from tests.helpers.sets import shard_file, tiny_set

pytestmark = pytest.mark.store


def test_a_set_in_a_store_is_verified_and_damaged_objects_are_named(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    tiny_set(tmp_path / "set")
    s3.put_folder(tmp_path / "set", bucket, "set")
    found = verify(f"s3://{bucket}/set", threads=3)
    assert found.sound, str(found)
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.mds"))
    assert not list(Path(tempfile.gettempdir()).glob("pixart_ds-verify-*/*"))
    flipped, lost = (shard_file(tmp_path / "set", "captions", number) for number in (1, 2))
    s3.put(bucket, f"set/captions/{flipped.name}", flipped.read_bytes()[:-1] + b"x")
    s3.delete(bucket, f"set/captions/{lost.name}")
    found = verify(f"s3://{bucket}/set")
    assert {(problem.kind, problem.where) for problem in found.problems} == {
        ("damaged", f"s3://{bucket}/set/captions/{flipped.name}"),
        ("missing", f"s3://{bucket}/set/captions/{lost.name}"),
    }
