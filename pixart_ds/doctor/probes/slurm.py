"""The allocation, or on a login node the site: variables, GPUs, requeue, time."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence

from pixart_ds.config.profile import Profile, seconds_of
from pixart_ds.doctor.ask import program
from pixart_ds.doctor.check import Check, failed, ok, skipped, warning
from pixart_ds.doctor.probes.config import estimate_of
from pixart_ds.doctor.subject import Subject
from pixart_ds.engine.environment import TORCH_NAMES
from pixart_ds.log import duration
from pixart_ds.train import interval

_WARNING_S = 300
"""As `pixart-ds train --warning` and profiles have it."""
_NO_JOB = "this process runs in no job of Slurm"

# ---- judgements: pure --------------------------------------------------------------------------------------------------


def judge_variables(said: Mapping[str, str], hosts: Sequence[str] | None) -> Check:
    """Whether what Slurm says of the job holds together.

    Args:
        said: Variables of this process.
        hosts: Names of the job's nodes; None if Slurm was not to be asked.
    """
    name, problems = "slurm.variables", []
    for variable in ("SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES"):
        if not said.get(variable):
            problems.append(f"{variable} is not set")
    number, node = said.get("SLURM_JOB_NUM_NODES", ""), said.get("SLURMD_NODENAME")
    if hosts is not None and number.isdecimal() and len(hosts) != int(number):
        problems.append(f"SLURM_JOB_NUM_NODES is {number}, but SLURM_JOB_NODELIST names {len(hosts)}")
    if hosts is not None and node is not None and node not in hosts:
        problems.append(f"SLURMD_NODENAME is {node}, which SLURM_JOB_NODELIST does not name")
    if problems:
        return failed(
            name, "; ".join(problems), "start from a plain shell: sbatch and srun pass on what the caller had"
        )
    left = [each for each in TORCH_NAMES if said.get(each)]
    if left and not said.get("SLURM_STEP_ID"):
        return warning(
            name, f"{', '.join(left)} set in the job's script: they win over what Slurm says", f"unset {' '.join(left)}"
        )
    return ok(
        name,
        f"job {said.get('SLURM_JOB_ID')}, {number} node{'' if number == '1' else 's'}: {said['SLURM_JOB_NODELIST']}",
    )


def judge_gpus(visible: str | None, granted: int | None, *, in_step: bool) -> Check:
    """Whether the GPUs that CUDA will see are those that were granted.

    Args:
        visible: Value of CUDA_VISIBLE_DEVICES; None if it is not set.
        granted: On this node, by Slurm's word.
        in_step: Whether this is a task of srun.
    """
    name = "slurm.gpus"
    if granted is None:
        return failed(
            name, "the job has no GPUs (SLURM_GPUS_ON_NODE is not set)", "ask for them: --gres=gpu:8, or the site's way"
        )
    if visible is None:
        return ok(name, f"{granted} granted on this node; CUDA_VISIBLE_DEVICES is not set, so all can be seen")
    seen = len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    words = f"{seen} of {granted} GPUs in CUDA_VISIBLE_DEVICES"
    if seen == granted:
        return ok(name, words)
    if in_step and seen == 1:
        return ok(name, f"{words}: one bound to this task")
    return failed(name, words, "do not set CUDA_VISIBLE_DEVICES in the job; Slurm does")


def judge_requeue(allowed: bool, profile_requeues: bool | None) -> Check:
    """Whether the job may go back into the queue at its time limit.

    Args:
        allowed: By `scontrol show job`.
        profile_requeues: `requeue` of the profile; None without one.
    """
    if allowed:
        return ok("slurm.requeue", "the job may be requeued")
    if profile_requeues is False:
        return ok("slurm.requeue", "the job may not be requeued; the profile has a second job wait behind it")
    return failed(
        "slurm.requeue",
        "the job may not be requeued (Requeue=0): it ends for good at its time limit",
        "submit it with --requeue; where the site forbids it, say requeue: false in the profile and use `pixart-ds launch`",
    )


def judge_time(limit_s: float, left_s: float, warning_s: float, interval_s: float | None) -> Check:
    """Whether there is time to get from one checkpoint to the next before all ranks are asked to save.

    Args:
        limit_s: Of one attempt.
        left_s: Until its end.
        warning_s: Before the end, when ranks save.
        interval_s: Between two checkpoints; None if unknown.
    """
    name = "slurm.time_limit"
    seen = f"{duration(left_s)} left of {duration(limit_s)}, warned {duration(warning_s)} before the end"
    seen += "" if interval_s is None else f"; a checkpoint every {duration(interval_s)}"
    if limit_s <= 2 * warning_s:
        return failed(name, f"{seen}: it would do nothing but stop", "ask for more time, or lower warning_s")
    if interval_s is not None and limit_s - warning_s < interval_s:
        return failed(
            name, f"{seen}: a crash would cost the whole attempt", "ask for more time, or lower checkpoint.every"
        )
    if left_s - warning_s < (interval_s or 0.0):
        return warning(name, f"{seen}: the next stop is the next checkpoint", "nothing, if the job may be requeued")
    return ok(name, seen)


def judge_partition(profile: Profile, table: str, asked: str) -> Check:
    """Whether the site has the profile's partition, with GPUs and time enough; `launch` looks at more.

    Args:
        profile: The site, as the user describes it.
        table: Rows of `sinfo -h -o '%P|%l|%D|%G'`.
        asked: The time limit of the job.
    """
    name = "slurm.partition"
    rows = [line.split("|") for line in table.splitlines() if line.count("|") == 3]
    wanted = (profile.partition or "").split(",")
    own = [row for row in rows if (row[0].rstrip("*") in wanted if profile.partition else row[0].endswith("*"))]
    known = ", ".join(sorted({row[0].rstrip("*") for row in rows})) or "none"
    if not own:
        which = f"partition {profile.partition}" if profile.partition else "default partition"
        return failed(name, f"there is no {which}; the site has {known}", "name one of them: partition in the profile")
    title = own[0][0].rstrip("*")
    gpus = max(sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", row[3])) for row in own)
    if gpus < profile.gpus_per_node:
        return failed(
            name,
            f"a node of partition {title} has {gpus} GPUs, the profile says {profile.gpus_per_node}",
            "correct gpus_per_node in the profile",
        )
    limits = [seconds_of(row[1]) for row in own if row[1] not in ("infinite", "n/a")]
    if limits and len(limits) == len(own) and seconds_of(asked) > max(limits):
        return failed(
            name,
            f"partition {title} allows {duration(max(limits))}, the profile asks {duration(seconds_of(asked))}",
            "lower time",
        )
    return ok(name, f"partition {title}: {sum(int(row[2]) for row in own)} nodes with up to {gpus} GPUs")


def fields_of(text: str) -> dict[str, str]:
    """The fields of one line of `scontrol show job -o`."""
    return dict(re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S*)", text))


# ---- probes ------------------------------------------------------------------------------------------------------------


def variables(subject: Subject) -> Check:
    if subject.job is None:
        return skipped("slurm.variables", _NO_JOB)
    answer = program("scontrol", "show", "hostnames", subject.environment.get("SLURM_JOB_NODELIST", ""))
    hosts = answer.stdout.split() if answer is not None and answer.returncode == 0 else None
    return judge_variables(subject.environment, hosts)


def gpus(subject: Subject) -> Check:
    if subject.job is None:
        return skipped("slurm.gpus", _NO_JOB)
    if subject.device == "cpu":
        return skipped("slurm.gpus", "the stage is to run on the CPU")
    in_step = bool(subject.environment.get("SLURM_STEP_ID"))
    return judge_gpus(subject.environment.get("CUDA_VISIBLE_DEVICES"), subject.granted_gpus, in_step=in_step)


def requeue(subject: Subject) -> Check:
    name = "slurm.requeue"
    if subject.job is None:
        return skipped(name, _NO_JOB)
    job = _job(subject)
    if isinstance(job, str):
        return skipped(name, job)
    return judge_requeue(job.get("Requeue") == "1", subject.profile.requeue if subject.profile else None)


def time_limit(subject: Subject) -> Check:
    """The job's time, or on a login node that which the profile asks for."""
    name = "slurm.time_limit"
    warning_s = float(subject.profile.warning_s if subject.profile else _WARNING_S)
    if subject.job is None:
        if subject.profile is None or subject.stage is None:
            return skipped(name, f"{_NO_JOB}, and no run and --profile say how long one would be")
        limit_s = float(seconds_of(subject.profile.time_of(subject.stage.name)))
        return judge_time(limit_s, limit_s, warning_s, checkpoint_interval_s(subject))
    job = _job(subject)
    if isinstance(job, str):
        return skipped(name, job)
    start, end = job.get("StartTime", ""), job.get("EndTime", "")
    if not (start.isdecimal() and end.isdecimal()):
        return ok(name, "the job has no time limit")
    return judge_time(
        float(end) - float(start), max(0.0, float(end) - time.time()), warning_s, checkpoint_interval_s(subject)
    )


