"""What Slurm says, and what follows from it: pure, on texts that Slurm 22.05 printed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pixart_ds.cluster import bad_nodes
from pixart_ds.cluster.guardian import guard, script_is_lost
from pixart_ds.cluster.launchers import Failed
from pixart_ds.cluster.requeue import Cause, cause_of, decide
from pixart_ds.cluster.slurm import JobState, Slurm, expand, parse_partitions
from pixart_ds.cluster.srun import parse_srun
from pixart_ds.layout import RunLayout

JOB = (
    "JobId=1 JobName=a.sbatch UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=1000 Nice=0 Account=root QOS=normal "
    "JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0 DerivedExitCode=0:9 "
    "RunTime=00:00:22 TimeLimit=365-00:00:00 TimeMin=N/A SubmitTime=1795619634 StartTime=1795619634 EndTime=1827155634 "
    "Deadline=N/A PreemptTime=None SuspendTime=None Partition=gpu AllocNode:Sid=localhost:18451 ReqNodeList=(null) "
    "ExcNodeList=(null) NodeList=n[1-2] BatchHost=n1 NumNodes=2 NumCPUs=128 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:* "
    "TRES=cpu=128,mem=125G,node=2,billing=128,gres/gpu=16 JOB_GRES=gpu:v100:16   Nodes=n[1-2] CPU_IDs=0-63 Mem=64000 "
    "GRES=gpu:v100:8(IDX:0-7) MinCPUsNode=1 Command=/tmp/a.sbatch WorkDir=/tmp Power= TresPerNode=gres:gpu:8"
)


def job(**changes: str) -> JobState:
    text = JOB
    for key, value in changes.items():
        old = next(word for word in JOB.split() if word.startswith(f"{key}="))
        text = text.replace(f" {old} ", f" {key}={value} ")
    return JobState.parse(text)


def test_a_job_is_read() -> None:
    found = job()
    assert (found.state, found.reason, found.restarts, found.preempted) == ("RUNNING", None, 0, False)
    assert (found.end, found.nodes, found.num_nodes, found.batch_host) == (1827155634.0, "n[1-2]", 2, "n1")
    assert found.gres == {"n[1-2]": "gpu:v100:8(IDX:0-7)"}
    assert job(EndTime="Unknown").end is None
    with pytest.raises(ValueError, match="without JobState"):
        JobState.parse("slurm_load_jobs error: Invalid job id specified")


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({}, "asked"),
        ({"PreemptTime": "1795619700"}, "preempted"),
        ({"JobState": "SIGNALING", "PreemptTime": "1795619700"}, "preempted"),
        ({"JobState": "COMPLETING", "Restarts": "1"}, "requeued by Slurm"),
        ({"JobState": "COMPLETING", "Reason": "TimeLimit"}, "time limit reached"),
        ({"JobState": "COMPLETING"}, "cancelled"),
        ({"JobState": "CANCELLED"}, "cancelled"),
    ],
)
def test_why_a_job_was_signalled(changes: dict[str, str], cause: Cause) -> None:
    assert cause_of(job(**changes), 0) == cause


def test_without_an_answer_there_is_no_cause() -> None:
    assert cause_of(None, 0) == "no answer"


STOPPED = {"outcome": "stopped", "cause": "SIGUSR1", "exit_code": 75}


@pytest.mark.parametrize(
    ("outcome", "cause", "more", "again"),
    [
        ({}, "asked", {}, True),
        ({}, "preempted", {}, True),
        ({}, "time limit reached", {}, True),
        ({}, "no answer", {"requests": ["SIGUSR1"]}, True),
        ({}, "no answer", {"requests": ["SIGUSR1", "SIGTERM"]}, False),
        ({}, "cancelled", {}, False),
        ({}, "requeued by Slurm", {}, False),
        ({"cause": "the file stop"}, "asked", {}, False),
        ({}, "asked", {"fruitless": 5}, False),
        ({"cause": "budget used up: 2 of 1 usd"}, "asked", {"requests": ["budget"]}, False),
        ({}, "preempted", {"requests": ["SIGUSR1", "budget"]}, False),
        ({}, "requeued by Slurm", {"requests": ["budget", "SIGTERM"]}, False),
        ({"outcome": "failed", "cause": "asked to stop (budget …), but"}, "asked", {"requests": ["budget"]}, False),
        ({"outcome": "failed", "cause": "asked to stop (SIGTERM), but", "exit_code": 75}, "preempted", {}, True),
        ({"outcome": "failed", "cause": "rank 1 …", "exit_code": 70}, "asked", {}, False),
        ({"outcome": "failed", "cause": "rank 1 …", "exit_code": 70}, "asked", {"bad_nodes": True}, True),
        ({"outcome": "failed", "cause": "rank 1 …", "exit_code": 3}, "asked", {"bad_nodes": True}, True),
        ({"outcome": "failed", "cause": "rank 1 …", "exit_code": 4}, "asked", {"bad_nodes": True}, False),
        ({"outcome": "done", "cause": None, "exit_code": 0}, "asked", {}, False),
    ],
)
def test_whether_a_job_runs_again(outcome: dict[str, Any], cause: Cause, more: dict[str, Any], again: bool) -> None:
    known: dict[str, Any] = {"requests": [], "fruitless": 0, "limit": 5, "bad_nodes": False, **more}
    decision = decide({**STOPPED, **outcome}, cause, **known)
    assert decision.again is again
    assert decision.why


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("", None),
        ("srun: error: n1: task 1: Killed\nsrun: error: n2: tasks 2-3: Killed\n", Failed(1, -9, "n1")),
        ("srun: error: n12: task 13: Exited with exit code 3\nsrun: error: n1: task 0: Killed\n", Failed(13, 3, "n12")),
        ("srun: error: n2: tasks 8-15: Segmentation fault (core dumped)", Failed(8, -11, "n2")),
        ("srun: error: n2: task 8: User defined signal 2", Failed(8, -12, "n2")),
        ("srun: error: Node failure on n4\nsrun: error: n1: task 0: Killed", Failed(None, 70, "n4")),
        (
            "srun: error: Task launch for StepId=48.2 failed on node n2: Communication connection failure\n"
            "srun: error: n1: task 0: Killed",
            Failed(None, 70, "n2"),
        ),
        ("srun: launch/slurm: _step_signal: Terminating StepId=1.0", None),
    ],
)
def test_the_first_failure_that_srun_tells_of(text: str, failed: Failed | None) -> None:
    assert parse_srun(text) == failed


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n[1-2],m7", ["n1", "n2", "m7"]),
        ("r1i[08-10,12]n1", ["r1i08n1", "r1i09n1", "r1i10n1", "r1i12n1"]),
        ("a[1-2]b[3-4]", ["a1b3", "a1b4", "a2b3", "a2b4"]),
    ],
)
def test_lists_of_nodes(nodes: str, names: list[str]) -> None:
    assert expand(nodes) == names


def test_partitions() -> None:
    rows = parse_partitions(
        "gpu*|7-00:00:00|8|gpu:v100:8|v100-32g\nbig|infinite|2|gpu:a100:4(S:0-1),gpu:v100:2|(null)\ncpu|30:00|4|(null)|x,y\n"
    )
    assert [(each.name, each.default, each.time_limit_s, each.nodes, each.gpus) for each in rows] == [
        ("gpu", True, 604800.0, 8, 8),
        ("big", False, None, 2, 6),
        ("cpu", False, 1800.0, 4, 0),
    ]
    assert rows[2].features == {"x", "y"}


def test_a_script_is_lost_when_its_node_is() -> None:
    assert not script_is_lost(job())
    assert script_is_lost(job(NodeList="n2", NumNodes="1"))
    assert not script_is_lost(job(NodeList="n2", NumNodes="1", BatchHost=""))
    assert not script_is_lost(job(NodeList="n2", NumNodes="1", JobState="COMPLETING"))


def attempt(*launches: tuple[str | None, bool], outcome: str = "failed", code: int = 70) -> dict[str, Any]:
    """An attempt whose launches failed on a node, after a step or not."""
    rows = [{"ending": "failed", "node": node, "stepped": stepped, "code": code} for node, stepped in launches]
    return {"outcome": outcome, "launches": rows}


@pytest.mark.parametrize(
    ("outcomes", "nodes"),
    [
        ([attempt(("n1", False), ("n1", False))], ["n1"]),
        ([attempt(("n1", False), ("n2", False))], []),  # now here, now there
        ([attempt(("n1", False), ("n1", True))], []),  # it did make a step
        ([attempt(("n1", False)), attempt(("n2", False))], []),  # it follows the job
        ([attempt(("n1", False), code=4)], []),  # a set is not a node's fault
        ([attempt(("n1", True))], []),
        ([attempt(("n1", True)), attempt(("n2", True)), attempt(("n1", True))], ["n1"]),
        ([attempt(("n1", True)), {"outcome": "stopped", "launches": []}, attempt(("n1", True))], ["n1"]),
        ([attempt(("n1", True)), attempt(("n1", True)), {"outcome": "stopped", "launches": []}], []),
        ([attempt((None, True)), attempt((None, True))], []),
        ([], []),
    ],
)
def test_which_nodes_a_job_had_better_not_get_again(outcomes: list[dict[str, Any]], nodes: list[str]) -> None:
    assert list(bad_nodes.suspects(outcomes)) == nodes


def test_a_bad_node_is_left_out_until_it_expires(tmp_path: Path) -> None:
    run = RunLayout(tmp_path)
    assert bad_nodes.excluded(run) == {}
    bad_nodes.record(run, {"n1": "its ranks failed before the first step"}, "stage1", 3, now=1000.0)
    bad_nodes.record(run, {"n2": "it has ended 2 attempts"}, "stage1", 4, now=2000.0)
    assert list(bad_nodes.excluded(run, now=3000.0)) == ["n1", "n2"]
    assert list(bad_nodes.excluded(run, now=1500.0 + bad_nodes.EXPIRE_S)) == ["n2"]
    assert bad_nodes.excluded(run, now=9e9) == {}


def test_a_task_of_an_array_has_the_arrays_number_and_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "71", "SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    slurm = Slurm.of_this_job()
    assert slurm is not None
    assert (slurm.job, slurm.restarts) == ("71_3", 2)


def tools(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> Path:
    """Programs of Slurm that are none; they write down what they are called with."""
    for name, script in scripts.items():
        path = folder / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/calls\n{script}\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "calls"


def test_a_controller_that_does_not_answer_is_asked_again_to_requeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = (
        '[ "$1" = show ] && exit 1\n'
        f"[ -e {tmp_path}/up ] && exit 0\n"
        f'touch {tmp_path}/up; echo "Unable to contact slurm controller" >&2; exit 1'
    )
    calls = tools(tmp_path, monkeypatch, scontrol=answer)
    assert Slurm("7", 0).requeue() is None
    assert calls.read_text().count("scontrol requeue 7") == 2


def test_a_site_that_forbids_to_requeue_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tools(
        tmp_path, monkeypatch, scontrol='echo "Requested operation is presently disabled for job 7" >&2; exit 1'
    )
    assert "disabled" in (Slurm("7", 0).requeue() or "")
    assert calls.read_text() == "scontrol requeue 7\n"


def test_a_guardian_ends_a_job_that_it_cannot_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = JOB.replace("NodeList=n[1-2] ", "NodeList=n2 ")
    script = f'[ "$1" = show ] && echo "{lost}" && exit 0; echo "presently disabled" >&2; exit 1'
    calls = tools(tmp_path, monkeypatch, scontrol=script, scancel="exit 0")
    told: list[str] = []
    guard(Slurm("1", 0), told.append, period_s=0.01)
    assert "scancel 1" in calls.read_text()
    assert told[-1].endswith("the job is ended")
