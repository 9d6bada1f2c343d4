"""The list of all pictures: filtered, resumable, the same whoever makes it, and refused with words where it cannot be used."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pixart_ds.config.schema import PrepareConfig, SourceConfig
from pixart_ds.errors import EXIT_DATA, DataError, MachineError
from pixart_ds.prepare.items import Rejected
from pixart_ds.prepare.parts import make_plan
from pixart_ds.prepare.scan import class_sequence, read_scan, scan
from pixart_ds.prepare.sources import base, folder, lists
from pixart_ds.s3 import StoreError
from tests.helpers.sources import encoded, prepare_config, some_pictures, write_kinds, write_tar


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (base, folder, lists):
        monkeypatch.setattr(module, "ENTRIES_PER_CHUNK", 4)


def write_list(path: Path, **numbers: list[Any]) -> SourceConfig:
    """Pictures 10 × 10, 10 × 11, … with these numbers."""
    path.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(numbers.values())))
    entries = [
        {"path": f"{n}.png", "text": f"picture {n}", **{key: values[n] for key, values in numbers.items()}}
        for n in range(count)
    ]
    for number in range(count):
        (path / f"{number}.png").write_bytes(encoded(10, 10 + number))
    (path / "list.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return SourceConfig(kind="list", path=str(path / "list.jsonl"))


def chunk_files(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (work / "scan").glob("chunk-*")}


def test_all_that_a_source_says_is_in_the_tables(tmp_path: Path) -> None:
    pictures = some_pictures()
    config = prepare_config(write_kinds(tmp_path / "made", pictures)["list json"])
    told: list[tuple[int, int]] = []
    made = scan(config, tmp_path / "work", 1, lambda done, total: told.append((done, total)))
    assert told == [(number, 4) for number in range(5)]
    assert (made.num_chunks, made.pictures, made.numbers) == (4, 14, ("score",))
    assert made.class_keys == ("big cats", "birds")
    assert made.rejected == {"broken": 0, "filtered": 0, "caption": 0}
    rows = [row for table in made.tables for row in table.to_pylist()]
    assert rows == [
        {
            "name": one.name,
            "container": one.name,
            "start": 0,
            "length": len(one.data),
            "height": one.height,
            "width": one.width,
            "caption": one.caption,
            "class_key": one.class_key,
            "number.score": one.score,
        }
        for one in pictures
    ]
    assert len(made.tables) == 4
    assert read_scan(tmp_path / "work") == made == scan(config, tmp_path / "work")
    assert not list(made.rejections())


def test_tables_of_all_chunks_have_one_schema(tmp_path: Path) -> None:
    source = write_list(tmp_path / "a", early=[1.5] * 4 + [None] * 5, late=[None] * 8 + [3])
    tables = list(scan(prepare_config(source), tmp_path / "work").tables)
    assert len(tables) == 3
    assert len({str(table.schema) for table in tables}) == 1
    assert tables[1]["number.late"].to_pylist() == [None] * 4
    assert tables[2]["number.late"].to_pylist() == [3.0]


def test_filters_leave_out_with_the_reason(tmp_path: Path) -> None:
    source = write_list(tmp_path / "a", score=[1, 2, 3, 4, 5, 6, None, 8, 9], other=[0] * 9)
    (tmp_path / "a/4.png").write_text("broken")
    limits = {
        "min_ratio": 0.6,
        "max_ratio": 0.99,
        "max_pixels": 150,
        "minimum": {"score": 3},
        "maximum": {"score": 8.5},
    }
    made = scan(prepare_config(source, filter=limits), tmp_path / "work")
    assert [name for table in made.tables for name in table["name"].to_pylist()] == ["2.png", "3.png", "5.png"]
    assert {one.name: f"{one.kind}: {one.reason}" for one in made.rejections()} == {
        "0.png": "filtered: height / width is 1, more than 0.99",
        "1.png": "filtered: its score is 2, less than 3",
        "4.png": "broken: it is no picture",
        "6.png": "filtered: it has 160 pixels, more than 150",
        "7.png": "filtered: height / width is 0.588, less than 0.6",
        "8.png": "filtered: height / width is 0.556, less than 0.6",
    }
    assert (made.pictures, made.rejected) == (3, {"broken": 1, "filtered": 5, "caption": 0})
    few = scan(prepare_config(source, filter={"maximum": {"score": 8}}), tmp_path / "other")
    assert {one.name: one.reason for one in few.rejections() if one.kind == "filtered"} == {
        "6.png": "it has no score",
        "8.png": "its score is 9, more than 8",
    }
    with pytest.raises(
        DataError, match="there is nothing to prepare: all 9 pictures are left out: 0.png .*less than 11.*; …"
    ):
        scan(prepare_config(source, filter={"min_side": 11}), tmp_path / "none")


def test_an_unknown_number_is_an_error_and_the_corrected_recipe_begins_anew(tmp_path: Path) -> None:
    source = write_list(tmp_path / "a", score=[1, 2, 3], other=[0] * 3)
    with pytest.raises(DataError, match="the source gives no number scroe to filter by; it gives other, score"):
        scan(prepare_config(source, filter={"minimum": {"scroe": 1}}), tmp_path / "work")
    made = scan(prepare_config(source, filter={"minimum": {"score": 2}}), tmp_path / "work")
    assert made.pictures == 2


def test_missing_captions_are_counted_and_named_or_skipped(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.png").write_bytes(encoded(4, 5))
    (tmp_path / "f.txt").write_text("a caption")
    source = SourceConfig(path=str(tmp_path))
    with pytest.raises(DataError, match=r"5 of 6 pictures have no caption: a\.png, b\.png, c\.png, …") as caught:
        scan(prepare_config(source), tmp_path / "work")
    assert "write NAME.txt beside each picture, or set captions.missing=skip" in str(caught.value)
    before = chunk_files(tmp_path / "work")
    with pytest.raises(DataError, match="the scan of the source is not finished"):
        read_scan(tmp_path / "work")
    made = scan(prepare_config(source, captions={"missing": "skip"}), tmp_path / "work")
    assert chunk_files(tmp_path / "work") == before  # headers are not read again for that
    assert (made.pictures, made.rejected["caption"]) == (1, 5)
    assert [table["name"].to_pylist() for table in made.tables] == [[], ["f.png"]]
    assert next(made.rejections()) == Rejected("a.png", "caption", "it has none")
    assert len(list(made.rejections())) == 5
    written = scan(prepare_config(source, captions={"captioner": "a.b:C"}), tmp_path / "own")
    assert (written.pictures, sum(len(table) for table in written.tables), written.rejected["caption"]) == (6, 6, 0)


def test_a_picture_that_is_listed_twice_is_named(tmp_path: Path) -> None:
    source = write_list(tmp_path / "a", score=list(range(9)))
    text = (tmp_path / "a/list.jsonl").read_text()
    (tmp_path / "a/list.jsonl").write_text(text + text.splitlines()[0] + "\n" + text.splitlines()[7])
    with pytest.raises(DataError, match=r"2 pictures are listed more than once: 0\.png, 7\.png"):
        scan(prepare_config(source), tmp_path / "work")


def test_of_pictures_listed_twice_all_are_found_whichever_chunks_hold_them(tmp_path: Path) -> None:
    source = write_list(tmp_path / "a", score=list(range(20)))
    lines = (tmp_path / "a/list.jsonl").read_text().splitlines()
    again = [lines[number] for number in (13, 19, 2, 13, 0)]  # 20 to 24: chunks of four, one of them twice there
    (tmp_path / "a/list.jsonl").write_text("\n".join([*lines, *again]))
    with pytest.raises(DataError, match=r"4 pictures are listed more than once: 0\.png, 2\.png, 13\.png, …"):
        scan(prepare_config(source), tmp_path / "work")


@pytest.mark.parametrize("texts", ["aabcdbae", "a--bb-a-", "--------"])
def test_a_plan_holds_each_picture_once_with_its_caption(texts: str, tmp_path: Path) -> None:
    captions = [None if text == "-" else text for text in texts]
    source = write_list(tmp_path / "a", text=captions)
    made = scan(prepare_config(source, captions={"captioner": "a.b:C"}), tmp_path / "work")
    assert made.num_chunks == 2
    plan = make_plan(
        tmp_path / "plan",
        made.tables,
        ratios=(1.0,),
        rows_per_group=3,
        seed=1,
        random_access=True,
        about={"class_keys": []},
    )
    for part in range(plan.num_parts):
        assert plan.captions(part) == [item.caption for item in plan.items(part) if item.caption is not None]
    rows = [(item.name, item.caption) for part in range(plan.num_parts) for item in plan.items(part)]
    assert sorted(rows, key=str) == [(f"{number}.png", text) for number, text in enumerate(captions)]


def test_a_changed_source_is_refused_once_it_was_scanned_and_begun_anew_before(tmp_path: Path) -> None:
    source = write_list(tmp_path / "a", score=[1, 2, 3])
    scan(prepare_config(source), tmp_path / "work")
    before = chunk_files(tmp_path / "work")
    note = tmp_path / "work/scan/source.json"
    finished = note.read_bytes()
    with pytest.raises(DataError, match=r"changed: `filter` in the recipe") as caught:
        scan(prepare_config(source, filter={"min_side": 2}), tmp_path / "work")
    assert "choose another output" in str(caught.value)
    source = write_list(tmp_path / "a", score=[1, 2, 3, 4, 5])
    with pytest.raises(DataError, match="changed: names or sizes of its files, 1 chunks are now 2"):
        scan(prepare_config(source), tmp_path / "work")
    assert (chunk_files(tmp_path / "work"), note.read_bytes()) == (before, finished)
    unfinished = json.loads(finished)
    del unfinished["found"]
    note.write_text(json.dumps(unfinished))
    assert scan(prepare_config(source), tmp_path / "work").pictures == 5


def test_names_and_captions_that_are_no_unicode_are_left_out(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in (b"fine.png", b"caf\xe9.png"):
        Path(os.fsdecode(os.path.join(os.fsencode(pictures), name))).write_bytes(encoded(4, 5))
    captions = {"captions": {"captioner": "a.b:C"}}
    made = scan(prepare_config(SourceConfig(path=str(pictures)), **captions), tmp_path / "work")
    assert made.pictures == 1
    assert list(made.rejections()) == [Rejected("caf\\udce9.png", "broken", "its name is not UTF-8")]
    (pictures / "list.jsonl").write_text('{"path": "fine.png", "text": "half \\ud83d"}\n{"path": "none.png"}')
    with pytest.raises(DataError, match="its caption or class is not UTF-8"):
        scan(prepare_config(SourceConfig(kind="list", path=str(pictures / "list.jsonl"))), tmp_path / "other")


def test_classes_are_numbered_by_number_or_by_letter() -> None:
    assert class_sequence(["10", "9", "1"]) == ["1", "9", "10"]
    assert class_sequence(["10", "9", "b"]) == ["10", "9", "b"]
    assert class_sequence([]) == []


def test_processes_make_the_same_files_and_their_errors_come_back(tmp_path: Path) -> None:
    pictures = some_pictures(12)
    (tmp_path / "tars").mkdir()
    for number in range(4):
        write_tar(tmp_path / f"tars/{number}.tar", pictures[number::4])
    config = prepare_config(SourceConfig(kind="webdataset", path=str(tmp_path / "tars")))
    one, three = scan(config, tmp_path / "one"), scan(config, tmp_path / "three", 3)
    assert chunk_files(tmp_path / "one") == chunk_files(tmp_path / "three")
    assert (one.pictures, one.listing) == (three.pictures, three.listing)
    assert not multiprocessing.active_children()
    (tmp_path / "tars/2.tar").write_bytes(gzip.compress(b"a tar"))
    with pytest.raises(DataError, match=r"2\.tar is compressed by gzip") as caught:
        scan(config, tmp_path / "again", 2)
    assert "gunzip" in str(caught.value)
    assert (caught.value.where, caught.value.exit_code) == (str(tmp_path / "tars"), EXIT_DATA)
    lost = StoreError("no answer", where="s3://b", remedy="ask", final=False, missing=True)
    again = pickle.loads(pickle.dumps(lost))
    assert (type(again), str(again), vars(again)) == (StoreError, str(lost), vars(lost))


def test_a_process_that_is_killed_while_it_scans_is_told(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(encoded(8, 8 + number))
        (tmp_path / f"{number}.txt").write_text("said")
    config = prepare_config(SourceConfig(path=str(tmp_path)))

    def kill(done: int, total: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(MachineError, match="a process that scans was killed") as caught:
        scan(config, tmp_path / "work", 2, kill)
    assert "fewer --processes" in str(caught.value)
    assert scan(config, tmp_path / "work").pictures == 40


SCAN = """
import sys, time
from pathlib import Path
from pixart_ds.config.schema import PrepareConfig
from pixart_ds.prepare import scan as module
from pixart_ds.prepare.sources import folder
folder.ENTRIES_PER_CHUNK = 4
if __name__ == "__main__":
    config = PrepareConfig.model_validate_json(Path(sys.argv[1]).read_text(), strict=False)
    def tell(done, total):
        print(done, flush=True)
        time.sleep(0.05 if done < 5 else 60)
    module.scan(config, Path(sys.argv[2]), int(sys.argv[3]), tell)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_scan_goes_on_and_makes_the_same_files(tmp_path: Path, processes: int) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(60):
        (tmp_path / f"pictures/{number}.png").write_bytes(encoded(8, 8 + number))
        (tmp_path / f"pictures/{number}.txt").write_text(f"number {number}")
    (tmp_path / "pictures/61.png").write_text("broken")
    config: PrepareConfig = prepare_config(SourceConfig(path=str(tmp_path / "pictures")))
    scan(config, tmp_path / "whole")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "run.py").write_text(SCAN)
    command = [sys.executable, "run.py", "config.json", "killed", str(processes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    while int(running.stdout.readline()) < 5:
        pass
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    running.kill()
    assert running.wait() == -signal.SIGKILL
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/exe").exists() for pid in children):  # none waits for a parent that is gone
        assert time.monotonic() < until
        time.sleep(0.02)
    kept = chunk_files(tmp_path / "killed")
    assert 5 <= sum(name.endswith(".parquet") for name in kept) < 16
    told: list[int] = []
    made = scan(config, tmp_path / "killed", 1, lambda done, total: told.append(done))
    assert told[0] >= 5
    assert chunk_files(tmp_path / "killed") == chunk_files(tmp_path / "whole")
    assert made.pictures == 60
    assert pq.read_table(tmp_path / "killed/scan/chunk-00000.parquet").num_rows == 4
