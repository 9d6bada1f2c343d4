"""The supervisor: the one process of an allocation that starts the ranks, again if they crash, passes signals on, and writes how it
ended.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO, cast

from pixart_ds import files
from pixart_ds.cluster import afterwards, bad_nodes, node_check
from pixart_ds.cluster.allocation import Allocation
from pixart_ds.cluster.budget import BudgetGuard
from pixart_ds.cluster.launchers import Launcher, LaunchRequest, Ranks
from pixart_ds.cluster.relaunch import Ending, Launch, delay_before_next
from pixart_ds.cluster.requests import Requests
from pixart_ds.cluster.slurm import Slurm
from pixart_ds.cluster.watch import Hang, PulseWatch
from pixart_ds.config.schema import DeadlinesConfig
from pixart_ds.engine import line
from pixart_ds.errors import EXIT_BUG, EXIT_MACHINE, EXITS_THAT_TELL, PixArtError
from pixart_ds.layout import RunLayout
from pixart_ds.log import Log
from pixart_ds.report.command import write_page
from pixart_ds.train.attempt import AttemptRecord, RankFailure, images_committed
from pixart_ds.train.pulse import read_pulses

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
        budget_s: Most seconds between two looks at what the run has used up of its budget.
    """

    hurry_grace_s: float = 30.0
    peers_s: float = 10.0
    stacks_s: float = 3.0
    walltime_margin_s: float = 300.0
    backoff_s: float = 1.0
    retries: int = 3
    fruitless_attempts: int = 5
    budget_s: float = 60.0


