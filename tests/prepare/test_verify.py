"""Sound sets pass; each damage is found and named with its file and row, and several at once are all told."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from safetensors.numpy import load_file, save_file

from pixart_ds.cli import main
from pixart_ds.config.load import load_prepare
from pixart_ds.data.format import FORMAT
from pixart_ds.data.mds import ShardIndex
from pixart_ds.data.writer import fingerprint_of
from pixart_ds.demo.pictures import write_pictures
from pixart_ds.errors import DataError
from pixart_ds.prepare.pipeline import prepare
from pixart_ds.prepare.verify import verify
from pixart_ds.prepare.verify_rows import SHOWN
from tests.helpers.sets import row, shard_file, spoil, tiny_set

ENCODERS = Path(__file__).resolve().parents[2] / "pixart_ds/demo/encoders"
LATENTS = "latents-48-buckets"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "set"
    tiny_set(folder)
    (folder / "skipped.jsonl").write_text('{"picture": "gone.png", "kind": "broken", "reason": "it is no picture"}\n')
    edit(folder / "manifest.json", lambda value: value.update(totals={"skipped": {"broken": 1}, "truncated": 0}))
    return folder


@pytest.fixture
def made(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "set")
    return tmp_path / "set"


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=2) + "\n")


def change_column(made: Path, folder: str, shard: int, number: int, column: str, content: bytes) -> None:
    """Other content of one row, of the same length, in a set whose hashes, names and fingerprint are all made right again."""
    path = shard_file(made, folder, shard)
    raw = bytearray(path.read_bytes())
    index = ShardIndex.parse((made / folder / "index.json").read_bytes(), path)
    at = int.from_bytes(raw[4 + 4 * number : 8 + 4 * number], "little")
    varying = sum(size is None for size in index.column_sizes)
    heads = iter(np.frombuffer(raw, "<u4", varying, at).tolist())
    begin = at + 4 * varying
    for name, size in zip(index.columns, index.column_sizes, strict=True):
        length = next(heads) if size is None else size
        if name == column:
            assert len(content) <= length
            raw[begin : begin + len(content)] = content
        begin += length
    digest = xxhash.xxh3_64_hexdigest(bytes(raw))
    name = f"part-{shard:05d}-{digest}.mds"
    path.unlink()
    (path.parent / name).write_bytes(raw)

    def told(entry: Any) -> None:
        entry["raw_data"].update(basename=name, bytes=len(raw), hashes={"xxh3_64": digest})

    edit(made / folder / "index.json", lambda value: told(value["shards"][shard]))
    edit(made / f"parts/part-{shard:05d}.json", lambda value: told(value["shards"][folder]))
    fingerprint(made)


def fingerprint(made: Path) -> None:
    def renew(value: Any) -> None:
        folders = ["captions", *(f"latents-{name}" for name in value["description"]["latents"])]
        raws = [(made / folder / "index.json").read_bytes() for folder in folders]
        raws += [(made / name).read_bytes() for name in ("conditions.safetensors", "prompts.json")]
        value["fingerprint"] = fingerprint_of(value["description"], raws)

    edit(made / "manifest.json", renew)


def change_table(made: Path, column: str, number: int, value: Any) -> None:
    table = pq.read_table(made / "rows.parquet")
    values = table[column].to_pylist()
    values[number] = value
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, table.schema.field(column), pa.array(values, table.schema.field(column).type)),
                   made / "rows.parquet")  # fmt: skip


def change_conditions(made: Path, name: str, value: Any) -> None:
    path = made / "conditions.safetensors"
    tensors = load_file(path)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, path)
    fingerprint(made)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def halves(*values: float) -> bytes:
    return np.array(values, np.float16).tobytes()


def ints(*values: int) -> bytes:
    return np.array(values, np.int32).tobytes()


def swapped(made: Path) -> None:
    """Two entries of an index have changed places."""

    def change(value: Any) -> None:
        value["shards"][0], value["shards"][2] = value["shards"][2], value["shards"][0]

    edit(made / LATENTS / "index.json", change)
    fingerprint(made)


def write(path: Path, text: str) -> None:
    path.write_text(text)


def manifest(made: Path, **values: Any) -> None:
    edit(made / "manifest.json", lambda value: value.update(values))


def marker(made: Path, **values: Any) -> None:
    edit(made / "parts/part-00001.json", lambda value: value.update(values))


def first(value: Any, **changes: Any) -> None:
    value["shards"][0].update(changes)


def damaged_header(made: Path) -> None:
    """Its first offset points behind the header's end."""
    path = shard_file(made, LATENTS, 1)
    raw = bytearray(path.read_bytes())
    raw[4:8] = (int.from_bytes(raw[4:8], "little") + 1).to_bytes(4, "little")
    path.write_bytes(raw)
    change_column(made, LATENTS, 1, 3, "part", b"\1")  # makes the hashes right


