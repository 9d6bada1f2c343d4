"""What asks a supervisor to stop: signals, none of which may be lost, and the end of the allocation."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from pixart_ds.cluster.slurm import JobState, Slurm
from pixart_ds.train.stop import STOP_SIGNALS

ASKED = "PIXART_DS_ASKED"
"""Variable with the names of signals that came before this process listened, joined by commas."""


class Requests:
    """Remembers who asked for a stop, in their order; made as early as can be.

    A signal that comes while one process replaces itself by the next waits: it is blocked meanwhile (`hold`), and a new `Requests`
    lets it in. What a job's script caught before comes by the variable `ASKED`.
    """

    def __init__(self) -> None:
        self.names = [name for name in os.environ.pop(ASKED, "").split(",") if name]
        self._earlier = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self._slurm: Slurm | None = None
        self._margin_s = 0.0
        self._stop_at: float | None = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.names.append(signal.Signals(number).name)

    def hold(self) -> dict[str, str]:
        """Blocks the signals for the process that replaces this one; returns the variable that tells it of earlier ones."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        return {ASKED: ",".join(self.names)} if self.names else {}

    def watch_slurm(self, slurm: Slurm, margin_s: float) -> JobState | None:
        """Also asks for a stop `margin_s` seconds before the time limit; and now, if the job's grace runs already.

        Returns:
            The job as it is.
        """
        self._slurm, self._margin_s = slurm, margin_s
        state = slurm.state()
        self._stop_at = None if state is None or state.end is None else state.end - margin_s
        if state is not None and state.preempted and not self.names:
            self.names.append("preemption")
        return state

    def look(self) -> None:
        """Notices that the time limit is near; asks Slurm first, since limits can be moved."""
        if self._slurm is None or self._stop_at is None or time.time() <= self._stop_at:
            return
        state = self._slurm.state()
        end = None if state is None else state.end
        if end is not None and end - self._margin_s > time.time():
            self._stop_at = end - self._margin_s
            return
        self._stop_at = None
        self.names.append("walltime")

    @property
    def first(self) -> str | None:
        return self.names[0] if self.names else None

    def restore(self) -> None:
        """Gives the signals back."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
