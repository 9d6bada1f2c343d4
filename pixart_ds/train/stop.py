"""Requests to stop: signals set a flag, a file is looked for; the loop decides what to do at the next step boundary."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Remembers that this rank was asked to stop.

    A handler does nothing but set the flag: ranks are told at different moments, and only the loop's agreement makes them
    leave together, after a save.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._file: Path | None = None
        self._earlier: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def install(self) -> StopFlag:
        """Takes over the stop signals; call it before anything slow, such as importing torch."""
        for number in STOP_SIGNALS:
            self._earlier[number] = signal.signal(number, self._on_signal)
        return self

    def restore(self) -> None:
        """Gives the signals back."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def watch(self, file: Path) -> None:
        """Also stops when `file` exists."""
        self._file = file

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    @property
    def requested(self) -> bool:
        if self.reason is None and self._file is not None and os.path.lexists(self._file):
            self.reason = f"the file {self._file.name}"
        return self.reason is not None
