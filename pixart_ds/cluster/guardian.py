"""What puts a job back into the queue when the node of its script is lost: `python -m pixart_ds.cluster.guardian JOB RESTARTS LOG`.

With --no-kill, Slurm lets a job live on the nodes that are left, also where the lost one ran its script: nothing would use them
until the time limit. So the supervisor keeps this small task on another node. It asks Slurm now and then, and requeues the job once
the script's node is no longer part of it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from pixart_ds.cluster.slurm import JobState, Slurm, expand

_PERIOD_S = 10.0


def script_is_lost(state: JobState) -> bool:
    """Whether a running job no longer has the node that its script runs on."""
    known = bool(state.nodes and state.batch_host)
    return state.state == "RUNNING" and known and state.batch_host not in expand(state.nodes)


def guard(slurm: Slurm, tell: Callable[[str], None], period_s: float = _PERIOD_S) -> None:
    """Watches until the script's node is lost, or another start of the job has begun."""
    while True:
        time.sleep(period_s)
        state = slurm.state()
        if state is None:
            continue
        if state.restarts > slurm.restarts:
            return
        if script_is_lost(state):
            tell(f"the job's script ran on {state.batch_host}, which is lost: the job is requeued")
            if (
                refusal := slurm.requeue()
            ) is not None:  # a site that forbids it: better ended than idle, others may wait
                tell(f"scontrol requeue: {refusal}; the job is ended")
                slurm.cancel()
            return


class Guardian:
    """The task, as the supervisor keeps it; on a node other than its own.

    Args:
        slurm: The job.
        log: File of what it and its srun say.
    """

    def __init__(self, slurm: Slurm, log: Path) -> None:
        self._slurm, self._log = slurm, log
        self._process: subprocess.Popen[bytes] | None = None
        self._node: str | None = None
        self._lock = threading.Lock()

    def keep(self, state: JobState, unreachable: Collection[str] = ()) -> None:
        """Sees to it that it runs on a node that the job has; a job of a single node needs none, Slurm requeues it itself."""
        with self._lock:
            self._keep([node for node in expand(state.nodes) if node not in (state.batch_host, *unreachable)])

    def _keep(self, others: list[str]) -> None:
        running = self._process is not None and self._process.poll() is None
        if not others or (running and self._node in others):
            return
        self.end()
        self._node = others[0]
        argv = [
            "srun",
            "--export=ALL",
            "--overlap",
            "--nodes=1",
            "--ntasks=1",
            f"--nodelist={self._node}",
            "--gres=none",
            "--mem=0",
        ]
        argv += ["--cpus-per-task=1", sys.executable, "-m", "pixart_ds.cluster.guardian"]
        argv += [self._slurm.job, str(self._slurm.restarts), str(self._log)]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def end(self) -> None:
        """Ends it."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:  # the job's end takes it along
                self._process.kill()
                self._process.wait()
        self._process = None


def main() -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGTERM):  # meant for the ranks
        signal.signal(number, signal.SIG_IGN)
    job, restarts, path = sys.argv[1:]

    def tell(text: str) -> None:  # its srun, which would pass its output on, is gone with the script
        with open(path, "a", encoding="utf-8") as log:
            print(text, file=log)

    guard(Slurm(job, int(restarts)), tell)


if __name__ == "__main__":
    main()
