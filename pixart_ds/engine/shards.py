"""Where each parameter lies in the flat fp32 shards: back to back, cut into one equal partition for each rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

SHARD_KEYS = ("master", "exp_avg", "exp_avg_sq", "ema")
"""A rank's flat fp32 shards, each of the same layout: the weights, Adam's moments, the average."""


@dataclass(frozen=True)
class Place:
    """One parameter in the flat sequence.

    Attributes:
        name: Its key in the net's state dict.
        offset: Elements before it.
        shape: Its shape.
    """

    name: str
    offset: int
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.offset + self.count


@dataclass(frozen=True)
class FlatLayout:
    """All parameters, and how the sequence is cut.

    Attributes:
        places: In the order of the sequence, without gaps.
        partition: Elements of each rank's part; only the end of the sequence is padded.
        world_size: Ranks.
    """

    places: tuple[Place, ...]
    partition: int
    world_size: int

    @property
    def count(self) -> int:
        """Elements without the padding."""
        return self.places[-1].end if self.places else 0

    def own(self, rank: int) -> range:
        """The elements that a rank holds, without the padding; empty if its part is all padding."""
        return range(min(self.count, rank * self.partition), min(self.count, (rank + 1) * self.partition))

    def of_rank(self, rank: int) -> Iterator[tuple[Place, int, int]]:
        """(parameter, a, b) for each part [a, b) of a flattened parameter that a rank holds, in the sequence of its shard."""
        own = self.own(rank)
        for place in self.places:
            start, end = max(place.offset, own.start), min(place.end, own.stop)
            if start < end:
                yield place, start - place.offset, end - place.offset

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(rank, a, b) for each part [a, b) of [start, end) that lies in one rank's partition."""
        while start < end:
            rank = start // self.partition
            stop = min(end, (rank + 1) * self.partition)
            yield rank, start, stop
            start = stop

    def problems(self) -> list[str]:
        """What is inconsistent, for layouts that were read from a file."""
        found = []
        at = 0
        for place in self.places:
            if place.offset != at:
                found.append(f"{place.name} begins at {place.offset} instead of {at}")
            at = place.end
        if self.partition * self.world_size < at:
            found.append(f"{self.world_size} partitions of {self.partition} do not hold {at} elements")
        return found
