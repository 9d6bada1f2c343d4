"""The end of preparing: parts are joined to a set, and a page shows what it holds."""

from __future__ import annotations

import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixart_ds import files
from pixart_ds.config.schema import PrepareConfig
from pixart_ds.data.format import CONDITIONS, MANIFEST, ROWS, SKIPPED, SUMMARY, SetDescription, latents_folder
from pixart_ds.data.mds import FolderSource, OpenShard, ShardIndex
from pixart_ds.data.range_file import RangeFile
from pixart_ds.data.shards import PreparedSet
from pixart_ds.data.store import exists, is_remote
from pixart_ds.data.target import open_target, scratch_of
from pixart_ds.data.writer import Conditions, SetWriter
from pixart_ds.encoders.latents import KLEncoder
from pixart_ds.prepare import summary
from pixart_ds.prepare.encode import skipped_line
from pixart_ds.prepare.items import Rejected
from pixart_ds.prepare.parts import Plan
from pixart_ds.prepare.scan import read_scan

EXAMPLES = 24
"""Pictures that the page shows."""
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Counts:
    """What a finished set says of how it was made.

    Attributes:
        skipped: Pictures that were left out, by kind.
        truncated: Captions that were cut.
    """

    skipped: dict[str, int]
    truncated: int


def counts_of(made: PreparedSet) -> Counts:
    totals = files.parse_json(made.store.read(MANIFEST), Path(MANIFEST))["totals"]
    return Counts(totals["skipped"], totals["truncated"])


def finish(config: PrepareConfig, work: Path, plan: Plan) -> None:
    """Joins the parts of a plan, all of which are written."""
    description = SetDescription.model_validate(files.read_json(work / "set.json"))
    writer = SetWriter(config.output, description, plan=plan.key(config), label="finish")
    conditions = Conditions.of_bytes((work / CONDITIONS).read_bytes(), config.prompts)
    writer.finish(conditions, _write_skipped(config, work, writer))


def _write_skipped(config: PrepareConfig, work: Path, writer: SetWriter) -> dict[str, Any]:
    """Writes skipped.jsonl: what the scan left out, then each part; returns totals for the manifest."""
    kinds: Counter[str] = Counter()
    truncated, squares, errors = 0, 0.0, 0.0
    target = open_target(config.output)
    with scratch_of(target, "skipped") as scratch:
        with open(scratch / SKIPPED, "w", encoding="utf-8") as file:
            for rejected in read_scan(work).rejections():
                kinds[rejected.kind] += 1
                file.write(json.dumps(skipped_line(rejected), ensure_ascii=False) + "\n")
            for marker in writer.markers():
                for line in marker["skipped"]:
                    kinds[line["kind"]] += 1
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                truncated += sum(line["truncated"] for line in marker["rows"])
                squares += marker["caption_squares"]
                errors += marker["caption_squared_error"]
        target.send(scratch / SKIPPED, SKIPPED)
    error = (errors / squares) ** 0.5 if squares and config.caption_codec != "fp16" else None
    return {"skipped": dict(sorted(kinds.items())), "truncated": truncated, "caption_error": error}


# ---- the page -----------------------------------------------------------------------------------------------------------


def write_summary(config: PrepareConfig, made: PreparedSet, seconds: float | None, device: str) -> str:
    """Writes the set's page, if it is not there, and returns the same as text; `seconds` as in `Facts`."""
    there = exists(made.store, SUMMARY)
    totals = files.parse_json(made.store.read(MANIFEST), Path(MANIFEST))["totals"]
    with closing(RangeFile(made.store, ROWS)) as rows:
        facts = summary.Facts(
            path=config.output,
            description=made.description,
            rows=rows,  # type: ignore[arg-type]  # pyarrow reads any file
            parts=len(made.counts),
            folder_bytes={
                folder: int(made.index(name).sizes.sum())
                for name, folder in (
                    ("captions", "captions"),
                    *((n, latents_folder(n)) for n in made.description.latents),
                )
            },
            seconds=seconds,
            skipped=summary.grouped(_skipped(made)),
            codec_error=totals["caption_error"],
            examples=() if there else list(_examples(config, made, device)),  # the text shows none
        )
        if not there:
            open_target(config.output).put(SUMMARY, summary.html(facts).encode())
        return summary.text(facts)


def _skipped(made: PreparedSet) -> Iterator[Rejected]:
    with io.BufferedReader(RangeFile(made.store, SKIPPED), _READ_BYTES) as lines:  # there may be millions
        for line in lines:
            about = json.loads(line)
            yield Rejected(about["picture"], about["kind"], about["reason"])


def _examples(config: PrepareConfig, made: PreparedSet, device: str) -> Iterator[summary.Example]:
    """Rows from groups all over the set, decoded from what is stored at the largest size below 600 pixels, or the smallest."""
    about = made.description
    name = _shown_latents(about)
    groups = np.unique(np.linspace(0, len(made.counts) - 1, EXAMPLES).round().astype(int)).tolist()
    rows_each = -(-EXAMPLES // len(groups))
    vae = KLEncoder(config.vae, device)
    with tempfile.TemporaryDirectory(prefix="pixart_ds-summary-") as folder:
        for group in groups[:EXAMPLES]:
            texts = _open(made, "captions", group, Path(folder))
            images = _open(made, name, group, Path(folder))
            for row in range(min(rows_each, len(texts))):
                yield _example(made, vae, name, group, texts.read(row), images.read(row))


def _shown_latents(about: SetDescription) -> str:
    """Buckets before squares: their cut is what can be wrong."""

    def key(name: str) -> tuple[bool, float]:
        side = max(max(size) for size in about.latents[name].sizes) * about.downsampling_factor
        return about.latents[name].square, side if side > 600 else 1200 - side

    return min(about.latents, key=key)


def _open(made: PreparedSet, name: str, group: int, folder: Path) -> OpenShard:
    """One shard, from where it lies or from a copy of it."""
    index: ShardIndex = made.index(name)
    shards = "captions" if name == "captions" else latents_folder(name)
    if not is_remote(made.path):
        return FolderSource(index, Path(made.path) / shards).open(group)
    (folder / shards).mkdir(exist_ok=True)
    made.store.fetch(f"{shards}/{index.names[group]}", folder / shards / index.names[group])
    return FolderSource(index, folder / shards).open(group)


def _example(
    made: PreparedSet, vae: KLEncoder, name: str, group: int, text: dict[str, bytearray], image: dict[str, bytearray]
) -> summary.Example:
    about = made.description
    partition = int(made.partitions[group])
    size = about.latents[name].sizes[0 if about.latents[name].square else partition]
    moments = np.frombuffer(image["latents"], "<f2").reshape(2 * about.latent_channels, *size).astype(np.float32)
    latents = (torch.from_numpy(moments[: about.latent_channels]) - about.shift_factor) * about.scaling_factor
    height, width = np.frombuffer(image["original_size"], "<i4").tolist()
    crop = np.frombuffer(image["crop"], "<i4").tolist()
    return summary.Example(
        picture=vae.decode(latents[None])[0],
        caption=bytes(text["caption_text"]).decode(),
        name=bytes(text["name"]).decode(),
        original=(height, width),
        crop=tuple(crop),
        latents=name,
        ratio=1.0 if about.latents[name].square else about.ratios[partition],
    )
