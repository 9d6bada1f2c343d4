"""What Slurm says of the supervisor's job while it runs: its end, its nodes, whether it is to make room."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection

from pixart_ds.cluster.guardian import Guardian
from pixart_ds.cluster.requests import Requests
from pixart_ds.cluster.requeue import cause_of
from pixart_ds.cluster.slurm import JobState, Slurm, expand
from pixart_ds.layout import AttemptLayout
from pixart_ds.log import Log

_PERIOD_S = 10.0
_JOIN_S = 5.0


class Allocation:
    """Asks Slurm every few seconds, in a thread: a controller that does not answer holds nothing up.

    Args:
        slurm: The job.
        attempt: For the log of the task that watches over the job's script.
        requests: Hears of the time limit and of preemption.
        margin_s: Before the time limit, when a stop is asked for.
        log: For people.
    """

    def __init__(self, slurm: Slurm, attempt: AttemptLayout, requests: Requests, margin_s: float, log: Log) -> None:
        self.slurm, self._requests, self._margin_s, self._log = slurm, requests, margin_s, log
        self._attempt = attempt
        self._guardian = Guardian(slurm, attempt.guardian_log)
        self._seen = slurm.state()
        self._nodes: set[str] = set()
        self._unreachable: set[str] = set()
        self._told: set[str] = set()
        self._over = threading.Event()
        self._asker = threading.Thread(target=self._ask_on, name="slurm", daemon=True)
        self._asker.start()
        self.look()

    def _ask_on(self) -> None:
        while not self._over.wait(_PERIOD_S):
            self._seen = self.slurm.state() or self._seen
            if self._nodes and self._seen is not None and not self._over.is_set():
                self._guardian.keep(self._seen, self._unreachable)

    def describe(self) -> dict[str, object]:
        """Where the attempt runs, for `env.json`; and a line in the log."""
        about: dict[str, object] = {"job": self.slurm.job, "restarts": self.slurm.restarts}
        if self._seen is None:
            self._log.event(f"job {self.slurm.job}: Slurm does not answer")
            return about
        left = "" if self._seen.end is None else f", {max(0.0, self._seen.end - time.time()) / 3600:.1f} h left"
        where = f"{self._seen.num_nodes} node{'' if self._seen.num_nodes == 1 else 's'} {self._seen.nodes}"
        number, start = self._attempt.number, self.slurm.restarts + 1
        self._log.event(f"attempt {number}: job {self.slurm.job}, start {start}, on {where}{left}")
        return {**about, "nodes": expand(self._seen.nodes), "gres": self._seen.gres}

    def look(self) -> None:
        """Asks for a stop when the time limit is near or the job is to make room, once each; does not wait for Slurm."""
        if self._seen is None or self._requests.names:
            return
        if self._seen.preempted:
            self._requests.names.append("preemption")
        elif self._seen.end is not None and time.time() > self._seen.end - self._margin_s:
            self._requests.names.append("walltime")

    @property
    def nodes(self) -> list[str]:
        """What the job holds, as Slurm said last."""
        return [] if self._seen is None else expand(self._seen.nodes)

    def launch_begins(self, unreachable: Collection[str]) -> None:
        """Remembers the nodes that the ranks are about to be started on, and keeps the guardian on one of them.

        A node that is gone since the launch before, and that nobody has named, is told: Slurm gives a dead one up after a while.

        Args:
            unreachable: Nodes that the job has, and that this launch leaves out.
        """
        self._seen = self.slurm.state() or self._seen
        self._unreachable = set(unreachable)
        if self._seen is not None:
            for node in sorted(self._gone(self._seen) - self._told):
                self._log.event(f"the node {node} was lost; this launch goes without it")
            self._nodes = set(expand(self._seen.nodes)) - self._unreachable
            self._guardian.keep(self._seen, self._unreachable)

    def lost_nodes(self, *, ask: bool = False) -> list[str]:
        """Those of the launch's nodes that the job has lost since.

        Args:
            ask: Slurm anew, and wait for it.
        """
        seen = (self.slurm.state() if ask else None) or self._seen
        lost = set() if seen is None else self._gone(seen)
        self._told |= lost
        return sorted(lost)

    def _gone(self, seen: JobState) -> set[str]:
        """Nodes that the job had; one that is taken down gives its nodes back one by one, which is no loss."""
        return self._nodes - set(expand(seen.nodes)) if seen.nodes and seen.state == "RUNNING" else set()

    def launch_ended(self) -> None:
        """Ranks may have been signalled without a word to this process: then a stop is asked for, and nothing is started again."""
        if self._requests.names:
            return
        cause = cause_of(self.slurm.state(), self.slurm.restarts)
        if cause not in ("asked", "no answer"):
            self._requests.names.append(cause)

    def end(self) -> None:
        """Asks no more, and ends the guardian."""
        self._over.set()
        self._asker.join(_JOIN_S)
        self._guardian.end()
