"""The supervisor: the one process of an allocation that starts the ranks, again if they crash, passes signals on, and writes how it
ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO, cast

from pixart_ds import files
from pixart_ds.cluster.launchers import Launcher, LaunchRequest, Ranks
from pixart_ds.cluster.relaunch import Ending, Launch, delay_before_next
from pixart_ds.cluster.watch import Hang, PulseWatch
from pixart_ds.config.schema import DeadlinesConfig
from pixart_ds.engine import line
from pixart_ds.errors import EXIT_BUG, EXIT_DONE, EXIT_STOPPED
from pixart_ds.layout import RunLayout
from pixart_ds.log import Log
from pixart_ds.train.attempt import AttemptRecord, attempts_without_progress, images_committed
from pixart_ds.train.stop import STOP_SIGNALS

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Timing:
    """How long things may take.

    Attributes:
        hurry_grace_s: After a second request to stop, seconds until the ranks are killed.
        peers_s: How long ranks may take to leave after one of them failed, before they are killed.
        stacks_s: How long ranks that hang may take to write their stacks.
        walltime_margin_s: Before the allocation's end, when a stop is asked for.
        backoff_s: Before the next launch after a crash; four times as long after each further one without progress.
        retries: Crashes in a row without a new checkpoint that are followed by another launch.
        fruitless_attempts: Attempts in a row without a new checkpoint after which a job does not requeue itself.
    """

    hurry_grace_s: float = 30.0
    peers_s: float = 10.0
    stacks_s: float = 3.0
    walltime_margin_s: float = 300.0
    backoff_s: float = 1.0
    retries: int = 3
    fruitless_attempts: int = 5


class _Requests:
    """What asks for a stop: signals that reached the supervisor, in their order, and the allocation's end."""

    def __init__(self, walltime_margin_s: float) -> None:
        self.names: list[str] = []
        self._earlier = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._stop_at = float(end) - walltime_margin_s if end.isdigit() else None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.names.append(signal.Signals(number).name)

    def look(self) -> None:
        """Notices that the walltime is near its end."""
        if self._stop_at is not None and time.time() > self._stop_at:
            self._stop_at = None
            self.names.append("walltime")

    @property
    def first(self) -> str | None:
        return self.names[0] if self.names else None

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
    deadlines: DeadlinesConfig | None = None,
) -> int:
    """Runs one attempt at a stage: one or several launches of the ranks.

    Args:
        run: Folder of the run.
        stage: Name of the stage.
        launcher: Starts the ranks.
        device: cpu or cuda.
        output: Where rank 0's lines and the supervisor's own go.
        timing: Of stops and relaunches.
        deadlines: When a rank is taken for stuck.

    Returns:
        The exit code: 0 done, or requeued under Slurm; 75 stopped on request; 2 to 5 what a rank said of config, machine, data or
        checkpoint; 70 anything else.

    Raises:
        ConfigError: A stop file lies there.
        MachineError: The stage runs already, or the disk refuses.
    """
    log, timing = Log(stage, output), timing or Timing()
    record = AttemptRecord.begin(RunLayout(run).stage(stage), device, log)
    if record is None:
        return EXIT_DONE
    requests = _Requests(timing.walltime_margin_s)
    try:
        request = LaunchRequest(run, stage, record.attempt, 1, device)
        attempt = _Attempt(launcher, request, record, requests, timing, deadlines or DeadlinesConfig(), log, output)
        failure = attempt.run()
    except OSError as cause:
        if (told := files.disk_error(cause, record.attempt.root)) is not None:
            raise told from cause
        raise
    finally:
        requests.restore()
    outcome = record.end(requests.first, failure)
    if outcome["exit_code"] == EXIT_STOPPED and (job := os.environ.get("SLURM_JOB_ID")):
        fruitless = attempts_without_progress(RunLayout(run).stage(stage))
        if fruitless < timing.fruitless_attempts:
            return _requeue(job, log)
        log.event(f"{fruitless} attempts in a row have saved nothing new: the job is not requeued; {outcome['cause']}")
    return int(outcome["exit_code"])


Failure = tuple[str, int]
"""What went wrong, and an exit code that says of which kind it is."""


