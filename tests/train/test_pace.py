"""When checkpoints are due: Daly's interval against a simulation, and the clock."""

from __future__ import annotations

import math
import random

import pytest

from pixart_ds.config.schema import CheckpointConfig
from pixart_ds.engine.shelf import Committed
from pixart_ds.layout import CheckpointName
from pixart_ds.train.pace import Pace, daly_interval

HOURS = {"mean_time_between_failures_hours": 6.0}


def committed(stall_s: float, commit_s: float) -> Committed:
    return Committed(CheckpointName(1, 1, 1), False, stall_s, commit_s, 10)


def expected_loss(interval: float, cost: float, failures: float, runs: int = 20000) -> float:
    """Mean seconds that saves and repeated work take, for each second of work, where failures come at random."""
    luck, wall, work = random.Random(3), 0.0, 0
    for _ in range(runs):
        span = interval + cost
        while (until := luck.expovariate(1 / failures)) < span:
            wall += until
        wall += span
        work += 1
    return wall / (work * interval) - 1


@pytest.mark.parametrize(("cost", "failures"), [(1.0, 600.0), (30.0, 3600.0), (300.0, 3600.0)])
def test_no_other_interval_loses_clearly_less(cost: float, failures: float) -> None:
    best = expected_loss(daly_interval(cost, failures), cost, failures)
    for factor in (0.4, 0.7, 1.4, 2.5):
        assert best <= expected_loss(factor * daly_interval(cost, failures), cost, failures) * 1.02


def test_youngs_interval_is_its_first_term_and_a_hopeless_save_takes_the_mean() -> None:
    assert daly_interval(1e-6, 3600) == pytest.approx(math.sqrt(2 * 1e-6 * 3600), rel=1e-4)
    assert daly_interval(7201, 3600) == 3600


def test_the_interval_follows_what_saves_are_measured_to_cost() -> None:
    now = 0.0
    pace = Pace(CheckpointConfig(**HOURS), clock=lambda: now)
    first = pace.interval_s
    assert first == daly_interval(1.0, 6 * 3600)
    now = first - 0.1
    assert not pace.due
    now = first
    assert pace.due
    pace.begun()
    assert not pace.due
    pace.committed(committed(stall_s=4.0, commit_s=9.0))
    assert pace.interval_s == daly_interval(4.0, 6 * 3600) > first
    pace.committed(committed(stall_s=0.01, commit_s=30.0))
    assert pace.interval_s == 120.0, "writing takes a quarter of the time at most"
    now += 120.0
    assert pace.due


def test_with_a_fixed_interval_the_clock_says_nothing() -> None:
    pace = Pace(CheckpointConfig.model_validate({"every": {"steps": 5}}), clock=lambda: 1e9)
    assert not pace.due
    assert pace.interval_s == math.inf


@pytest.mark.parametrize("both", [{}, {"every": {"steps": 5}, **HOURS}])
def test_exactly_one_way_to_say_when(both: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="exactly one of every and mean_time_between_failures_hours"):
        CheckpointConfig.model_validate(both)
