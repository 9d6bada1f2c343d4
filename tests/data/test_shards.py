"""Prepared sets: written in parts, read back, plain MDS for others, and what is said of damaged ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixart_ds.config.schema import SetConfig
from pixart_ds.data.shards import PreparedSet
from pixart_ds.data.writer import SetWriter
from pixart_ds.errors import ConfigError, DataError
from tests.helpers.sets import GROUPS, description, finish, row, shard_file, tiny_set, write_parts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return tiny_set(tmp_path_factory.mktemp("set") / "set")


def test_rows_read_back_as_they_were_written(made: PreparedSet) -> None:
    assert made.num_samples == sum(count for _, count in GROUPS)
    assert made.partitions.tolist() == [partition for partition, _ in GROUPS]
    assert made.null_embeds.tolist() == [[0.5] * 6] * 9
    assert made.null_length == 1
    assert [(text, embeds.shape) for text, embeds in made.prompts] == [("a cat", (3, 6))]
    number = 0
    for group, (partition, count) in enumerate(GROUPS):
        for place in range(count):
            wanted = row(number, partition)
            text = made.source("captions", None).open(group).read(place)
            assert bytes(text["caption_embeds"]) == wanted.caption_embeds.tobytes()
            assert bytes(text["name"]).decode() == wanted.name
            assert int.from_bytes(text["class_label"], "little", signed=True) == wanted.class_label
            for name in ("32-square", "48-buckets"):
                image = made.source(name, None).open(group).read(place)
                assert bytes(image["latents"]) == wanted.latents[name].tobytes()
                assert np.frombuffer(image["shape"], "<i4").tolist() == list(wanted.latents[name].shape)
            number += 1


@pytest.mark.parametrize(("name", "column"), [("captions", "caption_embeds"), ("48-buckets", "latents")])
def test_large_columns_begin_at_whole_lines_of_the_cache(made: PreparedSet, name: str, column: str) -> None:
    index = made.index(name)
    folder = Path(made.path) / ("captions" if name == "captions" else f"latents-{name}")
    padding = set()
    for number, file in enumerate(index.names):
        content = (folder / file).read_bytes()
        shard = made.source(name, None).open(number)
        for place in range(len(shard)):
            extent, read = shard.extent(place), shard.read(place)
            at = extent.begin + extent.before
            assert at % 64 == 0
            assert content[at : at + extent.size] == read[column]
            assert not any(read["align"])
            padding.add(len(read["align"]))
    assert len(padding) > 1
    assert max(padding) < 64


@pytest.mark.parametrize("folder", ["captions", "latents-32-square", "latents-48-buckets"])
def test_a_stock_streaming_dataset_reads_it(made: PreparedSet, folder: str) -> None:
    code = textwrap.dedent(f"""
        import json, sys, types
        sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
        from streaming import StreamingDataset
        data = StreamingDataset(local={str(Path(made.path) / folder)!r}, shuffle=False, batch_size=1)
        rows = []
        for number in range(len(data)):
            sample = data[number]
            rows.append([sample["part"], sample["row"], (sample.get("latents") or sample["caption_embeds"]).hex()])
        print(json.dumps(rows))
    """)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    rows = json.loads(answer.stdout.splitlines()[-1])
    wanted, first = [], 0
    for part, (partition, count) in enumerate(GROUPS):
        for place in range(count):
            each = row(first + place, partition)
            stored = each.caption_embeds if folder == "captions" else each.latents[folder.removeprefix("latents-")]
            wanted.append([part, place, stored.tobytes().hex()])
        first += count
    assert rows == wanted


def test_the_stub_for_torchvision_is_still_needed() -> None:
    code = "import sys; sys.modules['torchvision'] = None; import streaming"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode != 0, "streaming imports without torchvision: remove the stub in streaming_compat"
    assert "torchvision" in answer.stderr


def test_a_killed_writer_goes_on_and_makes_the_same_set(made: PreparedSet, tmp_path: Path) -> None:
    writer = SetWriter(tmp_path, description())
    write_parts(writer, GROUPS[:2])
    (tmp_path / "captions/part-00002-0123.mds").write_bytes(b"half")  # sent, but killed before the part's marker
    (tmp_path / ".scratch/0/latents-32-square").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no finished set: .*manifest\.json is missing") as caught:
        PreparedSet.open(tmp_path)
    assert "run the same `pixart-ds prepare` again, or `upload`" in str(caught.value)
    again = SetWriter(tmp_path, description())
    assert again.parts_done() == {0, 1}
    write_parts(again, GROUPS)
    finish(again)
    assert PreparedSet.open(tmp_path).fingerprint == made.fingerprint


def test_content_and_description_are_in_the_fingerprint(made: PreparedSet, tmp_path: Path) -> None:
    prints = {made.fingerprint}
    for number, changes in enumerate(({"scaling_factor": 0.6}, {"classes": ("cat",)})):
        prints.add(tiny_set(tmp_path / str(number), **changes).fingerprint)
    prints.add(tiny_set(tmp_path / "other", GROUPS[:-1]).fingerprint)
    assert len(prints) == 4


def test_square_latents_are_one_bucket_and_others_have_one_for_each_ratio(made: PreparedSet) -> None:
    square, buckets = (made.rows_for(name, SetConfig(path="x")) for name in ("32-square", "48-buckets"))
    assert set(square.buckets.tolist()) == {0}
    assert buckets.buckets.tolist() == made.partitions.tolist()
    assert square.selected is None
    assert square.counts.tolist() == [count for _, count in GROUPS]


def chosen(made: PreparedSet, **config: Any) -> set[int]:
    rows = made.rows_for("32-square", SetConfig.model_validate({"path": "x", **config}))
    starts = np.concatenate([[0], rows.counts.cumsum()[:-1]])
    selected = rows.selected or (None,) * len(rows.counts)
    return {
        int(start) + place
        for start, count, part in zip(starts, rows.counts, selected, strict=True)
        for place in (range(count) if part is None else part.tolist())
    }


def test_counts_and_filters(made: PreparedSet) -> None:
    everything = {n: row(n, p) for n, p in enumerate(p for p, count in GROUPS for _ in range(count))}
    assert chosen(made, count=10) < chosen(made, count=11) < set(everything)
    assert len(chosen(made, count=10)) == 10
    assert len(chosen(made, count=999)) == len(everything)
    scored = {n: r.numbers["aesthetic_score"] for n, r in everything.items() if r.numbers}
    assert chosen(made, minimum={"aesthetic_score": 1.25}) == {n for n, score in scored.items() if score >= 1.25}
    assert chosen(made, maximum={"aesthetic_score": 1.25}) == {n for n, score in scored.items() if score <= 1.25}
    with pytest.raises(ConfigError, match="the rows have no number 'punsafe'") as caught:
        chosen(made, minimum={"punsafe": 1})
    assert "filter by one of: aesthetic_score" in str(caught.value)
    flat = {n for n, r in everything.items() if r.original_height / r.original_width <= 1.0}
    assert chosen(made, max_ratio=1.0) == flat
    assert chosen(made, min_ratio=1.0) == {
        n for n, r in everything.items() if r.original_height / r.original_width >= 1.0
    }
    assert chosen(made, min_side=50) == {
        n for n, r in everything.items() if min(r.original_height, r.original_width) >= 50
    }
    assert chosen(made, min_side=50, max_ratio=1.1) == chosen(made, min_side=50) & chosen(made, max_ratio=1.1)
    with pytest.raises(DataError, match=r"leaves no sample of 33 \(min_side 9999\)"):
        chosen(made, min_side=9999)


def test_what_is_said_of_sets_that_cannot_be_read(made: PreparedSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the folder does not exist") as caught:
        PreparedSet.open(tmp_path / "none")
    assert "pixart-ds prepare" in str(caught.value)
    with pytest.raises(DataError, match="from folders and from s3:// addresses, not from gs://bucket/set"):
        PreparedSet.open("gs://bucket/set")
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(DataError, match=r"no finished set"):
        PreparedSet.open(tmp_path / "unfinished")
    with pytest.raises(DataError, match="no latents '512'") as caught:
        made.rows_for("512", SetConfig(path="x"))
    assert "32-square, 48-buckets" in str(caught.value)


@pytest.mark.parametrize("fault", ["missing", "truncated", "index"])
def test_what_is_said_of_damaged_sets(tmp_path: Path, fault: str) -> None:
    path = Path(tiny_set(tmp_path).path)
    shard = shard_file(path, "latents-32-square", 1)
    if fault == "missing":
        shard.unlink()
        words = f"{shard} is missing"
    elif fault == "truncated":
        size = shard.stat().st_size
        os.truncate(shard, size - 1)
        words = f"{shard} has {size - 1} bytes instead of {size}"
    else:
        index = json.loads((path / "latents-32-square/index.json").read_text())
        index["shards"][0]["samples"] += 1
        (path / "latents-32-square/index.json").write_text(json.dumps(index))
        words = "the index and the manifest disagree"
    with pytest.raises(DataError) as caught:
        PreparedSet.open(path).rows_for("32-square", SetConfig(path="x"))
    assert words in str(caught.value)
    PreparedSet.open(path).rows_for("48-buckets", SetConfig(path="x"))  # the other latents are whole


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def without(key: str) -> Callable[[Any], Any]:
    return lambda value: {name: each for name, each in value.items() if name != key}


def other_columns(value: Any) -> Any:
    for shard in value["shards"]:
        shard["column_names"][0] = "padding"
    return value


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("manifest.json", without("groups"), "manifest.json is none that `prepare` writes: KeyError: 'groups'"),
        ("manifest.json", lambda value: [value], "manifest.json is none that `prepare` writes"),
        ("manifest.json", lambda value: {**value, "description": {}}, "manifest.json is none that `prepare` writes"),
        ("captions/index.json", without("shards"), "the index is not one of plain MDS shards"),
        ("captions/index.json", lambda value: [value], "the index is not one of plain MDS shards"),
        (
            "captions/index.json",
            other_columns,
            "the shards have the columns padding, caption_embeds, .* instead of align, caption_embeds",
        ),
    ],
)
def test_small_files_that_are_damaged_are_named(
    tmp_path: Path, name: str, change: Callable[[Any], Any], words: str
) -> None:
    path = Path(tiny_set(tmp_path).path)
    change_json(path / name, change)
    with pytest.raises(DataError, match=words) as caught:
        PreparedSet.open(path).index("captions")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["rows.parquet", "conditions.safetensors"])
def test_tables_and_tensors_that_are_cut_short_are_named(tmp_path: Path, name: str) -> None:
    path = Path(tiny_set(tmp_path).path)
    os.truncate(path / name, 40)
    made = PreparedSet.open(path)
    with pytest.raises(DataError, match=f"{name} is none that `prepare` writes"):
        made.rows("height") if name == "rows.parquet" else made.null_embeds


def test_rows_of_another_kind_are_refused(tmp_path: Path) -> None:
    writer = SetWriter(tmp_path, description(caption_channels=7))
    with pytest.raises(DataError, match=r"pictures/0.png: caption features are float16"):
        writer.write_part(0, 1, [row(0, 1)])
    assert writer.parts_done() == set()
