"""What a probe says: a verdict, what was seen, what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pixart_ds.doctor.subject import Subject

Verdict = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: Subject and thing, `gpu.driver`; the same in every run, also where it was skipped.
        verdict: failed: training would fail, or not be what was asked for. warning: it would run, worse than it could.
            skipped: it cannot be looked at here.
        evidence: What was seen, with figures; of a skipped one, why not.
        remedy: What to do; None where there is nothing to do.
    """

    name: str
    verdict: Verdict
    evidence: str
    remedy: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Probe = Callable[[Subject], Check | list[Check]]


def ok(name: str, evidence: str) -> Check:
    return Check(name, "ok", evidence)


def warning(name: str, evidence: str, remedy: str) -> Check:
    return Check(name, "warning", evidence, remedy)


def failed(name: str, evidence: str, remedy: str) -> Check:
    return Check(name, "failed", evidence, remedy)


def skipped(name: str, reason: str) -> Check:
    return Check(name, "skipped", reason)


def overall(checks: list[Check]) -> Literal["ok", "warning", "failed"]:
    """The worst verdict; nothing that was skipped counts."""
    found = {check.verdict for check in checks}
    if "failed" in found:
        return "failed"
    return "warning" if "warning" in found else "ok"
