"""The order of the data: a pure function from sets, seed and shape to an endless sequence of samples (architecture §5).

Row groups (one shard of captions and one of each latents) are dealt to lanes once. In each pass each lane walks its groups in a
new random sequence; a step takes from each lane its proportional part, so that all lanes end a pass together. Neither the
number of ranks nor the batch is an input: any step follows from the images that were seen before it.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from pixart_ds.errors import DataError
from pixart_ds.plan.random import key_of, permutation, raw_words, uniform

Ints = npt.NDArray[np.int64]

_GROUPS, _SAMPLES, _STRIPS, _DEAL = range(4)  # purposes of random words: one counter word each
_FOLLOW_LANES_SPREAD = 0.01


@dataclass(frozen=True)
class SetRows:
    """What the order knows of one prepared set.

    Attributes:
        fingerprint: Identifies the set's content.
        counts: (groups,) rows in each row group.
        buckets: (groups,) bucket of each; all 0 for a square stage.
        selected: For each group the rows that are read, rising, or None for all; None if nothing is left out anywhere.
    """

    fingerprint: str
    counts: Ints
    buckets: Ints
    selected: tuple[Ints | None, ...] | None = None

    def taken(self) -> Ints:
        """(groups,) rows of each group that are read."""
        if self.selected is None:
            return self.counts
        return np.array(
            [count if rows is None else len(rows) for rows, count in zip(self.selected, self.counts, strict=True)],
            np.int64,
        )


@dataclass(frozen=True)
class StepPlan:
    """Samples in the order in which they are read; all attributes are (n,) int64.

    Attributes:
        set_index: Which of the order's sets.
        group: Row group within the set.
        row: Row within the group.
        bucket: Bucket of the group.
        sample_id: Number of the sample over all sets, the same whatever is selected.
        visit: How often the sample was seen before.
        lane: Lane of the group.
    """

    set_index: Ints
    group: Ints
    row: Ints
    bucket: Ints
    sample_id: Ints
    visit: Ints
    lane: Ints

    def __len__(self) -> int:
        return len(self.sample_id)

    def take(self, which: Ints | slice) -> StepPlan:
        """The samples at these places."""
        return StepPlan(*(getattr(self, item.name)[which] for item in fields(self)))

    @classmethod
    def join(cls, plans: Sequence[StepPlan]) -> StepPlan:
        """One after the other; none gives an empty plan."""
        empty = np.empty(0, np.int64)
        return cls(*(np.concatenate([empty, *(getattr(plan, item.name) for plan in plans)]) for item in fields(cls)))


@dataclass(frozen=True)
class _Part:
    """Samples [start, end) of one lane in one pass."""

    lane: int
    visit: int
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


class Order:
    """The endless sequence of samples of a stage.

    Args:
        sets: The prepared sets, joined in this sequence.
        seed: Of all permutations.
        lanes: Fixed parts of the row groups.
        strip_length: Consecutive samples of one bucket in a lane.
        window: Row groups of a bucket among which samples are shuffled.

    Raises:
        DataError: Nothing is selected.
    """

    def __init__(self, sets: Sequence[SetRows], *, seed: int, lanes: int, strip_length: int, window: int) -> None:
        self.lanes, self.strip_length, self.window = lanes, strip_length, window
        self.fingerprint = _fingerprint(sets, seed, lanes, strip_length, window)
        self._key = key_of("order", seed)
        self._set_index = np.repeat(np.arange(len(sets)), [len(item.counts) for item in sets]).astype(np.int64)
        self._first_group = np.concatenate([[0], np.cumsum([len(item.counts) for item in sets])]).astype(np.int64)
        self._group = np.concatenate([np.arange(len(item.counts), dtype=np.int64) for item in sets])
        self._bucket = np.concatenate([item.buckets for item in sets]).astype(np.int64)
        rows = np.concatenate([item.counts for item in sets]).astype(np.int64)
        self._first_id = np.concatenate([[0], rows.cumsum()[:-1]]).astype(np.int64)
        self._taken = np.concatenate([item.taken() for item in sets]).astype(np.int64)
        self._selected = [part for item in sets for part in (item.selected or (None,) * len(item.counts))]
        self.num_samples = int(self._taken.sum())
        if self.num_samples == 0:
            raise DataError(
                f"the selection leaves no sample of {int(rows.sum())}",
                remedy="loosen the filters or the counts of the sets",
            )
        self._lane = self._deal()
        self._lane_groups = [np.flatnonzero(self._lane == lane) for lane in range(lanes)]
        self.lane_sizes = np.array([self._taken[groups].sum() for groups in self._lane_groups], np.int64)
        self._passes: OrderedDict[tuple[int, int], tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = OrderedDict()

    def _deal(self) -> Ints:
        """The lane of each group: a snake over a fixed permutation, large groups first, so that lanes differ by little."""
        lane = np.full(len(self._taken), -1, np.int64)  # groups of which nothing is read have none
        shuffled = permutation(raw_words(self._key, (0, 0, _DEAL), len(self._taken)))
        shuffled = shuffled[self._taken[shuffled] > 0]
        by_size = shuffled[np.argsort(-self._taken[shuffled], kind="stable")]
        turn = np.arange(len(by_size)) % (2 * self.lanes)
        lane[by_size] = np.where(turn < self.lanes, turn, 2 * self.lanes - 1 - turn)
        return lane

    def sample_id(self, set_index: int, group: int, row: int) -> int:
        """The number over all sets of one row of a set."""
        return int(self._first_id[int(self._first_group[set_index]) + group]) + row

    # ---- a pass ----------------------------------------------------------------------------------------------------

    def allot(self, done: int) -> Ints:
        """A_l(done): how many of the first `done` samples of a pass come from each lane; exact and monotone.

        Sample j of lane l has the time (2j + 1) / (2 n_l); the pass goes by time, ties by lane.
        """
        sizes, total = self.lane_sizes, self.num_samples
        given = (2 * done * sizes + total) // (
            2 * total
        )  # nearest whole number: at most half a sample off in each lane
        while (left := int(done - given.sum())) != 0:
            step = 1 if left > 0 else -1
            open_lanes = np.flatnonzero(given < sizes if left > 0 else given > 0)
            times = (2 * given[open_lanes] + step) / sizes[open_lanes]
            extreme = times.min() if left > 0 else times.max()
            close = open_lanes[np.abs(times - extreme) <= 1e-9 * extreme]  # floats find the few, fractions decide
            ranked = [(Fraction(int(2 * given[lane] + step), int(sizes[lane])), int(lane)) for lane in close]
            given[(min(ranked) if left > 0 else max(ranked))[1]] += step
        return given

    def _lane_pass(self, visit: int, lane: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Groups and places within their selected rows of all samples of a lane, in the sequence of one pass; cached."""
        if (found := self._passes.get((visit, lane))) is not None:
            self._passes.move_to_end((visit, lane))
            return found
        made = self._walk(visit, lane)
        self._passes[visit, lane] = made
        while len(self._passes) > 2 * self.lanes:  # a step may straddle two passes
            self._passes.popitem(last=False)
        return made

    def _walk(self, visit: int, lane: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        groups = self._lane_groups[lane]
        groups = groups[permutation(raw_words(self._key, (lane, visit, _GROUPS), len(groups)))]
        groups = groups[np.argsort(self._bucket[groups], kind="stable")]  # by bucket, random within
        counts, buckets = self._taken[groups], self._bucket[groups]
        starts = np.flatnonzero(np.diff(buckets, prepend=-1))
        place = np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))
        # samples: shuffled within windows of groups of one bucket
        of_group = np.repeat(np.arange(len(groups)), counts)
        row = np.arange(len(of_group)) - np.repeat(counts.cumsum() - counts, counts)
        words = raw_words(self._key, (lane, visit, _SAMPLES), len(of_group))
        shuffled = np.lexsort((words, place[of_group] // self.window, buckets[of_group]))
        of_group, row = of_group[shuffled], row[shuffled]
        # strips: consecutive samples of one bucket; each bucket's strips are spread evenly over the pass, with jitter
        first = np.flatnonzero(np.diff(buckets[of_group], prepend=-1))
        length = np.diff(np.append(first, len(of_group)))
        strips = -(-length // self.strip_length)
        jitter = uniform(raw_words(self._key, (lane, visit, _STRIPS), int(strips.sum())))
        number = np.arange(len(jitter)) - np.repeat(strips.cumsum() - strips, strips)
        when = (number + jitter) / np.repeat(strips, strips)
        begin = np.repeat(first, strips) + number * self.strip_length
        end = np.minimum(begin + self.strip_length, np.repeat(first + length, strips))
        turn = np.argsort(when, kind="stable")
        sizes = (end - begin)[turn]
        walk = np.repeat(begin[turn] - (sizes.cumsum() - sizes), sizes) + np.arange(len(of_group))
        return groups[of_group[walk]].astype(np.int32), row[walk].astype(np.int32)

    # ---- a step ----------------------------------------------------------------------------------------------------

    def _parts(self, images_seen: int, count: int) -> list[_Part]:
        """The step's parts by lane, and within a lane by pass."""
        parts = []
        at = images_seen
        while at < images_seen + count:
            visit, done = divmod(at, self.num_samples)
            upto = min(self.num_samples, done + images_seen + count - at)
            before, after = self.allot(done), self.allot(upto)
            parts += [
                _Part(int(lane), visit, int(before[lane]), int(after[lane])) for lane in np.flatnonzero(after > before)
            ]
            at += upto - done
        return sorted(parts, key=lambda part: (part.lane, part.visit))

    def _plan(self, parts: Sequence[_Part]) -> StepPlan:
        return StepPlan.join([self._part(part) for part in parts])

    def _part(self, part: _Part) -> StepPlan:
        groups, places = self._lane_pass(part.visit, part.lane)
        group = groups[part.start : part.end].astype(np.int64)
        row = places[part.start : part.end].astype(np.int64)
        for which in np.unique(group):
            if (rows := self._selected[which]) is not None:
                mine = group == which
                row[mine] = rows[row[mine]]
        return StepPlan(
            set_index=self._set_index[group],
            group=self._group[group],
            row=row,
            bucket=self._bucket[group],
            sample_id=self._first_id[group] + row,
            visit=np.full(len(group), part.visit, np.int64),
            lane=np.full(len(group), part.lane, np.int64),
        )

    def step(self, images_seen: int, global_batch_size: int) -> StepPlan:
        """The `global_batch_size` samples after `images_seen`."""
        return self._plan(self._parts(images_seen, global_batch_size))

    def shares_follow_lanes(self, world_size: int) -> bool:
        """Whether each rank reads its own lanes in every pass: the world divides the lanes, and they are near-equal."""
        most, least = int(self.lane_sizes.max()), int(self.lane_sizes.min())
        return self.lanes % world_size == 0 and most - least <= _FOLLOW_LANES_SPREAD * most

    def shared_part(self, first_rank: int, ranks: int, world_size: int) -> float:
        """Which part of what some ranks, as those of a node, read lies in lanes that others read too: 0 where each has its own."""
        if self.shares_follow_lanes(world_size):
            return 0.0
        start, end = (
            Fraction(first_rank * self.lanes, world_size),
            Fraction((first_rank + ranks) * self.lanes, world_size),
        )
        own = max(0, math.floor(end) - math.ceil(start))
        return float(1 - own / (end - start))

    def live_groups(self, first_rank: int, ranks: int, world_size: int) -> Ints:
        """Of the lanes that some ranks read, the row groups that may be needed at one time: the largest in each bucket.

        Samples are shuffled within windows of a bucket, and strips of neighbouring windows may change places: at most 2 windows and
        one group of each bucket are live in a lane. A cache that holds these shards reads no shard twice in a pass.
        """
        live: list[int] = []
        for lane in self._lanes_of(first_rank, ranks, world_size):
            groups = self._lane_groups[lane]
            for bucket in np.unique(self._bucket[groups]):
                mine = groups[self._bucket[groups] == bucket]
                live += mine[np.argsort(-self._taken[mine], kind="stable")][: 2 * self.window + 1].tolist()
        return np.array(live, np.int64)

    def groups_of(self, first_rank: int, ranks: int, world_size: int) -> Ints:
        """All row groups of the lanes that some ranks, as those of a node, read; where shares do not follow lanes, a rank may now
        and then read a little of the lanes beside them.
        """
        return np.concatenate([self._lane_groups[lane] for lane in self._lanes_of(first_rank, ranks, world_size)])

    def _lanes_of(self, first_rank: int, ranks: int, world_size: int) -> range:
        return range(first_rank * self.lanes // world_size, -(-(first_rank + ranks) * self.lanes // world_size))

    def place_of(self, groups: Ints) -> tuple[Ints, Ints]:
        """Set and row group within it of groups over all sets."""
        return self._set_index[groups], self._group[groups]

    def share(self, images_seen: int, global_batch_size: int, rank: int, world_size: int) -> StepPlan:
        """A rank's part of a step: its lanes' samples, or [⌊rN/W⌋, ⌊(r+1)N/W⌋) of the step's list.

        Only the lanes that are needed are planned.
        """
        parts = self._parts(images_seen, global_batch_size)
        if self.shares_follow_lanes(world_size):
            each = self.lanes // world_size
            return self._plan([part for part in parts if part.lane // each == rank])
        low = rank * global_batch_size // world_size
        high = (rank + 1) * global_batch_size // world_size
        return self._plan(list(_slice(parts, low, high)))


def _slice(parts: Sequence[_Part], low: int, high: int) -> Iterator[_Part]:
    """The parts of samples [low, high) of the list."""
    at = 0
    for part in parts:
        start, end = max(low - at, 0), min(high - at, len(part))
        if start < end:
            yield _Part(part.lane, part.visit, part.start + start, part.start + end)
        at += len(part)


def _fingerprint(sets: Sequence[SetRows], seed: int, lanes: int, strip_length: int, window: int) -> str:
    digest = hashlib.blake2b(repr(("order 1", seed, lanes, strip_length, window, len(sets))).encode(), digest_size=16)
    for item in sets:
        digest.update(item.fingerprint.encode())
        digest.update(np.ascontiguousarray(item.counts, "<i8").tobytes())
        digest.update(np.ascontiguousarray(item.buckets, "<i8").tobytes())
        for number, rows in enumerate(item.selected or ()):
            if rows is not None:
                digest.update(repr((number, len(rows))).encode())
                digest.update(np.ascontiguousarray(rows, "<i8").tobytes())
    return digest.hexdigest()
