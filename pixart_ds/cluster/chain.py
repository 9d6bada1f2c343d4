"""`pixart-ds chain`: a job for each stage, behind the one whose weights it starts from; run again, it mends what is broken."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pixart_ds import files
from pixart_ds.cluster import submit
from pixart_ds.cluster.jobs import dependencies, job_name
from pixart_ds.cluster.queue import WAITS, queue
from pixart_ds.cluster.slurm import call
from pixart_ds.config.freeze import read_stage
from pixart_ds.config.profile import Profile
from pixart_ds.config.schema import StageConfig
from pixart_ds.errors import EXIT_BUG, EXIT_DATA, EXIT_DONE, EXITS_THAT_TELL, ConfigError, MachineError
from pixart_ds.layout import AttemptLayout, RunLayout, StageLayout
from pixart_ds.plan.chain import Action, StageFacts, decide


class Check(Protocol):
    """`train.preflight.preflight` of the run: reading sets is not this floor's matter."""

    def __call__(self, stage: StageConfig, device: str, *, origin: bool, data: bool) -> None:
        """Refuses a stage that cannot work.

        Args:
            stage, device: What is to be trained on what.
            origin: Whether the stage before must have handed over by now.
            data: Whether the sets must be there by now.
        """


@dataclass(frozen=True)
class Done:
    """What was done, or would be, for one stage.

    Attributes:
        action: What was decided.
        jobs: The stage's jobs now.
        notes: What a person should know beforehand.
        exit_code: That of a failure that is told; else 0.
    """

    action: Action
    jobs: tuple[str, ...]
    notes: tuple[str, ...] = ()
    exit_code: int = EXIT_DONE

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.action.stage,
            "do": self.action.do,
            "why": self.action.why,
            "jobs": list(self.jobs),
            "behind": self.action.behind,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Wishes:
    """What the user said.

    Attributes:
        after: By stage, jobs joined by colons, such as an array that prepares the data, that must end well before it begins.
        retry: Failed stages are submitted again.
        update_code: The code is frozen anew.
        dry_run: Nothing is submitted or changed.
    """

    after: Mapping[str, str]
    retry: bool = False
    update_code: bool = False
    dry_run: bool = False


def run_chain(run: RunLayout, profile: Profile, wishes: Wishes, check: Check) -> list[Done]:
    """Brings the jobs of a run into order: submits, mends, and leaves alone.

    Args:
        run: The run.
        profile: The site.
        wishes: What the user said.
        check: Refuses a stage that cannot work.

    Raises:
        ConfigError, DataError, CheckpointError: A stage that is to be submitted cannot work; what stood before it was submitted.
        MachineError: Slurm is not here, or refuses.
    """
    stages = {name: read_stage(run, name) for name in files.read_json(run.manifest)["stages"]}
    actions = decide([facts_of(run, stage) for stage in stages.values()], wishes.retry, wishes.after)
    for action in actions:  # all that can be known, before the first is submitted
        if action.do == "submit":
            # what prepares the first stage's data may prepare the others', too
            check(stages[action.stage], profile.device, origin=action.behind is None, data=not wishes.after)
    found: list[Done] = []
    numbers: dict[str, tuple[str, ...]] = {}
    for action in actions:
        done = _do(run, stages[action.stage], profile, action, numbers, wishes)
        numbers[action.stage] = done.jobs
        found.append(done)
    return found


def facts_of(run: RunLayout, stage: StageConfig) -> StageFacts:
    """What the run's folder and the queue say of a stage.

    Raises:
        MachineError: Slurm does not answer.
    """
    layout = run.stage(stage.name)
    jobs = queue(job_name(run.root, stage.name))
    done = layout.done.exists()
    failure = None if done or jobs else failure_of(layout)
    return StageFacts(stage.name, stage.init.stage, done, jobs, None if failure is None else failure[0])


def failure_of(layout: StageLayout) -> tuple[str, int] | None:
    """What ended the last attempt, and its exit code, if the next one would end so, too.

    A job that ended before an attempt began counts, if it has printed something: one that was cancelled while it waited has not.
    """
    attempts = layout.all_attempts()
    last = attempts[-1] if attempts else None
    if (lost := _without_attempt(layout)) is not None:
        return lost
    if last is None or not last.outcome.exists():
        return None
    outcome = files.read_json(last.outcome)
    code = int(outcome["exit_code"])
    if outcome["outcome"] != "failed" or code not in (*EXITS_THAT_TELL, EXIT_BUG):
        return None
    cause = str(outcome["cause"]).strip().splitlines()[0].rstrip(":")
    return f"attempt {last.number} failed: {cause}; its log: {last.log}", code


def _without_attempt(layout: StageLayout) -> tuple[str, int] | None:
    """A job, submitted after the last attempt began, that ended before it began one."""
    if not layout.submissions.is_dir():
        return None
    outputs = sorted(layout.submissions.glob("*.out"), key=lambda path: int(path.stem) if path.stem.isdigit() else -1)
    attempts = layout.all_attempts()
    newest = max((job for each in attempts if (job := _job_of(each)) is not None), default=-1)
    if not outputs or not outputs[-1].stem.isdigit() or int(outputs[-1].stem) <= newest:
        return None
    words = outputs[-1].read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if not words:
        return None
    said = next((word for word in reversed(words) if word.startswith("pixart-ds ")), words[-1])
    return f"job {outputs[-1].stem} ended before an attempt began: {said}; its output: {outputs[-1]}", EXIT_BUG


