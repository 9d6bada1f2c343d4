"""A run's jobs in Slurm's queue, for `pixart-ds status`: asked once, with little patience, and told in words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pixart_ds.cluster.queue import WAITS

_PATIENCE_S = 5.0
_FIELDS = "%A|%j|%T|%r|%S|%D|%E|%k"
_UNTIL_MENDED = {
    "DependencyNeverSatisfied": "the job that it waits for did not end well",
    "BadConstraints": "no node has what its constraint asks for",
    "PartitionNodeLimit": "it asks for more nodes than its partition gives",
    "PartitionTimeLimit": "it asks for more time than its partition gives",
    "InvalidAccount": "its account is not known",
    "InvalidQOS": "its QOS is not known",
    "AccountNotAllowed": "its account may not use the partition",
    "QOSNotAllowed": "its QOS may not use the partition",
}
"""Reasons that no time heals."""
_WORDS = {
    "Resources": "is next, as soon as nodes are free",
    "Priority": "waits behind other jobs",
    "Dependency": "waits for another job",
    "BeginTime": "was put back into the queue; Slurm lets it begin soon",
    "JobHeldUser": "is held",
    "JobHeldAdmin": "is held by an administrator",
    "JobHoldMaxRequeue": "is held: it was put back too often",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "NodeDown": "nodes that it needs are down",
    "PartitionDown": "its partition is down",
    "Licenses": "waits for licences",
    "Reservation": "waits for its reservation",
}


@dataclass(frozen=True)
class Queued:
    """A job of the run.

    Attributes:
        job, stage: Which.
        state: Slurm's: PENDING, RUNNING, COMPLETING, …
        reason: Why it waits, in Slurm's word; None if there is none.
        words: State and reason for people.
        starts: Unix seconds at which Slurm expects it to start, or at which it has started; None if Slurm does not say.
        nodes: How many it has or asks for.
        never: Whether it will not start before somebody mends something.
        held: Who must release it: `us`, which the stage before does when it is done; `somebody`; None.
        singleton: Whether it waits behind a job of its own name.
    """

    job: str
    stage: str
    state: str
    reason: str | None
    words: str
    starts: float | None
    nodes: str
    never: bool = False
    held: str | None = None
    singleton: bool = False

    @property
    def running(self) -> bool:
        return self.state != "PENDING"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Queue:
    """What Slurm said.

    Attributes:
        jobs: Of the run, in Slurm's sequence; empty where it is not known.
        known: Whether Slurm has answered.
        problem: Why not, in words; None also where there is no Slurm.
    """

    jobs: tuple[Queued, ...] = ()
    known: bool = False
    problem: str | None = None


def ask(names: Mapping[str, str], numbers: Mapping[str, str]) -> Queue:
    """This user's jobs that belong to a run.

    Args:
        names: Names of jobs, with the stage of each.
        numbers: Numbers of jobs that attempts ran in, with the stage of each.
    """
    if shutil.which("squeue") is None:
        return Queue()
    try:
        answer = subprocess.run(
            ["squeue", "-h", "--me", "-o", _FIELDS],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_PATIENCE_S,
            env={**os.environ, "SLURM_TIME_FORMAT": "%s"},
        )
    except subprocess.TimeoutExpired:
        return Queue(problem=f"squeue gave no answer within {_PATIENCE_S:.0f} s")
    except OSError as error:
        return Queue(problem=f"squeue cannot be started: {error.strerror}")
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        return Queue(problem="squeue: " + re.sub(r"^(squeue|slurm_\w+)?:? ?(error|fatal): ", "", last)[:200])
    return Queue(parse(answer.stdout, names, numbers), known=True)


def parse(text: str, names: Mapping[str, str], numbers: Mapping[str, str]) -> tuple[Queued, ...]:
    """The run's jobs among the rows of `squeue -h -o '%A|%j|%T|%r|%S|%D|%E|%k'`, times in Unix seconds."""
    rows = [line.split("|", 7) for line in text.splitlines() if line.count("|") >= 7]
    stages = {row[0]: stage for row in rows if (stage := names.get(row[1]) or numbers.get(row[0])) is not None}
    told = {**numbers, **stages}
    return tuple(_queued(row, stages[row[0]], told) for row in rows if row[0] in stages)


def _queued(row: list[str], stage: str, stages: Mapping[str, str]) -> Queued:
    job, _, state, reason, starts, nodes, after, comment = row
    short = re.split(r"[\s,(]", reason.strip())[0]
    waits = re.findall(r"after\w*:(\d+)", after)
    never, singleton = state == "PENDING" and short in _UNTIL_MENDED, "singleton" in after
    held = None
    if state == "PENDING" and "Held" in short + reason:
        held = "us" if comment.startswith(WAITS) else "somebody"
    return Queued(
        job=job,
        stage=stage,
        state=state,
        reason=None if short in ("None", "") else reason.strip(),
        words=_words(state, short, waits, stages, comment if held == "us" else "", singleton=singleton),
        starts=float(starts) if starts.isdigit() else None,
        nodes=nodes,
        never=never,
        held=held or ("somebody" if short == "JobHoldMaxRequeue" else None),
        singleton=singleton,
    )


def _words(
    state: str, reason: str, waits: Collection[str], stages: Mapping[str, str], comment: str, *, singleton: bool
) -> str:
    if state != "PENDING":
        return {"RUNNING": "runs", "COMPLETING": "ends", "CONFIGURING": "gets its nodes"}.get(state, state.lower())
    listed = ", ".join(f"job {job}" + (f" ({stages[job]})" if job in stages else "") for job in waits)
    if reason in _UNTIL_MENDED:
        said = _UNTIL_MENDED[reason]
        which = f": {listed}" if listed and reason == "DependencyNeverSatisfied" else ""
        return f"will never start: {said}{which}"
    if comment:
        return f"is released when {comment.removeprefix(WAITS).split(';')[0].strip()} is done"
    if reason == "Dependency" and (listed or singleton):
        return f"waits for {listed or 'the job of its own name that runs'}"
    if re.search(r"^(QOS|Assoc|Association)", reason):
        return "a limit of the account or the QOS is reached"
    return _WORDS.get(reason, "waits")
