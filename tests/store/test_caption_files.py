"""Captions of a prepared set that lies in an object store."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from pixart_ds.data.store import upload_folder
from pixart_ds.errors import DataError
from pixart_ds.prepare.caption_files import open_captions
from tests.helpers.s3 import S3Server


def test_captions_of_a_set_in_a_store_are_read_without_its_other_columns(
    s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    texts = [f"picture {number} of a boat" if number % 7 else None for number in range(900)]
    others = [random.Random(number).randbytes(4000) for number in range(900)]
    parquet.write_table(pa.table({"caption": texts, "other": others}), tmp_path / "rows.parquet", row_group_size=300)
    (tmp_path / "manifest.json").write_text("{}")
    where = f"s3://{bucket}/sets/boats"
    upload_folder(tmp_path, where)
    before = len(s3.requests())
    opened = open_captions(where)
    assert (opened.total, list(opened.read())) == (900, texts)
    assert sum(request.sent for request in s3.requests()[before:]) < 400_000 < 900 * 4000
    with pytest.raises(DataError, match="manifest.json"):
        open_captions(f"s3://{bucket}/sets/cars")