def spoil_letters(made: Path) -> None:
    table = pq.read_table(made / "rows.parquet")
    captions = [b"\xb1bad", *(text.encode() for text in table["caption"].to_pylist()[1:])]
    place = table.column_names.index("caption")
    column = pa.array(captions, pa.binary()).view(pa.string())
    pq.write_table(table.set_column(place, table.schema.field("caption"), column), made / "rows.parquet")


def large_height(made: Path) -> None:
    rows = json.loads((made / "parts/part-00001.json").read_text())["rows"]
    marker(made, rows=[{**row, "height": 10**20} for row in rows])


def padded(made: Path, folder: str, shard: int) -> int:
    """A row that has padding; its size is the first number of the row."""
    raw = shard_file(made, folder, shard).read_bytes()
    begins = np.frombuffer(raw, "<u4", int.from_bytes(raw[:4], "little"), 4).tolist()
    return next(row for row, begin in enumerate(begins) if any(raw[begin : begin + 4]))


def out_of_line(made: Path) -> None:
    """Moves all rows of a shard by a byte."""
    path = shard_file(made, LATENTS, 1)
    raw = path.read_bytes()
    count = int.from_bytes(raw[:4], "little")
    offsets = np.frombuffer(raw, "<u4", count + 1, 4)
    path.write_bytes(raw[:4] + (offsets + 1).tobytes() + raw[8 + 4 * count : offsets[0]] + b" " + raw[offsets[0] :])
    change_column(made, LATENTS, 1, 3, "part", b"\1")  # makes the hashes right