def _job_of(attempt: AttemptLayout) -> int | None:
    """The job that an attempt ran in; its heartbeat says so from its first moment on."""
    try:
        job = json.loads(attempt.heartbeat.read_bytes()).get("job")
    except (OSError, ValueError, AttributeError):  # emptied by a power loss
        job = files.read_json(attempt.env).get("job") if attempt.env.exists() else None
    return int(job) if job is not None and str(job).isdigit() else None


def _do(
    run: RunLayout,
    stage: StageConfig,
    profile: Profile,
    action: Action,
    numbers: Mapping[str, tuple[str, ...]],
    wishes: Wishes,
) -> Done:
    before = numbers.get(action.behind or "", ())
    if action.do == "submit":
        return _submit(run, stage, profile, action, before, wishes)
    if action.do == "mend":
        if not wishes.dry_run and not _mend(
            job_name(run.root, stage.name), action.jobs, profile, [*_others(stage, wishes), *before]
        ):
            action = replace(action, do="leave", why="has begun meanwhile")
        return Done(action, action.jobs)
    if action.do == "tell":
        failure = None if action.jobs else failure_of(run.stage(stage.name))
        return Done(action, action.jobs, exit_code=EXIT_DATA if failure is None else failure[1])
    return Done(action, action.jobs)


def _submit(
    run: RunLayout, stage: StageConfig, profile: Profile, action: Action, before: Sequence[str], wishes: Wishes
) -> Done:
    waits = _others(stage, wishes)
    held = None
    if action.behind is not None and not profile.requeue:
        held = f"{WAITS} {action.behind}"  # its job will end, and end well, before its stage is done
    elif action.behind is not None:
        waits += before or [f"JOB-OF-{action.behind}"]  # a dry run has none
    done = submit.launch(
        run,
        stage,
        profile,
        after=tuple(waits),
        held=held,
        dry_run=wishes.dry_run,
        update_code=wishes.update_code,
    )
    return Done(action, done.jobs, done.notes)


def _others(stage: StageConfig, wishes: Wishes) -> list[str]:
    """Jobs of another kind that the stage is to wait for."""
    return wishes.after[stage.name].split(":") if stage.name in wishes.after else []


def _mend(name: str, jobs: Sequence[str], profile: Profile, before: Sequence[str]) -> bool:
    """Gives a stage's jobs that wait another dependency, or none; they keep their place in the queue, and pairs stay behind each
    other.

    Returns:
        Whether all still waited: the stage before may be done since they were looked at, and its supervisor have released them.
    """
    wanted = dependencies(profile, before)
    for job in jobs:
        answer = call("scontrol", "update", f"JobId={job}", f"Dependency={wanted}")
        if answer.returncode and any(each.number == job and each.running for each in queue(name)):
            return False  # nor do those behind it need anything
        if answer.returncode:
            raise MachineError(
                f"scontrol update JobId={job}: {answer.stderr.strip()}", remedy=f"scancel {job}, and again"
            )
        call("scontrol", "release", job)
    return True


def after_of(run: RunLayout, words: Sequence[str]) -> dict[str, str]:
    """`[STAGE=]JOB` of the command line; a job alone is the first stage's.

    Raises:
        ConfigError: There is no such stage, or this is no job's number.
    """
    stages = files.read_json(run.manifest)["stages"]
    found: dict[str, str] = {}
    for word in words:
        stage, equals, job = word.rpartition("=")
        stage = stage if equals else stages[0]
        if stage not in stages:
            raise ConfigError(
                f"the run has no stage {stage!r}", where="--after", remedy=f"choose one of: {', '.join(stages)}"
            )
        if not re.fullmatch(r"\d+(_\d+)?", job):
            raise ConfigError(f"{job!r} is no job's number", where="--after", remedy="such as 71, or stage2=71")
        found[stage] = job if stage not in found else f"{found[stage]}:{job}"
    return found


def page(found: Sequence[Done], run: RunLayout, again: str, *, dry_run: bool) -> list[str]:
    """What was done for people; `again` is the command that goes on."""
    said = {
        "nothing": "is done",
        "leave": "is left alone",
        "submit": "would be submitted" if dry_run else "is submitted",
        "mend": "would get another dependency" if dry_run else "has got another dependency",
        "tell": "FAILED",
        "wait": "waits",
    }
    lines = []
    for done in found:
        action = done.action
        jobs = f" job {', '.join(done.jobs)}" if done.jobs else ""
        behind = f", behind {action.behind}" if action.do == "submit" and action.behind is not None else ""
        why = "" if action.do == "nothing" else f": {action.why}"
        lines.append(f"{action.stage:<14}{said[action.do]}{jobs}{behind}{why}")
        lines += [f"{'':<14}note: {note}" for note in done.notes]
    if any(done.action.do == "tell" for done in found):
        lines += ["", f"when the cause is mended: {again} --retry"]
    elif not dry_run and any(done.action.do != "nothing" for done in found):
        lines += ["", f"how it goes: pixart-ds status {run.root}"]
    return lines
