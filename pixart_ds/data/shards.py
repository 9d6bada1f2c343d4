"""The format of a prepared set: what one row holds, how sets are written part by part, and how they are opened.

    captions/index.json, part-00000/shard.00000.mds, …     caption features of row group 0, …
    latents-NAME/index.json, part-00000/shard.00000.mds, …  the same rows' latents at one resolution
    parts/part-00000.json                                   a part that is whole
    conditions.safetensors, prompts.json                    features of the empty caption and of the held prompts
    rows.npz                                                columns for filters, one entry for each row
    manifest.json                                           written last

A row group is one shard in every folder, so that text is stored once for all resolutions. Rows of a group share a partition, the
nearest aspect ratio. Everything is plain MDS: a stock `StreamingDataset` reads each folder with an index.json.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from pixart_ds import files
from pixart_ds.config.schema import SetConfig, StageConfig
from pixart_ds.data.cache import CacheOptions, ShardCache, file_name, shards_here
from pixart_ds.data.mds import FolderSource, ShardIndex, ShardSource
from pixart_ds.data.store import Store, is_remote, open_store
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.plan.order import SetRows
from pixart_ds.plan.random import key_of, permutation, raw_words
from pixart_ds.s3 import StoreError

FORMAT = 1
_CAPTION_COLUMNS = {
    "caption": "str",
    "caption_embeds": "bytes",
    "class_label": "int",
    "name": "str",
    "part": "int",
    "row": "int",
}
_LATENT_COLUMNS = {
    "latents": "bytes",
    "original_size": "ndarray:int32:2",
    "part": "int",
    "row": "int",
    "shape": "ndarray:int32:3",
}
_MAX_SHARD_BYTES = (1 << 32) - 1  # MDS offsets are 32 bits


class LatentsInfo(BaseModel):
    """One resolution of a set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    square: bool
    """All rows have one size and are read as one bucket."""
    sizes: tuple[tuple[int, int], ...]
    """(height, width) of the latents: one for a square, else one for each ratio."""


class SetDescription(BaseModel):
    """What a set's rows are made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratios: tuple[float, ...]
    """Aspect ratios (height / width) of the partitions."""
    latents: dict[str, LatentsInfo]
    latent_channels: int
    downsampling_factor: int
    scaling_factor: float
    """Latents are multiplied by this in training, after `shift_factor` was subtracted."""
    shift_factor: float = 0.0
    caption_channels: int
    max_tokens: int
    classes: tuple[str, ...]
    """Class names; a row's label is an index into them."""
    vae: str
    """How the VAE was named when the set was prepared."""
    text_encoder: str
    vae_fingerprint: str
    text_fingerprint: str
    source: str
    """Where the pictures came from."""


@dataclass(frozen=True)
class Row:
    """One picture.

    Attributes:
        name: Its file's path within the source.
        caption: Its text.
        caption_embeds: (L, D) float16, real tokens only.
        class_label: Index of its class, or -1.
        original_height, original_width: Of the file, in pixels.
        latents: For each resolution (2C, h, w) float16: mean and standard deviation of the VAE's posterior, unscaled.
        aesthetic_score: If it has one.
    """

    name: str
    caption: str
    caption_embeds: npt.NDArray[np.float16]
    class_label: int
    original_height: int
    original_width: int
    latents: Mapping[str, npt.NDArray[np.float16]]
    aesthetic_score: float | None = None


def part_name(number: int) -> str:
    return f"part-{number:05d}"


