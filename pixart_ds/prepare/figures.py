"""What a prepared set's rows are like, in figures: one pass over rows.parquet, batch by batch, however many there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pixart_ds.errors import DataError

if TYPE_CHECKING:
    from pixart_ds.data.format import SetDescription

_BATCH = 65536
_LONGEST = 100_000
"""Pixels; longer sides are counted as this."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Numbers:
    """One numeric column.

    Attributes:
        count: How many rows have it.
        low, mean, high: Of those; 0 where there are none.
    """

    count: int
    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class Cut:
    """How pictures became one resolution.

    Attributes:
        enlarged: How many are smaller than what they were resized to.
        kept: Mean share of a picture that lies inside its cut.
    """

    enlarged: int
    kept: float


@dataclass(frozen=True)
class RowFigures:
    """All of a set's rows.

    Attributes:
        samples: How many there are.
        per_bucket: (ratios,) rows by aspect ratio.
        per_tokens: (max_tokens + 1,) rows by tokens of their caption.
        per_side: Rows by the shorter side of the original, in pixels.
        truncated: Rows whose caption was cut.
        labelled: Rows with a class.
        numbers: Of each numeric column, by its name in the source.
        cuts: Of each resolution.
    """

    samples: int
    per_bucket: Counts
    per_tokens: Counts
    per_side: Counts
    truncated: int
    labelled: int
    numbers: Mapping[str, Numbers]
    cuts: Mapping[str, Cut]

    @property
    def mean_tokens(self) -> float:
        return float((self.per_tokens * np.arange(len(self.per_tokens))).sum()) / max(1, self.samples)

    @property
    def without_words(self) -> int:
        """Rows whose caption has but the sign that ends each: it is empty, or cleaning left nothing of it."""
        return int(self.per_tokens[:2].sum())

    @property
    def most_tokens(self) -> int:
        return int(np.flatnonzero(self.per_tokens)[-1]) if self.samples else 0


def row_figures(rows: Path | BinaryIO, description: SetDescription) -> RowFigures:
    """Reads a set's rows.parquet once.

    Raises:
        DataError: It lacks a column.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(rows) as file:
        known = file.schema_arrow.names
        numeric = [name for name in known if name.startswith("number.")]
        crops = {f"crop.{name}": name for name in description.latents}
        wanted = ["partition", "num_tokens", "truncated", "height", "width", "class_label", *crops, *numeric]
        missing = sorted(set(wanted) - set(known))
        if missing:
            raise DataError(f"the table of rows lacks {', '.join(missing)}", where=str(getattr(rows, "name", rows)))
        made = _Sums(description, [name.removeprefix("number.") for name in numeric])
        for batch in file.iter_batches(_BATCH, columns=wanted):
            made.add(batch)
    return made.figures()


class _Sums:
    """What adds up over batches."""

    def __init__(self, description: SetDescription, numeric: Sequence[str]) -> None:
        self._description = description
        self._samples = self._truncated = self._labelled = 0
        self._per_bucket = np.zeros(len(description.ratios), np.int64)
        self._per_tokens = np.zeros(description.max_tokens + 1, np.int64)
        self._per_side = np.zeros(1, np.int64)
        self._columns = {name: Numbers(0, np.inf, 0.0, -np.inf) for name in numeric}
        self._enlarged = dict.fromkeys(description.latents, 0)
        self._kept = dict.fromkeys(description.latents, 0.0)

    def add(self, batch: Any) -> None:
        """Args: batch: A pyarrow RecordBatch."""
        partition, tokens, height, width, label = (
            batch.column(name).to_numpy() for name in ("partition", "num_tokens", "height", "width", "class_label")
        )
        self._samples += len(partition)
        self._truncated += batch.column("truncated").true_count
        self._labelled += int((label >= 0).sum())
        self._per_bucket = _added(self._per_bucket, np.bincount(partition))
        self._per_tokens = _added(self._per_tokens, np.bincount(tokens))
        self._per_side = _added(self._per_side, np.bincount(np.minimum(np.minimum(height, width), _LONGEST)))
        for name, before in self._columns.items():
            values = batch.column(f"number.{name}").drop_null().to_numpy()
            values = values[np.isfinite(values)]
            if len(values):
                count = before.count + len(values)
                mean = before.mean + (float(values.mean()) - before.mean) * len(values) / count
                low, high = min(before.low, float(values.min())), max(before.high, float(values.max()))
                self._columns[name] = Numbers(count, low, mean, high)
        for name, info in self._description.latents.items():
            crop = batch.column(f"crop.{name}").flatten().to_numpy().reshape(-1, 4).astype(np.int64)
            sizes = np.array(info.sizes, np.int64) * self._description.downsampling_factor
            cut = sizes[np.zeros_like(partition) if info.square else partition]  # (rows, 2)
            self._enlarged[name] += int(((crop[:, 0] > height) | (crop[:, 1] > width)).sum())
            self._kept[name] += float((cut.prod(1) / crop[:, :2].prod(1)).sum())

    def figures(self) -> RowFigures:
        return RowFigures(
            samples=self._samples,
            per_bucket=self._per_bucket,
            per_tokens=self._per_tokens,
            per_side=self._per_side,
            truncated=self._truncated,
            labelled=self._labelled,
            numbers={name: each if each.count else Numbers(0, 0, 0, 0) for name, each in self._columns.items()},
            cuts={name: Cut(count, self._kept[name] / max(1, self._samples)) for name, count in self._enlarged.items()},
        )


def _added(left: Counts, right: Counts) -> Counts:
    made = np.zeros(max(len(left), len(right)), np.int64)
    made[: len(left)] += left
    made[: len(right)] += right
    return made


@dataclass(frozen=True)
class Bin:
    """How many values lie from `low` to `high`, both included; of the last bin that holds outliers, `high` is None."""

    low: int
    high: int | None
    count: int


def bins(counts: Counts, most: int, *, outliers: float = 0.0) -> list[Bin]:
    """Counts of whole numbers as at most `most` bins of one round width, from the first number that occurs to the last.

    Args:
        counts: How often 0, 1, 2, … occur.
        most: Bins.
        outliers: Share of the largest values that may lie in a last bin without an end.
    """
    total = int(counts.sum())
    if not total:
        return []
    first, last = (int(each) for each in np.flatnonzero(counts)[[0, -1]])
    end = int(np.searchsorted(counts.cumsum(), (1 - outliers) * total)) if outliers else last
    step = next(each for each in _round_numbers() if end // each - first // each < most - (end < last))
    made = [
        Bin(low, low + step - 1, int(counts[low : low + step].sum()))
        for low in range(first // step * step, end + 1, step)
    ]
    beyond = made[-1].low + step
    rest = int(counts[beyond:].sum())
    return [*made, Bin(beyond, None, rest)] if rest else made


def _round_numbers() -> Iterator[int]:
    for power in itertools.count():
        yield from (factor * 10**power for factor in (1, 2, 5))
