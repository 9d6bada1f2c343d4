"""What a run has used up of its budget, by its ledger alone: Slurm is not asked, so that nobody waits for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.config.budget import read_budget
from pixart_ds.errors import ConfigError
from pixart_ds.layout import RunLayout
from pixart_ds.ledger.accounting import RatesOf, Use, total, use_of, whole_parts
from pixart_ds.ledger.book import read_attempt_book, read_book
from pixart_ds.ledger.entries import Entry
from pixart_ds.rates import Assumptions

WARN_AT = 0.8
"""The part of a limit from which on people are warned."""

_IN_ACCOUNT = {"gpu_days": "device_days", "kwh": "kwh", "kg_co2e": "kg_co2e", "usd": "usd"}
"""Where a limit's amount stands in an account (`Use.to_json`); with `_total` behind it, in a forecast."""


@dataclass(frozen=True)
class Spent:
    """What a run has used up.

    Attributes:
        use: Of all entries; energy, emissions and money of those whose devices are known.
        unknown: Why some have no price and no power; empty if all have.
        open: Whether an entry's ranks have not said yet what they run on, and nothing else says it.
    """

    use: Use
    unknown: tuple[str, ...] = ()
    open: bool = False

    @property
    def account(self) -> dict[str, float | None]:
        """The amounts that limits are set for, under the names of the report's accounts; None for what is not known."""
        known = not self.unknown and not self.open
        days = self.use.device_seconds / 86400
        return {"device_days": days} | {
            name: getattr(self.use, key) if known else None
            for name, key in (("kwh", "kwh"), ("kg_co2e", "kg"), ("usd", "usd"))
        }


def spent(run: Path) -> Spent:
    """What the ledger of a run says now.

    Raises:
        DataError: The folder holds no run.
    """
    return spent_by(entry for entries in read_book(run).stages.values() for entry in entries)


def spent_by(entries: Iterable[Entry], rates: RatesOf | None = None) -> Spent:
    """What entries have used up.

    One whose ranks ended, or have not come as far, before they said what they run on is priced as the others of the run.

    Args:
        entries: Of one run.
        rates: Keeps the assumptions from one call to the next.
    """
    rates = rates or RatesOf()
    uses: list[Use] = []
    silent: list[Entry] = []
    unknown: list[str] = []
    like: Assumptions | None = None
    for entry in entries:
        try:
            like = rates(entry)
        except ConfigError as error:
            if entry.device_model is None:
                silent.append(entry)
            else:
                unknown.append(error.what)
                uses.append(_time_alone(entry))
            continue
        uses.append(use_of(entry, like))
    uses += [_time_alone(entry) if like is None else use_of(entry, like) for entry in silent]
    return Spent(total(uses), tuple(unknown), open=bool(silent) and like is None)


def _time_alone(entry: Entry) -> Use:
    parts = {name: seconds * entry.device_count for name, seconds in whole_parts(entry).items()}
    return Use(seconds=entry.seconds, parts=parts)


class GrowingBook:
    """The entries of a run, read again and again: of attempts that are over, which is all but the newest of a stage, only once.

    Args:
        run: The run.
    """

    def __init__(self, run: RunLayout) -> None:
        self._run, self._over = run, dict[Path, list[Entry]]()

    def read(self) -> tuple[list[Entry], list[str]]:
        """All entries as they are now, and what could not be read.

        Raises:
            OSError, DataError: A folder or the manifest cannot be read.
        """
        entries: list[Entry] = []
        problems: list[str] = []
        for name in files.read_json(self._run.manifest)["stages"]:
            attempts = self._run.stage(name).all_attempts()
            for attempt in attempts:
                found, newest = self._over.get(attempt.root), attempt is attempts[-1]
                if found is None:
                    before = len(problems)
                    found = read_attempt_book(attempt, name, problems, newest=newest)
                    if not newest and len(problems) == before:
                        self._over[attempt.root] = found
                entries += found
        return entries, problems


def amounts(account: Mapping[str, float | None]) -> dict[str, float | None]:
    """What was used up of each thing that may have a limit, by its key in the recipe."""
    return {what: account[name] for what, name in _IN_ACCOUNT.items()}


def rows(
    limits: Mapping[str, float], account: Mapping[str, float | None], forecast: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """A row for each limit: what, limit, used, the part of the limit that this is, and what a forecast sees at the chain's end.

    Args:
        limits: By their keys in the recipe.
        account: What was used: `Spent.account`, or an account of the cost report.
        forecast: Of the cost report, if there is one.
    """
    made: list[dict[str, Any]] = []
    for what, limit in limits.items():
        used, ahead = account[_IN_ACCOUNT[what]], (forecast or {}).get(f"{_IN_ACCOUNT[what]}_total")
        part = None if used is None else used / limit
        made.append({"what": what, "limit": limit, "used": used, "part": part, "forecast": ahead})
    return made


def is_used_up(row: Mapping[str, Any]) -> bool:
    """Whether nothing is left of a row's limit."""
    return row["part"] is not None and row["part"] >= 1


def told(budget_rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows in a sentence: `1,310 of 1,300 gpu_days, 12 of 10 kwh`."""
    return ", ".join(f"{figure(row['used'])} of {figure(row['limit'])} {row['what']}" for row in budget_rows)


def figure(value: float | None) -> str:
    """Four digits or all before the point; a question mark for what is not known."""
    if value is None:
        return "?"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def to_raise(run: RunLayout, budget_rows: Sequence[Mapping[str, Any]]) -> str:
    """The command that raises limits, as an instruction."""
    sets = " ".join(f"--set {row['what']}=MORE" for row in budget_rows)
    return f"raise it: pixart-ds budget {run.root} {sets} (null in place of a number takes a limit away)"


def refuse_used_up(run: RunLayout) -> None:
    """Refuses to begin with a budget of which nothing is left.

    Raises:
        ConfigError: What is used up, and the command that raises it; or the budget's file is damaged.
    """
    limits = read_budget(run).limits
    if not limits:
        return
    if over := [row for row in rows(limits, spent(run.root).account) if is_used_up(row)]:
        raise ConfigError(f"the run's budget is used up: {told(over)}", where=run.budget, remedy=to_raise(run, over))
