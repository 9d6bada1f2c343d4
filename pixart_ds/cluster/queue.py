"""A stage's jobs in Slurm's queue, and the release of those that waited for it to be done."""

from __future__ import annotations

import re

from pixart_ds import files
from pixart_ds.cluster.jobs import job_name
from pixart_ds.cluster.slurm import call
from pixart_ds.config.freeze import read_stage
from pixart_ds.errors import MachineError
from pixart_ds.layout import RunLayout
from pixart_ds.log import Log
from pixart_ds.plan.chain import QueueJob

WAITS = "pixart-ds waits for"
"""How the comment of a held job begins: only such a job is released when the stage before it is done."""


def queue(name: str) -> tuple[QueueJob, ...]:
    """This user's jobs of a name that wait or run.

    Raises:
        MachineError: Slurm does not answer.
    """
    answer = call("squeue", "-h", "--me", f"--name={name}", "-o", "%i|%T|%r|%E|%k")
    if answer.returncode:
        raise MachineError(f"squeue: {answer.stderr.strip()}", remedy="ask whether slurmctld is up: scontrol ping")
    found = []
    for line in answer.stdout.splitlines():
        if line.count("|") < 4:
            continue
        number, state, reason, after, comment = line.split("|", 4)
        held = "JobHeld" in reason and comment.startswith(WAITS)
        found.append(
            QueueJob(number, state != "PENDING", reason, frozenset(re.findall(r"after\w+:(\d+)", after)), held)
        )
    return tuple(found)


def release_behind(run: RunLayout, stage: str, log: Log) -> None:
    """Releases the jobs of the stages that start from this one, which is done; where Slurm refuses, a word in the log says so."""
    for name in files.read_json(run.manifest)["stages"]:
        if read_stage(run, name).init.stage != stage:
            continue
        try:
            held = [job.number for job in queue(job_name(run.root, name)) if job.held]
        except MachineError as error:
            log.event(f"{name} is not released: {error.what}; `pixart-ds chain {run.root}` does it later")
            continue
        for number in held:
            answer = call("scontrol", "release", number)
            said = "is released" if answer.returncode == 0 else f"is not released: {answer.stderr.strip()}"
            log.event(f"job {number} of {name}, which waited for {stage}, {said}")
