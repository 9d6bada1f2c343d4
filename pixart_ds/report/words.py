"""How the account of a run is told, in the text, the tables and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARTS_TOLD = {
    "productive": "steps that took training further than any before",
    "startup": "from an allocation's start to the first step: the environment, the ranks, the checkpoint",
    "data_wait": "the slowest rank's waiting for data in such steps",
    "checkpoint": "training stood still for a save, the last commit, the handover",
    "evaluation": "previews",
    "rework": "steps that were done before and lost, or whose update was refused",
    "idle": "steps that never ended, ranks leaving, pauses between launches",
    "unattributed": "nobody wrote down what it was",
}
"""The categories of an allocation's time, in the sequence of `ledger.entries.PARTS`."""


def unit(account: Mapping[str, Any]) -> tuple[str, str, float]:
    """How device-time is told: its name, the account's key, and what a figure in days is multiplied by.

    V100-days where all devices were V100s; hours where they are few.
    """
    if account["device_days"] < 1:
        return "device-hours", "device_hours", 24.0
    return ("V100-days" if account["v100_days"] is not None else "device-days"), "device_days", 1.0
