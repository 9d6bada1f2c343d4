"""Pieces that several of the page's sections are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from pixart_ds.page.words import counted
from pixart_ds.report.html_facts import Values


def per_run(runs: Sequence[Values], content: Callable[[Values], str]) -> str:
    """The content of each run, under its name where there are several."""
    if len(runs) == 1:
        return content(runs[0])
    return (
        "".join(f"<h3>{escape(str(run.get('name')))}</h3>{content(run)}" for run in runs) or "<p>There is no run.</p>"
    )


def state_of(run: Values) -> str:
    """How far a run is: done, not started, or its present stage and how many are done."""
    stages = run.get("stages") or []
    states = [str(stage.get("state")) for stage in stages]
    done = states.count("done")
    if stages and done == len(stages):
        return "done"
    if not any(stage.get("attempts") for stage in stages):
        return "not started"
    now = next((stage for stage in stages if stage.get("state") not in ("done", "not started")), None)
    at = f"{now.get('stage')} {now.get('state')}, " if now else ""
    return f"{at}{done} of {counted(len(stages), 'stage')} done"


def hosts_told(hosts: Sequence[Any] | None) -> str:
    """All names of a few hosts, or the first, the last and how many."""
    names = [str(host) for host in hosts or []]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, … {names[-1]} ({len(names)} hosts)"
