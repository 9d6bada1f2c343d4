"""The srun command line, and who a task is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pixart_ds.cluster.launchers import LaunchRequest, SrunLauncher, Tail, tail_of
from pixart_ds.cluster.task import rank_environment
from pixart_ds.errors import MachineError
from pixart_ds.layout import RunLayout

SLURM = {
    "SLURM_JOB_NUM_NODES": "8",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "n[1-8]",
}


def request_of(folder: Path) -> LaunchRequest:
    return LaunchRequest(folder, "stage2", RunLayout(folder).stage("stage2").attempt(3), 1, "cuda")


def test_srun_gives_one_task_for_each_gpu(tmp_path: Path) -> None:
    argv = SrunLauncher(environment=SLURM, extra=["--set", "a=1"]).argv(request_of(tmp_path))
    assert argv[:6] == ["srun", "--nodes=8", "--ntasks=64", "--ntasks-per-node=8", "--kill-on-bad-exit=1", "--wait=60"]
    assert argv[8:11] == [sys.executable, "-m", "pixart_ds.cluster.task"]
    assert argv[-2:] == ["--set", "a=1"]
    assert argv[11:-2] == [
        "--run",
        str(tmp_path),
        "--stage",
        "stage2",
        "--attempt",
        "3",
        "--launch",
        "1",
        "--device",
        "cuda",
    ]
    assert argv[6].endswith("/stage2/attempts/0003/rank-%5t-l01.txt")  # what AttemptLayout.rank_log names


@pytest.mark.parametrize(("said", "gpus"), [("8", 8), ("v100:4", 4), ("2(x4)", 2)])
def test_gpus_of_a_node_as_slurm_says_them(said: str, gpus: int) -> None:
    assert SrunLauncher(environment={**SLURM, "SLURM_GPUS_ON_NODE": said}).tasks() == (8, gpus)


def test_outside_of_slurm_or_without_gpus_srun_is_refused() -> None:
    with pytest.raises(MachineError, match="no Slurm allocation"):
        SrunLauncher(environment={}).tasks()
    with pytest.raises(MachineError, match="the allocation has no GPUs"):
        SrunLauncher(environment={"SLURM_JOB_NUM_NODES": "2"}).tasks()


def test_a_task_forgets_what_the_job_brought_along() -> None:
    slurm = {"SLURM_PROCID": "13", "SLURM_STEP_ID": "0", "PATH": "/bin"}
    stale = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert rank_environment(slurm | stale) == slurm


def test_a_task_survives_a_stop_signal_before_its_handlers_are_there(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pixart_ds.cluster import task\n"
        "rank = 'import os, signal; os.kill(os.getpid(), signal.SIGUSR1); print(os.environ[\"SLURM_PROCID\"])'\n"
        "task.RANK_MODULE = (sys.executable, '-c', rank)\n"
        "task.main()\n"
    )
    slurm = {"SLURM_PROCID": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **slurm}, capture_output=True, text=True, check=False
    )
    assert (answer.returncode, answer.stdout) == (0, "1\n"), answer.stderr
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_tail_copies_a_file_that_grows_and_one_that_comes_late(tmp_path: Path) -> None:
    import io
    import time

    output = io.StringIO()
    tail = Tail(tmp_path / "log", output)
    time.sleep(0.15)
    with open(tmp_path / "log", "w") as log:
        for number in range(3):
            print("line", number, file=log, flush=True)
            time.sleep(0.12)
    tail.finish()
    assert output.getvalue() == "line 0\nline 1\nline 2\n"
    assert tail_of(tmp_path / "log", lines=2) == "line 1\nline 2"
    assert tail_of(tmp_path / "none") == ""
