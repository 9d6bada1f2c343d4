"""Requests to stop, and the clock."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pixart_ds.engine.agree import Agreement, Votes
from pixart_ds.train import loop
from pixart_ds.train.state import TrainState, passed
from pixart_ds.train.stop import STOP_SIGNALS, StopFlag


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_names_itself(number: signal.Signals) -> None:
    flag = StopFlag().install()
    try:
        assert not flag.requested
        os.kill(os.getpid(), number)
        assert flag.requested
        assert flag.reason == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.reason == number.name  # the first one is the reason
    finally:
        flag.restore()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_stop_file_is_a_request(tmp_path: Path) -> None:
    flag = StopFlag()
    flag.watch(tmp_path / "stop")
    assert not flag.requested
    (tmp_path / "stop").touch()
    assert flag.requested
    assert flag.reason == "the file stop"


class OneStep:
    """A stage of two steps in which all three requests come while the first one computes."""

    def __init__(self, left_out: bool) -> None:
        self.asked, self.agreed, self.left, self._left_out = False, list[Votes](), list[str](), left_out
        self.state = SimpleNamespace(images_seen=0, leaves_out=lambda images_seen: left_out, advance=self.advance)
        self.figures: dict[str, Any] = {}
        self.engine = SimpleNamespace(step=lambda: SimpleNamespace(applied=True, figures=dict))

    def advance(self, batch: int, applied: bool) -> None:
        self.state.images_seen += batch

    def loader(self) -> Any:
        steps = SimpleNamespace(steps=lambda *_: iter([0, 32]), micro_batches=lambda images_seen: [])
        return nullcontext(steps)

    def meter(self) -> Any:
        return nullcontext(SimpleNamespace(record=lambda *_, **__: None))

    def left_out(self, meter: Any) -> None:
        self.asked = True
        self.advance(32, applied=False)

    def sums(self) -> dict[str, float]:  # waits for the device: the last that a step does before the ranks vote
        self.asked = True
        return {}

    def account(self, *_: Any) -> None: ...

    def judge(self, *_: Any) -> None: ...

    def save_if_due(self, *_: Any, last: bool) -> None: ...

    def leave(self, reason: str | None) -> None:
        self.left.append(f"at {self.state.images_seen}: {reason}")

    def agree(self, world: Any, votes: Votes) -> Agreement:
        self.agreed.append(votes)
        return Agreement(votes.stop, votes.save, 0, 0, 32, {})

    reason = "SIGTERM"
    requested = property(lambda self: self.asked)
    pace = property(lambda self: SimpleNamespace(due=self.asked))
    shelf = property(lambda self: SimpleNamespace(ready=self.asked))


@pytest.mark.parametrize("left_out", [False, True])
def test_what_is_asked_for_during_a_step_is_heard_at_its_end(left_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one = OneStep(left_out)
    figures = SimpleNamespace(sums=one.sums, each=dict, waited=lambda seconds: None, ready=lambda: None)
    parts = {"Training": lambda *_: one, "in_numbers": lambda stage, *_: stage, "agree": one.agree}
    parts |= {"Figures": lambda *_: figures, "row_of": lambda agreed: {}, "work_in": lambda agreed: None}
    for name, part in parts.items():
        monkeypatch.setattr(loop, name, part)
    stage = SimpleNamespace(global_batch_size=32, total_images=64, min_snr_gamma=None)
    pulse: Any = SimpleNamespace(enter=lambda phase: None, stepped=lambda images_seen: None)
    job = loop.Job(None, stage, None, 1, pulse)  # type: ignore[arg-type]
    loop.fit(job, SimpleNamespace(size=1, device=None), one, None)  # type: ignore[arg-type]
    assert one.left == ["at 32: SIGTERM"]
    (votes,) = one.agreed
    assert (votes.stop, votes.save, votes.saved) == (True, True, True)


def test_skipped_steps_consume_their_images() -> None:
    state = TrainState()
    for applied in (True, False, True):
        state.advance(32, applied)
    assert state == TrainState(images_seen=96, applied_steps=2, skipped_steps=1)
    assert TrainState.from_json(state.to_json()) == state


def test_passed_finds_each_multiple_once_whatever_the_batch() -> None:
    for batch in (1, 7, 32, 100, 250):
        marks = [at for at in range(0, 1000, batch) if passed(100, at, at + batch)]
        assert len(marks) == len({(at + batch) // 100 for at in marks})
        assert len(marks) == min(1000 // 100, -(-1000 // batch))
    assert passed(100, 99, 100)
    assert not passed(100, 100, 199)
