"""The ranks as tasks of one srun over the allocation."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from pixart_ds.cluster.launchers import LAST_LINES, RANK_MODULE, Failed, LaunchRequest, Tail, tail_of
from pixart_ds.cluster.slurm import Slurm, expand
from pixart_ds.errors import EXIT_BUG, MachineError
from pixart_ds.train.pulse import read_pulses


@dataclass
class SrunLauncher:
    """One srun over the allocation, one task for each GPU. Task counts stand here alone: in an sbatch header they would freeze
    the number of nodes at the first start.

    Args:
        extra: Further arguments for each rank.
        tasks_per_node: By default one for each GPU, as Slurm says of the allocation.
        srun: The program.
        environment: Of the job's script.
        slurm: Asked at each start how many nodes are left; without it the environment's number counts.
        command: What a rank runs before its arguments.
    """

    extra: Sequence[str] = ()
    tasks_per_node: int | None = None
    srun: str = "srun"
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    slurm: Slurm | None = None
    command: Sequence[str] = RANK_MODULE
    unreachable: set[str] = field(default_factory=set)
    """Nodes that no rank could be started on: Slurm itself may take minutes to give them up."""
    _missed: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return "srun, one task for each GPU" if self.tasks_per_node is None else f"srun, {self.tasks_per_node} a node"

    def tasks(self) -> tuple[int, int]:
        """(nodes, tasks on each) of this allocation as it is now.

        Raises:
            MachineError: This is no Slurm allocation, it has no GPUs, or Slurm is taking it down.
        """
        nodes = self.environment.get("SLURM_JOB_NUM_NODES")
        if nodes is None:
            raise MachineError(
                "this is no Slurm allocation (SLURM_JOB_NUM_NODES is not set)",
                remedy="submit it: sbatch slurm/STAGE.sbatch; or use --launcher local",
            )
        each = self.tasks_per_node or _gpus_per_node(self.environment)
        if not each:
            raise MachineError("the allocation has no GPUs", remedy="ask for them: #SBATCH --gres=gpu:8")
        state = None if self.slurm is None else self.slurm.state()
        if state is None:
            return max(1, int(nodes) - len(self.unreachable)), each
        self.unreachable &= set(expand(state.nodes))  # those that the job has lost are no longer counted in it
        return max(1, state.num_nodes - len(self.unreachable)), each

    def argv(self, request: LaunchRequest, nodes: int, each: int) -> list[str]:
        """The whole command line. The wrapper ignores signals until the rank has its handlers, and names the rank."""
        output = request.attempt.node_log(request.launch, "%N")
        cpus = _fewest_cpus(self.environment)
        return [
            *(self.srun, f"--nodes={nodes}", f"--ntasks={nodes * each}", f"--ntasks-per-node={each}"),
            *([f"--exclude={','.join(sorted(self.unreachable))}"] if self.unreachable else []),
            "--export=ALL",  # where jobs are submitted with --export=NONE, steps would inherit that
            # said again here: a step does not inherit it, and its tasks would share one core each
            *([f"--cpus-per-task={max(1, cpus // each)}"] if cpus else []),
            "--overlap",  # the step of a lost node stays in Slurm's books, and the next one would wait for what it held
            *("--kill-on-bad-exit=1", "--wait=60"),
            *("--unbuffered", "--label", f"--output={output}", "--open-mode=append"),
            *(sys.executable, "-m", "pixart_ds.cluster.task", str(request.attempt.rank_log(request.launch, 0))),
            *self.command,
            *request.arguments(),
            *self.extra,
        ]

    def leave_out(self, nodes: Collection[str]) -> None:
        """Leaves nodes that could not be reached out of later launches.

        At once if Slurm hears nothing from them either; else when it happens again: the network may have had a passing fault.
        """
        for node in nodes:
            self._missed[node] = self._missed.get(node, 0) + 1
            if self._missed[node] > 1 or self.slurm is None or not self.slurm.responds(node):
                self.unreachable.add(node)

    def start(self, request: LaunchRequest, output: TextIO) -> SrunRanks:
        """See `Launcher`."""
        nodes, each = self.tasks()
        return SrunRanks(self, self.argv(request, nodes, each), nodes * each, request, output)


def rank_command(container: str | None) -> Sequence[str]:
    """What a rank runs before its arguments: this process's python, or that of the image which a command such as `apptainer exec
    --nv /path/pixart.sif` enters. The frozen code reaches it by PYTHONPATH.

    Raises:
        MachineError: The command's program is not here.
    """
    if container is None:
        return RANK_MODULE
    program, *rest = shlex.split(container)
    found = shutil.which(program)
    if found is None:
        raise MachineError(
            f"there is no {program}, which is to start the ranks inside a container",
            where="--container, or container: in the profile",
            remedy="load its module in the profile's setup, or give its path",
        )
    return [found, *rest, "python", *RANK_MODULE[1:]]


def _fewest_cpus(environment: Mapping[str, str]) -> int:
    """CPUs of the node that has fewest, of `40(x7),36`; 0 if Slurm does not say."""
    text = environment.get("SLURM_JOB_CPUS_PER_NODE") or environment.get("SLURM_CPUS_ON_NODE", "")
    return min((int(count) for count in re.findall(r"(?:^|,)(\d+)", text)), default=0)


def _gpus_per_node(environment: Mapping[str, str]) -> int:
    """GPUs of this node as Slurm says: `8`, `v100:8` or `8(x4)`."""
    text = environment.get("SLURM_GPUS_ON_NODE") or environment.get("SLURM_GPUS_PER_NODE", "")
    digits = text.split("(")[0].split(":")[-1]
    return int(digits) if digits.isdigit() else 0


_TASK_FAILED = re.compile(r"error: (?P<node>[^\s:]+): tasks? (?P<rank>\d+)[^:]*: (?P<how>.+)")
_NODE_FAILED = re.compile(r"error: (?:Node failure on|Task launch for StepId=\S+ failed on node) (?P<node>[^\s:,]+)")
_SRUN_SECONDS = 15.0
"""For srun to end its tasks, before it is killed itself."""


def parse_srun(text: str) -> Failed | None:
    """The first failure that srun told of.

    Its lines are `srun: error: n2: task 13: Exited with exit code 3`, `…: tasks 1-4: Killed`, `srun: error: Node failure on n4`,
    `srun: error: Task launch for StepId=48.2 failed on node n4: Communication connection failure`.
    """
    for line in text.splitlines():
        if found := _NODE_FAILED.search(line):
            return Failed(None, EXIT_BUG, found["node"])
        if found := _TASK_FAILED.search(line):
            return Failed(int(found["rank"]), _code(found["how"]), found["node"])
    return None


def nodes_in(text: str) -> set[str]:
    """All nodes that srun could not reach or has lost."""
    return {found["node"] for found in _NODE_FAILED.finditer(text)}


def _code(how: str) -> int:
    """An exit code from srun's words: `Exited with exit code 3`, or a signal as the C library names it."""
    if number := re.search(r"exit code (\d+)", how):
        return int(number[1])
    said = how.removesuffix(" (core dumped)").strip()
    return next((-number for number in signal.Signals if signal.strsignal(number) == said), EXIT_BUG)


class SrunRanks:
    """The tasks of one srun."""

    def __init__(
        self, launcher: SrunLauncher, argv: Sequence[str], world_size: int, request: LaunchRequest, output: TextIO
    ) -> None:
        self.world_size = world_size
        self._launcher, self._request = launcher, request
        self._told = request.attempt.srun_log(request.launch)
        self._told_bytes = 0
        self._failed: Failed | None = None
        self._waiting: list[signal.Signals] = []
        self._next_look = 0.0
        self._kill_at: float | None = None
        with open(self._told, "ab") as errors:
            self._process = subprocess.Popen(argv, env=launcher.environment, stderr=errors)
        self._tail = Tail(request.attempt.rank_log(request.launch, 0), output)

    def send(self, number: signal.Signals) -> None:
        """A request to stop waits until all ranks listen: before, it would end srun or a task, and the job's warning with it."""
        if number == signal.SIGKILL:
            self._kill()
        elif number == signal.SIGQUIT:
            if self._launcher.slurm is not None:
                self._launcher.slurm.signal_steps("QUIT")
        else:  # srun hands SIGUSR1 and SIGUSR2 to every task; SIGTERM would make it kill them
            self._waiting.append(signal.SIGUSR1 if number == signal.SIGTERM else number)

    def _deliver(self) -> None:
        """Sends what waits, once every rank has given a sign of life."""
        now = time.monotonic()
        if not self._waiting or now < self._next_look:
            return
        self._next_look = now + 1.0
        if self.listening():
            for number in self._waiting:
                self._process.send_signal(number)
            self._waiting.clear()

    def _kill(self) -> None:
        """Has srun kill all tasks; killed itself, it would leave them running."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + _SRUN_SECONDS
            self._process.send_signal(signal.SIGTERM)
        elif time.monotonic() > self._kill_at:
            self._process.kill()

    def failed(self) -> Failed | None:
        if self._failed is None:
            size = self._told.stat().st_size
            if size > self._told_bytes:  # srun tells of a task's end long before its own
                self._told_bytes = size
                self._failed = parse_srun(self._told.read_text(encoding="utf-8", errors="replace"))
            if self._failed is None and (code := self._process.poll()):
                self._failed = Failed(None, code, None)
            if self._failed is not None and self._failed.rank is None:
                self._launcher.leave_out(nodes_in(self._told.read_text(encoding="utf-8", errors="replace")))
        return self._failed

    def alive(self) -> bool:
        if self._process.poll() is not None:
            self._tail.finish()
            return False
        self._deliver()
        return True

    def log_of(self, rank: int) -> Path:
        """Rank 0's own file; else that of the node where the rank's label is found: so also of a rank 0 that never began."""
        attempt, launch = self._request.attempt, self._request.launch
        own = attempt.rank_log(launch, 0)
        if rank == 0 and own.exists() and own.stat().st_size:
            return own
        nodes = sorted(attempt.root.glob(attempt.node_log(launch, "*").name))
        return next((path for path in nodes if _labelled(path, rank)), own)

    def listening(self) -> bool:
        return len(read_pulses(self._request.attempt, self._request.launch)) == self.world_size

    def last_words(self, rank: int | None) -> str:
        if rank is None:
            return tail_of(self._told)
        path = self.log_of(rank)
        own = path == self._request.attempt.rank_log(self._request.launch, 0)
        words = tail_of(path) if own and rank == 0 else "\n".join(_labelled(path, rank)[-LAST_LINES:])
        return words or tail_of(self._told)


def _labelled(path: Path, rank: int) -> list[str]:
    """The lines that srun's --label gave to a rank."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return re.findall(rf"^\s*0*{rank}: (.*)$", text, re.MULTILINE)
