"""Runs a function on N gloo ranks of this machine, in processes of their own, as the supervisor would start them."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class RanksFailed(Exception):
    """A rank ended with an error; `outputs` holds what each rank wrote, by rank."""

    def __init__(self, codes: list[int], outputs: list[str]) -> None:
        told = "\n".join(
            f"--- rank {rank}, exit code {code}\n{text[-3000:]}"
            for rank, (code, text) in enumerate(zip(codes, outputs, strict=True))
        )
        super().__init__(f"exit codes {codes}\n{told}")
        self.codes = codes
        self.outputs = outputs


class Ranks:
    """Ranks that are running; kill them, or wait for their results.

    Args:
        function: A module-level function; it is called as function(world, *args) on each rank.
        world_size: Ranks.
        args: JSON values.
    """

    def __init__(self, function: Callable[..., Any], world_size: int, *args: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        self._outputs = [self.folder / f"output-{rank}.txt" for rank in range(world_size)]
        for rank in range(world_size):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            }
            job = [sys.executable, "-m", "tests.helpers.launch", function.__module__, function.__qualname__]
            with open(self._outputs[rank], "wb") as output:
                self.processes.append(
                    subprocess.Popen(
                        [*job, json.dumps(args), str(self.folder / f"result-{rank}.json")],
                        cwd=ROOT,
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def kill(self) -> None:
        """SIGKILL to every rank that still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait()

    def outputs(self) -> list[str]:
        return [path.read_text(errors="replace") for path in self._outputs]

    def results(self, timeout: float = 240.0) -> list[Any]:
        """Each rank's JSON result, by rank.

        Raises:
            RanksFailed: A rank failed (the others are killed ten seconds later), or time is up.
        """
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in self.processes):
            if any(process.poll() for process in self.processes):
                deadline = min(deadline, time.monotonic() + 10)
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.05)
        codes = [process.returncode for process in self.processes]
        if any(codes):
            raise RanksFailed(codes, self.outputs())
        return [json.loads((self.folder / f"result-{rank}.json").read_text()) for rank in range(len(codes))]


def launch(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Runs function(world, *args) on `world_size` ranks; returns their JSON results, by rank."""
    return Ranks(function, world_size, *args).results(timeout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _main() -> None:
    import torch

    from pixart_ds.engine.world import join_world, leave_world

    module, name, args, result = sys.argv[1:]
    torch.set_num_threads(1)
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    world = join_world("cpu")
    value = function(world, *json.loads(args))
    Path(result).write_text(json.dumps(value))
    leave_world()
    sys.stdout.flush()
    os._exit(0)  # as the real rank ends, and for its reason


if __name__ == "__main__":
    _main()
