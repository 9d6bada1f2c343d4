"""A rank's signs of life: where it is, what its own part of a step takes, and who is slow."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from pixart_ds.layout import AttemptLayout
from pixart_ds.train.pulse import Pulse, read_pulses, slow_ranks


def state_of(pulse: Pulse) -> dict[str, Any]:
    return pulse._state()


def test_the_phase_its_deadline_and_the_clock(tmp_path: Path) -> None:
    pulse = Pulse(AttemptLayout(tmp_path / "0001"), 1, 3)
    assert (state_of(pulse)["phase"], state_of(pulse)["deadline"], state_of(pulse)["images_seen"]) == (
        "start",
        "start",
        None,
    )
    pulse.enter("compute")
    assert state_of(pulse)["deadline"] == "start", "the first step may take long"
    with pulse.during("save"):
        assert (state_of(pulse)["phase"], state_of(pulse)["deadline"]) == ("save", "save")
    assert state_of(pulse)["phase"] == "compute"
    pulse.stepped(64)
    assert (state_of(pulse)["deadline"], state_of(pulse)["images_seen"]) == ("step", 64)


def test_only_a_ranks_own_part_counts_and_the_first_step_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pulse = Pulse(AttemptLayout(tmp_path / "0001"), 1, 0)

    def step(own: float, together: float) -> None:
        nonlocal now
        pulse.enter("compute")
        now += own
        pulse.enter("together")
        now += together
        pulse.stepped(32)

    step(0.2, 0)
    assert state_of(pulse)["own_s"] is None
    step(0.02, 0.2)
    assert state_of(pulse)["own_s"] == 0.02


def test_signs_are_written_and_read_by_launch(tmp_path: Path) -> None:
    attempt = AttemptLayout(tmp_path / "0001")
    attempt.root.mkdir()
    for launch, rank in ((1, 0), (1, 1), (2, 0)):
        Pulse(attempt, launch, rank, every_s=0.01).start().stop()
    assert [each["rank"] for each in read_pulses(attempt, 1)] == [1]
    assert [(each["rank"], each["launch"]) for each in read_pulses(attempt)] == [(0, 2)]
    assert read_pulses(attempt)[0]["beat"] >= 1
    attempt.pulse(5).write_text("{")
    assert len(read_pulses(attempt)) == 1
    assert read_pulses(AttemptLayout(tmp_path / "none")) == []


def test_a_disk_that_refuses_for_a_while_ends_no_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it lets nothing be removed: a rank that gives no more signs is taken for dead."""
    attempt = AttemptLayout(tmp_path / "0001")
    pulse = Pulse(attempt, 1, 0, every_s=0.01)
    tried: list[object] = []

    def refused(*words: object, **_: object) -> None:
        tried.append(words)
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", refused)
        broken.setattr(Path, "unlink", refused)
        pulse.start()
        deadline = time.monotonic() + 20
        while len(tried) < 6 and pulse._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert pulse._thread.is_alive()
    pulse.stop()
    assert len(read_pulses(attempt)) == 1


def test_a_sign_that_cannot_be_read_now_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = AttemptLayout(tmp_path / "0001")
    for rank in (0, 1):
        Pulse(attempt, 1, rank, every_s=0.01).start().stop()
    read_text = Path.read_text

    def stale(path: Path, **more: Any) -> str:
        if path == attempt.pulse(0):
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_text(path, **more)

    monkeypatch.setattr(Path, "read_text", stale)
    assert [each["rank"] for each in read_pulses(attempt)] == [1]
    attempt.pulse(1).write_bytes(b"\xff")
    assert read_pulses(attempt) == []


def test_slow_ranks_are_named_slowest_first() -> None:
    ranks = [{"rank": rank, "own_s": 1.0 + rank / 100} for rank in range(6)]
    assert slow_ranks(ranks) == []
    ranks += [{"rank": 6, "own_s": 1.5}, {"rank": 7, "own_s": 3.0}, {"rank": 8, "own_s": None}]
    assert [each["rank"] for each in slow_ranks(ranks)] == [7, 6]
    assert slow_ranks(ranks[:1]) == []
