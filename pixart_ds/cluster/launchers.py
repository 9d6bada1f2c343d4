"""How the ranks of a launch are started and watched; and the launcher that starts them as processes of this machine."""

from __future__ import annotations

import os
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

from pixart_ds.engine.environment import PARENT_PID, RankEnvironment, free_port
from pixart_ds.errors import EXIT_BUG
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
        rank: Which; None where its whole node was lost, or the launcher itself failed.
        code: Its exit code; negative: the signal that killed it.
        node: Where it ran; None if the launcher itself failed.
    """

    rank: int | None
    code: int
    node: str | None

    def __str__(self) -> str:
        if self.node is None:
            return f"srun ended with exit code {self.code}"
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

    def listening(self) -> bool:
        """Whether all ranks are there to hear a signal."""
        ...

    def last_words(self, rank: int | None) -> str:
        """The end of a rank's output; without a rank, of what the launcher said."""
        ...


class Launcher(Protocol):
    """Starts ranks.

    Attributes:
        unreachable: Nodes of the allocation that it leaves out.
    """

    unreachable: set[str]

    def start(self, request: LaunchRequest, output: TextIO) -> Ranks:
        """Starts all ranks of a launch; rank 0's lines also go to `output`."""
        ...


@dataclass(frozen=True)
class Part:
    """The ranks that one machine starts, among all of a launch.

    Attributes:
        first: Number of the first of them.
        count: How many.
        world_size: Ranks of all machines.
        master_addr, master_port: Where rank 0 listens.
    """

    first: int
    count: int
    world_size: int
    master_addr: str
    master_port: int


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
    unreachable: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return f"{self.processes} local process" + ("es" if self.processes > 1 else "")

    def start(self, request: LaunchRequest, output: TextIO) -> LocalRanks:
        """See `Launcher`."""
        return self.start_part(request, output, Part(0, self.processes, self.processes, "127.0.0.1", free_port()))

    def start_part(self, request: LaunchRequest, output: TextIO, part: Part) -> LocalRanks:
        """Starts this machine's ranks of a launch. Call it in a thread that lives as long as they: when it ends, the kernel tells
        them to leave.
        """
        ranks = LocalRanks(request, output, part.first)
        for local in range(part.count):
            place = part.first + local, part.world_size, local, part.count
            told = RankEnvironment("torchrun", *place, part.master_addr, part.master_port)
            environment = {**os.environ, **told.variables(), PARENT_PID: str(os.getpid())}
            ranks.add([*self.command, *request.arguments(), *self.extra], environment)
        return ranks


class LocalRanks:
    """Processes of this machine; `first` is the number of the first of them among all ranks."""

    def __init__(self, request: LaunchRequest, output: TextIO, first: int = 0) -> None:
        self._request, self._output, self._first = request, output, first
        self._processes: list[subprocess.Popen[bytes]] = []
        self._first_failure: Failed | None = None
        self._tail: Tail | None = None

    @property
    def world_size(self) -> int:
        return len(self._processes)

    def add(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts the next rank in a session of its own: a terminal's Ctrl-C reaches it through the supervisor alone."""
        rank = self._first + len(self._processes)
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
            bad = [(rank, code) for rank, code in enumerate(codes, start=self._first) if code]
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

    def listening(self) -> bool:
        return True

    def last_words(self, rank: int | None) -> str:
        return "" if rank is None else tail_of(self.log_of(rank))


LAST_LINES = 15


def tail_of(path: Path, lines: int = LAST_LINES) -> str:
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
