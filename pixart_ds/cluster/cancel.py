"""`pixart-ds cancel`: ends the jobs of a run, and has those that train save first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pixart_ds import files
from pixart_ds.cluster.jobs import job_name
from pixart_ds.cluster.queue import queue
from pixart_ds.cluster.slurm import call
from pixart_ds.errors import MachineError
from pixart_ds.layout import RunLayout, StageLayout

CANCELLED = "made by `pixart-ds cancel`"
"""How a stop file begins that goes away when the stage is submitted again."""


@dataclass(frozen=True)
class Cancelled:
    """What was done to a job, or would be.

    Attributes:
        stage, job: Which.
        how: withdrawn (it had not begun), asked to save, ended.
    """

    stage: str
    job: str
    how: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def cancel(run: RunLayout, stages: Sequence[str], *, now: bool = False, dry_run: bool = False) -> list[Cancelled]:
    """Ends the jobs of stages, the last stage first, so that none begins because one before it ends.

    Args:
        run: The run.
        stages: Names.
        now: Jobs that train are given no more than Slurm's KillWait to save; else as long as a save takes.
        dry_run: Only say it.

    Raises:
        MachineError: Slurm is not here, or refuses.
    """
    done: list[Cancelled] = []
    for stage in reversed(stages):
        jobs = sorted(queue(job_name(run.root, stage)), key=lambda job: job.running)
        for job in jobs:
            if job.running and not now:
                done.append(Cancelled(stage, job.number, "asked to save"))
                if not dry_run:
                    _ask(run.stage(stage))
                continue
            done.append(Cancelled(stage, job.number, "ended" if job.running else "withdrawn"))
            if not dry_run:
                _scancel(job.number)
    return done


def _ask(layout: StageLayout) -> None:
    """The ranks save at the end of their step and leave; the job is not put back."""
    if not layout.stop_request.exists():
        files.write_text(layout.stop_request, f"{CANCELLED}; it goes away when the stage is submitted again\n")


def _scancel(job: str) -> None:
    answer = call("scancel", job)
    if answer.returncode and "already completing" not in answer.stderr:
        raise MachineError(
            f"scancel {job}: {answer.stderr.strip()}", remedy="ask whether slurmctld is up: scontrol ping"
        )


def withdraw_stop(layout: StageLayout) -> None:
    """Takes away a stop file that `cancel` has made; one that a person made stays."""
    path = layout.stop_request
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace").startswith(CANCELLED):
        path.unlink()
