"""The order of the data: every pass exactly once, for any world, from any step, for ever."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from pixart_ds.errors import DataError
from pixart_ds.plan.order import Order, SetRows, StepPlan
from pixart_ds.plan.shares import micro_batches

WORLDS = (1, 2, 3, 5, 7, 8, 48, 56, 64, 96)


def a_set(
    counts: list[int], buckets: list[int], selected: list[list[int] | None] | None = None, name: str = "a"
) -> SetRows:
    rows = None if selected is None else tuple(None if r is None else np.array(r, np.int64) for r in selected)
    return SetRows(name, np.array(counts, np.int64), np.array(buckets, np.int64), rows)


def random_order(rng: random.Random) -> tuple[Order, set[int]]:
    """A small world: several sets, Zipf buckets, odd last groups, selections; and the ids that must be served."""
    sets, wanted, first = [], set(), 0
    for number in range(rng.choice((1, 1, 2, 3))):
        groups = rng.randint(1, 12)
        counts = [rng.choice((1, 2, 5, 8, 8, 8)) for _ in range(groups)]
        buckets = [min(int(rng.paretovariate(1)), 9) for _ in range(groups)]
        selected: list[list[int] | None] | None = None
        if rng.random() < 0.4:
            selected = [None if rng.random() < 0.3 else sorted(rng.sample(range(n), rng.randint(0, n))) for n in counts]
        for group, count in enumerate(counts):
            rows = range(count) if selected is None or selected[group] is None else selected[group]
            wanted |= {first + row for row in rows or ()}
            first += count
        sets.append(a_set(counts, buckets, selected, f"set {number}"))
    if not wanted:
        return random_order(rng)
    order = Order(
        sets,
        seed=rng.randint(0, 9),
        lanes=rng.choice((1, 2, 3, 8, 64)),
        strip_length=rng.choice((1, 3, 8, 64)),
        window=rng.choice((1, 2, 4)),
    )
    return order, wanted


@pytest.mark.parametrize("seed", range(200))
def test_every_pass_serves_every_sample_once_for_any_batch(seed: int) -> None:
    rng = random.Random(seed)
    order, wanted = random_order(rng)
    assert order.num_samples == len(wanted)
    batch = rng.choice((1, 2, 3, 7, 16, 3 * len(wanted) + 1))
    seen: Counter[int] = Counter(dict.fromkeys(wanted, 0))
    at = 0
    while at < 3 * len(wanted):
        plan = order.step(at, batch)
        assert len(plan) == batch
        for sample, visit in zip(plan.sample_id.tolist(), plan.visit.tolist(), strict=True):
            assert seen[sample] == visit  # the how-manieth time, from 0
            seen[sample] += 1
        assert set(seen) == wanted
        assert max(seen.values()) - min(seen.values()) <= 1  # at every step boundary
        at += batch


@pytest.mark.parametrize("seed", range(60))
def test_shares_of_any_world_make_up_the_step_and_are_near_equal(seed: int) -> None:
    rng = random.Random(1000 + seed)
    order, wanted = random_order(rng)
    batch = rng.choice((1, 5, 16, 64))
    at = batch * rng.randint(0, 2 * len(wanted) // batch + 3)
    step = order.step(at, batch)
    for world in WORLDS:
        shares = [order.share(at, batch, rank, world) for rank in range(world)]
        joined = StepPlan.join(shares)
        assert joined.sample_id.tolist() == step.sample_id.tolist()
        assert joined.visit.tolist() == step.visit.tolist()
        sizes = [len(share) for share in shares]
        room = 2 * order.lanes // world if order.shares_follow_lanes(world) else 1
        assert max(sizes) - min(sizes) <= room


def test_any_step_is_reached_without_walking_there() -> None:
    sets = [a_set([8] * 20, [0] * 5 + [1] * 15)]
    walked = Order(sets, seed=1, lanes=4, strip_length=4, window=2)
    steps = [walked.step(at, 12).sample_id.tolist() for at in range(0, 1200, 12)]
    for number in (99, 0, 50, 13, 14):
        fresh = Order(sets, seed=1, lanes=4, strip_length=4, window=2)
        assert fresh.step(number * 12, 12).sample_id.tolist() == steps[number]


def test_the_batch_is_no_input_of_the_sequence_of_a_lane() -> None:
    sets = [a_set([8] * 12, [0] * 4 + [1] * 8)]
    by_lane = []
    for batch in (4, 6, 48):
        order = Order(sets, seed=3, lanes=2, strip_length=4, window=2)
        plan = StepPlan.join([order.step(at, batch) for at in range(0, 96 * 2, batch)])
        by_lane.append([plan.sample_id[plan.lane == lane].tolist() for lane in (0, 1)])
    assert by_lane[0] == by_lane[1] == by_lane[2]


def test_allotment_is_exact_and_monotone_by_definition() -> None:
    for seed in range(40):
        order, _ = random_order(random.Random(seed))
        times = sorted(
            (Fraction(2 * j + 1, 2 * int(size)), lane)
            for lane, size in enumerate(order.lane_sizes)
            for j in range(int(size))
        )
        given = np.zeros(order.lanes, np.int64)
        assert order.allot(0).tolist() == given.tolist()
        for done, (_, lane) in enumerate(times, start=1):
            given[lane] += 1
            assert order.allot(done).tolist() == given.tolist()


def test_where_the_world_divides_the_lanes_a_rank_reads_the_same_groups_in_every_pass() -> None:
    order = Order([a_set([10] * 64, [g % 5 for g in range(64)])], seed=0, lanes=8, strip_length=5, window=2)
    assert order.shares_follow_lanes(4)
    assert not order.shares_follow_lanes(3)
    groups: dict[int, set[tuple[int, int]]] = {}
    for rank in range(4):
        for number in range(3):
            shares = [order.share(at, 32, rank, 4) for at in range(number * 640, (number + 1) * 640, 32)]
            plan = StepPlan.join(shares)
            now = set(zip(plan.set_index.tolist(), plan.group.tolist(), strict=True))
            assert groups.setdefault(rank, now) == now
    assert sum(len(now) for now in groups.values()) == 64


def test_lanes_differ_by_little_and_samples_come_in_strips_of_one_bucket() -> None:
    counts = [100] * 50 + [37, 1]
    order = Order([a_set(counts, [0] * 30 + [1] * 21 + [2])], seed=5, lanes=4, strip_length=16, window=3)
    assert order.lane_sizes.max() - order.lane_sizes.min() <= 100
    lane = order.step(0, order.num_samples)
    buckets = lane.bucket[lane.lane == 0]
    changes = int((np.diff(buckets) != 0).sum())
    assert changes < len(buckets) / 16 * 1.1


def test_the_window_bounds_the_groups_that_are_open_at_once() -> None:
    order = Order([a_set([20] * 100, [0] * 100)], seed=5, lanes=1, strip_length=10, window=4)
    groups = order.step(0, 2000).group.tolist()
    first = {group: groups.index(group) for group in set(groups)}
    last = {group: len(groups) - 1 - groups[::-1].index(group) for group in set(groups)}
    live = max(sum(first[g] <= at <= last[g] for g in first) for at in range(0, 2000, 10))
    assert live <= 2 * 4 + 1  # strips of neighbouring windows may change places


def test_passes_and_seeds_differ() -> None:
    sets = [a_set([8] * 10, [0] * 10)]
    one = Order(sets, seed=1, lanes=2, strip_length=4, window=2)
    other = Order(sets, seed=2, lanes=2, strip_length=4, window=2)
    first, second = one.step(0, 80).sample_id.tolist(), one.step(80, 80).sample_id.tolist()
    assert first != second
    assert first != other.step(0, 80).sample_id.tolist()
    assert one.fingerprint != other.fingerprint


def test_every_input_is_in_the_fingerprint() -> None:
    base = {"seed": 1, "lanes": 2, "strip_length": 4, "window": 2}
    sets = [a_set([4, 4], [0, 1])]
    prints = {Order(sets, **base).fingerprint}
    prints |= {Order(sets, **{**base, key: 3}).fingerprint for key in base}
    prints |= {
        Order([a_set([4, 4], [0, 1], name="b")], **base).fingerprint,
        Order([a_set([4, 4], [0, 0])], **base).fingerprint,
    }
    prints |= {
        Order([a_set([4, 5], [0, 1])], **base).fingerprint,
        Order([a_set([4, 4], [0, 1], [[0, 1], None])], **base).fingerprint,
    }
    prints |= {Order([a_set([4, 4], [0, 1], [[0, 2], None])], **base).fingerprint, Order(sets * 2, **base).fingerprint}
    assert len(prints) == 11


def test_a_selection_that_leaves_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="leaves no sample of 4"):
        Order([a_set([4], [0], [[]])], seed=0, lanes=1, strip_length=1, window=1)


def test_unselected_rows_keep_their_ids() -> None:
    order = Order(
        [a_set([4, 4], [0, 0], [[1, 3], None]), a_set([2], [0], name="b")], seed=0, lanes=2, strip_length=2, window=1
    )
    plan = order.step(0, 8)
    assert sorted(plan.sample_id.tolist()) == [1, 3, 4, 5, 6, 7, 8, 9]
    assert sorted(zip(plan.set_index.tolist(), plan.group.tolist(), plan.row.tolist(), strict=True)) == [
        (0, 0, 1), (0, 0, 3), (0, 1, 0), (0, 1, 1), (0, 1, 2), (0, 1, 3), (1, 0, 0), (1, 0, 1)
    ]  # fmt: skip


def test_micro_batches_hold_one_bucket_each_and_all_of_the_share() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        order, _ = random_order(rng)
        size = rng.choice((1, 2, 4, 9))
        share = order.share(0, 40, 1, 3)
        pieces = micro_batches(share, size)
        assert sorted(StepPlan.join(pieces).sample_id.tolist()) == sorted(share.sample_id.tolist())
        assert all(0 < len(piece) <= size and len(set(piece.bucket.tolist())) == 1 for piece in pieces)
    assert micro_batches(StepPlan.join([]), 4) == []


@pytest.mark.parametrize("seed", range(40))
def test_a_run_that_changes_its_world_at_will_reads_each_sample_as_often(seed: int) -> None:
    rng = random.Random(2000 + seed)
    order, wanted = random_order(rng)
    batch, seen, at = rng.choice((1, 4, 9)), Counter(dict.fromkeys(wanted, 0)), 0
    while at < 2 * len(wanted):
        world = rng.randint(1, 96)
        for _ in range(rng.randint(1, 4)):  # steps of one attempt
            ranks = list(range(world))
            rng.shuffle(ranks)
            seen.update(sample for rank in ranks for sample in order.share(at, batch, rank, world).sample_id.tolist())
            at += batch
        assert sum(seen.values()) == at
        assert max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize("seed", range(30))
def test_no_more_groups_are_live_than_stated(seed: int) -> None:
    rng = random.Random(3000 + seed)
    counts = [rng.choice((4, 8, 8, 8)) for _ in range(rng.randint(20, 120))]
    buckets = [min(int(rng.paretovariate(1)), 9) for _ in counts]
    window, lanes = rng.choice((1, 2, 4)), rng.choice((1, 2, 4))
    order = Order([a_set(counts, buckets)], seed=seed, lanes=lanes, strip_length=rng.choice((2, 4, 16)), window=window)
    for lane in range(lanes):
        walk = order.step(0, order.num_samples)
        groups = walk.group[walk.lane == lane].tolist()
        first = {group: groups.index(group) for group in set(groups)}
        last = {group: len(groups) - 1 - groups[::-1].index(group) for group in set(groups)}
        live = max(sum(first[g] <= at <= last[g] for g in first) for at in range(len(groups)))
        assert live <= len(order.live_groups(lane, 1, lanes))


def test_the_part_that_is_read_from_shared_lanes() -> None:
    order = Order([a_set([10] * 640, [0] * 640)], seed=0, lanes=64, strip_length=5, window=2)
    assert [order.shared_part(0, ranks, world) for ranks, world in ((1, 64), (8, 64), (8, 32), (1, 1))] == [0.0] * 4
    assert order.shared_part(0, 1, 48) == pytest.approx(0.25)  # 4/3 lanes: one its own, a third of the next
    assert order.shared_part(1, 1, 48) == pytest.approx(1.0)  # two thirds of two lanes
    assert order.shared_part(0, 8, 48) == pytest.approx(1 - 10 / (8 * 64 / 48))
    for world in (3, 7, 48, 56):  # against what is read
        for rank in range(world):
            lanes = {lane for at in range(0, 6400, 128) for lane in order.share(at, 128, rank, world).lane.tolist()}
            start, end = rank * 64 // world, -(-(rank + 1) * 64 // world)
            assert lanes <= set(range(max(0, start - 1), min(64, end + 1)))


def test_golden_order() -> None:
    # Written down once: every later release must serve these, or runs could not be resumed.
    order = Order(
        [a_set([4, 4, 3, 4], [0, 0, 0, 1]), a_set([2, 5], [1, 2], [None, [0, 2, 4]], "b")],
        seed=43,
        lanes=2,
        strip_length=2,
        window=2,
    )
    assert order.fingerprint == GOLDEN_FINGERPRINT
    assert order.step(0, 20).sample_id.tolist() == GOLDEN_FIRST
    assert order.step(13 * 20, 20).sample_id.tolist() == GOLDEN_LATER


GOLDEN_FINGERPRINT = "4550c35462f6cf7c0a5159339d66f5f1"
GOLDEN_FIRST = [19, 17, 1, 0, 9, 2, 3, 8, 21, 10, 7, 4, 15, 11, 13, 16, 12, 14, 6, 5]
GOLDEN_LATER = [10, 1, 21, 19, 0, 8, 3, 2, 9, 17, 15, 12, 6, 5, 16, 13, 4, 7, 14, 11]
