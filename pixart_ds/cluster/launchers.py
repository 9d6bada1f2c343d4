"""How the ranks of a launch are started: as processes of this machine, or by srun as one task for each GPU."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO

from pixart_ds.cluster.slurm import Slurm
from pixart_ds.engine.environment import PARENT_PID, RankEnvironment, free_port
from pixart_ds.errors import EXIT_BUG, MachineError
from pixart_ds.layout import AttemptLayout

RANK_MODULE = (sys.executable, "-m", "pixart_ds.train.rank")


@dataclass(frozen=True)
class LaunchRequest:
    """What the ranks of one launch are told."""

    run: Path
    stage: str
    attempt: AttemptLayout
    launch: int
    device: str

    def arguments(self) -> list[str]:
        return [
            *("--run", str(self.run), "--stage", self.stage),
            *("--attempt", str(self.attempt.number), "--launch", str(self.launch), "--device", self.device),
        ]


@dataclass(frozen=True)
class Failed:
    """The first rank that ended with an error.

    Attributes:
        rank: Which; None where its whole node was lost.
        code: Its exit code; negative: the signal that killed it.
        node: Where it ran.
    """

    rank: int | None
    code: int
    node: str

    def __str__(self) -> str:
        if self.rank is None:
            return f"the node {self.node} was lost"
        how = (
            f"was killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"ended with exit code {self.code}"
        )
        return f"rank {self.rank} {how} on {self.node}"


class Ranks(Protocol):
    """The ranks of one launch, running."""

    @property
    def world_size(self) -> int:
        """How many."""
        ...

    def send(self, number: signal.Signals) -> None:
        """Passes a signal to every rank that is alive."""
        ...

    def failed(self) -> Failed | None:
        """The first rank that ended with an error, or None."""
        ...

    def alive(self) -> bool:
        """Whether any rank still runs."""
        ...

    def log_of(self, rank: int) -> Path:
        """The file with a rank's output."""
        ...

    def last_words(self, rank: int) -> str:
        """The end of a rank's output."""
        ...


class Launcher(Protocol):
    """Starts ranks."""

    def start(self, request: LaunchRequest, output: TextIO) -> Ranks:
        """Starts all ranks of a launch; rank 0's lines also go to `output`."""
        ...


@dataclass
class LocalLauncher:
    """Processes of this machine.

    Args:
        processes: Ranks.
        extra: Further arguments for each rank.
        command: What a rank runs before its arguments.
    """

    processes: int
    extra: Sequence[str] = ()
    command: Sequence[str] = RANK_MODULE

    def __str__(self) -> str:
        return f"{self.processes} local process" + ("es" if self.processes > 1 else "")

    def start(self, request: LaunchRequest, output: TextIO) -> LocalRanks:
        """See `Launcher`."""
        port = free_port()
        ranks = LocalRanks(request, output)
        for rank in range(self.processes):
            told = RankEnvironment("torchrun", rank, self.processes, rank, self.processes, "127.0.0.1", port)
            environment = {**os.environ, **told.variables(), PARENT_PID: str(os.getpid())}
            ranks.add([*self.command, *request.arguments(), *self.extra], environment)
        return ranks


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
        return (int(nodes) if state is None else state.num_nodes), each

    def argv(self, request: LaunchRequest, nodes: int, each: int) -> list[str]:
        """The whole command line. The wrapper ignores signals until the rank has its handlers, and names the rank."""
        output = request.attempt.node_log(request.launch, "%N")
        cpus = self.environment.get("SLURM_CPUS_ON_NODE", "")
        return [
            *(self.srun, f"--nodes={nodes}", f"--ntasks={nodes * each}", f"--ntasks-per-node={each}"),
            # said again here: a step does not inherit it, and its tasks would share one core each
            *([f"--cpus-per-task={max(1, int(cpus) // each)}"] if cpus.isdigit() else []),
            "--overlap",  # the step of a lost node stays in Slurm's books, and the next one would wait for what it held
            *("--kill-on-bad-exit=1", "--wait=60"),
            *("--unbuffered", "--label", f"--output={output}", "--open-mode=append"),
            *(sys.executable, "-m", "pixart_ds.cluster.task", str(request.attempt.rank_log(request.launch, 0))),
            *self.command,
            *request.arguments(),
            *self.extra,
        ]

    def start(self, request: LaunchRequest, output: TextIO) -> SrunRanks:
        """See `Launcher`."""
        nodes, each = self.tasks()
        return SrunRanks(self.argv(request, nodes, each), self.environment, nodes * each, request, output, self.slurm)


def _gpus_per_node(environment: Mapping[str, str]) -> int:
    """GPUs of this node as Slurm says: `8`, `v100:8` or `8(x4)`."""
    text = environment.get("SLURM_GPUS_ON_NODE") or environment.get("SLURM_GPUS_PER_NODE", "")
    digits = text.split("(")[0].split(":")[-1]
    return int(digits) if digits.isdigit() else 0


