"""What becomes of a job of Slurm after an attempt: it is put back into the queue, or a job that waits behind it goes on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.cluster import bad_nodes
from pixart_ds.cluster.jobs import HOLD
from pixart_ds.cluster.queue import release_behind
from pixart_ds.cluster.requeue import cause_of, decide
from pixart_ds.cluster.slurm import Slurm, call, own_jobs
from pixart_ds.errors import EXIT_DONE, EXIT_STOPPED, MachineError
from pixart_ds.layout import RunLayout
from pixart_ds.log import Log
from pixart_ds.train.attempt import attempts_without_progress


@dataclass(frozen=True)
class Job:
    """The job, and which attempt it was."""

    slurm: Slurm
    run: RunLayout
    stage: str
    attempt: int
    successor: bool
    log: Log


def follow(job: Job, outcome: dict[str, Any], requests: Sequence[str], limit: int) -> int:
    """Decides whether the job runs again, and sees to it.

    Args:
        job: The job, and which attempt it was.
        outcome: Of the attempt.
        requests: Who asked the supervisor to stop.
        limit: Attempts in a row without a new checkpoint that are enough.

    Returns:
        The exit code: 0 if the stage is done or the job will run again, else the outcome's.
    """
    layout = job.run.stage(job.stage)
    found = bad_nodes.suspects(
        [files.read_json(each.outcome) for each in layout.all_attempts() if each.outcome.exists()]
    )
    bad_nodes.record(job.run, found, job.stage, job.attempt)
    for node, reason in found.items():
        job.log.event(f"node {node} is left out for {bad_nodes.EXPIRE_S / 3600:.0f} h: {reason}")
    cause = cause_of(job.slurm.state(), job.slurm.restarts)
    fruitless = attempts_without_progress(layout)
    decision = decide(outcome, cause, requests=requests, fruitless=fruitless, limit=limit, bad_nodes=bool(found))
    if not decision.again:
        job.log.event(f"job {job.slurm.job}: {decision.why}")
        if outcome["outcome"] == "done" and job.successor:
            release_behind(job.run, job.stage, job.log)
        if job.successor and cause != "requeued by Slurm":
            _withdraw_successors(job.slurm, job.log)
        return int(outcome["exit_code"])
    if job.successor:
        job.log.event(f"job {job.slurm.job} ends; the one behind it goes on")
        for each in _waiting_behind(job.log):
            _exclude(job, Slurm(each, 0))
        return EXIT_DONE
    return _requeue(job, decision.why)


def _requeue(job: Job, why: str) -> int:
    """Puts the job back; Slurm then ends this process within its KillWait."""
    job.log.event(f"job {job.slurm.job} is requeued: {why}")
    if (refusal := job.slurm.requeue()) is not None:
        job.log.event(
            f"scontrol requeue {job.slurm.job}: {refusal}; submit it again, or set `requeue: false` in the profile of a site "
            "that forbids it"
        )
        return EXIT_STOPPED
    _exclude(job, job.slurm)
    return EXIT_DONE


def _exclude(job: Job, waiting: Slurm) -> None:
    """Has a job in the queue leave the bad nodes out, beside those that its submitter left out; expired ones it may have again."""
    state = waiting.state()
    bad, past = bad_nodes.excluded(job.run), bad_nodes.expired(job.run)
    had = frozenset() if state is None else state.excluded
    wanted = (had - past) | set(bad)
    if wanted == had:
        return
    refusal = waiting.exclude(wanted)
    said = ", ".join(sorted(wanted)) or "all nodes may be had again"
    job.log.event(f"job {waiting.job} leaves out {said}" if refusal is None else f"nodes cannot be left out: {refusal}")


def nothing_to_do(slurm: Slurm | None, run: RunLayout, stage: str, log: Log) -> int:
    """The stage is done: jobs that wait behind this one are not needed, and the next stage's may have been left held."""
    if slurm is not None:
        _withdraw_successors(slurm, log)
        release_behind(run, stage, log)
    return EXIT_DONE


def submit_successor(slurm: Slurm, log: Log) -> None:
    """Sees to it that one job waits behind this one, from the same script; of one name Slurm runs one at a time (singleton)."""
    name = os.environ.get("SLURM_JOB_NAME", "")
    try:
        if any(each["job"] != slurm.job for each in own_jobs(name)):
            return
    except MachineError as error:
        log.event(f"no job is put behind this one: {error.what}")
        return
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "job.sbatch"
        written = call("scontrol", "write", "batch_script", slurm.job, str(script))
        if written.returncode:
            log.event(f"no job waits behind this one: scontrol write batch_script: {written.stderr.strip()}")
            return
        script.write_text(script.read_text().replace(f"{HOLD}\n", ""))  # it is released already, by the stage before
        number, refusal = slurm.submit(script, f"--job-name={name}", "--dependency=singleton")
    log.event(f"job {number} waits behind this one" if number else f"no job waits behind this one: sbatch: {refusal}")


def _waiting_behind(log: Log) -> list[str]:
    """Jobs of this one's name that wait for it; none, and a word, where Slurm does not answer: they are no reason to fail."""
    try:
        there = own_jobs(os.environ.get("SLURM_JOB_NAME", ""))
    except MachineError as error:
        log.event(f"jobs that wait behind this one are left as they are: {error.what}")
        return []
    return [each["job"] for each in there if (each["state"], each["reason"]) == ("PENDING", "Dependency")]


def _withdraw_successors(slurm: Slurm, log: Log) -> None:
    for number in _waiting_behind(log):
        if number != slurm.job:
            call("scancel", number)
            log.event(f"job {number}, which waited behind this one, is withdrawn")
