"""Writing a prepared set part by part, and joining the parts; a killed writer leaves whole parts, and others do the rest."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pixart_ds import files
from pixart_ds.data.codecs import CODECS
from pixart_ds.data.format import (
    ALIGNMENT,
    CAPTION_COLUMNS,
    CAPTIONS,
    CONDITIONS,
    FORMAT,
    LARGE_COLUMNS,
    LATENT_COLUMNS,
    MANIFEST,
    MAX_SHARD_BYTES,
    PADDING,
    PROMPTS,
    ROWS,
    Row,
    SetDescription,
    latents_folder,
    marker_name,
    part_name,
)
from pixart_ds.data.store import open_store
from pixart_ds.data.target import Target, open_target, scratch_of
from pixart_ds.errors import DataError

_READERS = 16
_TABLE_GROUP_ROWS = 1 << 16


@dataclass(frozen=True)
class Conditions:
    """What a set holds beside its rows.

    Attributes:
        null: (max_tokens, D) float16: the encoder's output for the empty caption, all rows.
        null_mask: (max_tokens,) uint8: 1 for its real tokens.
        prompts: Held prompts, each with its features (L, D).
    """

    null: npt.NDArray[np.float16]
    null_mask: npt.NDArray[np.uint8]
    prompts: Sequence[tuple[str, npt.NDArray[np.float16]]] = ()

    def to_bytes(self) -> bytes:
        """The content of conditions.safetensors; the prompts' words are not in it."""
        from safetensors.numpy import save

        held = {f"prompt.{number}": embeds for number, (_, embeds) in enumerate(self.prompts)}
        return save({"null": self.null, "null_mask": self.null_mask, **held})

    @classmethod
    def of_bytes(cls, content: bytes, prompts: Sequence[str]) -> Conditions:
        """What `to_bytes` gave of these prompts."""
        from safetensors.numpy import load

        tensors = load(content)
        held = [(text, tensors[f"prompt.{number}"]) for number, text in enumerate(prompts)]
        return cls(tensors["null"], tensors["null_mask"], held)


def parts_done(target: Target) -> set[int]:
    """Numbers of the parts of a set that are whole."""
    found = (re.fullmatch(r"part-(\d+)\.json", name) for name in target.names("parts"))
    return {int(each[1]) for each in found if each}


