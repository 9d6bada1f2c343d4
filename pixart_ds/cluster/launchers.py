"""How the ranks of a launch are started: as processes of this machine, or by srun as one task for each GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO

from pixart_ds.engine.environment import PARENT_PID, RankEnvironment, free_port
from pixart_ds.errors import MachineError
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


class Ranks(Protocol):
    """The ranks of one launch, running."""

    @property
    def world_size(self) -> int:
        """How many."""
        ...

    def send(self, number: signal.Signals) -> None:
        """Passes a signal to every rank that is alive."""
        ...

    def failed(self) -> tuple[int, int] | None:
        """(rank, exit code) of the first rank that ended with an error, or None."""
        ...

    def alive(self) -> bool:
        """Whether any rank still runs."""
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
        gpus_per_node: Tasks on each node; by default what Slurm says of the allocation.
        srun: The program.
    """

    extra: Sequence[str] = ()
    gpus_per_node: int | None = None
    srun: str = "srun"
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def __str__(self) -> str:
        return "srun, one task for each GPU"

    def tasks(self) -> tuple[int, int]:
        """(nodes, tasks on each) of this allocation.

        Raises:
            MachineError: This is no Slurm allocation, or it has no GPUs.
        """
        nodes = self.environment.get("SLURM_JOB_NUM_NODES")
        if nodes is None:
            raise MachineError(
                "this is no Slurm allocation (SLURM_JOB_NUM_NODES is not set)",
                remedy="submit it: sbatch slurm/STAGE.sbatch; or use --launcher local",
            )
        each = self.gpus_per_node or _gpus_per_node(self.environment)
        if not each:
            raise MachineError("the allocation has no GPUs", remedy="ask for them: #SBATCH --gres=gpu:8")
        return int(nodes), each

    def argv(self, request: LaunchRequest) -> list[str]:
        """The whole command line. The wrapper ignores signals until the rank has its handlers, and names the rank."""
        nodes, each = self.tasks()
        output = request.attempt.root / f"rank-%5t-l{request.launch:02d}.txt"
        return [
            *(self.srun, f"--nodes={nodes}", f"--ntasks={nodes * each}", f"--ntasks-per-node={each}"),
            *("--kill-on-bad-exit=1", "--wait=60", f"--output={output}", "--open-mode=append"),
            *(sys.executable, "-m", "pixart_ds.cluster.task"),
            *request.arguments(),
            *self.extra,
        ]

    def start(self, request: LaunchRequest, output: TextIO) -> SrunRanks:
        """See `Launcher`."""
        nodes, each = self.tasks()
        return SrunRanks(self.argv(request), self.environment, nodes * each, request, output)


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
        self._first_failure: tuple[int, int] | None = None
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

    def failed(self) -> tuple[int, int] | None:
        codes = [process.poll() for process in self._processes]
        if self._first_failure is None:
            bad = [(rank, code) for rank, code in enumerate(codes) if code]
            # a rank that was killed or raised comes before its peers, which lose the connection a moment later
            self._first_failure = min(bad, key=lambda item: (item[1] == 70, item[0])) if bad else None
        return self._first_failure

    def alive(self) -> bool:
        running = any(process.poll() is None for process in self._processes)
        if not running and self._tail is not None:
            self._tail.finish()
        return running

    def last_words(self, rank: int) -> str:
        return tail_of(self._request.attempt.rank_log(self._request.launch, rank))


class SrunRanks:
    """The tasks of one srun."""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        world_size: int,
        request: LaunchRequest,
        output: TextIO,
    ) -> None:
        self.world_size = world_size
        self._request = request
        self._process = subprocess.Popen(argv, env=environment)
        self._tail = Tail(request.attempt.rank_log(request.launch, 0), output)

    def send(self, number: signal.Signals) -> None:
        """srun hands SIGUSR1 and SIGUSR2 to every task; SIGTERM would end srun itself."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1 if number == signal.SIGTERM else number)

    def failed(self) -> tuple[int, int] | None:
        code = self._process.poll()
        return (0, code) if code else None

    def alive(self) -> bool:
        running = self._process.poll() is None
        if not running:
            self._tail.finish()
        return running

    def last_words(self, rank: int) -> str:
        return tail_of(self._request.attempt.rank_log(self._request.launch, rank))


def tail_of(path: Path, lines: int = 15) -> str:
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