# what is done, the kind, words of what is told, and of where
DAMAGES: dict[str, tuple[Callable[[Path], Any], str, str, str]] = {
    "a bit of captions": (lambda m: flip(shard_file(m, "captions", 1)), "damaged", "xxh3 hash", "captions/part-00001"),
    "a bit of latents": (lambda m: flip(shard_file(m, LATENTS, 3)), "damaged", "xxh3 hash", f"{LATENTS}/part-00003"),
    "a short shard": (
        lambda m: os.truncate(shard_file(m, LATENTS, 2), 100), "damaged", "100 bytes instead of", "part-00002",
    ),
    "a lost shard": (lambda m: shard_file(m, "captions", 4).unlink(), "missing", "not there", "captions/part-00004"),
    "swapped shards": (swapped, "place", "part is 2 instead of 0", f"{LATENTS}/part-00002"),
    "swapped entries": (swapped, "index", "shard 0 is called part-00002", f"{LATENTS}/index.json"),
    "latents that are none": (lambda m: spoil(m, "48-buckets", 1, 3), "latents", "no finite numbers", ", row 3"),
    "an infinite mean": (
        lambda m: change_column(m, LATENTS, 1, 5, "latents", halves(np.inf)), "latents", "1 of 256 latents", "row 5",
    ),
    "a negative deviation": (
        lambda m: change_column(m, LATENTS, 1, 2, "latents", halves(*[0.0] * 128, -1.0)),
        "latents", "1 standard deviations are negative", "row 2",
    ),
    "another shape": (
        lambda m: change_column(m, LATENTS, 1, 2, "shape", ints(8, 8, 4)), "latents", "instead of (8, 4, 8)", "row 2",
    ),
    "another crop": (
        lambda m: change_column(m, LATENTS, 1, 2, "crop", ints(1, 2, 3, 4)), "crop", "[1, 2, 3, 4]", "row 2",
    ),
    "another size": (
        lambda m: change_column(m, LATENTS, 1, 2, "original_size", ints(41, 80)), "size", "[41, 80]", "row 2",
    ),
    "another ratio": (
        lambda m: change_column(m, LATENTS, 1, 2, "original_size", ints(80, 80)), "ratio", "ratio 1.0", "row 2",
    ),
    "no size": (
        lambda m: change_column(m, LATENTS, 1, 2, "original_size", ints(0, 80)), "size", "[0, 80]", "row 2",
    ),
    "another part": (
        lambda m: change_column(m, LATENTS, 1, 2, "part", b"\7"), "place", "part is 7 instead of 1", "row 2",
    ),
    "another row": (
        lambda m: change_column(m, "captions", 1, 2, "row", b"\7"), "place", "row is 7 instead of 2", "row 2",
    ),
    "features that are none": (
        lambda m: change_column(m, "captions", 0, 6, "caption_embeds", halves(np.nan)),
        "features", "no finite numbers", "captions/part-00000",
    ),
    "another class": (
        lambda m: change_column(m, "captions", 0, 1, "class_label", b"\2"), "class", "there are 2 classes", "row 1",
    ),
    "another caption": (
        lambda m: change_column(m, "captions", 0, 1, "caption_text", b"Picture"), "caption", "'Picture 1'", "row 1",
    ),
    "letters that are none": (
        lambda m: change_column(m, "captions", 0, 1, "caption_text", b"\xff"), "caption", "not UTF-8", "row 1",
    ),
    "another name": (
        lambda m: change_column(m, "captions", 0, 1, "name", b"P"), "name", "'Pictures/1.png'", "row 1",
    ),
    "one name twice": (
        lambda m: change_column(m, "captions", 0, 1, "name", b"pictures/2"), "name", "2 rows are called", "row 2",
    ),
    "padding that is used": (
        lambda m: change_column(m, "captions", 1, padded(m, "captions", 1), "align", b"\1"),
        "padding", "other bytes than zeros", "captions/part-00001",
    ),
    "a large column out of line": (
        out_of_line, "padding", "bytes of padding put latents at byte", f"{LATENTS}/part-00001",
    ),
    "letters of the table that are none": (
        spoil_letters, "table", "Invalid UTF8", "rows.parquet",
    ),
    "a marker of numbers beyond all measure": (
        large_height, "marker", "its lines are none of rows.parquet", "parts/part-00001.json",
    ),
    "an index beyond all measure": (
        lambda m: edit(m / "captions/index.json", lambda v: v["shards"][1].update(samples=10**20)),
        "index", "samples is 1000000", "captions/index.json",
    ),
    "a marker far behind": (
        lambda m: shutil.copy(m / "parts/part-00001.json", m / "parts/part-300000000.json"),
        "marker", "the part has none", "parts/part-00006.json",
    ),
    "another prompt": (
        lambda m: write(m / "prompts.json", '["a dog"]'), "manifest", "fingerprint is", "manifest.json",
    ),
    "a total that none has": (
        lambda m: manifest(m, totals={"scipped": {}}), "manifest", "totals holds scipped", "manifest.json",
    ),
    "a picture left out of the list": (
        lambda m: marker(m, skipped=[{"picture": "gone.png", "kind": "broken", "reason": "it is empty"}]),
        "skipped", "1 lines of markers", "skipped.jsonl",
    ),
    "a broken header": (
        damaged_header, "damaged", "right hash, but", f"{LATENTS}/part-00001",
    ),
    "a line of the table": (
        lambda m: change_table(m, "caption", 9, "else"), "table", "'else', in parts/part-00001.json", "rows.parquet, row 9",
    ),
    "a number of the table": (
        lambda m: change_table(m, "number.aesthetic_score", 9, 5.0), "table", "5.0", "rows.parquet, row 9",
    ),
    "an id": (lambda m: change_table(m, "id", 9, 3), "table", "id is 3 instead of 9", "rows.parquet, row 9"),
    "tokens": (lambda m: change_table(m, "num_tokens", 9, 99), "features", "in rows.parquet 99", "row 1"),
    "cut, but short": (
        lambda m: (change_table(m, "num_tokens", 9, 2), change_table(m, "truncated", 9, True)),
        "table", "was cut, but has 2 tokens", "row 9",
    ),
    "a partition": (lambda m: change_table(m, "partition", 9, 2), "table", "partition is 2 instead of 0", "row 9"),
    "a short table": (
        lambda m: pq.write_table(pq.read_table(m / "rows.parquet").slice(0, 30), m / "rows.parquet"),
        "table", "30 rows, the set 33", "rows.parquet",
    ),
    "a column less": (
        lambda m: pq.write_table(pq.read_table(m / "rows.parquet").drop_columns("crop.48-buckets"), m / "rows.parquet"),
        "table", "crop.48-buckets", "rows.parquet",
    ),
    "no table": (lambda m: (m / "rows.parquet").unlink(), "missing", "not there", "rows.parquet"),
    "a table that is none": (lambda m: write(m / "rows.parquet", "x" * 99), "table", "cannot be read", "rows.parquet"),
    "a marker's plan": (lambda m: marker(m, plan="x"), "marker", "another plan, 'x'", "parts/part-00001.json"),
    "a marker's count": (lambda m: marker(m, count=7), "marker", "count is 7 instead of 8", "parts/part-00001.json"),
    "a marker's encoders": (
        lambda m: marker(m, encoders={}), "marker", "encoders is {} instead of {'vae", "parts/part-00001.json",
    ),
    "a marker's shards": (lambda m: marker(m, shards={}), "marker", "shards is [] instead", "parts/part-00001.json"),
    "a marker's hash": (
        lambda m: edit(m / "parts/part-00001.json", lambda v: v["shards"]["captions"]["raw_data"].update(bytes=5)),
        "marker", "captions: bytes is 5", "parts/part-00001.json",
    ),
    "a marker that is none": (lambda m: marker(m, rows=None), "marker", "rows: ", "parts/part-00001.json"),
    "no marker": (lambda m: (m / "parts/part-00001.json").unlink(), "missing", "not there", "parts/part-00001.json"),
    "a marker too many": (
        lambda m: shutil.copy(m / "parts/part-00001.json", m / "parts/part-00006.json"),
        "marker", "is in no index", "parts/part-00006.json",
    ),
    "another fingerprint": (lambda m: manifest(m, fingerprint="x"), "manifest", "fingerprint is 'x'", "manifest.json"),
    "another number": (lambda m: manifest(m, num_samples=9), "manifest", "num_samples is 9, and 33", "manifest.json"),
    "another group": (
        lambda m: edit(m / "manifest.json", lambda v: v["groups"][1].update(count=9)),
        "manifest", "row group 1 has 9 rows instead of 8", "manifest.json",
    ),
    "another total": (
        lambda m: manifest(m, totals={"skipped": {}, "truncated": 2}), "manifest", "totals.truncated is 2, and 0", "",
    ),
    "another total of skipped": (
        lambda m: manifest(m, totals={"skipped": {"caption": 1}}), "manifest", "{'broken': 1}", "manifest.json",
    ),
    "an entry": (
        lambda m: edit(m / "captions/index.json", lambda v: first(v, compression="zstd")),
        "index", "shard 0: compression is 'zstd'", "captions/index.json",
    ),
    "an index's rows": (
        lambda m: edit(m / "captions/index.json", lambda v: first(v, samples=3)),
        "index", "row group 0 has 3 rows instead of 8", "captions/index.json",
    ),
    "a short index": (
        lambda m: edit(m / "captions/index.json", lambda v: v["shards"].pop()), "index", "5 shards", "captions/index.json",
    ),
    "an index that is none": (lambda m: write(m / "captions/index.json", "{"), "index", "no index", "captions"),
    "no conditions": (lambda m: (m / "conditions.safetensors").unlink(), "missing", "not there", "conditions"),
    "broken conditions": (
        lambda m: os.truncate(m / "conditions.safetensors", 40), "conditions", "no file of tensors", "conditions",
    ),
    "an infinite null": (
        lambda m: change_conditions(m, "null", np.full((9, 6), np.inf, np.float16)), "conditions", "no finite", "",
    ),
    "a short null": (
        lambda m: change_conditions(m, "null", np.ones((8, 6), np.float16)), "conditions", "(8, 6), not float16 (9, 6)", "",
    ),
    "a mask with holes": (
        lambda m: change_conditions(m, "null_mask", np.eye(1, 9, 2, dtype=np.uint8)[0]), "conditions", "ones and then", "",
    ),
    "no prompt": (lambda m: change_conditions(m, "prompt.0", None), "conditions", "holds 0 prompts", ""),
    "a prompt more": (lambda m: write(m / "prompts.json", '["a", "b"]'), "conditions", "prompts.json 2", ""),
    "prompts that are none": (lambda m: write(m / "prompts.json", '{"a": 1}'), "conditions", "no list", "prompts.json"),
    "no list of skipped": (lambda m: (m / "skipped.jsonl").unlink(), "missing", "not there", "skipped.jsonl"),
    "a torn line": (lambda m: write(m / "skipped.jsonl", '{"pict'), "skipped", "line 1 is none", "skipped.jsonl, line 1"),
    "a skipped row": (
        lambda m: write(m / "skipped.jsonl", '{"picture": "pictures/3.png", "kind": "broken", "reason": ""}\n'),
        "skipped", "'pictures/3.png' was left out, and is a row", "line 1",
    ),
}  # fmt: skip


