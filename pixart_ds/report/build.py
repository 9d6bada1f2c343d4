"""The cost of runs as JSON (docs/cost.md): what the text, the tables and the HTML page are made of."""

from __future__ import annotations

import datetime
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.config.budget import read_budget
from pixart_ds.config.freeze import read_stage
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.layout import RunLayout
from pixart_ds.ledger.accounting import RatesOf, Use, alone_use, divided_by, match, total, use_of
from pixart_ds.ledger.book import Book, read_book
from pixart_ds.ledger.budget import rows as budget_rows
from pixart_ds.ledger.entries import Entry
from pixart_ds.ledger.paper import paper_account
from pixart_ds.ledger.sacct import Allocation
from pixart_ds.rates import rate_table

FORMAT = 1


@dataclass(frozen=True)
class SlurmRows:
    """What Slurm says of a run's jobs.

    Attributes:
        rows: Of its jobs alone.
        source: Where they are from, in words.
        problems: What could not be read.
    """

    rows: Sequence[Allocation]
    source: str
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class _Attempt:
    """One attempt with what it consumed."""

    stage: str
    number: int
    entries: Sequence[Entry]
    ledger: Use
    use: Use
    rows: Sequence[Allocation] = ()

    @property
    def started(self) -> float:
        return self.entries[0].started

    @property
    def ended(self) -> float:
        return max(entry.until for entry in self.entries)

    @property
    def outcome(self) -> str:
        return self.entries[-1].outcome

    @property
    def user(self) -> str:
        return next((row.user for row in self.rows if row.user), None) or self.entries[-1].user or "unknown"


@dataclass
class _Run:
    """One run read."""

    layout: RunLayout
    book: Book
    attempts: list[_Attempt]
    alone: list[tuple[Allocation, Use | None]] = field(default_factory=list)
    slurm: SlurmRows | None = None
    problems: list[str] = field(default_factory=list)

    def of(self, stage: str) -> list[_Attempt]:
        return [attempt for attempt in self.attempts if attempt.stage == stage]


def build(
    runs: Sequence[Path], options: Mapping[str, Any] | None = None, slurm: Mapping[Path, SlurmRows] | None = None
) -> dict[str, Any]:
    """The report.

    Args:
        runs: Folders.
        options: Arguments of `rates.assume` that go before what the jobs' profiles said.
        slurm: Slurm's own account of runs; where there is one, its rows are the device-seconds.

    Raises:
        DataError: A folder holds no run.
        ConfigError: A device that is not in the table, a country, an impossible number.
    """
    rates = RatesOf(options)
    found = [_read(run, rates, (slurm or {}).get(run)) for run in runs]
    attempts = [attempt for run in found for attempt in run.attempts]
    alone = [use for run in found for _, use in run.alone if use is not None]
    return {
        "format": FORMAT,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "runs": [_run_json(run, rates) for run in found],
        "account": (total(attempt.use for attempt in attempts) + total(alone)).to_json(),
        "by_state": _grouped(attempts, found, "outcome"),
        "by_user": _grouped(attempts, found, "user"),
        "paper": paper_account(),
        "assumptions": _assumptions(rates),
        "problems": [],
    }


def _read(root: Path, rates: RatesOf, slurm: SlurmRows | None) -> _Run:
    book = read_book(root)
    attempts: list[_Attempt] = []
    for stage, entries in book.stages.items():
        reached = 0
        by_number: dict[int, list[Entry]] = {}
        for entry in entries:
            by_number.setdefault(entry.attempt, []).append(entry)
        for number, own in by_number.items():
            furthest = max(entry.images_to for entry in own)
            gained, reached = max(0, furthest - reached), max(reached, furthest)
            use = replace(total(use_of(entry, rates(entry)) for entry in own), images_gained=gained)
            attempts.append(_Attempt(stage, number, own, use, use))
    run = _Run(RunLayout(root), book, attempts, slurm=slurm)
    if slurm is not None:
        _hold_against(run, slurm, rates)
    return run


