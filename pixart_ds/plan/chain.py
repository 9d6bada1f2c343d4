"""What is to be done for a chain of jobs to go on, from what is known of its stages; pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

Do = Literal["nothing", "leave", "submit", "mend", "tell", "wait"]
"""`mend` is another dependency for a job that waits; `tell` is a failure that a person is to look at; `wait` is behind one."""


@dataclass(frozen=True)
class QueueJob:
    """A job of a stage in the queue.

    Attributes:
        number: Of the job.
        running: Whether it has begun; else it waits.
        reason: Why it waits, in Slurm's words.
        after: Jobs that must end well before it may begin.
        held: Whether it waits for a release. So do jobs where requeueing is forbidden: there the jobs that it would depend on end
            well many times before their stage is done.
    """

    number: str
    running: bool
    reason: str = ""
    after: frozenset[str] = frozenset()
    held: bool = False


@dataclass(frozen=True)
class StageFacts:
    """What is known of a stage.

    Attributes:
        name: Its name.
        origin: The earlier stage whose weights it starts from; None if it needs none.
        done: Whether it has handed over.
        jobs: Of the stage, in the queue.
        failure: What ended its last attempt and would end the next one, too; None if it may go on.
    """

    name: str
    origin: str | None
    done: bool
    jobs: tuple[QueueJob, ...] = ()
    failure: str | None = None


@dataclass(frozen=True)
class Action:
    """What to do for a stage.

    Attributes:
        stage: Its name.
        do: What.
        jobs: Those that it is done to, or that are left alone.
        behind: The stage that must be done first; None if it may begin at once.
        why: In words.
    """

    stage: str
    do: Do
    why: str
    jobs: tuple[str, ...] = ()
    behind: str | None = None


def decide(stages: Sequence[StageFacts], retry: bool = False, after: Collection[str] = ()) -> list[Action]:
    """An action for each stage, in the chain's sequence.

    What is done is passed over, and what is queued or running is left alone, as long as it can ever begin. What failed is told, and
    what comes after it waits; with `retry` it is submitted again.

    Args:
        stages: In the chain's sequence.
        retry: Whether failed stages are submitted again, and whether those go on that wait for another job that failed.
        after: Stages for which such a job was named anew.
    """
    by_name = {stage.name: stage for stage in stages}
    stuck: set[str] = set()
    replaced: set[str] = set()
    found: list[Action] = []
    for stage in stages:
        origin = None if stage.origin is None else by_name[stage.origin]
        behind = None if origin is None or origin.done else origin.name
        action = _of_stage(stage, behind, origin, retry or stage.name in after, stuck, replaced)
        if action.do in ("tell", "wait"):
            stuck.add(stage.name)
        if action.do == "submit":
            replaced.add(stage.name)
        found.append(action)
    return found


def _of_stage(
    stage: StageFacts,
    behind: str | None,
    origin: StageFacts | None,
    retry: bool,
    stuck: Collection[str],
    replaced: Collection[str],
) -> Action:
    name, numbers = stage.name, tuple(job.number for job in stage.jobs)
    if stage.done:
        return Action(name, "nothing", "is done")
    if any(job.running for job in stage.jobs):
        return Action(name, "leave", "runs", numbers)
    if behind in stuck:
        return Action(name, "wait", f"comes after {behind}", numbers, behind)
    if stage.jobs:
        return _of_waiting(stage, behind, origin, retry, replaced)
    if stage.failure is not None and not retry:
        return Action(name, "tell", stage.failure)
    again = "again, after a failure" if stage.failure is not None else "from its newest checkpoint, or its beginning"
    return Action(name, "submit", again, behind=behind)


def _of_waiting(
    stage: StageFacts, behind: str | None, origin: StageFacts | None, retry: bool, replaced: Collection[str]
) -> Action:
    """Jobs that wait are left alone, unless what they wait for will never be, or is no longer what they are to wait for."""
    name, numbers = stage.name, tuple(job.number for job in stage.jobs)
    never = any("DependencyNeverSatisfied" in job.reason for job in stage.jobs)
    held = any(job.held for job in stage.jobs)
    current = {job.number for job in origin.jobs} if origin is not None else set()
    still = behind not in replaced and any(job.after & current for job in stage.jobs)
    if never and (still or origin is None) and not retry:
        others = sorted({each for job in stage.jobs for each in job.after} - current)
        return Action(name, "tell", f"waits for job {', '.join(others)}, which did not end well", numbers)
    if behind is None:
        if held or never:
            return Action(name, "mend", "what it waited for is done, or did not end well", numbers)
        reason = stage.jobs[0].reason
        return Action(name, "leave", f"waits: {reason}" if reason and reason != "None" else "waits", numbers)
    if held:
        return Action(name, "leave", f"is released when {behind} is done", numbers, behind)
    if never or not still:
        return Action(name, "mend", f"waited for a job that is no more; now for the one of {behind}", numbers, behind)
    return Action(name, "leave", f"waits for {behind}", numbers, behind)
