"""What people should know of a run, and what to do next, for `pixart-ds status`."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pixart_ds.cluster import bad_nodes
from pixart_ds.cluster.cancel import CANCELLED
from pixart_ds.cluster.status_queue import Queued
from pixart_ds.cluster.status_stage import Look, exit_code_or_bug, job_of, lines_of, small_json
from pixart_ds.errors import EXIT_BUG, EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DATA, EXIT_MACHINE, EXIT_STOPPED
from pixart_ds.layout import AttemptLayout, RunLayout, StageLayout
from pixart_ds.ledger.book import FRESH_S
from pixart_ds.ledger.budget import WARN_AT, is_used_up, to_raise, told
from pixart_ds.log import duration, si
from pixart_ds.train.pulse import slow_words
from pixart_ds.train.skips import read_records

_NEARLY_FULL = 0.05
_TO_MEND = {
    EXIT_CONFIG: "mend the recipe or the option that it names",
    EXIT_MACHINE: "mend what the machine lacks",
    EXIT_DATA: "mend the data that it names",
    EXIT_CHECKPOINT: "put the checkpoint right",
}


# ---- warnings ----------------------------------------------------------------------------------------------------------


def warn(look: Look, rows: Sequence[Mapping[str, Any]], budget: Sequence[Mapping[str, Any]]) -> None:
    """Adds to what people should know."""
    nothing = list[str]()
    for row in rows:
        if row["state"] != "done":
            read = functools.partial(_of_stage, look, row)
            look.warnings += look.tried(row["stage"], read, nothing)
    look.warnings += _of_queue(look.queue.jobs)
    if look.queue.problem is not None:
        look.warnings.append(f"Slurm does not answer ({look.queue.problem}): what waits in its queue is not known")
    left_out = look.tried("the list of bad nodes", lambda: bad_nodes.excluded(look.run, look.now), dict[str, str]())
    look.warnings += [f"node {node} is left out of the run's jobs: {reason}" for node, reason in left_out.items()]
    look.warnings += _of_budget(look.run, budget)
    look.warnings += look.tried("the run's disk", lambda: list(_of_disk(look.run.root)), nothing)


def _of_stage(look: Look, row: Mapping[str, Any]) -> list[str]:
    name = row["stage"]
    layout = look.run.stage(name)
    attempts, nothing = layout.all_attempts(), list[str]()
    found = [*_of_row(row, layout)]
    found += look.tried(f"{name}: what the guard has left out", lambda: list(_of_guard(name, layout)), nothing)
    if attempts:
        found += look.tried(f"{name}: its newest attempt", lambda: list(_of_attempt(attempts[-1], name)), nothing)
    return found


def _of_row(row: Mapping[str, Any], layout: StageLayout) -> Iterator[str]:
    name, running = row["stage"], row["state"] == "running"
    if os.path.lexists(layout.stop_request):
        if running:
            yield f"{name}: a stop file asks it to stop; it saves at the end of its step and ends"
        elif not made_by_cancel(layout):
            yield f"{name}: a stop file lies there; no attempt begins before it is removed: {layout.stop_request}"
    if running and row["silent_s"] is not None and row["silent_s"] > FRESH_S:
        yield (
            f"{name}: its job runs, but attempt {row['attempts']} has given no sign of life for {duration(row['silent_s'])}: "
            "its supervisor is gone or hangs, or the next attempt has not begun yet"
        )
    if row["checkpoint_is_late"]:
        what = (
            "there is no checkpoint yet"
            if row["checkpoint"] is None
            else f"{row['checkpoint']} is the newest checkpoint"
        )
        yield f"{name}: {what}, and two intervals have passed; what was trained since would be lost in a crash"
    if lost := row["outcomes"].count("lost"):
        which = "its attempt" if row["attempts"] == 1 else f"{lost} of its {row['attempts']} attempts"
        yield f"{name}: {which} left no word about the end: killed, or on a lost node"
    for each in row["slow_ranks"]:
        yield f"{name}: {slow_words(each)}"


def _of_guard(name: str, layout: StageLayout) -> Iterator[str]:
    if windows := read_records(layout):
        left_out = sum(int(each["upto"]) - int(each["after"]) for each in windows)
        times = "once" if len(windows) == 1 else f"{len(windows)} times"
        why = f"; at last: {windows[-1]['reason']}" if windows[-1].get("reason") else ""
        yield f"{name}: the guard has sent it back {times}, and {si(left_out)} images are left out{why}"


def _of_attempt(attempt: AttemptLayout, name: str) -> Iterator[str]:
    if refused := len(lines_of(attempt.refused)):
        steps = "one step" if refused == 1 else f"{refused} steps"
        yield f"{name}: attempt {attempt.number} has refused {steps} for losses or gradients that are no numbers: {attempt.refused}"
    for path in sorted(attempt.root.glob("hang-l*.json")):
        yield f"{name}: attempt {attempt.number} hung: {small_json(path).get('what') or f'see {path}'}"


def _of_queue(jobs: Sequence[Queued]) -> Iterator[str]:
    for job in jobs:
        if job.never:
            yield f"{job.stage}: job {job.job} {job.words}"
        elif job.held == "somebody":
            yield f"{job.stage}: job {job.job} {job.words}; it does not start before: scontrol release {job.job}"
    for stage in dict.fromkeys(job.stage for job in jobs):
        own = [job for job in jobs if job.stage == stage and not job.singleton]
        if len(own) > 1:
            listed = ", ".join(job.job for job in own)
            yield f"{stage}: it has {len(own)} jobs, {listed}; one is enough, the others end when they begin: scancel {own[-1].job}"


def _of_budget(run: RunLayout, budget: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in budget:
        if row["part"] is not None and row["part"] >= WARN_AT:
            said = "used up; no attempt begins before it is raised" if is_used_up(row) else "nearly used up"
            yield f"the budget is {said}: {told([row])}"


def _of_disk(root: Path) -> Iterator[str]:
    disk = os.statvfs(root)
    free = disk.f_bavail / disk.f_blocks if disk.f_blocks else 1.0
    if free < _NEARLY_FULL:
        yield f"the disk of the run is nearly full: {si(disk.f_bavail * disk.f_frsize, 'B')} are free, {free:.1%}"


def made_by_cancel(layout: StageLayout) -> bool:
    """Whether the stop file goes away when the stage is submitted again."""
    try:
        return layout.stop_request.read_text(encoding="utf-8", errors="replace").startswith(CANCELLED)
    except OSError:
        return False


# ---- what to do --------------------------------------------------------------------------------------------------------


def next_steps(
    run: RunLayout, rows: Sequence[Mapping[str, Any]], jobs: Sequence[Queued], budget: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What to do now, with the command; of the first stage that is not done, since the others wait for it."""
    folder = shlex.quote(str(run.root))
    open_rows = [row for row in rows if row["state"] != "done"]
    if not open_rows:
        return [
            f'pixart-ds sample {folder} --prompt "a red bicycle" --out bicycle.png',
            f"pixart-ds export {folder} --out pixart-alpha",
        ]
    first = open_rows[0]
    own = [job for job in jobs if job.stage == first["stage"]]
    if first["state"] == "running":
        return [f"nothing to do: {first['stage']} runs", *_not_submitted(run, open_rows[1:], jobs)]
    if first["state"] == "waiting":
        return [*_of_waiting(run, own), *_not_submitted(run, open_rows[1:], jobs)]
    over = [row for row in budget if is_used_up(row)]
    before = [to_raise(run, over)] if over else []
    if first["state"] == "failed":
        return [*before, *_of_failed(run, first)]
    stop = run.stage(first["stage"]).stop_request
    if os.path.lexists(stop) and not (made_by_cancel(run.stage(first["stage"])) and _was_submitted(run)):
        before.append(f"rm {shlex.quote(str(stop))}")
    return [*before, *_start(run, first["stage"])]


