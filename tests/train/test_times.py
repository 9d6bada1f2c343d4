"""Where a rank's seconds go: together they are all of them."""

from __future__ import annotations

import random

import pytest

from pixart_ds.ledger.entries import PARTS
from pixart_ds.train.times import Times


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_each_category_by_hand() -> None:
    clock = Clock()
    times = Times(clock)
    clock.now += 7  # imports, the checkpoint
    times.enter("data")
    clock.now += 2
    times.enter("compute")
    clock.now += 3
    times.enter("together")
    clock.now += 1
    times.step_ended(data_wait_s=2.5, moved=True, flops=1e12)
    times.enter("save")
    clock.now += 4
    times.enter("together")
    times.enter("preview")
    clock.now += 5
    times.enter("data")
    clock.now += 6
    times.step_ended(data_wait_s=6, moved=False, flops=1e12)
    clock.now += 8
    assert times.parts() == {
        "startup": 7,
        "data_wait": 2.5,  # of the slowest rank
        "productive": 3.5,
        "checkpoint": 4,
        "evaluation": 5,
        "rework": 6,  # with its waiting for data
        "idle": 8,  # a step that has not ended
    }
    assert times.flops == 2e12


@pytest.mark.parametrize("seed", range(50))
def test_all_seconds_are_somewhere(seed: int) -> None:
    chance, clock = random.Random(seed), Clock()
    times = Times(clock)
    for _ in range(chance.randrange(200)):
        clock.now += chance.choice([0.0, 0.001, 0.3, 40.0])
        if chance.random() < 0.2:
            times.step_ended(data_wait_s=chance.uniform(0, 50), moved=chance.random() < 0.7, flops=1.0)
        else:
            times.enter(chance.choice(["start", "data", "compute", "together", "save", "preview"]))
        if chance.random() < 0.2:
            assert sum(times.parts().values()) == pytest.approx(clock.now - 100, abs=0.01)
    parts = times.parts()
    assert sum(parts.values()) == pytest.approx(clock.now - 100, abs=0.01)
    assert set(parts) <= set(PARTS)
    assert min(parts.values(), default=0) >= 0
