"""Whether a job of Slurm runs again after an attempt, and by whose doing; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pixart_ds.cluster.requests import BUDGET
from pixart_ds.cluster.slurm import JobState
from pixart_ds.errors import EXIT_BUG, EXIT_MACHINE, EXIT_STOPPED

Cause = Literal["asked", "preempted", "requeued by Slurm", "time limit reached", "cancelled", "no answer"]
"""Why a job was signalled: `asked` is the warning before the time limit, or a person who wants it saved and started again."""


def cause_of(state: JobState | None, own_restarts: int) -> Cause:
    """Why this attempt is to end, from what Slurm says of its job.

    A grace shows in the time of preemption; a job that is put back (requeue, lost node, end of a grace) counts one restart more
    than this attempt knew; one that ends with neither, and not by its time limit, was cancelled by a person.

    Args:
        state: The job; None if Slurm did not answer.
        own_restarts: SLURM_RESTART_COUNT of this attempt.
    """
    if state is None:
        return "no answer"
    if state.restarts > own_restarts:
        return "requeued by Slurm"
    if state.ended_by_time_limit:
        return "time limit reached"
    if state.state in ("COMPLETING", "CANCELLED"):
        return "cancelled"
    return "preempted" if state.preempted else "asked"


@dataclass(frozen=True)
class Decision:
    """What becomes of the job.

    Attributes:
        again: Whether the supervisor sees to it that the job runs again.
        why: For the log.
    """

    again: bool
    why: str


def decide(
    outcome: dict[str, Any], cause: Cause, *, requests: Sequence[str], fruitless: int, limit: int, bad_nodes: bool
) -> Decision:
    """Whether a job is to run again.

    Args:
        outcome: Of the attempt: `outcome`, `exit_code` and `cause` as in outcome.json.
        cause: Why it was signalled, if it was.
        requests: Who asked the supervisor to stop, in their order.
        fruitless: Attempts in a row without a new checkpoint, up to this one.
        limit: So many are enough.
        bad_nodes: Whether the attempt failed for nodes that the next one will not get.
    """
    reasons = (
        (cause == "requeued by Slurm", "Slurm has put the job back into the queue itself"),
        (outcome["outcome"] == "done", "the stage is done"),
        (cause == "cancelled", "the job was cancelled, and is not requeued"),
        (not _may_go_on(outcome, bad_nodes), "the job is not requeued: it would fail again"),
        (_by_file(outcome), f"{outcome['cause']} asked for the stop: the job is not requeued"),
        (BUDGET in requests, "the run's budget is used up: the job is not requeued"),  # the next one would be refused
        (
            cause == "no answer" and "SIGTERM" in requests,
            "Slurm is ending the job, and does not say why: it is not requeued",
        ),
        (
            fruitless >= limit,
            f"{fruitless} attempts in a row have saved nothing new: the job is not requeued; {outcome['cause']}",
        ),
    )
    for holds, why in reasons:
        if holds:
            return Decision(False, why)
    return Decision(True, "it goes on where it was saved" if cause == "asked" else cause)


def _may_go_on(outcome: dict[str, Any], bad_nodes: bool) -> bool:
    code = outcome["exit_code"]
    return code == EXIT_STOPPED or (bad_nodes and code in (EXIT_BUG, EXIT_MACHINE))


def _by_file(outcome: dict[str, Any]) -> bool:
    """Whether a person made the file that asks for a stop: a job that starts again would only find it there."""
    return str(outcome["cause"]).startswith("the file")
