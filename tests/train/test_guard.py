"""The guard over made-up losses; what is left out, and which checkpoints are from before training went wrong."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pixart_ds.config.schema import GuardConfig
from pixart_ds.errors import CheckpointError
from pixart_ds.layout import StageLayout
from pixart_ds.train.guard import Guard, Verdict, is_persistent
from pixart_ds.train.skips import Window, is_clean, read_records, read_windows, record_window
from pixart_ds.train.state import TrainState
from pixart_ds.train.training import Training

BATCH = 32
CONFIG = GuardConfig(consecutive_skips=6, spike_factor=12.0, spike_steps=4, history_steps=100)


class Steps:
    """Feeds a guard step by step."""

    def __init__(self, guard: Guard) -> None:
        self.guard, self.clock, self.skips = guard, 0, 0

    def take(self, loss: float, *, applied: bool = True) -> Verdict | None:
        self.skips = 0 if applied else self.skips + 1
        verdict = self.guard.judge(self.clock, loss=loss, applied=applied, consecutive_skips=self.skips)
        self.clock += BATCH
        return verdict


def calm(count: int, seed: int = 1, scatter: float = 0.02) -> list[float]:
    """Losses as a healthy training has them: falling, with noise."""
    luck = random.Random(seed)
    return [0.15 + 0.85 / (1 + step / 20) + luck.gauss(0, scatter) for step in range(count)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scatter", [0.0, 0.005, 0.05])
def test_a_healthy_training_is_never_sent_back(seed: int, scatter: float) -> None:
    steps = Steps(Guard(CONFIG, BATCH))
    assert all(steps.take(loss) is None for loss in calm(2000, seed, scatter))


def test_a_spike_that_lasts_is_sent_back_with_its_window() -> None:
    steps = Steps(Guard(CONFIG, BATCH))
    for loss in calm(300):
        assert steps.take(loss) is None
    assert not steps.guard.doubts
    for _ in range(3):
        assert steps.take(0.9) is None
        assert steps.guard.doubts
    verdict = steps.take(0.95)
    assert verdict is not None
    assert verdict.window == Window(300 * BATCH, 304 * BATCH)
    assert "the loss was above" in verdict.reason
    assert "0.95 at last" in verdict.reason


def test_a_spike_that_passes_is_let_go_and_does_not_move_the_bound() -> None:
    steps = Steps(Guard(CONFIG, BATCH))
    for loss in calm(300):
        steps.take(loss)
    bound = steps.guard.bound
    for _ in range(3):
        assert steps.take(5.0) is None
    assert steps.guard.bound == bound
    assert steps.take(0.17) is None
    assert not steps.guard.doubts


def test_refused_steps_in_a_row_are_sent_back_and_single_ones_are_not() -> None:
    steps = Steps(Guard(CONFIG, BATCH))
    for number in range(200):
        assert steps.take(0.2, applied=number % 6 == 0) is None
    for _ in range(10):
        steps.take(0.2)
    for _ in range(5):
        assert steps.take(float("nan"), applied=False) is None
    verdict = steps.take(float("nan"), applied=False)
    assert verdict is not None
    assert verdict.window == Window(210 * BATCH, 216 * BATCH)
    assert verdict.reason == "6 steps in a row had a loss or gradient that is not finite"


def test_early_losses_and_a_guard_without_bound_are_not_judged() -> None:
    steps = Steps(Guard(CONFIG, BATCH))
    assert all(steps.take(loss) is None for loss in [1.0] * 30 + [50.0] * 19)
    blind = Steps(Guard(CONFIG.model_copy(update={"spike_factor": None}), BATCH))
    assert all(blind.take(loss) is None for loss in [1.0] * 300 + [50.0] * 100)


def test_a_history_from_a_checkpoint_goes_on_as_if_it_had_run() -> None:
    losses = calm(260)
    whole = Steps(Guard(CONFIG, BATCH))
    for loss in losses[:200]:
        whole.take(loss)
    resumed = Steps(Guard(CONFIG, BATCH, json.loads(json.dumps(whole.guard.to_json()))))
    for loss in losses[200:]:
        assert whole.take(loss) == resumed.take(loss)
        assert whole.guard.bound == resumed.guard.bound


@pytest.mark.parametrize("steps_before", [1, 2, 3])
def test_a_stop_amid_a_spike_does_not_make_its_checkpoint_one_from_before(steps_before: int) -> None:
    whole = Steps(Guard(CONFIG, BATCH))
    for loss in calm(300):
        whole.take(loss)
    for _ in range(steps_before):
        assert whole.take(0.9) is None
    resumed = Steps(Guard(CONFIG, BATCH, json.loads(json.dumps(whole.guard.to_json()))))
    assert resumed.guard.doubts
    resumed.clock = whole.clock
    verdicts = [resumed.take(0.9) for _ in range(4 - steps_before)]
    assert verdicts[:-1] == [None] * (3 - steps_before)
    assert verdicts[-1] is not None
    assert verdicts[-1].window == Window(300 * BATCH, 304 * BATCH)
    assert not is_clean(whole.clock, (), [verdicts[-1].window])


def test_a_history_of_losses_alone_is_read() -> None:
    guard = Guard(CONFIG, BATCH, [0.5] * 200)
    assert guard.to_json() == {"losses": [0.5] * 100, "high": 0}
    assert guard.bound is not None


def training_of(**parts: Any) -> Any:
    """A stage under way of which only these parts are there."""
    training = Training.__new__(Training)
    vars(training).update(parts)
    return training


@pytest.mark.parametrize("changes", [[], ["another learning rate"]])
def test_after_a_change_the_old_losses_are_no_measure(changes: list[str]) -> None:
    kept = {"losses": [0.5] * 60, "high": 2}
    state = {"state": TrainState(320, 10).to_json(), "lineage": {}, "guard": kept}

    def resume(names: list[str], check: Any) -> Any:
        check(None)
        return SimpleNamespace(damaged=[], name=names[0], state=state)

    training = training_of(shelf=SimpleNamespace(resume=resume), log=SimpleNamespace(event=lambda text: None))
    training._changes_since, training._take_over = lambda reader: changes, lambda changes: None
    guard = Guard(CONFIG, BATCH, training._resume(["newest"]))
    assert guard.to_json() == ({"losses": [], "high": 0} if changes else kept)


def saving(guard: Guard, saved: list[int]) -> Any:
    """Training that saves every 15 steps into a list."""
    checkpoint = SimpleNamespace(every=SimpleNamespace(in_images=lambda batch: 15 * batch), milestone_every=None)
    training = training_of(guard=guard, state=TrainState(), _owed=None)
    training.stage = SimpleNamespace(checkpoint=checkpoint, global_batch_size=BATCH)

    def save(meter: Any, *, milestone: bool) -> None:
        training._owed = None
        saved.append(training.state.images_seen // BATCH)

    training._save = save
    return training


def after(training: Any, steps: Steps, loss: float, *, stop: bool = False, last: bool = False) -> None:
    """One step, refused if its loss is no number, and the save after it."""
    before, applied = steps.clock, math.isfinite(loss)
    assert steps.take(loss, applied=applied) is None
    training.state.advance(BATCH, applied)
    training.save_if_due(None, SimpleNamespace(save=False, stop=stop), before, last=last)


def test_while_steps_are_refused_no_checkpoint_pushes_out_a_clean_one() -> None:
    config = CONFIG.model_copy(update={"consecutive_skips": 40})
    steps, saved = Steps(Guard(config, BATCH)), list[int]()
    training = saving(steps.guard, saved)
    for _ in range(31):
        after(training, steps, 0.2)
    for _ in range(39):
        after(training, steps, float("nan"))
        assert steps.guard.doubts
    assert saved == [15, 30]
    verdict = steps.take(float("nan"), applied=False)
    assert verdict is not None
    assert [is_clean(step * BATCH, (), [verdict.window]) for step in saved] == [True, True]


def test_a_save_that_refused_steps_put_off_is_made_after_them() -> None:
    steps, saved = Steps(Guard(CONFIG, BATCH)), list[int]()
    training = saving(steps.guard, saved)
    for loss in [0.2] * 13 + [float("nan")] * 3 + [0.2] * 2:
        after(training, steps, loss)
    assert saved == [17]


@pytest.mark.parametrize("end", ["stop", "last"])
def test_a_stop_and_the_end_save_amid_refused_steps_too(end: str) -> None:
    steps, saved = Steps(Guard(CONFIG, BATCH)), list[int]()
    training = saving(steps.guard, saved)
    after(training, steps, 0.2)
    after(training, steps, float("nan"), stop=end == "stop", last=end == "last")
    assert saved == [2]


# ---- what is left out ----------------------------------------------------------------------------------------------


def test_windows_are_recorded_for_good_and_read_in_order(tmp_path: Path) -> None:
    layout = StageLayout(tmp_path)
    assert read_windows(layout) == ()
    record_window(layout, Window(640, 800), {"reason": "late", "attempt": 2, "launch": 1})
    record_window(layout, Window(64, 96), {"reason": "early", "attempt": 3, "launch": 1})
    assert read_windows(layout) == (Window(64, 96), Window(640, 800))
    assert [row["reason"] for row in read_records(layout)] == ["late", "early"]
    layout.skips.write_text("{")
    with pytest.raises(CheckpointError, match="skips.json is not JSON"):
        read_windows(layout)


def test_a_window_holds_whole_steps() -> None:
    state = TrainState(skips=(Window(64, 128), Window(320, 352)))
    assert [clock for clock in range(0, 400, 32) if state.leaves_out(clock)] == [64, 96, 320]
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert TrainState.from_json({"images_seen": 1, "applied_steps": 1, "skipped_steps": 0}).skips == ()


def test_checkpoints_from_before_a_window_or_that_went_around_it_are_clean() -> None:
    window, other = Window(64, 128), Window(320, 352)
    assert is_clean(64, (), [window])
    assert not is_clean(96, (), [window])
    assert not is_clean(256, (), [window]), "it was trained through it"
    assert is_clean(256, (window,), [window, other])
    assert not is_clean(384, (window,), [window, other])


def test_going_back_too_often_in_a_short_time_is_persistent() -> None:
    config = GuardConfig(rollbacks=2, rollback_steps=10)
    near, far = {"after": 5 * BATCH}, {"after": 0}
    now = Window(14 * BATCH, 15 * BATCH)
    assert not is_persistent(config, BATCH, [], now)
    assert not is_persistent(config, BATCH, [near, far], now)
    assert is_persistent(config, BATCH, [near, near], now)
    assert is_persistent(GuardConfig(rollbacks=0), BATCH, [], now)