class SetWriter:
    """Writes a set part by part; a killed writer leaves whole parts, and the next one goes on with the others."""

    def __init__(self, folder: Path, description: SetDescription) -> None:
        self.folder, self.description = folder, description
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        for each in self._folders():
            each.mkdir(exist_ok=True)

    def _folders(self) -> list[Path]:
        return [self.folder / "captions", *(self.folder / f"latents-{name}" for name in self.description.latents)]

    def parts_done(self) -> set[int]:
        """Numbers of the parts that are whole."""
        return {int(path.stem.removeprefix("part-")) for path in (self.folder / "parts").glob("part-*.json")}

    def write_group(self, part: int, partition: int, rows: Sequence[Row]) -> None:
        """Writes one row group as one shard in every folder; none of it counts before all of it is durable.

        Args:
            part: The group's number.
            partition: Index of the rows' aspect ratio.
            rows: May be empty, if none of the part's pictures could be read.
        """
        if rows:
            captions = [self._caption_sample(part, number, row) for number, row in enumerate(rows)]
            self._write(self.folder / "captions", part, _CAPTION_COLUMNS, captions)
            for name in self.description.latents:
                latents = [self._latent_sample(part, number, row, name) for number, row in enumerate(rows)]
                self._write(self.folder / f"latents-{name}", part, _LATENT_COLUMNS, latents)
        columns = {
            "name": [row.name for row in rows],
            "height": [row.original_height for row in rows],
            "width": [row.original_width for row in rows],
            "num_tokens": [len(row.caption_embeds) for row in rows],
            "aesthetic_score": [row.aesthetic_score for row in rows],
        }
        marker = {"part": part, "partition": partition, "count": len(rows), "rows": columns}
        files.write_json(self.folder / "parts" / f"{part_name(part)}.json", marker)

    def _caption_sample(self, part: int, number: int, row: Row) -> dict[str, Any]:
        if row.caption_embeds.dtype != np.float16 or row.caption_embeds.shape[1:] != (
            self.description.caption_channels,
        ):
            raise DataError(f"{row.name}: caption features are {row.caption_embeds.dtype} {row.caption_embeds.shape}")
        return {
            "caption": row.caption,
            "caption_embeds": row.caption_embeds.tobytes(),
            "class_label": row.class_label,
            "name": row.name,
            "part": part,
            "row": number,
        }

    def _latent_sample(self, part: int, number: int, row: Row, name: str) -> dict[str, Any]:
        latents = row.latents[name]
        if latents.dtype != np.float16 or latents.shape[0] != 2 * self.description.latent_channels:
            raise DataError(f"{row.name}: latents {name} are {latents.dtype} {latents.shape}")
        return {
            "latents": latents.tobytes(),
            "original_size": np.array([row.original_height, row.original_width], np.int32),
            "part": part,
            "row": number,
            "shape": np.array(latents.shape, np.int32),
        }

    def _write(self, folder: Path, part: int, columns: dict[str, str], samples: Sequence[dict[str, Any]]) -> None:
        from pixart_ds.data.streaming_compat import mds_writer

        final = folder / part_name(part)
        temporary = files.temporary_name(final)
        for stale in (temporary, final):  # of a writer that was killed before this part's marker
            if stale.exists():
                shutil.rmtree(stale)
        with mds_writer()(
            out=str(temporary), columns=columns, hashes=["xxh3_64"], size_limit=_MAX_SHARD_BYTES, progress_bar=False
        ) as writer:
            for sample in samples:
                writer.write(sample)
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        files.sync_folder(temporary)
        os.rename(temporary, final)
        files.sync_folder(folder)

    def finish(
        self, null_embeds: npt.NDArray[np.float16], prompts: Sequence[tuple[str, npt.NDArray[np.float16]]]
    ) -> None:
        """Merges the indexes of all parts and writes conditions, rows and manifest.

        Args:
            null_embeds: (L, D) features of the empty caption.
            prompts: Held prompts with their features.
        """
        from safetensors.numpy import save

        markers = [
            files.read_json(self.folder / "parts" / f"{part_name(part)}.json") for part in sorted(self.parts_done())
        ]
        groups = [marker for marker in markers if marker["count"]]
        if not groups:
            raise DataError(
                "no part of the set holds a row", where=self.folder, remedy="look at skipped.jsonl beside it"
            )
        for folder in self._folders():
            files.write_json(
                folder / "index.json", {"version": 2, "shards": [_index_entry(folder, group) for group in groups]}
            )
        tensors = {"null": null_embeds, **{f"prompt.{number}": embeds for number, (_, embeds) in enumerate(prompts)}}
        files.write_durable(self.folder / "conditions.safetensors", [save(tensors)])
        files.write_json(self.folder / "prompts.json", [text for text, _ in prompts])
        self._write_rows(groups)
        described = self.description.model_dump(mode="json")
        manifest = {
            "format": FORMAT,
            "description": described,
            "groups": [{"part": g["part"], "partition": g["partition"], "count": g["count"]} for g in groups],
            "num_samples": sum(group["count"] for group in groups),
            "fingerprint": self._fingerprint(described),
        }
        files.write_json(self.folder / "manifest.json", manifest)

    def _write_rows(self, groups: Sequence[dict[str, Any]]) -> None:
        buffer = io.BytesIO()
        columns = {name: [value for group in groups for value in group["rows"][name]] for name in groups[0]["rows"]}
        np.savez(
            buffer,
            height=np.array(columns["height"], np.int32),
            width=np.array(columns["width"], np.int32),
            num_tokens=np.array(columns["num_tokens"], np.int32),
            aesthetic_score=np.array([np.nan if x is None else x for x in columns["aesthetic_score"]], np.float32),
            name=np.array(columns["name"], np.str_),
        )
        files.write_durable(self.folder / "rows.npz", [buffer.getvalue()])

    def _fingerprint(self, described: dict[str, Any]) -> str:
        digest = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16)
        for path in [*(folder / "index.json" for folder in self._folders()), self.folder / "conditions.safetensors"]:
            digest.update(path.read_bytes())
        return digest.hexdigest()


