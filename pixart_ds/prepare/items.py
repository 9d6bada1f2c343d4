"""What a source says of one picture: where its bytes lie, how large it is, its caption, class and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


class BrokenPicture(Exception):
    """A picture that cannot be read or decoded; it is listed with the reason and left out."""


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: names on a disk and lines of a list may be any bytes, and JSON can hold half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Place:
    """Where a picture's bytes lie.

    Attributes:
        container: The file that holds them, from the source's root: the picture's own, a tar, a parquet file.
        start: Where they begin in it; of a parquet file, the row.
        length: How many bytes they are.
    """

    container: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Item:
    """One picture that can be prepared.

    Attributes:
        name: Unique in its source; like a path, without `..`.
        place: Where its bytes lie.
        height, width: In pixels, as it is shown.
        caption: The source's own, or None.
        class_key: Of its class; classes are numbered in the sequence of their keys. None without a class.
        numbers: Whatever else the source says in numbers, such as aesthetic_score.
    """

    name: str
    place: Place
    height: int
    width: int
    caption: str | None = None
    class_key: str | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rejected:
    """One picture that is left out.

    Attributes:
        name: As in `Item`.
        kind: `broken`: it cannot be read; `filtered`: a filter of the recipe; `caption`: it has none.
        reason: In words, for a person.
    """

    name: str
    kind: Literal["broken", "filtered", "caption"]
    reason: str