class SetWriter:
    """Writes the parts of one set. Several writers may write one set at once, even one part: the first that is done counts.

    Args:
        location: Folder or s3:// address of the set.
        description: What its rows are made of.
        plan: Fingerprint of what the parts are; parts of another plan are never joined with these.
        label: Says in the names of scratch folders whose they are.
    """

    def __init__(self, location: str | Path, description: SetDescription, *, plan: str = "", label: str = "0") -> None:
        self.description, self.plan, self.label = description, plan, label
        self.target: Target = open_target(location)
        self._store = open_store(location)

    @property
    def folders(self) -> list[str]:
        """Of the shards."""
        return [CAPTIONS, *map(latents_folder, self.description.latents)]

    def parts_done(self) -> set[int]:
        """Numbers of the parts that are whole."""
        return parts_done(self.target)

    def write_part(
        self, part: int, partition: int, rows: Sequence[Row], skipped: Sequence[Mapping[str, str]] = ()
    ) -> bool:
        """Writes one row group as one shard in every folder; none of it counts before all of it is durable.

        Args:
            part: The group's number.
            partition: Index of the rows' aspect ratio.
            rows: May be empty, if none of the part's pictures could be read.
            skipped: Pictures of the part that were left out, as lines of skipped.jsonl.

        Returns:
            False if another writer was first; then what it wrote stays.

        Raises:
            DataError: A row does not fit the description.
        """
        shards: dict[str, dict[str, Any]] = {}
        with scratch_of(self.target, self.label) as scratch:
            if rows:
                texts = [self._caption_sample(part, number, row) for number, row in enumerate(rows)]
                shards[CAPTIONS] = self._write(scratch, CAPTIONS, part, CAPTION_COLUMNS, texts)
                for name in self.description.latents:
                    latents = [self._latent_sample(part, number, row, name) for number, row in enumerate(rows)]
                    folder = latents_folder(name)
                    shards[folder] = self._write(scratch, folder, part, LATENT_COLUMNS, latents)
        squares, squared_error = self._caption_error(rows)
        marker = {
            "part": part,
            "partition": partition,
            "count": len(rows),
            "plan": self.plan,
            "encoders": self.description.encoders,
            "shards": shards,
            "skipped": list(skipped),
            "caption_squares": squares,
            "caption_squared_error": squared_error,
            "rows": [self._line(row) for row in rows],
        }
        return self.target.put_new(marker_name(part), (json.dumps(marker, ensure_ascii=False) + "\n").encode())

    def _caption_error(self, rows: Sequence[Row]) -> tuple[float, float]:
        """Sums of squares of the caption features, and of what their codec makes of them less themselves."""
        squares = squared_error = 0.0
        if self.description.caption_codec == "fp16":
            return squares, squared_error
        for row in rows:
            wanted, codec = row.caption_embeds.astype(np.float64), CODECS[self.description.caption_codec]
            raw = torch.from_numpy(codec.encode(row.caption_embeds))
            stored = codec.decode(raw, self.description.caption_channels).numpy()
            squares += float(np.square(wanted).sum())
            squared_error += float(np.square(stored - wanted).sum())
        return squares, squared_error

    def _line(self, row: Row) -> dict[str, Any]:
        return {
            "name": row.name,
            "caption": row.caption,
            "class_label": row.class_label,
            "height": row.original_height,
            "width": row.original_width,
            "num_tokens": len(row.caption_embeds),
            "truncated": row.truncated,
            "crops": {name: list(row.crops[name]) for name in self.description.latents},
            "numbers": dict(row.numbers),
        }

    def _caption_sample(self, part: int, number: int, row: Row) -> dict[str, Any]:
        about, embeds = self.description, row.caption_embeds
        if (
            embeds.dtype != np.float16
            or embeds.shape[1:] != (about.caption_channels,)
            or len(embeds) > about.max_tokens
        ):
            raise DataError(
                f"{row.name}: caption features are {embeds.dtype} {embeds.shape}, "
                f"not float16 of up to {(about.max_tokens, about.caption_channels)}"
            )
        return {
            "caption_embeds": CODECS[about.caption_codec].encode(embeds).tobytes(),
            "caption_text": row.caption,
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
            "crop": np.array(row.crops[name], np.int32),
            "latents": latents.tobytes(),
            "original_size": np.array([row.original_height, row.original_width], np.int32),
            "part": part,
            "row": number,
            "shape": np.array(latents.shape, np.int32),
        }

    def _write(
        self, scratch: Path, folder: str, part: int, columns: dict[str, str], samples: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """Writes one shard and sends it; returns its entry for the index. Its name holds its hash: two writers of one part, whose
        encoders may differ in the last bit, do not take each other's place.
        """
        from pixart_ds.data.streaming_compat import mds_writer

        with mds_writer()(
            out=str(scratch / folder),
            columns=columns,
            hashes=["xxh3_64"],
            size_limit=MAX_SHARD_BYTES,
            progress_bar=False,
        ) as writer:
            for number, sample in enumerate(samples):
                # the offsets of all samples stand before the first one
                begin = writer.new_shard_size + writer.extra_bytes_per_sample * (len(samples) - number)
                writer.write({PADDING: bytes(-(begin + _before_large(columns, sample)) % ALIGNMENT), **sample})
        (entry,) = files.read_json(scratch / folder / "index.json")["shards"]
        about = entry["raw_data"]
        name = f"{part_name(part)}-{about['hashes']['xxh3_64']}.mds"
        self.target.send(scratch / folder / about["basename"], f"{folder}/{name}")
        about["basename"] = name
        return dict(entry)

    # ---- joining the parts -----------------------------------------------------------------------------------------------

    def markers(self) -> Iterator[dict[str, Any]]:
        """The markers of all parts that are whole, by number.

        Raises:
            DataError: A part is of another plan, or by other encoders.
        """
        parts = iter(sorted(self.parts_done()))
        with ThreadPoolExecutor(_READERS, "markers") as pool:
            # not far ahead: they hold the captions of all rows
            ahead = iter(lambda: list(itertools.islice(parts, 4 * _READERS)), [])
            for marker in itertools.chain.from_iterable(pool.map(self._marker, some) for some in ahead):
                self._check(marker)
                yield marker

    def check(self) -> None:
        """Looks whether a part that is there, if there is one, was made as this writer makes them.

        Raises:
            DataError: It is of another plan, or by other encoders.
        """
        if there := self.parts_done():
            self._check(self._marker(min(there)))

    def _check(self, marker: Mapping[str, Any]) -> None:
        if marker["plan"] != self.plan:
            raise DataError(
                f"part {marker['part']} was written for another plan",
                where=self.target.url,
                remedy="prepare into a new output; nothing was changed in this one",
            )
        before, ours = marker["encoders"], self.description.encoders
        if changed := [name for name in ours if before.get(name) != ours[name]]:
            raise DataError(
                f"part {marker['part']} was made with other encoders: "
                + ", ".join(f"{name} was {before.get(name)!r} and is {ours[name]!r}" for name in changed),
                where=self.target.url,
                remedy="take the same encoders, or choose another output; nothing was changed in this one",
            )

    def _marker(self, part: int) -> dict[str, Any]:
        name = marker_name(part)
        return dict(files.parse_json(self._store.read(name), Path(name)))

    def finish(self, conditions: Conditions, totals: Mapping[str, Any] | None = None) -> None:
        """Joins all parts: writes indexes, conditions, rows and, last, the manifest.

        Args:
            conditions: Features beside the rows.
            totals: What the manifest is to say of how the set was made.

        Raises:
            DataError: No part holds a row.
        """
        groups: list[dict[str, int]] = []
        entries: dict[str, list[dict[str, Any]]] = {folder: [] for folder in self.folders}
        with scratch_of(self.target, f"{self.label}-finish") as scratch:
            table = _Table(scratch / ROWS, self.description)
            for marker in self.markers():
                if marker["count"]:
                    table.add(len(groups), marker)
                    groups.append({name: marker[name] for name in ("part", "partition", "count")})
                    for folder, shard in marker["shards"].items():
                        entries[folder].append(shard)
            if not groups:
                raise DataError(
                    "no part of the set holds a row",
                    where=self.target.url,
                    remedy="every picture was left out; skipped.jsonl says why",
                )
            table.close()
            self.target.send(scratch / ROWS, ROWS)
        described = self.description.model_dump(mode="json")
        indexes = [files.json_bytes({"version": 2, "shards": entries[folder]}) for folder in self.folders]
        for folder, index in zip(self.folders, indexes, strict=True):
            self.target.put(f"{folder}/index.json", index)
        stored = conditions.to_bytes()
        self.target.put(CONDITIONS, stored)
        prompts = files.json_bytes([text for text, _ in conditions.prompts])
        self.target.put(PROMPTS, prompts)
        manifest = {
            "format": FORMAT,
            "description": described,
            "groups": groups,
            "num_samples": sum(group["count"] for group in groups),
            "fingerprint": fingerprint_of(described, [*indexes, stored, prompts]),
            "totals": dict(totals or {}),
        }
        self.target.put(MANIFEST, files.json_bytes(manifest))


def fingerprint_of(described: Mapping[str, Any], contents: Iterable[bytes]) -> str:
    """What identifies a set's content.

    Args:
        described: Its description, as the manifest holds it.
        contents: Of the index.json of captions, then of each of the latents in the description's sequence, and last of
            conditions.safetensors and prompts.json.
    """
    digest = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16)
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def _before_large(columns: Mapping[str, str], sample: Mapping[str, Any]) -> int:
    """Bytes of a sample before its large column, without padding: the size of each column that varies, and small columns."""
    total = 4 * sum(encoding in ("bytes", "str") for encoding in columns.values())
    for name in sorted(columns.keys() - {PADDING}):
        if name in LARGE_COLUMNS:
            break
        total += len(sample[name].encode()) if columns[name] == "str" else sample[name].nbytes
    return total


