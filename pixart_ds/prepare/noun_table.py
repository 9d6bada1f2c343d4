"""Noun statistics as the paper's Table 1 gives them, beside the paper's own rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

VALID_ABOVE = 10
"""A noun is valid that comes more often than this (Table 1)."""

_PAPER_CAPTIONS = 11_200_000
"""Nouns in all by nouns per image, about the same in each row of Table 1."""


@dataclass(frozen=True)
class PaperNouns:
    """A row of Table 1, as it is printed."""

    dataset: str
    valid: str
    distinct: str
    ratio: str
    total: str
    per_image: str


PAPER_ROWS = (
    PaperNouns("LAION", "210 K", "2,461 K", "8.5 %", "72.0 M", "6.4"),
    PaperNouns("LAION-LLaVA", "85 K", "646 K", "13.3 %", "233.9 M", "20.9"),
    PaperNouns("SAM-LLaVA", "23 K", "124 K", "18.6 %", "327.9 M", "29.3"),
    PaperNouns("Internal", "152 K", "582 K", "26.1 %", "136.6 M", "12.2"),
)


@dataclass(frozen=True)
class NounStatistics:
    """What was counted in one place, or in all together.

    Attributes:
        where: The place.
        captions: How many were counted.
        without: Entries that have none: null, or only white space.
        valid: Distinct nouns that come more than `VALID_ABOVE` times.
        distinct: All distinct nouns.
        total: Nouns with every repetition.
    """

    where: str
    captions: int
    without: int
    valid: int
    distinct: int
    total: int

    @property
    def ratio(self) -> float | None:
        """VN/DN; None where there is no noun."""
        return self.valid / self.distinct if self.distinct else None

    @property
    def per_image(self) -> float | None:
        """Nouns for each caption; None where there is no caption."""
        return self.total / self.captions if self.captions else None

    def to_json(self) -> dict[str, Any]:
        return {
            "where": self.where,
            "captions": self.captions,
            "without_caption": self.without,
            "valid_nouns": self.valid,
            "distinct_nouns": self.distinct,
            "valid_ratio": self.ratio,
            "total_nouns": self.total,
            "nouns_per_image": self.per_image,
        }


@dataclass(frozen=True)
class NounReport:
    """The counts of each place, and of all together where there are several."""

    places: tuple[NounStatistics, ...]
    together: NounStatistics | None
    tagger: str

    def to_json(self) -> dict[str, Any]:
        return {
            "sets": [place.to_json() for place in self.places],
            "together": None if self.together is None else self.together.to_json(),
            "valid_above": VALID_ABOVE,
            "tagger": self.tagger,
            "paper": [vars(row) for row in PAPER_ROWS],
        }

    def __str__(self) -> str:
        ours = [*self.places, *([] if self.together is None else [self.together])]
        rows: list[tuple[str, ...]] = [("", "VN", "DN", "VN/DN", "nouns", "nouns/image", "captions")]
        rows += [_cells(each) for each in ours]
        rows += [
            (f"paper: {row.dataset}", row.valid, row.distinct, row.ratio, row.total, row.per_image, "")
            for row in PAPER_ROWS
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        lines.append(f"VN: distinct nouns that come more than {VALID_ABOVE} times; DN: all distinct nouns")
        lines += [f"{each.where}: {each.without:,} entries have no caption" for each in self.places if each.without]
        if ours[-1].captions < _PAPER_CAPTIONS / 2:
            lines.append("VN/DN depends on how many captions there are: the paper's rows are of about 11.2 M each")
        return "\n".join(lines)


def _cells(each: NounStatistics) -> tuple[str, ...]:
    ratio = "–" if each.ratio is None else f"{each.ratio:.1%}".replace("%", " %")
    per_image = "–" if each.per_image is None else f"{each.per_image:.1f}"
    counts = (f"{each.valid:,}", f"{each.distinct:,}", ratio, f"{each.total:,}", per_image, f"{each.captions:,}")
    return each.where, *counts


def statistics(where: str, captions: int, without: int, counts: Iterable[tuple[str, int]]) -> NounStatistics:
    """Of all nouns of a place, each once with how often it came."""
    valid = distinct = total = 0
    for _, count in counts:
        distinct += 1
        valid += count > VALID_ABOVE
        total += count
    return NounStatistics(where, captions, without, valid, distinct, total)