def partition(subject: Subject) -> Check:
    name = "slurm.partition"
    if subject.profile is None:
        return skipped(name, "no --profile was given")
    answer = program("sinfo", "-h", "-o", "%P|%l|%D|%G")
    if answer is None:
        return skipped(name, "there is no sinfo here")
    if answer.returncode:
        return failed(name, f"sinfo: {' '.join(answer.stderr.split())}", "ask whether slurmctld is up: scontrol ping")
    asked = subject.profile.time_of(subject.stage.name) if subject.stage else subject.profile.time
    return judge_partition(subject.profile, answer.stdout, asked)


def _job(subject: Subject) -> dict[str, str] | str:
    """What Slurm says of this job, or why it does not."""
    answer = program("scontrol", "show", "job", "-o", subject.job or "")
    if answer is None:
        return "there is no scontrol here"
    if answer.returncode or not answer.stdout.strip():
        return f"Slurm does not answer: {' '.join(answer.stderr.split())}"
    return fields_of(answer.stdout.strip().splitlines()[0])


def checkpoint_interval_s(subject: Subject) -> float | None:
    """Seconds between two checkpoints; None if unknown, or without a run and a stage."""
    if subject.run is None or subject.stage is None:
        return None
    return interval.checkpoint_interval_s(subject.run, subject.stage, lambda: _estimated_rate(subject))


def _estimated_rate(subject: Subject) -> float | None:
    """Images a second of all GPUs; None if it cannot be estimated."""
    found = estimate_of(subject)
    each = None if found is None else found["images_per_second_per_gpu"]
    return None if found is None or each is None else float(each * found["gpus"])


FULL = (variables, gpus, requeue, time_limit, partition)
