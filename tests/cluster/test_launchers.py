"""The srun command line, and who a task is."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pixart_ds.cluster.launchers import LaunchRequest, Tail, tail_of
from pixart_ds.cluster.srun import SrunLauncher, SrunRanks
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
    launcher = SrunLauncher(environment={**SLURM, "SLURM_JOB_CPUS_PER_NODE": "48(x7),40"}, extra=["--set", "a=1"])
    argv = launcher.argv(request_of(tmp_path), *launcher.tasks())
    own = argv.index(sys.executable)
    attempt = tmp_path / "stage2" / "attempts" / "0003"
    assert argv[:4] == ["srun", "--nodes=8", "--ntasks=64", "--ntasks-per-node=8"]
    assert {"--cpus-per-task=5", "--export=ALL", "--overlap"} <= set(argv[4:own])
    assert {"--kill-on-bad-exit=1", "--wait=60", "--label", f"--output={attempt}/node-%N-l01.txt"} <= set(argv[5:own])
    assert argv[own + 1 : own + 4] == ["-m", "pixart_ds.cluster.task", str(attempt / "rank-00000-l01.txt")]
    told = ["--run", str(tmp_path), "--stage", "stage2", "--attempt", "3", "--launch", "1", "--device", "cuda"]
    assert argv[own + 4 :] == [sys.executable, "-m", "pixart_ds.train.rank", *told, "--set", "a=1"]


def test_a_site_may_want_fewer_tasks(tmp_path: Path) -> None:
    argv = SrunLauncher(environment=SLURM, tasks_per_node=2).argv(request_of(tmp_path), 3, 2)
    assert argv[1:4] == ["--nodes=3", "--ntasks=6", "--ntasks-per-node=2"]


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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_task_survives_a_stop_signal_before_its_handlers_are_there(tmp_path: Path, rank: int) -> None:
    """And rank 0 has a log of its own."""
    log = tmp_path / "rank-0.txt"
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1); print(os.environ['SLURM_PROCID'])"
    answer = subprocess.run(
        [sys.executable, "-m", "pixart_ds.cluster.task", str(log), sys.executable, "-c", code],
        env={**os.environ, "SLURM_PROCID": str(rank)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.returncode, answer.stdout) == (0, "" if rank == 0 else "1\n"), answer.stderr
    assert log.exists() is (rank == 0)
    assert rank == 1 or log.read_text() == "0\n"


def test_what_a_rank_wrote_is_found_in_its_nodes_log(tmp_path: Path) -> None:
    request = request_of(tmp_path)
    request.attempt.root.mkdir(parents=True)
    request.attempt.node_log(1, "n1").write_text("01: one\n02: two\n01: more\n")
    request.attempt.node_log(1, "n2").write_text("10: ten\n")
    request.attempt.rank_log(1, 0).write_text("zero\n")
    ranks = SrunRanks(SrunLauncher(), ["true"], 16, request, io.StringIO())
    assert [ranks.last_words(rank) for rank in (0, 1, 10)] == ["zero", "one\nmore", "ten"]
    assert ranks.log_of(10) == request.attempt.node_log(1, "n2")
    request.attempt.rank_log(1, 0).write_text("")
    request.attempt.node_log(1, "n1").write_text("00: no interpreter\n")
    assert ranks.last_words(0) == "no interpreter", "a rank 0 that never began"


def test_a_request_to_stop_waits_until_all_ranks_listen(tmp_path: Path) -> None:
    request = request_of(tmp_path)
    request.attempt.pulses.mkdir(parents=True)
    told = tmp_path / "told"
    ranks = SrunRanks(
        SrunLauncher(),
        ["bash", "-c", f"trap 'echo $? > {told}; exit' USR1; while :; do sleep 0.05; done"],
        2,
        request,
        io.StringIO(),
    )
    ranks.send(signal.SIGTERM)
    for rank in (0, 1):
        time.sleep(1.2)
        assert ranks.alive()
        assert not told.exists(), f"{rank} of 2 listen"
        request.attempt.pulse(rank).write_text(f'{{"rank": {rank}, "launch": 1}}')
    until = time.monotonic() + 10
    while ranks.alive() and time.monotonic() < until:
        time.sleep(0.05)
    assert told.exists()


def test_a_node_that_cannot_be_reached_is_left_out_of_the_next_launch(tmp_path: Path) -> None:
    request = request_of(tmp_path)
    request.attempt.root.mkdir(parents=True)
    launcher = SrunLauncher(environment=SLURM)
    text = "srun: error: Task launch for StepId=48.2 failed on node n3: Communication connection failure"
    ranks = SrunRanks(launcher, ["bash", "-c", f"echo '{text}' >&2; exit 1"], 64, request, io.StringIO())
    while ranks.alive():
        time.sleep(0.02)
    assert str(ranks.failed()) == "the node n3 was lost"
    assert launcher.tasks() == (7, 8)
    assert {"--nodes=7", "--ntasks=56", "--exclude=n3"} <= set(launcher.argv(request, *launcher.tasks()))


def test_srun_is_asked_to_kill_its_tasks_before_it_is_killed(tmp_path: Path) -> None:
    """Killed itself, it would leave them running."""
    request = request_of(tmp_path)
    request.attempt.root.mkdir(parents=True)
    told = tmp_path / "told"
    srun = ["bash", "-c", f"trap 'echo TERM >> {told}; exit 137' TERM; echo up >> {told}; while :; do sleep 0.05; done"]
    ranks = SrunRanks(SrunLauncher(), srun, 1, request, io.StringIO())
    while not told.exists():
        pass
    ranks.send(signal.SIGKILL)
    while ranks.alive():
        pass
    assert told.read_text() == "up\nTERM\n"
    failed = ranks.failed()
    assert failed is not None
    assert failed.code == 137


def test_tail_copies_a_file_that_grows_and_one_that_comes_late(tmp_path: Path) -> None:

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