def _index_entry(folder: Path, group: dict[str, Any]) -> dict[str, Any]:
    """The only shard of a part's own index, named from the set's folder."""
    name = part_name(group["part"])
    shards = files.read_json(folder / name / "index.json")["shards"]
    if len(shards) != 1 or shards[0]["samples"] != group["count"]:
        raise DataError(f"{name} is not one shard of {group['count']} rows", where=folder)
    entry: dict[str, Any] = shards[0]
    entry["raw_data"]["basename"] = f"{name}/{entry['raw_data']['basename']}"
    return entry


@dataclass(frozen=True)
class PreparedSet:
    """A finished set, opened for reading.

    Attributes:
        path: Its folder or address.
        store: What reads there.
        description: What its rows are made of.
        partitions: (groups,) index of each row group's aspect ratio.
        counts: (groups,) rows of each.
        parts: (groups,) number of the part of each.
        fingerprint: Identifies the content.
    """

    path: str
    store: Store
    description: SetDescription
    partitions: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    parts: npt.NDArray[np.int64]
    fingerprint: str
    _indexes: dict[str, ShardIndex] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> PreparedSet:
        """Opens a set in a folder or under an s3:// address.

        Raises:
            DataError: There is none, it was not finished, it was written by a later version, or its store cannot be read.
        """
        store = open_store(path)
        if not is_remote(path) and not Path(path).is_dir():
            raise DataError(
                "there is no prepared set: the folder does not exist",
                where=Path(path).resolve(),
                remedy="prepare one with `pixart-ds prepare`, or correct data.sets.…path in the recipe",
            )
        try:
            manifest = files.parse_json(store.read("manifest.json"), Path("manifest.json"))
        except StoreError as error:
            if not error.missing:
                raise
            raise DataError(
                f"there is no finished set: {error.what}",
                where=error.where,
                remedy="correct data.sets.…path in the recipe, or run the same `pixart-ds prepare` again, or `upload`",
            ) from error
        if manifest.get("format") != FORMAT:
            raise DataError(f"the set has format {manifest.get('format')}; this version reads {FORMAT}", where=path)
        groups = manifest["groups"]
        return cls(
            path=str(path),
            store=store,
            description=SetDescription.model_validate(manifest["description"]),
            partitions=np.array([group["partition"] for group in groups], np.int64),
            counts=np.array([group["count"] for group in groups], np.int64),
            parts=np.array([group["part"] for group in groups], np.int64),
            fingerprint=manifest["fingerprint"],
        )

    @property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    def index(self, name: str) -> ShardIndex:
        """The shards of `captions`, or of the latents of that name; in a folder, all are there and have the right size.

        Raises:
            DataError: The name is unknown, or a shard is missing or truncated.
        """
        if name not in self._indexes:
            folder = self._folder(name)
            index = ShardIndex.parse(self.store.read(f"{folder}/index.json"), Path(self.path) / folder / "index.json")
            if not np.array_equal(index.samples, self.counts):
                raise DataError(
                    "the index and the manifest disagree about the row groups", where=f"{self.path}/{folder}"
                )
            if not is_remote(self.path):
                FolderSource(index, Path(self.path) / folder).check_files()
            self._indexes[name] = index
        return self._indexes[name]

    def source(self, name: str, cache: CacheOptions | None) -> ShardSource:
        """The same shards, to be opened: through a node's cache, in place, or in the copy of an object store that nodes share.

        Raises:
            ConfigError: A set in an object store cannot be read in place.
            DataError: The copy that nodes share is not whole.
        """
        index = self.index(name)
        if cache is not None and not cache.in_place:
            return ShardCache(index, open_store(self.address(name)), cache)
        if is_remote(self.path) and cache is not None:
            return self._staged(index, name, cache)
        if is_remote(self.path):
            raise ConfigError(
                f"{self.path} cannot be read in place: it is an object store",
                where="execution.cache.mode",
                remedy="set it to node-job or node-persistent; or name a folder that all nodes see in execution.cache.folder, and "
                "copy the set there: pixart-ds stage-in RUN STAGE",
            )
        return FolderSource(index, Path(self.path) / self._folder(name))

    def address(self, name: str) -> str:
        """Where the shards of `captions`, or of the latents of that name, come from."""
        return f"{self.path}/{self._folder(name)}"

    def _staged(self, index: ShardIndex, name: str, cache: CacheOptions) -> FolderSource:
        here = shards_here(index, cache)
        if not here.all():
            raise DataError(
                f"{int((~here).sum())} of {len(here)} shards of {self.address(name)} are not in the copy that all nodes read",
                where=cache.folder / index.fingerprint,
                remedy="copy them there: pixart-ds stage-in RUN STAGE; or set execution.cache.mode to node-job",
            )
        names = [file_name(number) for number in range(len(index))]
        return FolderSource(replace(index, names=names), cache.folder / index.fingerprint)

    def _folder(self, name: str) -> str:
        if name == "captions":
            return name
        self._latents_info(name)
        return f"latents-{name}"

    def _latents_info(self, name: str) -> LatentsInfo:
        info = self.description.latents.get(name)
        if info is None:
            known = ", ".join(self.description.latents)
            raise DataError(
                f"the set has no latents {name!r}", where=self.path, remedy=f"set data.latents to one of: {known}"
            )
        return info

    def rows_for(self, latents: str, config: SetConfig) -> SetRows:
        """The set's row groups as the order reads them, after count and filters; square latents are one bucket.

        Raises:
            DataError: The latents are unknown, a shard is missing, or nothing is left.
        """
        info = self._latents_info(latents)
        self.index("captions")
        self.index(latents)
        buckets = np.zeros_like(self.partitions) if info.square else self.partitions
        return SetRows(self.fingerprint, self.counts, buckets, self._selection(config))

    def _selection(self, config: SetConfig) -> tuple[npt.NDArray[np.int64] | None, ...] | None:
        filters = (config.min_aesthetic_score, config.min_ratio, config.max_ratio, config.min_side)
        if config.count is None and all(value is None for value in filters):
            return None
        keep = np.ones(self.num_samples, bool)
        if config.count is not None:
            chosen = permutation(raw_words(key_of("count", self.fingerprint), (0, 0, 0), self.num_samples))
            keep[chosen[config.count :]] = False
        rows = self._rows
        if config.min_aesthetic_score is not None:
            keep &= rows["aesthetic_score"] >= config.min_aesthetic_score  # a row without a score is left out
        ratio = rows["height"] / rows["width"]
        if config.min_ratio is not None:
            keep &= ratio >= config.min_ratio
        if config.max_ratio is not None:
            keep &= ratio <= config.max_ratio
        if config.min_side is not None:
            keep &= np.minimum(rows["height"], rows["width"]) >= config.min_side
        if not keep.any():
            said = ", ".join(
                f"{key} {value}" for key, value in config.model_dump(exclude={"path"}).items() if value is not None
            )
            raise DataError(
                f"the selection leaves no sample of {self.num_samples} ({said})", where=self.path, remedy="loosen it"
            )
        ends = self.counts.cumsum()
        parts = (keep[end - count : end] for count, end in zip(self.counts, ends, strict=True))
        return tuple(None if part.all() else np.flatnonzero(part).astype(np.int64) for part in parts)

    @cached_property
    def _rows(self) -> dict[str, npt.NDArray[Any]]:
        with np.load(io.BytesIO(self.store.read("rows.npz")), allow_pickle=False) as columns:
            return {name: columns[name] for name in columns.files}

    @cached_property
    def _conditions(self) -> dict[str, npt.NDArray[np.float16]]:
        from safetensors.numpy import load

        return dict(load(self.store.read("conditions.safetensors")))

    @property
    def null_embeds(self) -> npt.NDArray[np.float16]:
        """(L, D) features of the empty caption."""
        return self._conditions["null"]

    @cached_property
    def prompts(self) -> list[tuple[str, npt.NDArray[np.float16]]]:
        """The held prompts with their features (L, D)."""
        texts = files.parse_json(self.store.read("prompts.json"), Path("prompts.json"))
        return [(text, self._conditions[f"prompt.{number}"]) for number, text in enumerate(texts)]


def first_set(stage: StageConfig | None) -> PreparedSet | None:
    """The first set of a stage, which names its encoders and holds its prompts, if it is still there."""
    path = stage.data.sets[0].path if stage else None
    if path is None or (not is_remote(path) and not Path(path).is_dir()):
        return None
    return PreparedSet.open(path)
