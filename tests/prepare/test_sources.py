"""Sources of every kind: the same pictures give the same items and bytes; what is damaged or leads astray is told and left out."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_ds.config.schema import SourceConfig
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.prepare.items import BrokenPicture, Item, Place, Rejected, is_unicode
from pixart_ds.prepare.sources import base, folder, lists, open_source, tables
from pixart_ds.prepare.sources.base import expand_braces
from pixart_ds.s3 import StoreError
from tests.helpers.sources import Made, add, encoded, some_pictures, write_kinds

KINDS = ("folder", "list json", "list jsonl", "list csv", "webdataset", "parquet", "parquet of paths")


@pytest.fixture(scope="module")
def pictures() -> list[Made]:
    return some_pictures()


@pytest.fixture(scope="module")
def kinds(pictures: list[Made], tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceConfig]:
    return write_kinds(tmp_path_factory.mktemp("kinds"), pictures)


def scanned(config: SourceConfig) -> list[Item | Rejected]:
    source = open_source(config)
    return [found for chunk in source.chunks() for found in source.scan(chunk)]


def items(config: SourceConfig) -> list[Item]:
    found = scanned(config)
    assert all(isinstance(one, Item) for one in found), found
    return [one for one in found if isinstance(one, Item)]


def refused(config: SourceConfig) -> dict[str, str]:
    return {one.name: f"{one.kind}: {one.reason}" for one in scanned(config) if isinstance(one, Rejected)}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (base, folder, lists):
        monkeypatch.setattr(module, "ENTRIES_PER_CHUNK", 3)
    monkeypatch.setattr(tables, "_ROWS_PER_CHUNK", 3)
    monkeypatch.setattr(tables, "_MOST_ROWS_PER_CHUNK", 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", ["large", "small"])
def test_every_kind_gives_the_same_pictures(
    kind: str, chunks: str, kinds: dict[str, SourceConfig], pictures: list[Made], request: pytest.FixtureRequest
) -> None:
    if chunks == "small":
        request.getfixturevalue("small_chunks")
    source = open_source(kinds[kind])
    cut = source.chunks()
    assert len(cut) == {"folder": 1, "webdataset": 2}.get(kind, 1) if chunks == "large" else len(cut) >= 2
    found = [one for chunk in cut for one in source.scan(chunk)]
    with_data = {}
    with ThreadPoolExecutor(4) as pool:
        data = list(pool.map(lambda one: source.read(one.place), found))
    for one, content in zip(found, data, strict=True):
        assert isinstance(one, Item)
        said = one.numbers if kind != "folder" else {"score": None}
        assert list(said) == ["score"], "width, height, ratio and truth values are no numbers"
        with_data[content] = (one.height, one.width, one.caption, one.class_key, said["score"])
    known = {
        one.data: (one.height, one.width, one.caption, one.class_key, one.score if kind != "folder" else None)
        for one in pictures
    }
    assert with_data == known
    names = [one.name for one in found]
    by_name = {one.name: one for one in pictures}
    if kind == "folder" or kind.startswith("list"):
        assert names == list(by_name)
    elif kind == "webdataset":
        assert [name.split("/", 1)[1] for name in names] == [one.name for one in [*pictures[::2], *pictures[1::2]]]
    else:
        assert names == [f"{names[0].partition('#')[0]}#{row}" for row in range(len(pictures))]
    assert source.random_access == (kind != "parquet")
    again = open_source(kinds[kind])
    assert again.chunks() == cut
    assert again.listing() == source.listing()
    assert source.titles(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_listing_tells_when_the_source_changes(kind: str, tmp_path: Path) -> None:
    config = write_kinds(tmp_path, some_pictures(5))[kind]
    before = open_source(config).listing()
    path = {
        "folder": tmp_path / "files/birds/001.txt",
        "webdataset": tmp_path / "tars/001.tar",
        "parquet": tmp_path / "tables/embedded.parquet",
        "parquet of paths": tmp_path / "tables/paths.parquet",
    }.get(kind, tmp_path / f"lists/all.{kind.rpartition(' ')[2]}")
    path.write_bytes(path.read_bytes() + b" ")
    assert open_source(config).listing() != before


def test_sidecars_are_found_whatever_stands_between(tmp_path: Path) -> None:
    names = ["a.png", "a.b.png", "a-b.png", "ab.png", "a/x.png", "a.d/x.png", "a.d/y.JPG", "z.Jpeg"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(4, 5))
        path.with_suffix(".txt").write_text(name)
        path.with_suffix(".short.txt").write_text("short " + name)
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work/b.png").write_bytes(b"x")
    (tmp_path / "notes.md").write_text("x")
    assert {one.name: one.caption for one in items(SourceConfig(path=str(tmp_path)))} == {name: name for name in names}
    short = items(SourceConfig(path=str(tmp_path), caption_suffix=".short.txt"))
    assert {one.name: one.caption for one in short} == {name: "short " + name for name in names}
    with pytest.raises(ConfigError, match="begins with a dot, unlike 'txt'"):
        open_source(SourceConfig(path=str(tmp_path), caption_suffix="txt")).chunks()


def test_captions_that_are_empty_missing_or_no_text(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.png").write_bytes(encoded(4, 5))
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    found = {one.name: one for one in scanned(SourceConfig(path=str(tmp_path)))}
    assert [found[name].caption for name in ("a.png", "c.png", "d.png")] == [None, None, "one"]  # type: ignore[union-attr]
    assert found["b.png"].kind == "caption"  # type: ignore[union-attr]
    assert "its caption is not UTF-8" in found["b.png"].reason  # type: ignore[union-attr]
    assert found["a.png"].class_key == tmp_path.name  # type: ignore[union-attr]


def test_two_pictures_cannot_share_a_caption(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.txt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"two pictures share one caption: a\.\*"):
        open_source(SourceConfig(path=str(tmp_path))).chunks()


def test_pictures_in_a_row_share_a_caption_only_if_they_differ_in_nothing_but_their_suffix(tmp_path: Path) -> None:
    names = [f"img.{number:06d}.png" for number in range(300)]
    for name in names:
        (tmp_path / name).write_bytes(encoded(4, 5))
        (tmp_path / name).with_suffix(".txt").write_text(name)
    found = items(SourceConfig(path=str(tmp_path)))
    assert [(one.name, one.caption) for one in found] == [(name, name) for name in names]
    for name in ("img.000200.jpg", "img.000100.webp"):
        (tmp_path / name).write_bytes(encoded(4, 5))
    with pytest.raises(DataError, match=r"two pictures share one caption: img\.000100\.\*"):
        open_source(SourceConfig(path=str(tmp_path))).chunks()


def test_broken_pictures_are_named_with_the_reason_and_changed_ones_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.jpg").write_text("<html>404</html>")
    (tmp_path / "fine.png").write_bytes(encoded(4, 5))
    source = open_source(SourceConfig(path=str(tmp_path)))
    (chunk,) = source.chunks()
    found = {one.name: one for one in source.scan(chunk)}
    assert found["empty.png"] == Rejected("empty.png", "broken", "it is empty")
    assert found["words.jpg"] == Rejected("words.jpg", "broken", "it is no picture")
    fine = found["fine.png"]
    assert isinstance(fine, Item)
    (tmp_path / "fine.png").write_bytes(encoded(4, 5) + b"more")
    with pytest.raises(BrokenPicture, match=r"it had \d+ bytes when it was listed, and has \d+ now"):
        source.read(fine.place)
    (tmp_path / "fine.png").unlink()
    with pytest.raises(BrokenPicture, match="there is no such file"):
        source.read(fine.place)
    assert Rejected("fine.png", "broken", "there is no such file") in list(source.scan(chunk))
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    with pytest.raises(StoreError, match="missing"):  # the disk is gone, which no picture can help
        source.read(fine.place)
    with pytest.raises(StoreError, match="missing"):
        list(source.scan(chunk))
    tmp_path.with_name("elsewhere").rename(tmp_path)


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key.png").write_bytes(encoded(4, 5))
    root = tmp_path / "pictures"
    root.mkdir()
    (root / "fine.png").write_bytes(encoded(4, 5))
    (root / "inside.png").symlink_to("fine.png")
    (root / "outside.png").symlink_to("../secret/key.png")
    (root / "nowhere.png").symlink_to("nothing")
    (root / "folder").symlink_to("../secret")
    (root / "loop").symlink_to(".")
    names = [one.name for one in scanned(SourceConfig(path=str(root))) if isinstance(one, Item)]
    assert names == ["fine.png", "inside.png"]
    why = refused(SourceConfig(path=str(root)))
    assert why["folder"] == why["loop"] == "broken: it is a link to a folder, which is not followed"
    assert "outside of" in why["outside.png"]
    assert why["nowhere.png"] == "broken: it is empty" or "no such file" in why["nowhere.png"]
    link = tmp_path / "link"
    link.symlink_to(root)  # the root itself may be one
    assert len([one for one in scanned(SourceConfig(path=str(link))) if isinstance(one, Item)]) == 2


def test_captions_that_are_links_out_of_the_folder_are_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("a password")
    root = tmp_path / "pictures"
    (root / "birds").mkdir(parents=True)
    for name in ("absolute", "birds/relative", "inside", "nowhere", "twice"):
        (root / f"{name}.png").write_bytes(encoded(4, 5))
    (root / "shared.caption").write_text("a bird")
    (root / "absolute.txt").symlink_to(secret)
    (root / "birds/relative.txt").symlink_to("../../secret.txt")
    (root / "inside.txt").symlink_to("shared.caption")
    (root / "nowhere.txt").symlink_to("../nothing")
    (root / "twice.txt").symlink_to("absolute.txt")
    config = SourceConfig(path=str(root))
    assert [(one.name, one.caption) for one in scanned(config) if isinstance(one, Item)] == [("inside.png", "a bird")]
    assert refused(config) == {
        f"{name}.png": f"caption: its caption {name}.txt is not read: "
        f"it is a link to {tmp_path / 'nothing' if name == 'nowhere' else secret}, outside of {root}"
        for name in ("absolute", "birds/relative", "nowhere", "twice")
    }
    link = tmp_path / "link"
    link.symlink_to(root)  # the root itself may be one
    assert [one.name for one in scanned(SourceConfig(path=str(link))) if isinstance(one, Item)] == ["inside.png"]


def test_nothing_there_is_said_with_where_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder of pictures") as caught:
        open_source(SourceConfig(path=str(tmp_path / "none"))).chunks()
    assert caught.value.where == str(tmp_path / "none")
    assert caught.value.remedy is not None
    with pytest.raises(DataError, match="the folder holds no picture"):
        open_source(SourceConfig(path=str(tmp_path))).chunks()
    for kind, what in (("list", "lists of pictures"), ("webdataset", "tar files"), ("parquet", "parquet files")):
        with pytest.raises(DataError, match=f"there are no {what}"):
            open_source(SourceConfig(kind=kind, path=str(tmp_path))).chunks()  # type: ignore[arg-type]
        with pytest.raises(DataError, match=f"there is no folder of {what}"):
            open_source(SourceConfig(kind=kind, path=str(tmp_path / "a/b"))).chunks()  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=r"b\.tar is missing"):
        open_source(SourceConfig(kind="webdataset", path=f"{tmp_path}/{{b,c}}.tar")).chunks()
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match="the lists are empty"):
        open_source(SourceConfig(kind="list", path=str(tmp_path / "a.json"))).chunks()
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"a\.json holds no array"):
        open_source(SourceConfig(kind="list", path=str(tmp_path / "a.json"))).chunks()
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(DataError, match=r"a\.json is not JSON"):
        open_source(SourceConfig(kind="list", path=str(tmp_path / "a.json"))).chunks()
    (tmp_path / "a.parquet").write_text("no parquet at all")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet"):
        open_source(SourceConfig(kind="parquet", path=str(tmp_path))).chunks()


def test_imagenet_numbers_and_names_its_classes_as_everybody(tmp_path: Path) -> None:
    for name in ("n01443537", "n01440764"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / f"{name}_1.JPEG").write_bytes(encoded(4, 5, "JPEG"))
    mapping, index = tmp_path / "LOC_synset_mapping.txt", tmp_path / "imagenet_class_index.json"
    mapping.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    index.write_text(json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "great_white_shark"]}))

    def config(names: Path | None) -> SourceConfig:
        return SourceConfig(kind="imagenet", path=str(tmp_path / "train"), class_names=names and str(names))

    found = items(config(mapping))
    assert [(one.class_key, one.caption) for one in found] == [
        ("n01440764", "tench, Tinca tinca"),
        ("n01443537", "goldfish, Carassius auratus"),
    ]
    assert [one.caption for one in items(config(index))] == ["tench", "great white shark"]
    assert [one.caption for one in items(config(None))] == ["n01440764", "n01443537"]
    assert open_source(config(mapping)).titles(["n01443537"]) == ["goldfish, Carassius auratus"]
    assert open_source(config(mapping)).listing() != open_source(config(index)).listing()
    (tmp_path / "train/n99").mkdir()
    (tmp_path / "train/n99/a.JPEG").write_bytes(b"x")
    with pytest.raises(DataError, match="the folder n99 is no class of"):
        open_source(config(mapping)).chunks()
    with pytest.raises(DataError, match=r"a picture does not lie in the folder of a class: train/n01440764/"):
        open_source(SourceConfig(kind="imagenet", path=str(tmp_path))).chunks()
    mapping.write_text("nonsense")
    with pytest.raises(DataError, match="class names cannot be read"):
        open_source(config(mapping)).chunks()


def test_the_released_lists_are_read_and_entries_that_lead_out_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images/sub").mkdir(parents=True)
    (tmp_path / "images/a.png").write_bytes(encoded(4, 5))
    (tmp_path / "images/sub/b.png").write_bytes(encoded(4, 5))
    (tmp_path / "secret.png").write_bytes(encoded(4, 5))
    (tmp_path / "images/link").symlink_to("..")
    entries = [
        {"width": 5, "height": 4, "ratio": 0.8, "path": "a.png", "prompt": "one", "sharegpt4v": "long", "aes": 6.5},
        {"path": "./sub/../sub/b.png", "prompt": " ", "nan": float("nan"), "big": 10**400, "ok": True, "tags": [1]},
        {"path": str(tmp_path / "images/a.png"), "prompt": 3},
        *(
            {"path": path}
            for path in ("../secret.png", str(tmp_path / "secret.png"), "link/secret.png", "s3://b/a.png")
        ),
        *({"path": path} for path in ("none.png", "", None, "sub", ".", "a\0b", "a.png/b", "x" * 300 + ".png")),
        {"prompt": "no path"},
        "words",
    ]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/data_info.json").write_text(json.dumps(entries))
    config = SourceConfig(kind="list", path=str(tmp_path / "lists/*.json"), root=str(tmp_path / "images"))
    found = scanned(config)
    good = [one for one in found if isinstance(one, Item)]
    assert [(one.name, one.caption, dict(one.numbers)) for one in good] == [
        ("a.png", "one", {"aes": 6.5}),
        ("sub/b.png", None, {}),
        ("a.png", None, {}),
    ]
    bad = [one for one in found if isinstance(one, Rejected)]
    assert {one.kind for one in bad} == {"broken"}
    assert len(good) + len(bad) == len(entries)
    assert sum("outside of" in one.reason for one in bad) == 6
    source = open_source(config.model_copy(update={"caption_key": "sharegpt4v"}))
    first = next(iter(source.scan(source.chunks()[0])))
    assert isinstance(first, Item)
    assert first.caption == "long"


def test_lines_that_cannot_be_read_are_named_by_their_number(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(4, 5))
    lines = ['{"path": "a.png", "text": "one"}', "", "{", "[1]", '{"path": "gone.png"}']
    (tmp_path / "list.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"path": "\xff"}')
    why = refused(SourceConfig(kind="list", path=str(tmp_path / "list.jsonl")))
    assert list(why) == ["list.jsonl#3", "list.jsonl#4", "gone.png", "list.jsonl#6"]
    (tmp_path / "list.csv").write_text('path,caption,n\na.png,"x\ny",1\na.png\n\ngone.png,z,\n')
    found = scanned(SourceConfig(kind="list", path=str(tmp_path / "list.csv")))
    assert [(one.name, getattr(one, "caption", None)) for one in found] == [
        ("a.png", "x\ny"),
        ("list.csv#4", None),
        ("gone.png", None),
    ]


def test_a_csv_in_another_encoding_loses_no_letter_unsaid(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(4, 5))
    rows = "path,caption\na.png,café\nb.png,tea\nç.png,x\n"
    (tmp_path / "list.csv").write_text(rows, encoding="cp1252")
    config = SourceConfig(kind="list", path=str(tmp_path / "list.csv"))
    first, second, third = scanned(config)
    assert isinstance(first, Item)
    assert not is_unicode(str(first.caption)), "the scan leaves it out"
    assert isinstance(second, Item)
    assert second.caption == "tea"
    assert isinstance(third, Rejected)
    assert "its path in the list is not UTF-8" in third.reason
    (tmp_path / "list.csv").write_text("path,größe\na.png,3\n", encoding="cp1252")
    with pytest.raises(DataError, match=r"list\.csv is not UTF-8: its first line"):
        scanned(config)


def test_a_list_says_where_its_pictures_begin(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"part{number}/images").mkdir(parents=True)
        (tmp_path / f"part{number}/images/a.png").write_bytes(encoded(4, 5 + number))
        (tmp_path / f"part{number}/list.jsonl").write_text('{"image": "images/a.png", "label": 3.0}\n')
    config = SourceConfig(kind="list", path=f"{tmp_path}/part*/list.jsonl", class_key="label")
    assert [(one.name, one.width, one.class_key) for one in items(config)] == [
        ("part0/images/a.png", 5, "3"),
        ("part1/images/a.png", 6, "3"),
    ]


def test_samples_of_tars_that_are_incomplete_double_or_lead_out(tmp_path: Path) -> None:
    good = encoded(4, 5)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "./one.PNG", good)
        add(tar, "./one.json", json.dumps({"prompt": "said", "n": 2}).encode())
        add(tar, "two.jpg", b"no picture")
        add(tar, "three.txt", b"alone")
        add(tar, "four.png", good)
        add(tar, "four.jpg", good)
        add(tar, "five.png", good)
        add(tar, "five.txt", b"caf\xe9")
        add(tar, "six.png", good)
        add(tar, "six.json", b"{")
        add(tar, "seven.png", good)
        add(tar, "seven.seg.png", b"another thing")
        add(tar, "../eight.png", good)
        add(tar, "/nine.png", good)
        link = tarfile.TarInfo("ten.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add(tar, "folder/eleven.png", good)
        add(tar, "one.PNG", good)
    config = SourceConfig(kind="webdataset", path=str(tmp_path))
    found = [one for one in scanned(config) if isinstance(one, Item)]
    assert [(one.name, one.caption, dict(one.numbers)) for one in found] == [
        ("a.tar/one.PNG", "said", {"n": 2.0}),
        ("a.tar/seven.png", None, {}),
        ("a.tar/folder/eleven.png", None, {}),
    ]
    source = open_source(config)
    assert {source.read(one.place) for one in found} == {good}
    why = refused(config)
    assert why["a.tar/two.jpg"] == "broken: it is no picture"
    assert why["a.tar/three"] == "broken: its sample holds no picture"
    assert "holds two pictures" in why["a.tar/four.jpg"]
    assert why["a.tar/five.png"].startswith("caption: its caption is not UTF-8")
    assert why["a.tar/six.png"].startswith("caption: its .json cannot be read")
    assert "leads out of the tar file" in why["a.tar/../eight.png"]
    assert "leads out of the tar file" in why["a.tar//nine.png"]
    assert "a link" in why["a.tar/ten.png"]
    assert "holds it twice" in why["a.tar/one.PNG"]
    assert len(why) == 9


def test_what_follows_a_tar_that_was_joined_by_cat_is_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            add(tar, f"{name}.png", encoded(4, 5))
    joined = tmp_path / "joined/x.tar"
    joined.parent.mkdir()
    joined.write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    config = SourceConfig(kind="webdataset", path=str(joined))
    assert [one.name for one in scanned(config)] == ["x.tar/a.png", "x.tar"]
    (reason,) = refused(config).values()
    assert "behind its first 1 members: another one follows its end, as where cat joined several" in reason
    joined.write_bytes((tmp_path / "a.tar").read_bytes() + b"signed\n")
    assert len(items(config)) == 1, "what is no tar is nobody's loss"
    subprocess.run(["tar", "--concatenate", f"--file={tmp_path / 'a.tar'}", str(tmp_path / "b.tar")], check=True)
    assert len(items(SourceConfig(kind="webdataset", path=str(tmp_path / "a.tar")))) == 2


def test_a_tar_that_ends_too_early_keeps_what_is_before(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(6):
            add(tar, f"{number}.png", encoded(40, 40, seed=number))
    whole = (tmp_path / "a.tar").read_bytes()
    config = SourceConfig(kind="webdataset", path=str(tmp_path / "a.tar"))
    last = items(config)[-1].place
    for end in (last.start + 1000, last.start + 100, last.start - 100, last.start - 300):
        (tmp_path / "a.tar").write_bytes(whole[:end])
        found = scanned(config)
        assert [one.name for one in found if isinstance(one, Item)] == [f"a.tar/{number}.png" for number in range(5)]
        assert any(isinstance(one, Rejected) and one.kind == "broken" for one in found), end
    spoiled = bytearray(whole)
    spoiled[last.start - 512 : last.start] = os.urandom(512)
    (tmp_path / "a.tar").write_bytes(spoiled)
    assert "the tar file is damaged behind its first 5 members" in refused(config)["a.tar"]
    (tmp_path / "a.tar").write_bytes(
        whole[: last.start + -(-last.length // 512) * 512]
    )  # some writers leave out what follows
    assert len(items(config)) == 6
    (tmp_path / "a.tar").write_bytes(whole[: last.start])
    with pytest.raises(StoreError, match=r"a\.tar ends too early"):
        open_source(config).read(last)


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.png", encoded(4, 5))
    packed = gzip.compress((tmp_path / "a.tar").read_bytes())
    (tmp_path / "a.tar").write_bytes(packed)
    with pytest.raises(DataError, match=r"a\.tar is compressed by gzip") as caught:
        scanned(SourceConfig(kind="webdataset", path=str(tmp_path)))
    assert "gunzip" in str(caught.value)
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    for path in (tmp_path, tmp_path / "a.tar.gz"):
        with pytest.raises(DataError, match=r"a\.tar\.gz is compressed"):
            open_source(SourceConfig(kind="webdataset", path=str(path))).chunks()


def test_parquet_columns_are_found_or_asked_for(tmp_path: Path) -> None:
    table = pa.table(
        {
            "jpg": pa.array([encoded(4, 5), None, b"", b"words"], pa.binary()),
            "caption": ["one", "two", None, "four"],
            "label": pa.array([2, 0, 1, 1], pa.int64()),
            "aesthetic": pa.array([6.5, None, float("inf"), 1.0], pa.float32()),
            "score": pa.array([Decimal("6.25"), None, None, None], pa.decimal128(9, 2)),
            "flag": [True, False, True, True],
            "tags": [[1], [2], [3], [4]],
            "WIDTH": [1, 1, 1, 1],
        }
    )
    features = {"info": {"features": {"label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "a.parquet")
    config = SourceConfig(kind="parquet", path=str(tmp_path), class_key="label")
    (found,) = [one for one in scanned(config) if isinstance(one, Item)]
    assert (found.name, found.caption, found.class_key) == ("a.parquet#0", "one", "2")
    assert dict(found.numbers) == {"aesthetic": 6.5, "score": 6.25}
    assert refused(config) == {
        "a.parquet#1": "broken: the row holds no picture",
        "a.parquet#2": "broken: the row holds no picture",
        "a.parquet#3": "broken: it is no picture",
    }
    source = open_source(config)
    assert source.titles(["0", "2", "7"]) == ["cat", "owl", "7"]
    assert source.read(found.place) == encoded(4, 5)
    with pytest.raises(BrokenPicture, match="bytes when it was listed"):
        source.read(replace(found.place, length=7))
    with pytest.raises(BrokenPicture, match="fewer rows"):
        source.read(Place("a.parquet", 9, 7))
    for changes, words in (
        ({"picture_key": "nothing"}, "no column holds a picture or its path: there is jpg, caption"),
        ({"picture_key": "label"}, "the column label holds int64, neither pictures nor paths"),
        ({"caption_key": "prompt"}, "source.caption_key: there is no column prompt, only jpg"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_source(config.model_copy(update=changes)).chunks()


def test_the_last_row_groups_are_kept_in_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [encoded(20, 20, seed=number) for number in range(12)]
    pq.write_table(pa.table({"png": data}), tmp_path / "a.parquet", row_group_size=3)
    monkeypatch.setattr(tables, "_CACHED_BYTES", 7 * len(data[0]))
    source = open_source(SourceConfig(kind="parquet", path=str(tmp_path / "a.parquet")))
    assert isinstance(source, tables.ParquetSource)
    places = [one.place for chunk in source.chunks() for one in source.scan(chunk) if isinstance(one, Item)]
    assert [source.read(place) for place in places] == data
    assert len(source._groups) == 2
    assert [source.read(place) for place in reversed(places)] == data[::-1]


def test_braces_are_written_out() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand_braces("a{9..10}") == ["a9", "a10"]
    assert expand_braces("plain") == ["plain"]
    with pytest.raises(ConfigError, match="more than a million files"):
        expand_braces("{0..9999999}")


def test_a_folder_may_be_called_like_a_pattern(tmp_path: Path) -> None:
    odd = tmp_path / "a[1]{2}"
    odd.mkdir()
    pq.write_table(pa.table({"png": [encoded(4, 5)]}), odd / "b.parquet")
    assert len(items(SourceConfig(kind="parquet", path=str(odd)))) == 1
    assert len(items(SourceConfig(kind="parquet", path=str(odd / "b.parquet")))) == 1