def supervise(
    run: Path,
    stage: str,
    *,
    launcher: Launcher,
    device: str,
    output: TextIO = sys.stdout,
    timing: Timing | None = None,
    deadlines: DeadlinesConfig | None = None,
    requests: Requests | None = None,
    slurm: Slurm | None = None,
    successor: bool = False,
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
        requests: What has asked for a stop so far.
        slurm: The job of Slurm that this process is the script of.
        successor: The site forbids requeueing: a job waits behind this one and goes on where it ends.

    Returns:
        The exit code: 0 done, or put back into the queue; 75 stopped on request; 2 to 5 what a rank said of config, machine, data
        or checkpoint; 70 anything else.

    Raises:
        ConfigError: A stop file lies there, or the run's budget is used up.
        MachineError: The stage runs already, or the disk refuses.
    """
    log, timing, requests = Log(stage, output), timing or Timing(), requests or Requests()
    with requests:
        record = AttemptRecord.begin(RunLayout(run).stage(stage), device, log)
        if record is None:
            return afterwards.nothing_to_do(slurm if successor else None, RunLayout(run), stage, log)
        allocation = None
        try:
            if slurm is not None:
                allocation = Allocation(slurm, record.attempt, requests, timing.walltime_margin_s, log)
            if slurm is not None and successor:
                afterwards.submit_successor(slurm, log)
            request = LaunchRequest(run, stage, record.attempt, 1, device)
            budget = BudgetGuard(RunLayout(run), record, requests, log, timing.budget_s)
            attempt = _Attempt(
                launcher, request, record, requests, timing, deadlines or DeadlinesConfig(), budget, log, output
            )
            failure = attempt.run(allocation)
            outcome = record.end(budget.asked(), failure)
            if slurm is None:
                return int(outcome["exit_code"])
            if outcome["outcome"] != "done":
                budget.look(at_once=True)  # a job that would only be refused is not put back
            job = afterwards.Job(slurm, RunLayout(run), stage, record.attempt.number, successor, log)
            return afterwards.follow(job, outcome, requests.names, timing.fruitless_attempts)
        except OSError as cause:
            if (told := files.disk_error(cause, record.attempt.root)) is not None:
                raise told from cause
            raise
        finally:
            if allocation is not None:
                allocation.end()
            _report(run, log)  # last: a job that was put back may be killed meanwhile


def _report(run: Path, log: Log) -> None:
    """Writes the run's report.html anew. Whatever is wrong with it is told, and changes nothing of what the attempt did."""
    try:
        write_page(run)
    except Exception as error:
        what = error.what if isinstance(error, PixArtError) else f"{type(error).__name__}: {error}"
        log.event(f"report.html is not written anew: {what}")


@dataclass
class _Attempt:
    """The launches of one attempt."""

    launcher: Launcher
    request: LaunchRequest
    record: AttemptRecord
    requests: Requests
    timing: Timing
    deadlines: DeadlinesConfig
    budget: BudgetGuard
    log: Log
    output: TextIO
    crash: _Crash | None = None
    allocation: Allocation | None = None
    where: Mapping[str, object] = field(default_factory=dict)

    def run(self, allocation: Allocation | None) -> RankFailure | None:
        """Starts the ranks until they are done, stopped, or not worth another start; what went wrong last, if anything."""
        if allocation is not None:
            self.allocation, self.where = allocation, allocation.describe()
        if self.requests.names:
            return None
        if self.allocation is not None and (failure := self._examine(self.allocation)) is not None:
            return failure
        if self.requests.names:  # while the nodes were looked at
            return None
        layout = RunLayout(self.request.run).stage(self.request.stage)
        launches: list[Launch] = []
        while True:
            before = images_committed(layout)
            failure = self._launch()
            number = self.request.launch
            ending = cast("Ending", self.record.ending(number, failure))
            self.record.ranks_left(number, ending, failure, self._stepped())
            if self.allocation is not None and ending != "done":
                self.allocation.launch_ended()
            asked, code = self.requests.first is not None, None if failure is None else failure.code
            launches.append(Launch(ending, asked, code, images_committed(layout) > before))
            delay = delay_before_next(launches, retries=self.timing.retries, backoff_s=self.timing.backoff_s)
            if delay is None or number >= line.MAX_LAUNCHES or not self._wait(delay):
                return failure if ending == "failed" else None
            why = "" if failure is None else f": {failure.what.splitlines()[0].rstrip(':')}"
            self.log.event(f"launch {number} {ending}{why}; launch {number + 1} goes on after {delay:.0f} s")
            self.request = LaunchRequest(
                self.request.run, self.request.stage, self.request.attempt, number + 1, self.request.device
            )

    def _examine(self, allocation: Allocation) -> RankFailure | None:
        """Has the doctor look at each node, and leaves out those that fail; a failure if none is left."""
        run, stage, nodes = RunLayout(self.request.run.absolute()), self.request.stage, allocation.nodes
        if not nodes:
            return None
        found = node_check.examine(nodes, run.root, stage, self.request.device)
        if not found.answered:
            self.log.event(f"the nodes could not be looked at before the start: {found.said}")
            return None
        for node, what in found.bad.items():
            self.log.event(f"node {node} fails the doctor's quick look: {what}")
        if len(found.bad) == len(nodes):  # what all have in common is no node's fault
            what = next(iter(found.bad.values()))
            return RankFailure(
                f"every node fails the doctor's quick look: {what}; pixart-ds doctor {run.root} {stage}", EXIT_MACHINE
            )
        bad_nodes.record(run, found.bad, stage, self.request.attempt.number)
        self.launcher.unreachable |= set(found.bad)
        return None

    def _launch(self) -> RankFailure | None:
        if self.allocation is not None:
            self.allocation.launch_begins(self.launcher.unreachable)
        ranks = self.launcher.start(self.request, self.output)
        launcher = f"supervisor, {self.launcher}"
        self.record.ranks_started(ranks.world_size, launcher, self.request.launch, where=self.where)
        pulses = PulseWatch(self.request.attempt, self.request.launch, self.deadlines, ranks.world_size)
        started = time.monotonic()
        watch = _Watch(ranks, self.record, self.requests, self.timing, pulses, self.budget, self.allocation, self.log)
        hang = watch.until_all_left(lambda first_step: self._tell_recovery(started, first_step))
        self.crash = _Crash(watch.failed_at, time.monotonic()) if watch.failed_at is not None else None
        if hang is not None:
            return self._told(hang, ranks)
        failure, lost = _failure(ranks, self._stepped()), watch.lost
        if not lost and failure is not None and failure.code not in EXITS_THAT_TELL and self.allocation is not None:
            lost = self.allocation.lost_nodes(ask=True)  # a lost node's peers may all have left since the last look
            self.record.keep()  # Slurm may have taken its time
        if lost:
            return RankFailure(f"the {_plural('node', lost)} lost", EXIT_BUG, lost[0])
        return failure

    def _stepped(self) -> bool:
        """Whether a rank of this launch has ended a step."""
        pulses = read_pulses(self.request.attempt, self.request.launch)
        return any(each["images_seen"] is not None for each in pulses)

    def _tell_recovery(self, started: float, first_step: float) -> None:
        """Says how long it took from a crash to the next step, and where the time went."""
        if self.crash is None:
            return
        self.log.event(
            f"trains again {first_step - self.crash.noticed:.1f} s after the crash was noticed: "
            f"{self.crash.left - self.crash.noticed:.1f} s until all ranks had left, {started - self.crash.left:.1f} s pause, "
            f"{first_step - started:.1f} s from the start to the end of a step"
        )

    def _told(self, hang: Hang, ranks: Ranks) -> RankFailure:
        """Keeps what was seen of ranks that hung; their stacks are in their logs."""
        attempt, launch = self.request.attempt, self.request.launch
        logs = {each["rank"]: str(ranks.log_of(each["rank"])) for each in hang.seen}
        files.write_json(
            attempt.hang(launch), {"what": hang.what, "culprits": hang.culprits, "seen": hang.seen, "stacks_in": logs}
        )
        what = f"{hang.what}; the stacks of all threads are in the ranks' logs"
        blamed = 0 < len(hang.culprits) < ranks.world_size or ranks.world_size == 1  # not where all wait for each other
        return RankFailure(what, EXIT_BUG, hang.culprits[0]["host"] if blamed and hang.culprits else None)

    def _wait(self, seconds: float) -> bool:
        """Waits, unless a stop is asked for meanwhile."""
        until = time.monotonic() + seconds
        while not self.requests.names and time.monotonic() < until:
            if self.allocation is not None:
                self.allocation.look()
            self.budget.look()
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
        self,
        ranks: Ranks,
        record: AttemptRecord,
        requests: Requests,
        timing: Timing,
        pulses: PulseWatch,
        budget: BudgetGuard,
        allocation: Allocation | None,
        log: Log,
    ) -> None:
        self.ranks, self.record, self.requests, self.timing, self.pulses = ranks, record, requests, timing, pulses
        self.budget, self.allocation, self.log = budget, allocation, log
        self.lost: list[str] = []
        self._told = 0
        self._kill_at: float | None = None
        self._hang: Hang | None = None
        self.failed_at: float | None = None

    def until_all_left(self, on_first_step: Callable[[float], None]) -> Hang | None:
        """Waits; `on_first_step` hears when a step was first seen to have ended. Returns what made the ranks hang, if they did."""
        stepped = False
        while self.ranks.alive():
            now = time.monotonic()
            if self.allocation is not None:
                self.allocation.look()
                self._end_what_is_lost(now)
            self.budget.look()
            self._pass_on(now)
            self._end_what_failed(now)
            for slow in self.pulses.newly_slow():
                self.log.event(slow)
            if not stepped and self.pulses.first_step_at is not None:
                stepped = True
                on_first_step(self.pulses.first_step_at)
            if self._kill_at is not None and now > self._kill_at:
                self.ranks.send(signal.SIGKILL)
            self.record.keep()
            time.sleep(_POLL_SECONDS)
        self.pulses.look_back()
        if not stepped and self.pulses.first_step_at is not None:
            on_first_step(self.pulses.first_step_at)
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

    def _end_what_is_lost(self, now: float) -> None:
        """Without one of their nodes the other ranks wait in vain; so does an srun that was started on a node already dead."""
        if self.allocation is None or self.lost or not (lost := self.allocation.lost_nodes()):
            return
        self.lost = lost
        self.failed_at = self.failed_at or now
        self.ranks.send(signal.SIGTERM)
        self._kill_at = min(self._kill_at or now, now) + self.timing.stacks_s

    def _pass_on(self, now: float) -> None:
        """Tells the ranks of new requests; a person's second one hurries them, and kills them after a grace."""
        asked = len(self.requests.names)
        if asked > self._told:
            self.ranks.send(signal.SIGTERM)
            hurry = (
                sum(name in ("SIGINT", "SIGTERM") for name in self.requests.names) > 1
            )  # a warning and its end are one
            if (hurry or not self.ranks.listening()) and self._kill_at is None:  # before a first step nothing is lost
                self._kill_at = now + self.timing.hurry_grace_s
            self._told = asked


def _plural(what: str, names: list[str]) -> str:
    return f"{what} {names[0]} was" if len(names) == 1 else f"{what}s {', '.join(names)} were"


def _failure(ranks: Ranks, stepped: bool) -> RankFailure | None:
    """How the first rank that ended with an error did so, with its last words, and its exit code."""
    if (failed := ranks.failed()) is None:
        return None
    words = "" if failed.rank is None and failed.node else f":\n{ranks.last_words(failed.rank)}"
    # a rank that raises after a first step has mostly lost a peer: its own node is not to blame
    node = None if failed.code == EXIT_BUG and stepped else failed.node
    return RankFailure(f"{failed}{words}", failed.code, node)
