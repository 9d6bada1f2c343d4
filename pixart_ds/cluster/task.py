"""One task of srun, as the supervisor starts it: `python -m pixart_ds.cluster.task LOG COMMAND…` becomes the rank, which reads
from Slurm's variables who it is. Rank 0 writes into LOG, of its own; the others into their node's, where srun puts it.

Signals that ask for a stop are ignored until the rank has installed its handlers: one that arrives while it is imported would
kill the task, and with it the whole launch.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

from pixart_ds.engine.environment import TORCH_NAMES


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without torch's words: what a job brought along from where it was submitted says nothing of this task."""
    return {name: value for name, value in environment.items() if name not in TORCH_NAMES}


def main() -> None:
    """Replaces this process by the rank's; ignored signals stay ignored across exec."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    log, *command = sys.argv[1:]
    if os.environ["SLURM_PROCID"] == "0":
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, sys.stdout.fileno())
        os.dup2(file, sys.stderr.fileno())
    os.execve(command[0], command, rank_environment(os.environ))


if __name__ == "__main__":
    main()