def _of_waiting(run: RunLayout, jobs: Sequence[Queued]) -> list[str]:
    for job in jobs:
        if job.reason == "DependencyNeverSatisfied":
            return [f"{_chain(run)}    (gives job {job.job} another dependency, or none)"]
        if job.never:
            return [f"scancel {job.job}, correct the profile, then: {_chain(run)}"]
        if job.held == "somebody":
            return [f"scontrol release {job.job}"]
    return [f"nothing to do: job {jobs[0].job} of {jobs[0].stage} is in the queue"]


def _of_failed(run: RunLayout, row: Mapping[str, Any]) -> list[str]:
    name, code = row["stage"], exit_code_or_bug(row)
    again = _start(run, name, retry=code != EXIT_STOPPED)
    if code == EXIT_STOPPED:
        return again
    log = f"{row['log']}" if row["log"] is not None else f"{run.stage(name).submissions}"
    lines = [f"{_TO_MEND.get(code, 'find out why')} ({log}), then:"]
    if code == EXIT_CHECKPOINT:
        lines.insert(0, f"pixart-ds checkpoint verify {shlex.quote(str(run.root))} --stage {name}")
    if code == EXIT_BUG:
        lines[0] = f"find out why it failed ({log}), then:"
    return [*lines, *again]


def _not_submitted(run: RunLayout, rows: Sequence[Mapping[str, Any]], jobs: Sequence[Queued]) -> list[str]:
    """The stages after the one that is under way, where stages are jobs and these have none."""
    names = [row["stage"] for row in rows if row["stage"] not in {job.stage for job in jobs}]
    if not names or not jobs or not _was_submitted(run):
        return []
    return [f"{_chain(run)}    (puts {', '.join(names)} behind it)"]


def _chain(run: RunLayout, *, retry: bool = False) -> str:
    return f"pixart-ds chain {shlex.quote(str(run.root))} --profile PROFILE" + (" --retry" if retry else "")


def _was_submitted(run: RunLayout) -> bool:
    """Whether `launch` or `chain` have submitted jobs of the run."""
    return any(run.root.glob("*/submissions"))


def _start(run: RunLayout, stage: str, *, retry: bool = False) -> list[str]:
    """How the stage goes on, in the way that the run's newest attempts were started."""
    if _was_submitted(run):
        return [_chain(run, retry=retry)]
    folder, newest = shlex.quote(str(run.root)), _newest_attempt(run)
    if newest is None:
        train = f"pixart-ds train {folder} {stage}"
        chain = f"{_chain(run)}    (or: sbatch slurm/{stage}.sbatch, with RUN in slurm/setup.sh)"
        return [chain] if shutil.which("sbatch") else [train, f"on a cluster: {chain}"]
    if job_of(newest) is not None:
        return [f"sbatch slurm/{stage}.sbatch"]
    env = small_json(newest.env)
    launcher = str(env.get("launcher", "supervisor"))
    if not launcher.startswith("supervisor"):
        return [f"start {stage} as before, with {launcher} (docs/launching.md)"]
    options = ["--device", "cpu"] if env.get("device") == "cpu" else []
    if isinstance(env.get("world_size"), int):
        options += ["--processes", str(env["world_size"])]
    return [" ".join(["pixart-ds", "train", folder, stage, *options])]


def _newest_attempt(run: RunLayout) -> AttemptLayout | None:
    """Of the stages', the one that was begun last."""
    found = [
        attempts[-1]
        for folder in run.root.iterdir()
        if folder.is_dir() and (attempts := StageLayout(folder).all_attempts())
    ]
    return max(found, key=lambda attempt: attempt.root.stat().st_mtime, default=None)
