"""Sources in an object store: the same pictures as on a disk, in few requests; a store that fails breaks no picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pixart_ds import s3 as s3_module
from pixart_ds.config.schema import SourceConfig
from pixart_ds.data.store import FolderStore, open_store
from pixart_ds.errors import DataError
from pixart_ds.prepare.items import BrokenPicture, Item, Rejected
from pixart_ds.prepare.scan import scan
from pixart_ds.prepare.sources import Source, open_source
from pixart_ds.s3 import StoreError
from tests.helpers.s3 import S3Server
from tests.helpers.sources import encoded, prepare_config, some_pictures, write_kinds

pytestmark = pytest.mark.store


def found(source: Source) -> Iterator[tuple[Item | Rejected, bytes | None]]:
    for chunk in source.chunks():
        for one in source.scan(chunk):
            yield one, source.read(one.place) if isinstance(one, Item) else None


def in_store(config: SourceConfig, folder: Path, bucket: str) -> SourceConfig:
    """The same source, copied to s3://BUCKET/made."""
    moved = {
        name: value.replace(str(folder), f"s3://{bucket}/made")
        for name, value in (("path", config.path), ("root", config.root))
        if value is not None
    }
    return config.model_copy(update=moved)


def test_every_kind_gives_what_it_gives_on_a_disk(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    kinds = write_kinds(tmp_path, some_pictures())
    (tmp_path / "files/birds/broken.png").write_text("no picture")
    (tmp_path / "files/birds/noise.png").write_bytes(encoded(200, 300))  # larger than what is read first
    s3.put_folder(tmp_path, bucket, "made")
    for kind, config in kinds.items():
        here, there = open_source(config), open_source(in_store(config, tmp_path, bucket))
        assert list(found(there)) == list(found(here)), kind
        assert here.listing() == there.listing(), kind
        assert [chunk.label for chunk in here.chunks()] == [chunk.label for chunk in there.chunks()]
    patterns = SourceConfig(kind="webdataset", path=f"s3://{bucket}/made/**/00[0-9].tar")
    assert [chunk.label for chunk in open_source(patterns).chunks()] == ["tars/000.tar", "tars/001.tar"]
    assert len(list(found(open_source(SourceConfig(kind="webdataset", path=f"s3://{bucket}/made/tars"))))) == 14
    imagenet = SourceConfig(kind="imagenet", path=f"s3://{bucket}/made/files")
    assert [one.class_key for one, _ in found(open_source(imagenet)) if isinstance(one, Item)][:1] == ["big cats"]


def test_scanned_tars_are_read_once_and_headers_without_the_rest(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    kinds = write_kinds(tmp_path, some_pictures())
    large = encoded(1000, 1000)
    for number in range(4):
        (tmp_path / f"files/birds/large{number}.png").write_bytes(large)
    s3.put_folder(tmp_path, bucket, "made")
    before = len(s3.requests("GET", ".tar"))
    scan(prepare_config(in_store(kinds["webdataset"], tmp_path, bucket)), tmp_path / "tars-work")
    asked = s3.requests("GET", ".tar")[before:]
    sizes = sum(path.stat().st_size for path in (tmp_path / "tars").iterdir())
    assert len(asked) == 2
    assert sum(one.sent for one in asked) == sizes
    before = len(s3.requests("GET", "large"))
    config = prepare_config(in_store(kinds["folder"], tmp_path, bucket), captions={"captioner": "a.b:C"})
    assert scan(config, tmp_path / "folder-work", 2).pictures == 18
    asked = s3.requests("GET", "large")[before:]
    assert sum(one.sent for one in asked) <= 4 * 2 * (64 << 10) < 4 * len(large)


def test_names_and_ranges_of_a_store_are_those_of_a_folder(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    for name in ("a.b/c", "a/b", "a-c", "b/d/e", "ab", "é"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 5)
    s3.put_folder(tmp_path, bucket, "made")
    folder, store = FolderStore(tmp_path), open_store(f"s3://{bucket}/made")
    for prefix in ("", "a", "a/", "b/d", "none", "none/x"):
        assert list(folder.names(prefix)) == list(store.names(prefix))
    for here in (folder, store):
        assert (here.read_range("b/d/e", 3, 4), here.read_range("b/d/e", 9, 0), here.size("ab")) == (b"/eb/", b"", 10)
        with pytest.raises(StoreError, match="ab ends too early"):
            here.read_range("ab", 8, 3)
        with pytest.raises(StoreError, match="ab ends too early"):
            here.read_range("ab", 10, 1)
        with pytest.raises(StoreError) as caught:
            here.read_range("none", 0, 1)
        assert caught.value.missing


def test_a_picture_that_is_gone_is_broken_and_a_store_that_is_gone_is_not(
    own_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "_CONNECT_TIMEOUT_SECONDS", 1.0)
    for number in range(3):
        own_server.put("own", f"pictures/{number}.png", encoded(4, 5))
    source = open_source(SourceConfig(path="s3://own/pictures"))
    (chunk,) = source.chunks()
    first = next(iter(source.scan(chunk)))
    assert isinstance(first, Item)
    own_server.delete("own", "pictures/0.png")
    own_server.put("own", "pictures/1.png", encoded(40, 50))
    with pytest.raises(BrokenPicture, match="there is no such file"):
        source.read(first.place)
    again = list(source.scan(chunk))
    assert again[0] == Rejected("0.png", "broken", "there is no such file")
    own_server.stop()
    for ask in (lambda: list(source.scan(chunk)), lambda: source.read(first.place)):
        with pytest.raises(StoreError, match="the store did not give [012].png") as caught:
            ask()
        assert caught.value.where == "s3://own/pictures"
        assert not caught.value.final
    config = prepare_config(SourceConfig(path="s3://own/pictures"), work="work")
    with pytest.raises(StoreError):
        scan(config, tmp_path / "work")


def test_nothing_in_a_store_is_said(s3: S3Server, bucket: str) -> None:
    with pytest.raises(DataError, match="the folder holds no picture") as caught:
        open_source(SourceConfig(path=f"s3://{bucket}/none")).chunks()
    assert caught.value.where == f"s3://{bucket}/none"
    for kind, what in (("list", "lists of pictures"), ("webdataset", "tar files"), ("parquet", "parquet files")):
        with pytest.raises(DataError, match=f"there are no {what}"):
            open_source(SourceConfig(kind=kind, path=f"s3://{bucket}/none")).chunks()  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="there is no bucket there-is-none"):
        open_source(SourceConfig(path="s3://there-is-none/x")).chunks()
    with pytest.raises(StoreError, match="b.tar is not in the store"):
        open_source(SourceConfig(kind="webdataset", path=f"s3://{bucket}/{{b,c}}.tar")).chunks()
