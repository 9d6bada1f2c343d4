"""`pixart-ds launch`: a stage's job for a site, checked against what the site has, then submitted through submitit."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.cluster import bad_nodes, frozen
from pixart_ds.cluster.cancel import withdraw_stop
from pixart_ds.cluster.jobs import JobSpec, Place
from pixart_ds.cluster.slurm import Partition, call, own_jobs, partitions
from pixart_ds.config.budget import read_budget
from pixart_ds.config.load import validate
from pixart_ds.config.profile import Profile, node_range, seconds_of
from pixart_ds.config.schema import StageConfig
from pixart_ds.errors import ConfigError, MachineError
from pixart_ds.layout import RunLayout
from pixart_ds.ledger.book import furthest
from pixart_ds.ledger.budget import figure, refuse_used_up, rows, spent
from pixart_ds.plan.estimate import Machines, estimate_stage
from pixart_ds.train.interval import checkpoint_interval_s


@dataclass(frozen=True)
class Submission:
    """What `launch` did, or would do.

    Attributes:
        spec: The job.
        text: Its script.
        jobs: Numbers of the jobs; empty where nothing was submitted.
        code: The copy of the code that it runs.
        notes: What a person should know beforehand.
    """

    spec: JobSpec
    text: str
    jobs: tuple[str, ...]
    code: frozen.Frozen
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.spec.name,
            "jobs": list(self.jobs),
            "nodes": self.spec.nodes,
            "time": self.spec.time,
            "code": self.code.hash,
            "script": self.text,
            "notes": list(self.notes),
        }


def with_options(profile: Profile, stage: str | None, given: Mapping[str, str | None], where: str) -> Profile:
    """A profile with what the command line says in its place: partition, account, qos, constraint, nodes, time.

    Raises:
        ConfigError: A value is wrong.
    """
    given = {key: value for key, value in given.items() if value is not None}
    values = profile.model_dump(exclude_unset=True)
    own = {key: given.pop(key) for key in ("nodes", "time") if key in given}
    stages = {**values.get("stages", {})}
    if stage is not None:
        stages[stage] = {**stages.get(stage, {}), **own}
    return validate(Profile, {**values, **given, "stages": stages}, where)


def launch(
    run: RunLayout,
    stage: StageConfig,
    profile: Profile,
    sets: Sequence[str] = (),
    *,
    after: Sequence[str] = (),
    held: str | None = None,
    dry_run: bool = False,
    update_code: bool = False,
) -> Submission:
    """Checks a stage's job and submits it.

    Args:
        run, stage: What to train.
        profile: The site.
        sets: Overrides of `execution`.
        after: Jobs that must end well before it begins.
        held: Why it waits until it is released.
        dry_run: Only check, and say what would be submitted; the script is the same to the letter.
        update_code: Freeze the code anew.

    Raises:
        ConfigError: All that does not fit the site, or the run's budget is used up; nothing was submitted.
        MachineError: Slurm is not here, or refuses.
    """
    refuse_used_up(run)
    notes = [*check(run, stage, profile, partitions()), *budget_notes(run, stage, profile)]
    code = frozen.freeze(run, "launch", update=update_code, dry_run=True)
    folder = run.stage(stage.name).submissions.absolute()
    place = Place(run.root.absolute(), code.folder, Path(sys.prefix), folder / "%j.out")
    spec = JobSpec(stage, profile, place, tuple(sets), tuple(bad_nodes.excluded(run)), tuple(after), held)
    _refuse_second(spec)
    text = spec.render()
    if dry_run:
        return Submission(spec, text, (), code, tuple(notes))
    folder.mkdir(parents=True, exist_ok=True)
    withdraw_stop(run.stage(stage.name))
    _test_only(text, folder)
    code = frozen.freeze(run, "launch", update=update_code)  # once nothing can be refused any more
    # where a job cannot go back into the queue, a second one waits behind it: of one name Slurm runs one at a time
    jobs = tuple(_submit(text, folder) for _ in range(1 if profile.requeue else 2))
    return Submission(spec, text, jobs, code, tuple(notes))


def check(run: RunLayout, stage: StageConfig, profile: Profile, has: Sequence[Partition]) -> list[str]:
    """Holds a job against the site and against itself.

    Returns:
        What is no error, and worth knowing.

    Raises:
        ConfigError: All that is wrong, in one message.
    """
    problems = _against_site(stage, profile, has)
    limit_s = seconds_of(profile.time_of(stage.name))
    if limit_s <= 2 * profile.warning_s:
        problems.append(
            f"time {profile.time_of(stage.name)} is not even twice warning_s ({profile.warning_s} s): it would do nothing but stop"
        )
    interval_s = checkpoint_interval_s(run, stage, lambda: _estimated_rate(stage, profile))
    if interval_s is not None and limit_s - profile.warning_s < interval_s:
        every = stage.checkpoint.every
        said = "" if every is None else f" (every {every.in_steps(stage.global_batch_size):,} steps)"
        problems.append(
            f"time {profile.time_of(stage.name)} is shorter than the {interval_s / 3600:.1f} h between two checkpoints{said}: "
            "a crash would cost the whole attempt; ask for more time, or lower checkpoint.every"
        )
    if problems:
        raise ConfigError(
            "the job does not fit:\n" + "\n".join(f"  - {each}" for each in problems),
            where=f"{stage.name} at this site",
            remedy="nothing was submitted; change the profile, or give --partition, --nodes, --time, … to launch",
        )
    notes = []
    saves = [row for each in run.stage(stage.name).all_attempts() for row in files.read_json_lines(each.saves)]
    if profile.grace_s is not None and saves and saves[-1].get("commit_s", 0.0) > profile.grace_s:
        notes.append(
            f"the last checkpoint took {saves[-1]['commit_s']:.0f} s until it counted, preemption leaves {profile.grace_s:.0f} s: "
            "what was trained since the checkpoint before would be lost"
        )
    return notes


def _against_site(stage: StageConfig, profile: Profile, has: Sequence[Partition]) -> list[str]:
    named = profile.partition.split(",") if profile.partition else []
    own = [each for each in has if (each.name in named if named else each.default)]
    if not own:
        known = ", ".join(sorted({each.name for each in has})) or "none"
        if profile.partition is None:
            return [f"the site has no default partition, and the profile names none; choose one of: {known}"]
        return [f"there is no partition {profile.partition!r} here; choose one of: {known}"]
    name, problems = own[0].name, []
    wanted = profile.gpus_per_node
    fitting = [each for each in own if each.gpus >= wanted]
    if not fitting:
        problems.append(f"gpus_per_node {wanted}: a node of partition {name} has {max(each.gpus for each in own)}")
    least, _ = node_range(profile.nodes_of(stage.name, stage.paper_gpus))
    if fitting and sum(each.nodes for each in fitting) < least:
        problems.append(f"nodes {least}: partition {name} has {sum(each.nodes for each in fitting)} such nodes")
    features = frozenset().union(*(each.features for each in own))
    for word in re.split(r"[\[\]()&|,\s]+", re.sub(r"\*\d+", "", profile.constraint or "")):
        if word and word not in features:
            problems.append(
                f"constraint {word}: no node of partition {name} has it; they have: {', '.join(sorted(features)) or 'none'}"
            )
    limits = [each.time_limit_s for each in own if each.time_limit_s is not None]
    asked = profile.time_of(stage.name)
    if limits and seconds_of(asked) > max(limits):
        problems.append(f"time {asked}: partition {name} allows {max(limits) / 3600:g} h")
    return problems


def budget_notes(run: RunLayout, stage: StageConfig, profile: Profile) -> list[str]:
    """For each limit that what is spent and what the rest of the stage is estimated to take would exceed together."""
    limits = read_budget(run).limits
    estimated = _estimated(stage, profile) if limits else None
    if estimated is None or not estimated["fits"]:
        return []
    left = max(0.0, 1 - furthest(run.stage(stage.name)) / stage.total_images)
    notes = []
    for row in rows(limits, spent(run.root).account):
        more = left * estimated["dollars" if row["what"] == "usd" else row["what"]]
        if row["used"] is not None and row["used"] + more > row["limit"]:
            notes.append(
                f"{figure(row['used'])} {row['what']} are used, and the rest of {stage.name} is estimated at {figure(more)} on the "
                f"fewest nodes: more than the budget of {figure(row['limit'])}, so the job would stop on the way; raise it: "
                f"pixart-ds budget {run.root}"
            )
    return notes


def _estimated(stage: StageConfig, profile: Profile) -> dict[str, Any] | None:
    """The stage's estimate on the fewest nodes; None where the profile names no GPU, or the recipe cannot run on it."""
    if profile.gpu is None or profile.device == "cpu":
        return None
    nodes, _ = node_range(profile.nodes_of(stage.name, stage.paper_gpus))
    cost = profile.cost
    machines = Machines(
        profile.gpu,
        nodes,
        profile.gpus_per_node,
        country=cost.country,
        pue=cost.pue,
        price_per_hour=cost.price_per_hour,
    )
    try:
        return estimate_stage(stage, machines)
    except ConfigError:  # such as bf16 on a V100: `estimate` and the first start say it better
        return None


