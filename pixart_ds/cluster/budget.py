"""The guard of a run's budget beside its ranks: it warns when little is left, and asks for a stop when nothing is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from pixart_ds.cluster.requests import BUDGET, Requests
from pixart_ds.config.budget import read_budget
from pixart_ds.errors import PixArtError
from pixart_ds.layout import RunLayout
from pixart_ds.ledger.accounting import RatesOf
from pixart_ds.ledger.budget import WARN_AT, GrowingBook, is_used_up, rows, spent_by, told
from pixart_ds.ledger.entries import Entry
from pixart_ds.log import Log, duration
from pixart_ds.train.attempt import AttemptRecord

_SHORTEST_S = 1.0
"""Between two looks, however soon a limit is reached."""


class BudgetGuard:
    """Looks now and then at what the run has used up; nothing that it cannot read or does not know ends a training.

    Args:
        run: The run; its budget may change at any time.
        record: Of the running attempt, which counts up to this moment.
        requests: Hears when a limit is reached.
        log: For people.
        period_s: Most seconds between two looks; the next one comes sooner where a limit will be reached sooner.
        clock: Seconds that never run back.
    """

    def __init__(
        self,
        run: RunLayout,
        record: AttemptRecord,
        requests: Requests,
        log: Log,
        period_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._record, self._requests, self._log = run, record, requests, log
        self._period_s, self._clock, self._next_look = period_s, clock, clock()
        self._book, self._rates = GrowingBook(run), RatesOf()
        self._warned: set[tuple[str, float]] = set()
        self._said: set[str] = set()
        self.used_up: str | None = None
        """What the stop was asked for, in words."""

    def look(self, *, at_once: bool = False) -> None:
        """Warns, or asks for a stop, if it is time for a look; call it as often as you like."""
        now = self._clock()
        if self.used_up is not None or (now < self._next_look and not at_once):
            return
        self._next_look = now + self._period_s
        try:
            if limits := read_budget(self._run).limits:
                self._next_look = now + self._hold_against(limits)
        except (OSError, PixArtError) as error:
            self._say_once(f"the budget is not watched while it cannot be read: {error}")

    def asked(self) -> str | None:
        """Who asked for a stop first, with what is used up if it was this guard."""
        return self.used_up if self._requests.first == BUDGET else self._requests.first

    def _hold_against(self, limits: Mapping[str, float]) -> float:
        """Compares, and returns the seconds until the next look."""
        entries, problems = self._book.read()
        for problem in problems:
            self._say_once(f"the budget is watched without what cannot be read: {problem}")
        running = self._record.entry_now()
        if running is not None:
            entries = [entry for entry in entries if _key(entry) != _key(running)] + [running]
        found = spent_by(entries, self._rates)
        if found.unknown and (blind := [what for what in limits if what != "gpu_days"]):
            self._say_once(f"{', '.join(blind)} cannot be watched: {found.unknown[0]}")
        compared = rows(limits, found.account)
        if over := [row for row in compared if is_used_up(row)]:
            self.used_up = f"budget used up: {told(over)}"
            self._log.event(f"{self.used_up}; the run stops until it is raised: pixart-ds budget")
            self._requests.names.append(BUDGET)
            return self._period_s
        paces = {} if running is None or not running.seconds else self._paces(limits, running)
        for row in compared:
            self._warn(row, paces.get(row["what"]))
        return min([self._period_s, *(max(_SHORTEST_S, _seconds_to_next(row, paces)) for row in compared)])

    def _paces(self, limits: Mapping[str, float], running: Entry) -> dict[str, float]:
        """What the running launch uses up in a second, of each limit for which that is known."""
        own = rows(limits, spent_by([running], self._rates).account)
        return {row["what"]: row["used"] / running.seconds for row in own if row["used"]}

    def _warn(self, row: Mapping[str, Any], pace: float | None) -> None:
        """Once an attempt for each limit, and again for one that was changed."""
        key = row["what"], row["limit"]
        if row["part"] is None or row["part"] < WARN_AT or key in self._warned:
            return
        self._warned.add(key)
        left = "" if pace is None else f"; at this pace used up in {duration((row['limit'] - row['used']) / pace)}"
        self._log.event(f"budget: {row['part']:.0%} used, {told([row])}{left}")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._log.event(text)


def _key(entry: Entry) -> tuple[str, int, int]:
    return entry.stage, entry.attempt, entry.launch


def _seconds_to_next(row: Mapping[str, Any], paces: Mapping[str, float]) -> float:
    """Until the warning is due, or after it the stop; infinite if nobody knows."""
    pace = paces.get(row["what"])
    if pace is None or row["part"] is None:
        return float("inf")
    due = row["limit"] * (WARN_AT if row["part"] < WARN_AT else 1.0)
    return float((due - row["used"]) / pace)
