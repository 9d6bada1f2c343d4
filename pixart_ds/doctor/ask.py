"""A question to a process of its own, with a time limit: a driver or a file system that hangs does not hang the doctor."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pixart_ds.errors import EXIT_MACHINE

_PACKAGE = Path(__file__).resolve().parents[2]
_LAST_WORDS = 300
_GONE_S = 2.0
_running: set[Child] = set()


@dataclass(frozen=True)
class Answer:
    """What a process said.

    Attributes:
        value: The JSON value on its last line; None if there is an error.
        error: Why there is none, in words.
    """

    value: Any = None
    error: str | None = None


class Child:
    """A module of this package that runs as a program and prints one JSON value as its last line.

    Args:
        module: Its name below `pixart_ds.doctor.children`.
        words: Its arguments.
        environment: In place of this process's.
    """

    def __init__(self, module: str, *words: str, environment: Mapping[str, str] | None = None) -> None:
        given = os.environ if environment is None else environment
        path = os.pathsep.join(filter(None, [str(_PACKAGE), given.get("PYTHONPATH")]))
        self.name = module
        # files, since a pipe that nobody reads would fill
        self._said, self._complained = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"pixart_ds.doctor.children.{module}", *words],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._complained,
            env={**given, "PYTHONPATH": path},
            start_new_session=True,
        )
        _running.add(self)

    def answer(self, timeout_s: float) -> Answer:
        """Waits for it, and no longer than told: a process that hangs in a driver cannot even be killed."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            return Answer(error=f"no answer within {timeout_s:.0f} s")
        _running.discard(self)
        lines = _text(self._said).strip().splitlines()
        if code == 0 and lines:
            with suppress(json.JSONDecodeError):
                return Answer(json.loads(lines[-1]))
        last = " ".join(_text(self._complained).split())[-_LAST_WORDS:] or "it said nothing"
        return Answer(error=last if code == EXIT_MACHINE else f"{_how_it_ended(code)}: {last}")

    def failure(self) -> str | None:
        """What it said if it has ended with an error by now."""
        code = self._process.poll()
        return self.answer(0).error if code else None

    def end(self) -> None:
        """SIGKILL to it and its children, without waiting for one that the kernel holds."""
        _running.discard(self)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GONE_S)


def ask(module: str, *words: str, timeout_s: float, environment: Mapping[str, str] | None = None) -> Answer:
    """The answer of one child."""
    return Child(module, *words, environment=environment).answer(timeout_s)


def end_all() -> None:
    """Ends the children that still run: of probes that were left behind, or interrupted. They would hold GPUs."""
    for child in list(_running):
        child.end()


def program(*argv: str, timeout_s: float = 20.0) -> subprocess.CompletedProcess[str] | None:
    """Runs a program of the system; None if there is none of that name. Times in Unix seconds, where it is one of Slurm's."""
    if shutil.which(argv[0]) is None:
        return None
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout_s,
            env={**os.environ, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"},
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 1, "", f"{argv[0]} gave no answer within {timeout_s:.0f} s")


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