def test_a_sound_set_passes(made: Path) -> None:
    told: list[tuple[int, int]] = []
    found = verify(made, report=lambda done, total: told.append((done, total)))
    assert found.sound, str(found)
    assert (found.rows, found.groups, found.notes) == (33, 6, ())
    assert found.bytes == sum(path.stat().st_size for path in made.rglob("*.mds"))
    assert (told[0], told[-1]) == ((0, 33), (33, 33))


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_found_and_named(made: Path, damage: str) -> None:
    spoiling, kind, what, where = DAMAGES[damage]
    spoiling(made)
    found = verify(made, threads=1)
    told = [problem for problem in found.problems if problem.kind == kind and what in problem.what]
    assert any(where in problem.where for problem in told), str(found)
    assert all(problem.where.startswith(str(made)) for problem in found.problems)


def test_the_set_that_prepare_makes_is_sound(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 20, seed=2)
    (min((tmp_path / "pictures").rglob("*.png"))).write_text("this is no picture")
    values = [f"source.path={tmp_path / 'pictures'}", f"vae={ENCODERS / 'vae'}", f"text_encoder={ENCODERS / 'text'}"]
    for codec, tokens in (("fp16", 40), ("int8", 8)):
        made = tmp_path / codec
        prepare(
            load_prepare(
                "smoke/prepare",
                [*values, f"output={made}", f"caption_codec={codec}", f"max_tokens={tokens}", "prompts=[a red circle]"],
            )
        )
        found = verify(made)
        assert found.sound, str(found)
        assert found.rows == 19
    scales = np.full(1, -1.0, np.float16).tobytes()
    change_column(tmp_path / "int8", "captions", 0, 0, "caption_embeds", bytes(64) + scales)
    (problem,) = verify(tmp_path / "int8").problems
    assert problem.what.startswith("the caption features hold scales from -1.0 to")
    edit(tmp_path / "int8/manifest.json", lambda value: value["totals"].update(caption_error=0.5))
    assert "totals.caption_error is 0.5" in str(verify(tmp_path / "int8"))