def _hold_against(run: _Run, slurm: SlurmRows, rates: RatesOf) -> None:
    """Slurm's rows are the device-seconds of the attempts that ran in them; those in which none ran are kept apart."""
    found = match({(each.stage, each.number): each.entries for each in run.attempts}, slurm.rows)
    like = run.attempts[-1].entries[-1] if run.attempts else None
    for number, each in enumerate(run.attempts):
        rows = found.of_attempt.get((each.stage, each.number), [])
        if rows:
            uses = [use_of(entry, rates(entry)) for entry in each.entries]
            use = replace(divided_by(rows, each.entries, uses, rates), images_gained=each.ledger.images_gained)
            run.attempts[number] = _Attempt(each.stage, each.number, each.entries, each.ledger, use, rows)
    run.alone = [(row, alone_use(row, like, rates)) for row in found.alone if row.gpu_seconds]
    run.attempts.sort(key=lambda each: each.started)


def _run_json(run: _Run, rates: RatesOf) -> dict[str, Any]:
    ordered = sorted(run.attempts, key=lambda each: each.started)
    waits: dict[tuple[str, int], float] = {}
    for before, after in itertools.pairwise(ordered):
        waits[after.stage, after.number] = max(0.0, after.started - before.ended)
    use = total(each.use for each in run.attempts) + total(use for _, use in run.alone if use is not None)
    wall = ordered[-1].ended - ordered[0].started if ordered else 0.0
    productive = sum(entry.parts.get("productive", 0.0) for each in ordered for entry in each.entries)
    manifest = files.read_json(run.layout.manifest)
    stages = [_stage_json(run, stage, waits) for stage in run.book.stages]
    forecast = _forecast(run, use)
    return {
        "run": str(run.layout.root),
        "name": run.layout.root.resolve().name,
        "chain": manifest.get("chain"),
        "stages": stages,
        "account": use.to_json(),
        "wall_seconds": wall,
        "waited_seconds": sum(waits.values()),
        "ettr": productive / wall if wall and any(entry.parts for each in ordered for entry in each.entries) else None,
        "energy_notes": sorted({note for each in ordered for e in each.entries for note in e.energy.get("notes", ())}),
        "forecast": forecast,
        "budget": _budget(run, use, forecast),
        "slurm": _slurm_json(run),
        "problems": [*run.book.problems, *run.problems, *(run.slurm.problems if run.slurm else ())],
    }


