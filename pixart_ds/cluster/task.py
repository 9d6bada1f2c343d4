"""One task of srun: says who it is in the words that torch knows, and becomes the rank.

Signals that ask for a stop are ignored until the rank has installed its handlers: one that arrives while torch is imported would
kill the task, and with it the whole launch.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

from pixart_ds.cluster.launchers import RANK_MODULE


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE from what Slurm tells a task."""
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": environment["SLURM_NTASKS_PER_NODE"],
    }


def main() -> None:
    """Replaces this process by the rank's; ignored signals stay ignored across exec."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.execve(RANK_MODULE[0], [*RANK_MODULE, *sys.argv[1:]], {**os.environ, **rank_environment(os.environ)})


if __name__ == "__main__":
    main()