class LocalRanks:
    """Processes of this machine."""

    def __init__(self, request: LaunchRequest, output: TextIO) -> None:
        self._request, self._output = request, output
        self._processes: list[subprocess.Popen[bytes]] = []
        self._first_failure: Failed | None = None
        self._tail: Tail | None = None

    @property
    def world_size(self) -> int:
        return len(self._processes)

    def add(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts the next rank in a session of its own: a terminal's Ctrl-C reaches it through the supervisor alone."""
        rank = len(self._processes)
        path = self._request.attempt.rank_log(self._request.launch, rank)
        with open(path, "ab") as log:
            self._processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            )
        if rank == 0:
            self._tail = Tail(path, self._output)

    def send(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def failed(self) -> Failed | None:
        codes = [process.poll() for process in self._processes]
        if self._first_failure is None:
            bad = [(rank, code) for rank, code in enumerate(codes) if code]
            if bad:  # a rank that was killed or raised comes before its peers, which lose the connection a moment later
                rank, code = min(bad, key=lambda item: (item[1] == EXIT_BUG, item[0]))
                self._first_failure = Failed(rank, code, socket.gethostname())
        return self._first_failure

    def alive(self) -> bool:
        running = any(process.poll() is None for process in self._processes)
        if not running and self._tail is not None:
            self._tail.finish()
        return running

    def log_of(self, rank: int) -> Path:
        return self._request.attempt.rank_log(self._request.launch, rank)

    def last_words(self, rank: int) -> str:
        return tail_of(self.log_of(rank))


_TASK_FAILED = re.compile(r"error: (?P<node>[^\s:]+): tasks? (?P<rank>\d+)[^:]*: (?P<how>.+)")
_NODE_FAILED = re.compile(r"error: Node failure on (?P<node>\S+)")
_SRUN_SECONDS = 15.0
"""For srun to end its tasks, before it is killed itself."""


def parse_srun(text: str) -> Failed | None:
    """The first failure that srun told of.

    Its lines are `srun: error: n2: task 13: Exited with exit code 3`, `…: tasks 1-4: Killed`, `srun: error: Node failure on n4`.
    """
    for line in text.splitlines():
        if found := _NODE_FAILED.search(line):
            return Failed(None, EXIT_BUG, found["node"].rstrip(",."))
        if found := _TASK_FAILED.search(line):
            return Failed(int(found["rank"]), _code(found["how"]), found["node"])
    return None


def _code(how: str) -> int:
    """An exit code from srun's words: `Exited with exit code 3`, or a signal as the C library names it."""
    if number := re.search(r"exit code (\d+)", how):
        return int(number[1])
    said = how.removesuffix(" (core dumped)").strip()
    return next((-number for number in signal.Signals if signal.strsignal(number) == said), EXIT_BUG)


class SrunRanks:
    """The tasks of one srun."""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        world_size: int,
        request: LaunchRequest,
        output: TextIO,
        slurm: Slurm | None = None,
    ) -> None:
        self.world_size = world_size
        self._request, self._slurm = request, slurm
        self._told = request.attempt.srun_log(request.launch)
        self._told_bytes = 0
        self._failed: Failed | None = None
        self._kill_at: float | None = None
        with open(self._told, "ab") as errors:
            self._process = subprocess.Popen(argv, env=environment, stderr=errors)
        self._tail = Tail(self.log_of(0), output)

    def send(self, number: signal.Signals) -> None:
        """srun hands SIGUSR1 and SIGUSR2 to every task; SIGTERM makes it kill them, and other signals go through Slurm."""
        if self._process.poll() is not None:
            return
        if number == signal.SIGKILL:
            self._kill()
        elif number == signal.SIGQUIT and self._slurm is not None:
            self._slurm.signal_steps("QUIT")
        else:
            self._process.send_signal(signal.SIGUSR1 if number == signal.SIGTERM else number)

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
                self._failed = Failed(0, code, socket.gethostname())
        return self._failed

    def alive(self) -> bool:
        running = self._process.poll() is None
        if not running:
            self._tail.finish()
        return running

    def log_of(self, rank: int) -> Path:
        """Rank 0's own file, else that of the node where the rank's label is found."""
        attempt, launch = self._request.attempt, self._request.launch
        if rank != 0:
            for path in sorted(attempt.root.glob(attempt.node_log(launch, "*").name)):
                if _labelled(path, rank):
                    return path
        return attempt.rank_log(launch, 0)

    def last_words(self, rank: int) -> str:
        path = self.log_of(rank)
        own = _labelled(path, rank) if rank else tail_of(path).splitlines()
        return "\n".join(own[-_LAST_LINES:]) or tail_of(self._told)


_LAST_LINES = 15


def _labelled(path: Path, rank: int) -> list[str]:
    """The lines that srun's --label gave to a rank."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return re.findall(rf"^\s*0*{rank}: (.*)$", text, re.MULTILINE)


def tail_of(path: Path, lines: int = _LAST_LINES) -> str:
    """The last lines of a file, or nothing."""
    if not path.exists():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


class Tail:
    """Copies a growing file to a stream, in a thread, until `finish`."""

    def __init__(self, path: Path, output: TextIO) -> None:
        self._path, self._output = path, output
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        at = 0
        while True:
            last = self._ended.is_set()
            if self._path.exists():
                with open(self._path, encoding="utf-8", errors="replace") as file:
                    file.seek(at)
                    if text := file.read():
                        self._output.write(text)
                        self._output.flush()
                    at = file.tell()
            if last:
                return
            time.sleep(0.1)

    def finish(self) -> None:
        """Copies what is left."""
        self._ended.set()
        self._thread.join()