def test_all_that_is_wrong_is_told_in_one_go_and_many_of_a_kind_are_counted(made: Path) -> None:
    flip(shard_file(made, "captions", 1))
    shard_file(made, LATENTS, 3).unlink()
    spoil(made, "32-square", 0, 2)
    marker(made, plan="x")
    table = pq.read_table(made / "rows.parquet")
    labels = pa.array([7] * 33, pa.int32())
    pq.write_table(table.set_column(table.column_names.index("class_label"), table.schema.field("class_label"), labels),
                   made / "rows.parquet")  # fmt: skip
    found = verify(made)
    assert {"damaged", "missing", "latents", "marker", "table", "class", "manifest"} <= set(found.counts)
    assert found.counts["table"] == 33
    assert len([problem for problem in found.problems if problem.kind == "table"]) == SHOWN
    assert "table: and 23 more" in str(found)


def test_what_a_killed_writer_left_over_is_noted_and_not_wrong(made: Path) -> None:
    (made / "captions/part-00001-0123456789abcdef.mds").write_bytes(bytes(2000))
    found = verify(made)
    assert found.sound
    assert found.notes[0].startswith("1 file is named by nothing")
    assert "2 kB" in found.notes[0]


def test_where_nothing_can_be_compared_that_is_said(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the folder does not exist"):
        verify(tmp_path / "none")
    manifest(made, format=99)
    with pytest.raises(DataError, match="format 99"):
        verify(made)
    manifest(made, format=FORMAT, description={"ratios": [1.0]})
    with pytest.raises(DataError, match="is none that `prepare` writes"):
        verify(made)


def test_a_row_without_a_token_is_wrong(tmp_path: Path) -> None:
    tiny_set(tmp_path / "set", [(1, 2)], tokens=0)
    assert "the caption has 0 tokens, not 1 to 9" in str(verify(tmp_path / "set"))
    assert row(3, 1).caption_embeds.shape[0] > 0


def test_the_command_ends_with_4_where_a_set_is_damaged(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(made)]) == 0
    assert f"{made} is sound: 33 rows in 6 row groups" in capsys.readouterr().out
    shard_file(made, "captions", 4).unlink()
    assert main(["verify", str(made), "--threads", "1"]) == 4
    text = capsys.readouterr().out
    assert f"{made} is not sound: 1 problem;" in text
    assert "to do: restore the files from a copy" in text
    assert main(["verify", str(made), "--json"]) == 4
    answer = json.loads(capsys.readouterr().out)
    assert (answer["sound"], answer["counts"]) == (False, {"missing": 1})
    assert answer["problems"][0]["where"].startswith(f"{made}/captions/part-00004-")
