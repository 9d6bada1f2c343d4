"""The same pictures in every form that can be prepared."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pixart_ds.config.schema import PrepareConfig, SourceConfig

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "JPEG": "JPEG"}


@dataclass(frozen=True)
class Made:
    """One picture, whatever form it lies in."""

    name: str
    data: bytes
    height: int
    width: int
    caption: str
    class_key: str
    score: float


def encoded(height: int, width: int, kind: str = "PNG", mode: str = "RGB", seed: int = 0, **options: Any) -> bytes:
    """A picture's file, of coarse noise."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, kind, **options)
    return file.getvalue()


def some_pictures(count: int = 14) -> list[Made]:
    """Of all formats, sizes and two classes; captions with commas, quotes, lines and letters of other alphabets."""
    made = []
    for number in range(count):
        suffix = list(FORMATS)[number % len(FORMATS)]
        height, width = 8 + number, 30 - number
        folder = "birds" if number % 3 else "big cats"
        made.append(
            Made(
                f"{folder}/{number:03d}.{suffix}",
                encoded(height, width, FORMATS[suffix], seed=number),
                height,
                width,
                f'a "nice" bird, № {number},\nsecond line é',
                folder,
                number / 4,
            )
        )
    return sorted(made, key=lambda one: one.name)


def write_kinds(folder: Path, pictures: list[Made]) -> dict[str, SourceConfig]:
    """Writes each form under the folder; returns how each is named in a recipe."""
    for one in pictures:
        path = folder / "files" / one.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(one.data)
        path.with_suffix(".txt").write_text(f" {one.caption}\n")
    entries: list[dict[str, Any]] = [
        {
            "path": one.name,
            "prompt": one.caption,
            "label": one.class_key,
            "score": one.score,
            "width": 1,
            "height": 1,
            "ratio": 1.0,
        }
        for one in pictures
    ]
    (folder / "lists").mkdir()
    (folder / "lists/all.json").write_text(json.dumps(entries))
    (folder / "lists/all.jsonl").write_text("\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries))
    with open(folder / "lists/all.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(entries[0]))
        writer.writeheader()
        writer.writerows(entries)
    (folder / "tars").mkdir()
    for number in range(2):
        write_tar(folder / f"tars/{number:03d}.tar", pictures[number::2])
    tables = folder / "tables"
    tables.mkdir()
    table = pa.table(
        {
            "image": [{"bytes": one.data, "path": one.name} for one in pictures],
            "text": [one.caption for one in pictures],
            "label": [one.class_key for one in pictures],
            "score": [one.score for one in pictures],
        }
    )
    pq.write_table(table, tables / "embedded.parquet", row_group_size=4)
    paths = table.set_column(0, "image", pa.array([one.name for one in pictures]))
    pq.write_table(paths, tables / "paths.parquet", row_group_size=4)
    where, root = str(folder), str(folder / "files")
    return {
        "folder": SourceConfig(path=root),
        **{
            f"list {kind}": SourceConfig(kind="list", path=f"{where}/lists/all.{kind}", root=root, class_key="label")
            for kind in ("json", "jsonl", "csv")
        },
        "webdataset": SourceConfig(kind="webdataset", path=f"{where}/tars/{{000..001}}.tar"),
        "parquet": SourceConfig(kind="parquet", path=f"{where}/tables/emb*.parquet", class_key="label"),
        "parquet of paths": SourceConfig(
            kind="parquet", path=f"{where}/tables/paths.parquet", root=root, class_key="label"
        ),
    }


def write_tar(path: Path, pictures: list[Made]) -> None:
    with tarfile.open(path, "w") as tar:
        for one in pictures:
            stem = one.name.rpartition(".")[0]
            add(tar, one.name, one.data)
            add(tar, f"{stem}.txt", one.caption.encode())
            add(tar, f"{stem}.cls", one.class_key.encode())
            add(tar, f"{stem}.json", json.dumps({"score": one.score, "prompt": "another", "ok": True}).encode())


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def prepare_config(source: SourceConfig, **more: Any) -> PrepareConfig:
    """A recipe whose encoders are not there: for what comes before them."""
    values = {"vae": "none", "text_encoder": "none", "output": "none", "latents": [{"name": "a", "square": 64}]}
    return PrepareConfig.model_validate({"source": source, **values, **more})