def _stage_json(run: _Run, stage: str, waits: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    attempts = run.of(stage)
    layout = run.layout.stage(stage)
    state = "done" if layout.done.exists() else attempts[-1].outcome if attempts else "not started"
    return {
        "stage": stage,
        "state": state,
        "total_images": _total_images(run, stage),
        "images_seen": max((entry.images_to for each in attempts for entry in each.entries), default=0),
        "account": total(each.use for each in attempts).to_json(),
        "paper_v100_days": rate_table().paper.gpu_days.get(stage),
        "attempts": [_attempt_json(each, waits.get((each.stage, each.number), 0.0)) for each in attempts],
    }


def _attempt_json(attempt: _Attempt, waited_s: float) -> dict[str, Any]:
    last = attempt.entries[-1]
    return {
        "attempt": attempt.number,
        "job": last.job,
        "user": attempt.user,
        "outcome": attempt.outcome,
        "cause": last.cause,
        "started": attempt.started,
        "ended": attempt.ended,
        "waited_s": waited_s,
        "hosts": sorted({host for entry in attempt.entries for host in entry.hosts}),
        "devices": last.device_count,
        "device": last.device_kind or ("cpu-core" if last.device == "cpu" else None),
        "device_model": last.device_model,
        "launches": len(attempt.entries),
        "images_from": attempt.entries[0].images_from,
        "images_to": max(entry.images_to for entry in attempt.entries),
        "account": attempt.use.to_json(),
    }


def _total_images(run: _Run, stage: str) -> int | None:
    """Its length by its recipe; None for a recipe of another version, which is told."""
    try:
        return read_stage(run.layout, stage).total_images
    except ConfigError as error:
        run.problems.append(f"{stage}: its recipe cannot be read: {error.what}")
        return None


def _newest_row(run: _Run, stage: str) -> dict[str, Any]:
    for attempt in reversed(run.layout.stage(stage).all_attempts()):
        try:
            row = files.last_json_line(attempt.metrics)
        except (DataError, OSError):  # a line that a kill left torn
            continue
        if row:
            return dict(row)
    return {}


def _forecast(run: _Run, use: Use) -> dict[str, Any] | None:
    """What is still to come, by the newest attempt's pace; None before its second step, and when all is done."""
    stages = [stage for stage in run.book.stages if run.of(stage)]
    if not stages or all(run.layout.stage(stage).done.exists() for stage in run.book.stages):
        return None
    stage = stages[-1]
    left = _newest_row(run, stage).get("chain_seconds_left")
    newest = run.of(stage)[-1]
    steps = sum(newest.use.parts.get(name, 0.0) for name in ("productive", "data_wait"))
    own = newest.use.device_seconds
    if left is None or not steps or not own:
        return None
    overhead = own / steps
    devices = own / newest.use.seconds if newest.use.seconds else newest.entries[-1].device_count
    seconds = float(left) * overhead
    share = seconds * devices / own
    return {
        "device_days_left": seconds * devices / 86400,
        "seconds_left": seconds,
        "ends": time.time() + seconds,
        "device_days_total": (use.device_seconds + seconds * devices) / 86400,
        "usd_total": use.usd + newest.use.usd * share,
        "kwh_total": use.kwh + newest.use.kwh * share,
        "kg_co2e_total": use.kg + newest.use.kg * share,
        "how": f"at the pace of {stage}'s newest attempt and its {devices:g} devices, with {overhead - 1:.0%} on top for what is "
        "no training; later stages by their FLOPs; without waiting in the queue",
    }


def _budget(run: _Run, use: Use, forecast: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What was used up of each limit; none for a file that cannot be read, which is told."""
    try:
        limits = read_budget(run.layout).limits
    except ConfigError as error:
        run.problems.append(f"its budget cannot be read: {error.what}")
        return []
    return budget_rows(limits, use.to_json(), forecast)


def _slurm_json(run: _Run) -> dict[str, Any] | None:
    if run.slurm is None:
        return None
    rows = run.slurm.rows
    gpu_seconds = sum(row.gpu_seconds for row in rows)
    held = sum(each.ledger.device_seconds for each in run.attempts if each.rows)
    without = [f"{each.stage}, attempt {each.number}" for each in run.attempts if not each.rows]
    return {
        "source": run.slurm.source,
        "gpu_seconds": gpu_seconds,
        "ledger_seconds": held,
        "difference_seconds": gpu_seconds - held,
        "rows": len(rows),
        "running": sorted({row.job for row in rows if row.running}),
        "without_gpus": sorted({row.job for row in rows if row.gpus is None}),
        "unmatched": [
            {"job": row.job, "name": row.name, "state": row.state, "user": row.user, "gpu_seconds": row.gpu_seconds}
            for row, _ in run.alone
        ],
        "not_in_slurm": without,
        "problems": list(run.slurm.problems),
    }


def _grouped(attempts: Sequence[_Attempt], runs: Sequence[_Run], name: str) -> dict[str, Any]:
    groups: dict[str, list[Use]] = {}
    for attempt in attempts:
        groups.setdefault(str(getattr(attempt, name)), []).append(attempt.use)
    for run in runs:
        for row, use in run.alone:
            if use is not None:
                groups.setdefault(row.user if name == "user" else "no attempt", []).append(use)
    return {key: total(uses).to_json() for key, uses in sorted(groups.items())}


def _assumptions(rates: RatesOf) -> dict[str, Any]:
    ratio, embodied = rate_table().a100_days_per_v100_day, rate_table().embodied
    lines = [line for each in rates.used for line in each.lines()]
    if any(each.device.startswith("v100") for each in rates.used):
        lines.append(f"A100-equivalent days are V100-days × {ratio.value:.4f} ({ratio.source})")
    if any(each.embodied_grams_per_hour is not None for each in rates.used):
        lines.append(f"embodied emissions, not in the CO2e above: over {embodied.value:g} h; {embodied.source}")
    lines += [
        "energy: what was measured, the rest at the same launch's measured power or the device's; the host share; all × PUE",
        "goodput: device-time of productive steps / all device-time; ETTR: their time / time from the first start to the last end",
    ]
    return {"lines": list(dict.fromkeys(lines)), "rates": [each.model_dump() for each in rates.used]}


def to_text(values: Mapping[str, Any]) -> str:
    """The report as JSON text."""
    return json.dumps(values, indent=2, ensure_ascii=False)