def _estimated_rate(stage: StageConfig, profile: Profile) -> float | None:
    """Images a second of all GPUs on the fewest nodes; None if it cannot be estimated."""
    found = _estimated(stage, profile)
    each = None if found is None else found["images_per_second_per_gpu"]
    return None if found is None or each is None else float(each * found["gpus"])


def _refuse_second(spec: JobSpec) -> None:
    there = own_jobs(spec.name)
    if there:
        raise ConfigError(
            f"job {there[0]['job']} of this stage is {there[0]['state'].lower()} already",
            where=spec.name,
            remedy=f"wait for it, or end it: scancel {' '.join(each['job'] for each in there)}",
        )


def _test_only(text: str, folder: Path) -> None:
    """Asks Slurm whether it would take the job."""
    script = folder / ".test.sbatch"
    script.write_text(text, encoding="utf-8")
    try:
        answer = call("sbatch", "--test-only", str(script))
    finally:
        script.unlink()
    if answer.returncode:
        said = " ".join(answer.stderr.replace("sbatch: error:", "").replace("allocation failure:", "").split())
        raise ConfigError(
            f"Slurm would not take the job: {said}",
            where="sbatch --test-only",
            remedy="nothing was submitted; change the profile, or give --partition, --account, … to launch",
        )


def _submit(text: str, folder: Path) -> str:
    """Submits a script through submitit, which keeps it in `folder` as JOB_submission.sh.

    submitit's own script has no process of ours beside the tasks, and its checkpoint() tells only rank 0, in the middle of a step:
    so the text is ours, and signals, sizes and requeueing are the supervisor's.
    """
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):  # type: ignore[misc]
        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return text

    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise MachineError("there is no sbatch or srun on the path", where=os.environ.get("PATH", ""))
    try:
        job = Executor(folder=folder, max_num_timeout=0)._submit_command("")
    except FailedJobError as cause:
        raise MachineError(f"sbatch refused the job: {cause}", where=folder) from cause
    return str(job.job_id)
