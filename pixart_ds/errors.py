"""The errors a person sees: what is wrong, where, and what to do next; each with its exit code."""

from __future__ import annotations

import copyreg
from typing import Any

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_MACHINE = 3
EXIT_DATA = 4
EXIT_CHECKPOINT = 5
EXIT_BUG = 70
EXIT_STOPPED = 75

EXITS_THAT_TELL = (EXIT_CONFIG, EXIT_MACHINE, EXIT_DATA, EXIT_CHECKPOINT)
"""Of errors that come again at the next try: somebody has to mend something first."""


class PixArtError(Exception):
    """Base of all errors with a message for people.

    Args:
        what: What is wrong, with the offending value.
        where: The file, key or host concerned.
        remedy: What to do next, as an instruction.
    """

    exit_code = EXIT_BUG

    def __init__(self, what: str, *, where: object | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors come back whole from other processes, whatever arguments their class takes."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
        if self.remedy is not None:
            lines.append(f"  to do: {self.remedy}")
        return "\n".join(lines)


class ConfigError(PixArtError):
    """The user's recipe, option or DeepSpeed file is wrong (exit code 2)."""

    exit_code = EXIT_CONFIG


class MachineError(PixArtError):
    """The machine lacks something: a GPU, a program, a package, disk space (exit code 3)."""

    exit_code = EXIT_MACHINE


class DataError(PixArtError):
    """Pictures, captions or shards are missing or damaged (exit code 4)."""

    exit_code = EXIT_DATA


class CheckpointError(PixArtError):
    """A checkpoint or handover is missing, damaged or belongs to something else (exit code 5)."""

    exit_code = EXIT_CHECKPOINT
