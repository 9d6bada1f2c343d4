"""What Slurm is asked and told, in one place: why a job was signalled, which nodes it has, that it is to run again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart_ds.errors import MachineError

_TIMEOUT_S = 30.0
_TRIES = 3


@dataclass(frozen=True)
class JobState:
    """A job as `scontrol show job` tells it.

    Attributes:
        state: RUNNING, COMPLETING, PENDING, …
        reason: Why it waits or ends: TimeLimit, BeginTime, …; None if Slurm names none.
        restarts: How often it was put back into the queue.
        preempted: Whether it is to make room: the grace runs.
        end: Unix seconds at which the time limit is reached; during a grace, its end; None if Slurm knows none.
        nodes: What it holds now, as Slurm writes it: n[1-8].
        num_nodes: How many those are.
        gres: GPUs of each node, by their indices: n[1-2] → gpu:v100:8(IDX:0-7).
        batch_host: The node that its script runs on.
        excluded: Nodes that it shall not get.
    """

    state: str
    reason: str | None
    restarts: int
    preempted: bool
    end: float | None
    nodes: str
    num_nodes: int
    gres: dict[str, str]
    batch_host: str
    excluded: frozenset[str] = frozenset()

    @property
    def ended_by_time_limit(self) -> bool:
        return self.reason == "TimeLimit"

    @classmethod
    def parse(cls, text: str) -> JobState:
        """Reads one line of `scontrol show job -d -o`, times in Unix seconds.

        Raises:
            ValueError: It is something else.
        """
        found = dict(re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S*)", text))
        try:
            return cls(
                state=found["JobState"],
                reason=None if found["Reason"] == "None" else found["Reason"],
                restarts=int(found["Restarts"]),
                preempted=found.get("PreemptTime", "None") not in ("None", "Unknown", "(null)"),
                end=float(found["EndTime"]) if found["EndTime"].isdigit() else None,
                nodes="" if found["NodeList"] == "(null)" else found["NodeList"],
                num_nodes=int(found["NumNodes"].split("-")[0]),
                gres=dict(re.findall(r"Nodes=(\S+) CPU_IDs=\S* Mem=\S* GRES=(\S*)", text)),
                batch_host=found.get("BatchHost", ""),
                excluded=frozenset(expand(found.get("ExcNodeList", "").replace("(null)", ""))),
            )
        except KeyError as cause:
            raise ValueError(f"scontrol said {text[:200]!r}, without {cause.args[0]}") from cause


class Slurm:
    """The Slurm of this machine, asked about a job.

    Args:
        job: Its number.
        restarts: How often it had been put back into the queue when this process was started.
    """

    def __init__(self, job: str, restarts: int) -> None:
        self.job, self.restarts = job, restarts

    @classmethod
    def of_this_job(cls) -> Slurm | None:
        """The job that this process runs in; None outside of one."""
        job = os.environ.get("SLURM_JOB_ID")
        if job is None:
            return None
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # the number of its last task is the array's own
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        return cls(job, int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0))

    def state(self) -> JobState | None:
        """The job as Slurm sees it now; None if it gives no answer, as happens while it takes a job down."""
        for attempt in range(_TRIES):
            answer = call("scontrol", "show", "job", "-d", "-o", self.job)
            if answer.returncode == 0 and answer.stdout.strip():
                return JobState.parse(answer.stdout.strip().splitlines()[0])
            time.sleep(0.3 * attempt)
        return None

    def requeue(self, patience_s: float = 60.0) -> str | None:
        """Puts the job back into the queue; Slurm then ends this process. Returns what Slurm said against it, if it did.

        A controller that does not answer, as while it is started anew, is asked again for `patience_s`.
        """
        until = time.monotonic() + patience_s
        while (refusal := _refusal(call("scontrol", "requeue", self.job))) is not None:
            if not re.search(r"[Uu]nable to contact|[Tt]imed out|no answer|Connection|try again", refusal):
                return refusal
            state = self.state()
            if state is not None and state.restarts > self.restarts:  # it had been heard
                return None
            if time.monotonic() > until:
                return refusal
            time.sleep(3.0)
        return None

    def exclude(self, nodes: Collection[str]) -> str | None:
        """Names the nodes that the job, being in the queue, shall not get; none lets it have all again."""
        refusal: str | None = None
        for attempt in range(_TRIES):  # a moment may pass between `requeue` and the queue
            time.sleep(0.3 * attempt)
            names = ",".join(sorted(nodes))
            refusal = _refusal(call("scontrol", "update", f"JobId={self.job}", f"ExcNodeList={names}"))
            if refusal is None:
                return None
        return refusal

    def cancel(self) -> None:
        """Ends the job for good."""
        call("scancel", self.job)

    def responds(self, node: str) -> bool:
        """Whether Slurm still hears from a node; it needs some seconds to notice that it does not."""
        answer = call("sinfo", "-h", "-n", node, "-o", "%T")
        states = answer.stdout.split()
        return answer.returncode == 0 and not any(
            each.endswith("*") or "down" in each or "fail" in each for each in states
        )

    def signal_steps(self, name: str) -> None:
        """Sends a signal to all tasks of the job, and not to its script."""
        call("scancel", f"--signal={name}", self.job)

    def submit(self, script: Path, *options: str) -> tuple[str | None, str]:
        """Submits a script; (number of the job, "") or (None, what Slurm said)."""
        answer = call("sbatch", "--parsable", *options, str(script))
        if answer.returncode:
            return None, answer.stderr.strip()
        return answer.stdout.strip().split(";")[0], ""


def call(*argv: str) -> subprocess.CompletedProcess[str]:
    """Runs one of Slurm's programs, in a session of its own: a signal to the whole job does not cut it off.

    Raises:
        MachineError: The program is not there.
    """
    if shutil.which(argv[0]) is None:
        raise MachineError(
            f"there is no {argv[0]} on the path",
            where=os.environ.get("PATH", ""),
            remedy="work on a node of the cluster that has Slurm's programs, or load their module",
        )
    environment = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
    try:
        return subprocess.run(
            argv,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
            start_new_session=True,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 1, "", f"{argv[0]} gave no answer within {_TIMEOUT_S:.0f} s")


def _refusal(answer: subprocess.CompletedProcess[str]) -> str | None:
    return (answer.stderr.strip() or f"exit code {answer.returncode}") if answer.returncode else None


def expand(nodes: str) -> list[str]:
    """The names in a list as Slurm writes it: n1, n2, m7 of `n[1-2],m7`."""
    names: list[str] = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", nodes):
        names += _expand_one(part)
    return names


def _expand_one(part: str) -> list[str]:
    found = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if found is None:
        return [part]
    head, inside, rest = found.groups()
    numbers: list[str] = []
    for piece in inside.split(","):
        low, dash, high = piece.partition("-")
        numbers += [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)] if dash else [low]
    return [f"{head}{number}{tail}" for number in numbers for tail in _expand_one(rest)]


@dataclass(frozen=True)
class Partition:
    """A part of the cluster that jobs may ask for, as `sinfo` tells it; nodes of one kind are one row.

    Attributes:
        name: Its name.
        default: Whether a job that names none gets it.
        time_limit_s: The longest that a job may ask for; None: no limit.
        nodes, gpus, features: Of this kind of node: how many, GPUs in each, what a constraint may name.
    """

    name: str
    default: bool
    time_limit_s: float | None
    nodes: int
    gpus: int
    features: frozenset[str]


def partitions() -> list[Partition]:
    """What this cluster has.

    Raises:
        MachineError: Slurm does not answer.
    """
    answer = call("sinfo", "-h", "-o", "%P|%l|%D|%G|%f")
    if answer.returncode:
        raise MachineError(
            f"sinfo: {answer.stderr.strip()}", remedy="ask whether slurmctld is up: scontrol ping; then try again"
        )
    return parse_partitions(answer.stdout)


def parse_partitions(text: str) -> list[Partition]:
    """The rows of `sinfo -h -o '%P|%l|%D|%G|%f'`."""
    from pixart_ds.config.profile import seconds_of

    rows: list[Partition] = []
    for line in text.splitlines():
        if line.count("|") != 4:  # some releases head each cluster's rows in spite of -h
            continue
        name, limit, nodes, gres, features = line.split("|")
        gpus = [int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", gres)]
        rows.append(
            Partition(
                name.rstrip("*"),
                name.endswith("*"),
                None if limit in ("infinite", "n/a") else float(seconds_of(limit)),
                int(nodes),
                sum(gpus),
                frozenset(features.replace("(null)", "").split(",")) - {""},
            )
        )
    return rows


def own_jobs(name: str) -> list[dict[str, Any]]:
    """This user's jobs of a name that wait or run: number, state, reason.

    Raises:
        MachineError: Slurm does not answer.
    """
    answer = call("squeue", "-h", "--me", f"--name={name}", "-o", "%i|%T|%r")
    if answer.returncode:
        raise MachineError(f"squeue: {answer.stderr.strip()}", remedy="ask whether slurmctld is up: scontrol ping")
    rows = [line.split("|", 2) for line in answer.stdout.splitlines() if line.count("|") >= 2]
    return [{"job": job, "state": state, "reason": reason} for job, state, reason in rows]
