"""What asks a supervisor to stop: signals, none of which may be lost, and what Slurm says of the job."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Self

from pixart_ds.train.stop import STOP_SIGNALS

ASKED = "PIXART_DS_ASKED"
"""Variable with the names of signals that came before this process listened, joined by commas."""

BUDGET = "budget"
"""The name by which the guard of the run's budget asks for a stop."""


class Requests:
    """Remembers who asked for a stop, in their order; made as early as can be.

    A signal that comes while one process replaces itself by the next waits: it is blocked meanwhile (`hold`), and a new `Requests`
    lets it in. What a job's script caught before comes by the variable `ASKED`.
    """

    def __init__(self) -> None:
        self.names = [name for name in os.environ.pop(ASKED, "").split(",") if name]
        self._earlier = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.names.append(signal.Signals(number).name)

    def hold(self) -> dict[str, str]:
        """Blocks the signals for the process that replaces this one; returns the variable that tells it of earlier ones."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        return {ASKED: ",".join(self.names)} if self.names else {}

    @property
    def first(self) -> str | None:
        return self.names[0] if self.names else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