@dataclass
class _Attempt:
    """The launches of one attempt."""

    launcher: Launcher
    request: LaunchRequest
    record: AttemptRecord
    requests: _Requests
    timing: Timing
    deadlines: DeadlinesConfig
    log: Log
    output: TextIO
    crash: _Crash | None = None

    def run(self) -> Failure | None:
        """Starts the ranks until they are done, stopped, or not worth another start; what went wrong last, if anything."""
        layout = RunLayout(self.request.run).stage(self.request.stage)
        launches: list[Launch] = []
        while True:
            before = images_committed(layout)
            failure = self._launch()
            number = self.request.launch
            ending = cast("Ending", self.record.ending(number, failure))
            self.record.ranks_left(number, ending, failure and failure[0])
            asked, code = self.requests.first is not None, failure and failure[1]
            launches.append(Launch(ending, asked, code, images_committed(layout) > before))
            delay = delay_before_next(launches, retries=self.timing.retries, backoff_s=self.timing.backoff_s)
            if delay is None or number >= line.MAX_LAUNCHES or not self._wait(delay):
                return failure if ending == "failed" else None
            why = "" if failure is None else f": {failure[0].splitlines()[0]}"
            self.log.event(f"launch {number} {ending}{why}; launch {number + 1} goes on after {delay:.0f} s")
            self.request = LaunchRequest(
                self.request.run, self.request.stage, self.request.attempt, number + 1, self.request.device
            )

    def _launch(self) -> Failure | None:
        ranks = self.launcher.start(self.request, self.output)
        self.record.ranks_started(ranks.world_size, f"supervisor, {self.launcher}", self.request.launch)
        pulses = PulseWatch(self.request.attempt, self.request.launch, self.deadlines)
        started = time.monotonic()
        watch = _Watch(ranks, self.record, self.requests, self.timing, pulses)
        hang = watch.until_all_left(lambda first_step: self._tell_recovery(started, first_step))
        self.crash = _Crash(watch.failed_at, time.monotonic()) if watch.failed_at is not None else None
        return _failure(ranks) if hang is None else self._told(hang)

    def _tell_recovery(self, started: float, first_step: float) -> None:
        """Says how long it took from a crash to the next step, and where the time went."""
        if self.crash is None:
            return
        self.log.event(
            f"trains again {first_step - self.crash.noticed:.1f} s after the crash was noticed: "
            f"{self.crash.left - self.crash.noticed:.1f} s until all ranks had left, {started - self.crash.left:.1f} s pause, "
            f"{first_step - started:.1f} s from the start to the end of a step"
        )

    def _told(self, hang: Hang) -> Failure:
        """Keeps what was seen of ranks that hung; their stacks are in their logs."""
        attempt, launch = self.request.attempt, self.request.launch
        logs = {each["rank"]: str(attempt.rank_log(launch, each["rank"])) for each in hang.seen}
        files.write_json(
            attempt.hang(launch), {"what": hang.what, "culprits": hang.culprits, "seen": hang.seen, "stacks_in": logs}
        )
        return f"{hang.what}; the stacks of all threads are in the ranks' logs", EXIT_BUG

    def _wait(self, seconds: float) -> bool:
        """Waits, unless a stop is asked for meanwhile."""
        until = time.monotonic() + seconds
        while not self.requests.names and time.monotonic() < until:
            self.requests.look()
            self.record.keep()
            time.sleep(min(_POLL_SECONDS, max(0.0, until - time.monotonic())))
        return not self.requests.names


@dataclass(frozen=True)
class _Crash:
    """When a crash was noticed, and when the last rank had left."""

    noticed: float
    left: float


class _Watch:
    """Waits for the ranks, passing requests on and keeping the heartbeat and the ledger fresh; ends ranks that hang."""

    def __init__(
        self, ranks: Ranks, record: AttemptRecord, requests: _Requests, timing: Timing, pulses: PulseWatch
    ) -> None:
        self.ranks, self.record, self.requests, self.timing, self.pulses = ranks, record, requests, timing, pulses
        self._told = 0
        self._kill_at: float | None = None
        self._hang: Hang | None = None
        self.failed_at: float | None = None

    def until_all_left(self, on_first_step: Callable[[float], None]) -> Hang | None:
        """Waits; `on_first_step` hears when a step was first seen to have ended. Returns what made the ranks hang, if they did."""
        stepped = False
        while self.ranks.alive():
            now = time.monotonic()
            self.requests.look()
            self._pass_on(now)
            self._end_what_failed(now)
            if not stepped and self.pulses.first_step_at is not None:
                stepped = True
                on_first_step(self.pulses.first_step_at)
            if self._kill_at is not None and now > self._kill_at:
                self.ranks.send(signal.SIGKILL)
            self.record.keep()
            time.sleep(_POLL_SECONDS)
        if self.failed_at is None and self.ranks.failed():
            self.failed_at = time.monotonic()
        return self._hang

    def _end_what_failed(self, now: float) -> None:
        """Asks the peers of a failed rank to leave, and ranks that hang for their stacks; after a grace they are killed."""
        if self.failed_at is None and self.ranks.failed():
            self.failed_at = now
            self.ranks.send(signal.SIGTERM)
            self._kill_at = self._kill_at or now + self.timing.peers_s
        if self._hang is None and self.failed_at is None and (hang := self.pulses.look()) is not None:
            self._hang, self.failed_at = hang, now
            self.ranks.send(signal.SIGQUIT)
            self._kill_at = now + self.timing.stacks_s

    def _pass_on(self, now: float) -> None:
        """Tells the ranks of new requests; the second one hurries them, and kills them after a grace."""
        asked = len(self.requests.names)
        if asked > self._told:
            self.ranks.send(signal.SIGTERM)
            if asked > 1 and self._kill_at is None:
                self._kill_at = now + self.timing.hurry_grace_s
            self._told = asked


def _failure(ranks: Ranks) -> Failure | None:
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
