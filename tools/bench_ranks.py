"""The ranks of a benchmark: processes of this machine that wait for words between measurements, and the end of one that fails."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from pixart_ds.engine.environment import RankEnvironment, free_port
from pixart_ds.engine.world import leave_world

Join = Callable[[RankEnvironment], object]
"""Joins the world as this rank, in a process of its own; what it returns has the methods that the rank can be asked for."""


class RankFailedError(Exception):
    """A rank has ended instead of answering.

    Attributes:
        rank, size: Which, of how many.
        method: What it was asked for.
        code: Its exit code.
        output: All that it wrote.
    """

    def __init__(self, rank: int, size: int, method: str, code: int | None, output: str) -> None:
        super().__init__(rank, size, method, code, output)
        self.rank, self.size, self.method, self.code, self.output = rank, size, method, code, output

    @property
    def end(self) -> str:
        """Of what it wrote, as much as people read."""
        return self.output[-3000:]


class Ranks:
    """The processes of one world; leaving ends them.

    Args:
        size: Ranks.
        join: What each calls first; it is pickled.
        folder: Where they write what they print; made if it is not there.
    """

    def __init__(self, size: int, join: Join, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._join, self._logs = join, [folder / f"rank-{rank}.txt" for rank in range(size)]
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._start()

    def _start(self) -> None:
        context, port, size = multiprocessing.get_context("spawn"), free_port(), len(self._logs)
        for rank, log in enumerate(self._logs):
            given = RankEnvironment("torchrun", rank, size, rank, size, "127.0.0.1", port)
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, given, self._join, log), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def restart(self) -> None:
        """Ends these processes; the next word starts others."""
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes.clear()
        self._processes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for pipe in self._pipes:
                pipe.send(None)
            for process in self._processes:
                process.join()
        self.restart()

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of each rank; their answers, by rank.

        Raises:
            RankFailedError: A rank has ended instead of answering.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # it has failed already: `recv` says so
                pipe.send((method, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            for ready in wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]):
                rank = self._pipes.index(ready)  # type: ignore[arg-type]
                try:
                    answers[rank] = self._pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join()
                    output, code = self._logs[rank].read_text(errors="replace"), self._processes[rank].exitcode
                    raise RankFailedError(rank, len(self._pipes), method, code, output) from None
        return [answers[rank] for rank in range(len(self._pipes))]


def _serve(pipe: Connection, given: RankEnvironment, join: Join, log: Path) -> None:
    """A rank's whole life; what it and DeepSpeed print goes to `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    code = 1
    try:
        rank = join(given)
        while (word := pipe.recv()) is not None:
            method, arguments = word
            pipe.send(getattr(rank, method)(*arguments))
        leave_world()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as a real rank ends, and for its reason
