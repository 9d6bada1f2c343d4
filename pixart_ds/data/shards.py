"""A finished prepared set, opened for reading; `pixart_ds.data.format` says what it is made of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixart_ds import files
from pixart_ds.config.schema import SetConfig, StageConfig
from pixart_ds.data.cache import CacheOptions, ShardCache, file_name, shards_here
from pixart_ds.data.format import (
    CAPTION_COLUMNS,
    CAPTIONS,
    CONDITIONS,
    FORMAT,
    LATENT_COLUMNS,
    MANIFEST,
    PROMPTS,
    ROWS,
    LatentsInfo,
    SetDescription,
    latents_folder,
)
from pixart_ds.data.mds import PREPARE_AGAIN, FolderSource, ShardIndex, ShardSource
from pixart_ds.data.range_file import RangeFile
from pixart_ds.data.store import Store, is_remote, open_store
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.plan.order import SetRows
from pixart_ds.plan.random import key_of, permutation, raw_words
from pixart_ds.s3 import StoreError


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
            manifest = files.parse_json(store.read(MANIFEST), Path(MANIFEST))
        except StoreError as error:
            if not error.missing:
                raise
            raise DataError(
                f"there is no finished set: {error.what}",
                where=error.where,
                remedy="correct data.sets.…path in the recipe, or run the same `pixart-ds prepare` again, or `upload`",
            ) from error
        try:
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
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as cause:
            raise none_of_ours(path, MANIFEST, cause) from cause

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
            columns = CAPTION_COLUMNS if name == CAPTIONS else LATENT_COLUMNS
            if index.columns != tuple(columns):
                raise DataError(
                    f"the shards have the columns {', '.join(index.columns)} instead of {', '.join(columns)}",
                    where=f"{self.path}/{folder}",
                    remedy="it was prepared by another version: prepare it again into a new folder",
                )
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
        if name == CAPTIONS:
            return name
        self._latents_info(name)
        return latents_folder(name)

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
        self.index(CAPTIONS)
        self.index(latents)
        buckets = np.zeros_like(self.partitions) if info.square else self.partitions
        return SetRows(self.fingerprint, self.counts, buckets, self._selection(config))

    def _selection(self, config: SetConfig) -> tuple[npt.NDArray[np.int64] | None, ...] | None:
        asked = config.model_dump(exclude={"path"}, exclude_defaults=True)
        if not asked:
            return None
        keep = np.ones(self.num_samples, bool)
        if config.count is not None:
            chosen = permutation(raw_words(key_of("count", self.fingerprint), (0, 0, 0), self.num_samples))
            keep[chosen[config.count :]] = False
        if asked.keys() != {"count"}:
            keep &= self._filtered(config)
        if not keep.any():
            said = ", ".join(f"{key} {value}" for key, value in asked.items())
            raise DataError(
                f"the selection leaves no sample of {self.num_samples} ({said})", where=self.path, remedy="loosen it"
            )
        ends = self.counts.cumsum()
        parts = (keep[end - count : end] for count, end in zip(self.counts, ends, strict=True))
        return tuple(None if part.all() else np.flatnonzero(part).astype(np.int64) for part in parts)

    def _filtered(self, config: SetConfig) -> npt.NDArray[np.bool_]:
        """Which rows the filters leave."""
        bounds = (config.minimum, config.maximum)
        numbers = sorted({name for bound in bounds for name in bound})
        known = [name.removeprefix("number.") for name in self.columns if name.startswith("number.")]
        if unknown := [name for name in numbers if name not in known]:
            raise ConfigError(
                f"the rows have no number {unknown[0]!r}",
                where=f"data.sets: {self.path}",
                remedy=f"filter by one of: {', '.join(known)}"
                if known
                else "its source had no numbers: filter by size or ratio",
            )
        rows = self.rows("height", "width", *(f"number.{name}" for name in numbers))
        ratio, side = rows["height"] / rows["width"], np.minimum(rows["height"], rows["width"])
        keep = np.ones(self.num_samples, bool)
        limits: list[tuple[npt.NDArray[Any], float | None, float | None]] = [
            (ratio, config.min_ratio, config.max_ratio),
            (side, config.min_side, None),
            *((rows[f"number.{name}"], config.minimum.get(name), config.maximum.get(name)) for name in numbers),
        ]
        for values, least, most in limits:  # a row without the number is NaN, which no comparison lets through
            if least is not None:
                keep &= values >= least
            if most is not None:
                keep &= values <= most
        return keep

    @cached_property
    def _table(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(RangeFile(self.store, ROWS))
        except pa.ArrowException as cause:
            raise none_of_ours(self.path, ROWS, cause) from cause

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of rows.parquet's columns."""
        return tuple(self._table.schema_arrow.names)

    def rows(self, *names: str) -> dict[str, npt.NDArray[Any]]:
        """Columns of rows.parquet, an entry for each row; only these are read. A number that is missing is NaN."""
        import pyarrow as pa

        try:
            table = self._table.read(columns=list(names))
        except (pa.ArrowException, OSError) as cause:  # pyarrow says so of pages that it cannot read
            raise none_of_ours(self.path, ROWS, cause) from cause
        if len(table) != self.num_samples:
            raise DataError(f"{ROWS} has {len(table)} rows, the manifest {self.num_samples}", where=self.path)
        return {name: table[name].to_numpy() for name in names}

    def names_of(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """The pictures' names of some rows, by their numbers in the set."""
        groups = self._table.metadata
        ends = np.cumsum([groups.row_group(number).num_rows for number in range(groups.num_row_groups)])
        which = np.searchsorted(ends, rows, side="right")
        found = [""] * len(rows)
        for number in np.unique(which).tolist():
            names, first = (
                self._table.read_row_group(number, columns=["name"])["name"],
                ends[number - 1] if number else 0,
            )
            for place in np.flatnonzero(which == number).tolist():
                found[place] = names[int(rows[place] - first)].as_py()
        return found

    @cached_property
    def _conditions(self) -> dict[str, npt.NDArray[np.float16]]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return dict(load(self.store.read(CONDITIONS)))
        except SafetensorError as cause:
            raise none_of_ours(self.path, CONDITIONS, cause) from cause

    @property
    def null_embeds(self) -> npt.NDArray[np.float16]:
        """(max_tokens, D) features of the empty caption and of its padding: training takes all rows for dropped captions."""
        return self._conditions["null"]

    @property
    def null_length(self) -> int:
        """How many real tokens the empty caption has; the rows behind them are masked in sampling."""
        return int(self._conditions["null_mask"].sum())

    @cached_property
    def prompts(self) -> list[tuple[str, npt.NDArray[np.float16]]]:
        """The held prompts with their features (L, D)."""
        texts = files.parse_json(self.store.read(PROMPTS), Path(PROMPTS))
        return [(text, self._conditions[f"prompt.{number}"]) for number, text in enumerate(texts)]


def none_of_ours(location: str | Path, name: str, cause: Exception) -> DataError:
    """What to raise of a file of a set that cannot be understood."""
    words = " ".join(str(cause).splitlines()[:3])
    return DataError(
        f"{name} is none that `prepare` writes: {type(cause).__name__}: {words}",
        where=f"{location}/{name}",
        remedy=PREPARE_AGAIN,
    )


def first_set(stage: StageConfig | None) -> PreparedSet | None:
    """The first set of a stage, which names its encoders and holds its prompts, if it is still there."""
    path = stage.data.sets[0].path if stage else None
    if path is None or (not is_remote(path) and not Path(path).is_dir()):
        return None
    return PreparedSet.open(path)
