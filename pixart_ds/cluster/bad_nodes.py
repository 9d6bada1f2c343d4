"""Nodes that a job had better not get again: those whose ranks failed before a first step, or that ended two attempts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pixart_ds import files
from pixart_ds.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DATA
from pixart_ds.layout import RunLayout

EXPIRE_S = 24 * 3600.0
_LOOK_BACK = 10
"""Attempts."""


def suspects(outcomes: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Nodes that the newest failed attempt speaks against, with the reason; pure.

    A failure that follows the job to another node is not the node's: of two attempts in a row that both failed before their first
    step on different nodes, none is suspected. Nor is any for what a recipe, a set or a checkpoint is to blame.

    Args:
        outcomes: `outcome.json` of the stage's attempts, oldest first.
    """
    recent = [outcome for outcome in outcomes[-_LOOK_BACK:] if outcome["outcome"] == "failed"]
    if not recent or recent[-1] is not outcomes[-1]:
        return {}
    found: dict[str, str] = {}
    node = _failed_before_a_step(recent[-1])
    before = _failed_before_a_step(outcomes[-2]) if len(outcomes) > 1 else None
    if node is not None and before in (None, node):
        found[node] = "its ranks failed before the first step"
    ended = [_last_culprit(outcome) for outcome in recent]
    if ended[-1] is not None and ended.count(ended[-1]) >= 2:
        found[ended[-1]] = f"it has ended {ended.count(ended[-1])} attempts"
    return found


def _last_culprit(outcome: dict[str, Any]) -> str | None:
    """The node whose rank ended an attempt."""
    launches = outcome.get("launches", [])
    if not launches or launches[-1]["ending"] != "failed":
        return None
    if launches[-1].get("code") in (EXIT_CONFIG, EXIT_DATA, EXIT_CHECKPOINT):
        return None
    node: str | None = launches[-1].get("node")
    return node


def _failed_before_a_step(outcome: dict[str, Any]) -> str | None:
    """The one node on which all launches of an attempt failed before a step."""
    launches = outcome.get("launches", [])
    if any(launch.get("stepped", True) for launch in launches):
        return None
    nodes = {launch.get("node") for launch in launches}
    return _last_culprit(outcome) if len(nodes) == 1 else None


def record(run: RunLayout, found: dict[str, str], stage: str, attempt: int, now: float | None = None) -> None:
    """Writes suspects down, each until it expires."""
    now = time.time() if now is None else now
    for node, reason in found.items():
        about = {"node": node, "reason": reason, "stage": stage, "attempt": attempt}
        files.append_json_line(run.bad_nodes, {**about, "since": now, "until": now + EXPIRE_S})


def excluded(run: RunLayout, now: float | None = None) -> dict[str, str]:
    """The nodes that are to be left out now, with the reason."""
    now = time.time() if now is None else now
    rows = files.read_json_lines(run.bad_nodes)
    return {row["node"]: row["reason"] for row in rows if row["since"] <= now < row["until"]}


def expired(run: RunLayout, now: float | None = None) -> set[str]:
    """The nodes that were left out, and need not be any more."""
    return {row["node"] for row in files.read_json_lines(run.bad_nodes)} - set(excluded(run, now))
