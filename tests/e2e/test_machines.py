"""Two machines that train together without Slurm; both are this one: a leader, and an agent that joins it over TCP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pixart_ds import files
from pixart_ds.engine.environment import free_port
from pixart_ds.layout import StageLayout
from tests.e2e import test_same_run
from tests.e2e.test_demo import ROOT
from tests.e2e.test_same_run import STEPS, create, start, wait_for
from tests.e2e.test_survival import audited, launches, ranks_of_none

pytestmark = pytest.mark.e2e

data = test_same_run.data


def lead(run: Path, *words: object) -> subprocess.Popen[str]:
    return start(run, 1, "stage1", *map(str, words), retries=3)


def by_hand(port: int) -> tuple[object, ...]:
    return "--machines", 2, "--rendezvous", f"127.0.0.1:{port}"


def join(run: Path, port: int) -> subprocess.Popen[str]:
    """The agent of the other machine."""
    words = ["join", run, "stage1", "--rendezvous", f"127.0.0.1:{port}", "--name", "other"]
    return subprocess.Popen(
        [sys.executable, "-m", "pixart_ds", *map(str, words), "--device", "cpu", "--processes", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """Kills what a failed test leaves; their ranks follow them."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def ends(process: subprocess.Popen[str], code: int) -> str:
    """Waits for a process, and returns its output."""
    output = process.communicate(timeout=120)[0]
    print(output)
    assert process.returncode == code, output
    return output


def its_rank(agent: subprocess.Popen[str]) -> int:
    (pid,) = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=True).stdout.split()
    return int(pid)


def check(run: Path, stage: StageLayout) -> None:
    """The stage is done and proven, and nothing of it runs any more."""
    assert stage.done.exists()
    assert audited(run)["proven"]["to_step"] == STEPS
    assert ranks_of_none(run)
    assert not stage.machines_token.exists()
    assert subprocess.run(["pgrep", "-f", f"pixart_ds join {run}"], capture_output=True, check=False).returncode == 1


def test_a_killed_rank_and_a_lost_machine_cost_a_launch_each(data: Path, tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    stage = create(run, data)
    leader, agent = lead(run, *by_hand(port)), join(run, port)
    with ended(leader, agent):
        wait_for(stage, 1, 32 * 9, leader)
        os.kill(its_rank(agent), signal.SIGKILL)
        wait_for(stage, 1, 32 * 25, leader)
        agent.kill()
        killed = time.monotonic()
        while not _steps_of(stage, 3):
            assert leader.poll() is None, ends(leader, 0)
            time.sleep(0.02)
        print(
            f"from the kill of the agent to the end of the next launch's first step: {time.monotonic() - killed:.1f} s"
        )
        output = ends(leader, 0)
    told = launches(stage)
    assert [(each["ending"], each["world_size"]) for each in told] == [("failed", 2), ("failed", 2), ("done", 1)]
    assert told[0]["cause"].startswith("rank 1 was killed by SIGKILL on other")
    assert (told[1]["cause"], told[1]["node"]) == ("the node other was lost", "other")
    assert "other is lost: the connection was closed" in output
    check(run, stage)


def _steps_of(stage: StageLayout, launch: int) -> bool:
    """Whether a launch has ended a step."""
    said = files.read_json(stage.attempt(1).pulse(0))
    return said["launch"] == launch and said["images_seen"] is not None


def test_a_lost_leader_is_followed_by_another_and_a_stop_reaches_all_machines(data: Path, tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    stage = create(run, data)
    leader, agent = lead(run, *by_hand(port)), join(run, port)
    with ended(leader, agent):
        wait_for(stage, 1, 32 * 8, leader)
        rank = its_rank(agent)
        leader.kill()
        leader.communicate()
        while os.path.exists(f"/proc/{rank}"):
            assert agent.poll() is None
            time.sleep(0.05)
        assert stage.attempt(1).stopped.exists(), "all ranks saved and left"
        leader = lead(run, *by_hand(port))
        with ended(leader):
            wait_for(stage, 2, 32 * 20, leader)
            leader.terminate()
            assert "attempt 2: stopped (SIGTERM)" in ends(leader, 75)
        output = ends(agent, 75)
        assert output.count("has joined the leader") == 2, output
    assert ranks_of_none(run)

    ssh = tmp_path / "ssh"  # stands in for ssh: its last word is for the host's shell
    ssh.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/called\nexec bash -c "${{!#}}"\n')
    ssh.chmod(0o755)
    leader = lead(run, "--hosts", "127.0.0.1,node-b", "--rendezvous", "127.0.0.1:0", "--ssh", ssh)
    with ended(leader):
        ends(leader, 0)
    assert (tmp_path / "called").read_text().startswith("-o BatchMode=yes ")
    assert "the leader has ended with exit code 0" in stage.machine_log("node-b").read_text()
    assert [files.read_json(attempt.env)["world_size"] for attempt in stage.all_attempts()] == [2, 2, 2]
    assert "node-b (1)" in files.read_json(stage.attempt(3).env)["launcher"]
    assert {each["code"] for each in launches(stage, 3) if "code" in each} == set()
    check(run, stage)
