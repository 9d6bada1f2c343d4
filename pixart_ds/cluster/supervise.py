"""The supervisor: the one process of an allocation that starts the ranks, passes signals on, and writes how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from pixart_ds.cluster.launchers import Launcher, LaunchRequest, Ranks
from pixart_ds.errors import EXIT_DONE, EXIT_STOPPED
from pixart_ds.layout import RunLayout
from pixart_ds.log import Log
from pixart_ds.train.attempt import AttemptRecord

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_POLL_SECONDS = 0.1
_PEERS_SECONDS = 20.0
"""How long ranks may take to leave after one of them failed, before they are killed."""


@dataclass
class Timing:
    """How long a stop may take.

    Attributes:
        hurry_grace_s: After a second request, seconds until the ranks are killed.
    """

    hurry_grace_s: float = 30.0


class _Requests:
    """Stop signals that reached the supervisor, in their order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._earlier = {number: signal.signal(number, self._on_signal) for number in _STOP_SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.names.append(signal.Signals(number).name)

    def restore(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)


def supervise(
    run: Path,
    stage: str,
    *,
    launcher: Launcher,
    device: str,
    output: TextIO = sys.stdout,
    timing: Timing | None = None,
) -> int:
    """Runs one attempt at a stage.

    Args:
        run: Folder of the run.
        stage: Name of the stage.
        launcher: Starts the ranks.
        device: cpu or cuda.
        output: Where rank 0's lines and the supervisor's own go.

    Returns:
        The exit code: 0 done, or requeued under Slurm; 75 stopped on request; 2 to 5 what a rank said of config, machine, data or
        checkpoint; 70 anything else.

    Raises:
        ConfigError: A stop file lies there.
        MachineError: The stage runs already.
    """
    log = Log(stage, output)
    record = AttemptRecord.begin(RunLayout(run).stage(stage), device, log)
    if record is None:
        return EXIT_DONE
    requests = _Requests()
    try:
        ranks = launcher.start(LaunchRequest(run, stage, record.attempt, 1, device), output)
        record.ranks_started(ranks.world_size, f"supervisor, {launcher}")
        _Watch(ranks, record, requests, timing or Timing()).until_all_left()
    finally:
        requests.restore()
    outcome = record.end(requests.names[0] if requests.names else None, _failure(ranks))
    if outcome["outcome"] == "stopped" and (job := os.environ.get("SLURM_JOB_ID")):
        return _requeue(job, log)
    return int(outcome["exit_code"])


class _Watch:
    """Waits for the ranks, passing requests on and keeping the heartbeat and the ledger fresh."""

    def __init__(self, ranks: Ranks, record: AttemptRecord, requests: _Requests, timing: Timing) -> None:
        self.ranks, self.record, self.requests, self.timing = ranks, record, requests, timing
        self._told = 0
        self._kill_at: float | None = None

    def until_all_left(self) -> None:
        while self.ranks.alive():
            now = time.monotonic()
            self._pass_on(now)
            if self.ranks.failed() and self._kill_at is None:
                self.ranks.send(signal.SIGTERM)
                self._kill_at = now + _PEERS_SECONDS
            if self._kill_at is not None and now > self._kill_at:
                self.ranks.send(signal.SIGKILL)
            self.record.keep()
            time.sleep(_POLL_SECONDS)

    def _pass_on(self, now: float) -> None:
        """Tells the ranks of new requests; the second one hurries them, and kills them after a grace."""
        asked = len(self.requests.names)
        if asked > self._told:
            self.ranks.send(signal.SIGTERM)
            if asked > 1 and self._kill_at is None:
                self._kill_at = now + self.timing.hurry_grace_s
            self._told = asked


def _failure(ranks: Ranks) -> tuple[str, int] | None:
    """How the first rank that ended with an error did so, with its last words, and its exit code."""
    if (failed := ranks.failed()) is None:
        return None
    rank, code = failed
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"rank {rank} {how}:\n{ranks.last_words(rank)}", code


def _requeue(job: str, log: Log) -> int:
    """Puts our own Slurm job back into the queue; Slurm then ends this process."""
    answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if answer.returncode:
        log.event(f"scontrol requeue {job} failed: {answer.stderr.strip()}")
        return EXIT_STOPPED
    log.event(f"job {job} is requeued")
    return EXIT_DONE
