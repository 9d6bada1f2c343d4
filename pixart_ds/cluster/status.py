"""`pixart-ds status`: where a run stands and what to do next, from its folder and Slurm's queue.

It works while jobs run, after they died, and without Slurm; what cannot be read is told, and the rest is shown. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pixart_ds import files
from pixart_ds.cluster.jobs import job_name
from pixart_ds.cluster.status_advice import next_steps, warn
from pixart_ds.cluster.status_queue import Queue, ask
from pixart_ds.cluster.status_stage import Look, job_of, stage_status
from pixart_ds.config.budget import read_budget
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.layout import RunLayout
from pixart_ds.ledger.budget import rows as budget_rows
from pixart_ds.ledger.budget import spent
from pixart_ds.report.build import build

_NO_PRICE = dict.fromkeys(("v100_days", "a100_days", "kwh", "kg_co2e", "kg_co2e_embodied", "usd"))


def run_status(run: RunLayout, now: float | None = None) -> dict[str, Any]:
    """Everything that is known of a run: stages, jobs, time left, what it has used up, warnings, what to do next.

    Args:
        run: The run.
        now: Unix seconds.

    Raises:
        ConfigError, DataError: Its manifest is not there, or damaged.
    """
    manifest = files.read_json(run.manifest, error=ConfigError)
    names = manifest.get("stages") if isinstance(manifest, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError("its manifest lists no stages", where=run.manifest, remedy="give the folder of a run")
    look = Look(run, time.time() if now is None else now)
    look.queue = look.tried("its jobs", lambda: _queue(run, names), Queue())
    rows = [stage_status(look, name) for name in names]
    report = _report(look)
    warn(look, rows, report["budget"])
    return {
        "run": str(run.root),
        "chain": manifest.get("chain"),
        "time": look.now,
        "stages": rows,
        "jobs": [job.to_json() for job in look.queue.jobs],
        "queue_known": look.queue.known,
        "seconds_left": _chain_left(rows, report),
        "forecast": report["forecast"],
        "account": report["account"],
        "budget": report["budget"],
        "warnings": list(dict.fromkeys(look.warnings)),
        "next": look.tried(
            "what to do next", lambda: next_steps(run, rows, look.queue.jobs, report["budget"]), list[str]()
        ),
    }


def is_done(status: Mapping[str, Any]) -> bool:
    """Whether nothing is left to do of a run."""
    return all(row["state"] == "done" for row in status["stages"])


def _queue(run: RunLayout, stages: list[str]) -> Queue:
    """Slurm's word, where the run has had to do with Slurm and is not done."""
    layouts = {name: run.stage(name) for name in stages}
    if all(layout.done.exists() for layout in layouts.values()):
        return Queue()
    numbers: dict[str, str] = {}
    for name, layout in layouts.items():
        if layout.submissions.is_dir():
            numbers |= dict.fromkeys((path.stem for path in layout.submissions.glob("*.out")), name)
        for attempt in layout.all_attempts()[-3:]:
            if (job := job_of(attempt)) is not None:
                numbers[job] = name
    if not numbers and not any(layout.submissions.is_dir() for layout in layouts.values()):
        return Queue()
    return ask({job_name(run.root, name): name for name in stages}, numbers)


def _report(look: Look) -> dict[str, Any]:
    """What the run has used up, by its ledger alone, and what is still to come; without prices where a device has none."""
    nothing: dict[str, Any] = {"account": None, "forecast": None, "budget": []}
    found = look.tried("the ledger", lambda: _built(look), nothing)
    return {key: found[key] for key in nothing}


def _built(look: Look) -> dict[str, Any]:
    try:
        found: dict[str, Any] = build([look.run.root])["runs"][0]
    except ConfigError as error:
        return {"forecast": None, **_without_forecast(look, error.what)}
    look.warnings += found["problems"]
    return found


def _without_forecast(look: Look, why: str) -> dict[str, Any]:
    """For a run with devices that the table of rates does not have, or of which nothing is known yet: their time alone."""
    found = spent(look.run.root)
    account = found.use.to_json()
    if found.unknown or found.open:
        account |= _NO_PRICE
        look.warnings.append(
            f"energy, CO2e and money are not known: {why}; `pixart-ds cost {look.run.root} --device …` takes it for another"
        )
    limits = read_budget(look.run).limits
    return {"account": account, "budget": budget_rows(limits, found.account)}


def _chain_left(rows: list[dict[str, Any]], report: Mapping[str, Any]) -> float | None:
    """Seconds to the chain's end: with what is no training on top where the ledger knows it, else by the steps alone."""
    if all(row["state"] == "done" for row in rows):
        return None
    if report["forecast"] is not None:
        return float(report["forecast"]["seconds_left"])
    left = [row["chain_seconds_left"] for row in rows if row["chain_seconds_left"] is not None]
    return left[-1] if left else None
