"""Finds ranks that have stopped moving, from their signs of life, and names those that the others wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pixart_ds.config.schema import DeadlinesConfig
from pixart_ds.layout import AttemptLayout
from pixart_ds.train.pulse import read_pulses, slow_ranks, slow_words

_LOOK_SECONDS = 1.0
_SLOW_SECONDS = 60.0
_SLOW_AGAIN_SECONDS = 3600.0


@dataclass(frozen=True)
class Hang:
    """Ranks that no longer move.

    Attributes:
        what: Which ranks, where, in which phase, for how long.
        culprits: Their last signs of life.
        seen: Those of all ranks.
    """

    what: str
    culprits: list[dict[str, Any]]
    seen: list[dict[str, Any]]


class PulseWatch:
    """Watches the ranks of one launch.

    Only counters and durations that each host measured itself are compared, so clocks may differ or jump.

    Args:
        attempt, launch: Whose.
        deadlines: What is too long.
        world_size: Ranks that were started; without it, those that never give a sign of life are not missed.
        clock: Seconds.
    """

    def __init__(
        self,
        attempt: AttemptLayout,
        launch: int,
        deadlines: DeadlinesConfig,
        world_size: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._attempt, self._launch, self._deadlines, self._clock = attempt, launch, deadlines, clock
        self._world_size, self._began = world_size, clock()
        self._beats: dict[int, tuple[int, float]] = {}
        self._next_look = clock()
        self._first_step_at: float | None = None
        self._slow_since: dict[int, float] = {}
        self._slow_told: dict[int, float] = {}
        self._slow: list[str] = []

    @property
    def first_step_at(self) -> float | None:
        """When a rank was first seen to have ended a step."""
        return self._first_step_at

    def look(self) -> Hang | None:
        """What is wrong, if anything; cheap when called often."""
        now = self._clock()
        if now < self._next_look:
            return None
        self._next_look = now + _LOOK_SECONDS
        pulses = read_pulses(self._attempt, self._launch)
        for each in pulses:
            if self._beats.get(each["rank"], (-1, 0.0))[0] != each["beat"]:
                self._beats[each["rank"]] = (each["beat"], now)
            each["silent_s"] = now - self._beats[each["rank"]][1]
        self._notice_step(pulses, now)
        self._notice_slow(pulses, now)
        return self._missing(pulses, now) or self._judge(pulses)

    def look_back(self) -> None:
        """Notes what ranks that have left said last: all of their steps may lie between two looks."""
        self._notice_step(read_pulses(self._attempt, self._launch), self._clock())

    def _notice_step(self, pulses: list[dict[str, Any]], now: float) -> None:
        if self._first_step_at is None and any(each["images_seen"] is not None for each in pulses):
            self._first_step_at = now

    def newly_slow(self) -> list[str]:
        """For people: ranks that have been slower than the others for a minute; each at most once an hour."""
        said, self._slow = self._slow, []
        return said

    def _notice_slow(self, pulses: list[dict[str, Any]], now: float) -> None:
        slow = {each["rank"]: each for each in slow_ranks(pulses)}
        self._slow_since = {rank: self._slow_since.get(rank, now) for rank in slow}
        for rank, since in self._slow_since.items():
            told = self._slow_told.get(rank)
            if now - since >= _SLOW_SECONDS and (told is None or now - told >= _SLOW_AGAIN_SECONDS):
                self._slow_told[rank] = now
                self._slow.append(slow_words(slow[rank]))

    def _missing(self, pulses: list[dict[str, Any]], now: float) -> Hang | None:
        """Ranks that have never given a sign of life: their node hangs, or they were never started."""
        missing = sorted(set(range(self._world_size)) - {each["rank"] for each in pulses})
        if not missing or now - self._began <= self._deadlines.start:
            return None
        listed = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        word = "rank" if len(missing) == 1 else "ranks"
        return Hang(f"no sign of life from {word} {listed} within {self._deadlines.start:.0f} s", [], pulses)

    def _judge(self, pulses: list[dict[str, Any]]) -> Hang | None:
        silent = [each for each in pulses if each["silent_s"] > self._deadlines.silence]
        if silent and (len(silent) < len(pulses) or len(pulses) == 1):  # all of many: the file system, not the ranks
            said = [
                f"{_name(each)} has given no sign of life for {each['silent_s']:.0f} s, {_place(each)}"
                for each in silent
            ]
            return Hang("; ".join(said), silent, pulses)
        late = [
            each for each in pulses if each["for_s"] + each["silent_s"] > getattr(self._deadlines, each["deadline"])
        ]
        if not late:
            return None
        alone = [each for each in pulses if each["phase"] != "together"]
        clocks = [each["images_seen"] or 0 for each in alone]
        culprits = [each for each in alone if (each["images_seen"] or 0) == min(clocks)] or late
        said = [
            f"{_name(each)} has not moved for {each['for_s'] + each['silent_s']:.0f} s, {_place(each)}"
            for each in culprits
        ]
        why = "" if alone else ": all ranks wait for each other, which a broken network or GPU does"
        return Hang("; ".join(said) + why, culprits, pulses)


def _name(pulse: dict[str, Any]) -> str:
    return f"rank {pulse['rank']} on {pulse['host']} (pid {pulse['pid']})"


def _place(pulse: dict[str, Any]) -> str:
    clock = pulse["images_seen"]
    return f"in the phase {pulse['phase']!r} " + (
        "before its first step" if clock is None else f"after {clock:,} images"
    )