# ---- rows.parquet --------------------------------------------------------------------------------------------------------


def table_schema(latents: Iterable[str], numbers: Iterable[str]) -> Any:
    """The columns of rows.parquet.

    Args:
        latents: Their names.
        numbers: Names of the numbers' columns.
    """
    import pyarrow as pa

    whole, words, crop = pa.int32(), pa.string(), pa.list_(pa.int32(), 4)
    return pa.schema(
        [
            ("id", pa.int64()), ("name", words), ("caption", words), ("class_label", whole), ("partition", pa.int16()),
            ("part", whole), ("shard", whole), ("row", whole), ("height", whole), ("width", whole),
            ("num_tokens", whole), ("truncated", pa.bool_()),
            *((f"crop.{name}", crop) for name in latents),
            *((name, pa.float64()) for name in numbers),
        ]
    )  # fmt: skip


def table_lines(marker: Mapping[str, Any], shard: int, first: int, latents: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The lines of rows.parquet for one part.

    Args:
        marker: Of the part.
        shard: Its place in every index.
        first: Its first row's id.
        latents: Their names.
    """
    for number, line in enumerate(marker["rows"]):
        place = {"id": first + number, "part": marker["part"], "shard": shard, "row": number}
        crops = {f"crop.{name}": line["crops"][name] for name in latents}
        numbers = {f"number.{name}": value for name, value in line["numbers"].items()}
        plain = {name: value for name, value in line.items() if name not in ("crops", "numbers")}
        yield {**place, "partition": marker["partition"], **plain, **crops, **numbers}


class _Table:
    """rows.parquet, written as the parts come: there may be millions of rows.

    Args:
        path: The file.
        description: Of the set.
    """

    def __init__(self, path: Path, description: SetDescription) -> None:
        self.path, self.latents = path, tuple(description.latents)
        self._first = 0
        self._lines: list[dict[str, Any]] = []
        self._spilled: list[Path] = []

    def add(self, shard: int, marker: Mapping[str, Any]) -> None:
        """The rows of one part, which is the `shard`-th of every index."""
        self._lines += table_lines(marker, shard, self._first, self.latents)
        self._first += marker["count"]
        if len(self._lines) >= _TABLE_GROUP_ROWS:
            self._spill()

    def _spill(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.path.with_name(f"{self.path.name}.{len(self._spilled)}")
        pq.write_table(
            pa.Table.from_pylist(self._lines, schema=table_schema(self.latents, _numbers(self._lines))), path
        )
        self._spilled.append(path)
        self._lines = []

    def close(self) -> None:
        """Writes what is left, and joins the pieces: which numbers there are is known only now."""
        import pyarrow.parquet as pq

        if self._lines:
            self._spill()
        pieces = [pq.ParquetFile(path) for path in self._spilled]
        fixed = set(table_schema(self.latents, ()).names)
        numbers = sorted({name for piece in pieces for name in piece.schema_arrow.names} - fixed)
        schema = table_schema(self.latents, numbers)
        with pq.ParquetWriter(self.path, schema, compression="zstd") as writer:
            for piece in pieces:
                table = piece.read()
                for name in numbers:
                    if name not in table.column_names:
                        table = table.append_column(name, _nothing(len(table)))
                writer.write_table(table.select(schema.names), row_group_size=_TABLE_GROUP_ROWS)
                piece.close()


def _numbers(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({name for line in lines for name in line if name.startswith("number.")})


def _nothing(count: int) -> Any:
    import pyarrow as pa

    return pa.nulls(count, pa.float64())
