"""One run, trained piece by piece by every launcher in turn, without a supervisor: `python -m pixart_ds.train.rank`."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pixart_ds import files
from pixart_ds.engine.environment import TORCH_NAMES, free_port, job_port
from pixart_ds.layout import StageLayout
from tests.e2e import test_same_run
from tests.e2e.test_demo import ROOT, call

pytestmark = pytest.mark.e2e

BATCH = 32
data = test_same_run.data
MODULE = "pixart_ds.train.rank"


def launch(command: Sequence[object], extra: Mapping[str, object] | None = None) -> subprocess.Popen[str]:
    """Starts a launcher, or a rank, as from a shell that knows nothing of ranks or Slurm."""
    clean = {k: v for k, v in os.environ.items() if k not in TORCH_NAMES and not k.startswith("SLURM_")}
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in (extra or {}).items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class Pieces:
    """The launchers, on one stage of a run."""

    def __init__(self, run: Path, folder: Path) -> None:
        self.entry = ["--run", run, "--stage", "stage1", "--device", "cpu"]
        self.folder = folder

    def alone(self) -> list[subprocess.Popen[str]]:
        return [launch([sys.executable, "-m", MODULE, *self.entry])]

    def torchrun(self) -> list[subprocess.Popen[str]]:
        agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return [launch([*agent, "--module", "--", MODULE, *self.entry])]  # else torchrun takes --run for its --run-path

    def deepspeed(self) -> list[subprocess.Popen[str]]:
        """Two slots of this machine."""
        return [self._deepspeed("127.0.0.1 slots=2\n", free_port())]

    def deepspeed_without_ssh(self) -> list[subprocess.Popen[str]]:
        """Two hosts, each with a runner of its own, as where there is no ssh."""
        hosts, port = "one slots=1\ntwo slots=1\n", free_port()
        return [self._deepspeed(hosts, port, "--no_ssh", "--node_rank", node) for node in (0, 1)]

    def _deepspeed(self, hosts: str, port: int, *options: object) -> subprocess.Popen[str]:
        hostfile = self.folder / "hostfile"
        hostfile.write_text(hosts)
        runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile, "--no_ssh_check"]
        address = ["--master_addr", "127.0.0.1", "--master_port", port]
        return launch([*runner, *address, *options, "--module", MODULE, *self.entry])

    def srun(self) -> list[subprocess.Popen[str]]:
        """Two tasks on two nodes, which are both this machine."""
        job = next(job for job in random.sample(range(10000), 100) if _is_free(job_port(job, 0)))
        step = {
            "SLURM_JOB_ID": job,
            "SLURM_STEP_ID": 0,
            "SLURM_NTASKS": 2,
            "SLURM_STEP_NUM_TASKS": 2,
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
            "SLURM_LOCALID": 0,
        }
        tasks = [{**step, "SLURM_PROCID": rank, "SLURM_NODEID": rank} for rank in (0, 1)]
        return [launch([sys.executable, "-m", MODULE, *self.entry], task) for task in tasks]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def train(
    stage: StageLayout,
    start: Callable[[], list[subprocess.Popen[str]]],
    steps: int | None = None,
    stop: Callable[[list[subprocess.Popen[str]]], None] | None = None,
) -> tuple[list[int], str]:
    """The exit codes and the output of one piece, which `stop` ends after so many steps of the stage."""
    attempt = len(stage.all_attempts()) + 1
    processes = start()
    try:
        while steps is not None and all(process.poll() is None for process in processes):
            row = files.last_json_line(stage.attempt(attempt).metrics)
            if row is not None and row["images_seen"] >= steps * BATCH:
                assert stop is not None
                stop(processes)
                break
            time.sleep(0.01)
        output = "".join(process.communicate(timeout=120)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    print(f"--- attempt {attempt}: {start.__name__}\n{output}")
    return [process.returncode for process in processes], output


def sends(number: signal.Signals) -> Callable[[list[subprocess.Popen[str]]], None]:
    """A stop by a signal to every process that the test started."""
    return lambda processes: [process.send_signal(number) for process in processes] and None


def test_one_run_under_every_launcher(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stage = test_same_run.create(run, data)
    pieces = Pieces(run, tmp_path)

    codes, output = train(stage, pieces.alone, 6, sends(signal.SIGTERM))
    assert codes == [75], output
    assert "attempt 1: stopped (SIGTERM)" in output

    codes, output = train(stage, pieces.torchrun, 13, sends(signal.SIGTERM))
    assert codes == [1], output  # torchrun's own, whatever its ranks return
    assert "attempt 2: stopped (SIGTERM)" in output

    codes, output = train(stage, pieces.deepspeed, 20, lambda _: stage.stop_request.touch())
    assert codes == [0], output
    assert "attempt 3: stopped (the file stop)" in output
    codes, output = train(stage, pieces.alone)
    assert (codes, len(stage.all_attempts())) == ([2], 3)
    assert "a stop file asks this stage to stop" in output
    stage.stop_request.unlink()

    codes, output = train(stage, pieces.srun, 27, sends(signal.SIGUSR1))
    assert codes == [0, 0], output
    assert "attempt 4: stopped (SIGUSR1)" in output

    codes, output = train(stage, pieces.deepspeed_without_ssh)
    assert codes == [0, 0], output
    assert "attempt 5: done" in output
    codes, output = train(stage, pieces.alone)
    assert (codes, len(stage.all_attempts())) == ([0], 5)
    assert "is done already; nothing to do" in output

    told = [files.read_json(attempt.env) for attempt in stage.all_attempts()]
    assert [(env["launcher"], env["world_size"]) for env in told] == [
        ("alone", 1),
        ("torchrun", 2),
        ("deepspeed", 2),
        ("srun", 2),
        ("deepspeed", 2),
    ]
    check_accounts(run, stage)


def check_accounts(run: Path, stage: StageLayout) -> None:
    """What people ask of a run is answered as after a supervisor."""
    answer = call("audit", run)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.startswith("stage1: proven\n")
    rows = json.loads(call("status", run, "--json").stdout)["stages"]
    assert (rows[0]["state"], rows[0]["outcomes"]) == ("done", ["stopped"] * 4 + ["done"])
    command = [sys.executable, ROOT / "tools/cost_report.py", run, "--format", "json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    (report,) = [part for part in json.loads(answer.stdout)["runs"][0]["stages"] if part["stage"] == "stage1"]
    attempts: list[dict[str, Any]] = report["attempts"]
    assert [entry["outcome"] for entry in attempts] == ["stopped"] * 4 + ["done"]
    assert sum(entry["account"]["images"] for entry in attempts) == BATCH * test_same_run.STEPS
    assert "stage1" in (run / "report.html").read_text()
    for attempt in stage.all_attempts():
        lines = list(files.read_json_lines(attempt.ledger))
        assert [line["outcome"] for line in (lines[0], lines[-1])] == [
            "running",
            files.read_json(attempt.outcome)["outcome"],
        ]
        assert lines[-1]["until"] > lines[0]["until"]


def test_a_failure_is_told_and_recorded(data: Path, tmp_path: Path) -> None:
    """The second stage cannot start before the first has handed over."""
    run = tmp_path / "run"
    second = test_same_run.create(run, data).root.with_name("stage2")
    process = launch([sys.executable, "-m", MODULE, "--run", run, "--stage", "stage2", "--device", "cpu"])
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 5, output
    said = "stage2 starts from stage1, which has handed nothing over yet"
    assert said in output
    assert "Traceback" not in output
    attempt = StageLayout(second).attempt(1)
    outcome = files.read_json(attempt.outcome)
    assert (outcome["outcome"], outcome["exit_code"]) == ("failed", 5)
    assert said in outcome["cause"]
    assert [line["outcome"] for line in files.read_json_lines(attempt.ledger)][-1] == "failed"
