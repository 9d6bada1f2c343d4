"""Requests to stop, and the clock."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

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
