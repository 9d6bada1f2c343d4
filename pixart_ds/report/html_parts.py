"""Pieces that the page's sections are made of, and how they write states, counts, times and hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from pixart_ds.report.html_facts import Values


def per_run(runs: Sequence[Values], content: Callable[[Values], str]) -> str:
    """The content of each run, under its name where there are several."""
    if len(runs) == 1:
        return content(runs[0])
    return (
        "".join(f"<h3>{escape(str(run.get('name')))}</h3>{content(run)}" for run in runs) or "<p>There is no run.</p>"
    )


def figure(title: str, content: str) -> str:
    """Content (HTML) under its title (text)."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{content}</figure>"


def colour_keys(words: Mapping[str, str]) -> str:
    """What the colours mean: words by the CSS class of a chart's marks."""
    lines = [f'<li><i class="key {name}"></i>{escape(each)}</li>' for name, each in words.items()]
    return f'<ul class="keys">{"".join(lines)}</ul>'


def spaced(name: str) -> str:
    """A key of the values as words."""
    return name.replace("_", " ")


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


def counted(count: int, what: str) -> str:
    """1 stage, 2,000 stages."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def moment(seconds: float | None, *, zone: bool = True) -> str:
    """Unix seconds as 3 Oct 2026, 14:05 UTC."""
    if seconds is None:
        return "at an unknown time"
    at = datetime.fromtimestamp(seconds, UTC)
    return f"{at.day} {at:%b %Y, %H:%M}{' UTC' if zone else ''}"


def hosts_told(hosts: Sequence[Any] | None) -> str:
    """All names of a few hosts, or the first, the last and how many."""
    names = [str(host) for host in hosts or []]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, … {names[-1]} ({len(names)} hosts)"
