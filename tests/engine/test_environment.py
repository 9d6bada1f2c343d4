"""Who a rank is, in each launcher's words."""

from __future__ import annotations

import pytest

from pixart_ds.engine.environment import RankEnvironment, first_host, job_port, read_environment
from pixart_ds.errors import MachineError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
DEEPSPEED = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"} | {
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "13",
    "SLURM_LOCALID": "5",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "64",
    "SLURM_STEP_NUM_TASKS": "64",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_TASKS_PER_NODE": "8(x8)",
    "SLURM_STEP_TASKS_PER_NODE": "8(x8)",
    "SLURM_JOB_NODELIST": "n[1-8]",
    "SLURM_STEP_NODELIST": "n[1-8]",
}
SCRIPT = {  # what the script of a job sees: the same words, but no step
    name: value for name, value in SRUN.items() if "_STEP_" not in name
} | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


def refused(environment: dict[str, str]) -> str:
    with pytest.raises(MachineError) as error:
        read_environment(environment)
    return str(error.value)


def test_no_launcher_is_a_world_of_one_at_a_port_of_its_own() -> None:
    told = read_environment({"HOME": "/root"})
    assert told == RankEnvironment("alone", 0, 1, 0, 1, "127.0.0.1", told.master_port)
    assert told.variables()["WORLD_SIZE"] == "1"
    assert told.master_port > 1023


def test_torchrun() -> None:
    assert read_environment(TORCHRUN) == RankEnvironment("torchrun", 5, 8, 1, 4, "node1", 29500)
    assert read_environment(TORCHRUN).variables() == TORCHRUN


def test_deepspeed_says_local_size() -> None:
    assert read_environment(DEEPSPEED) == RankEnvironment("deepspeed", 5, 8, 1, 4, "node1", 29500)


def test_srun() -> None:
    assert read_environment(SRUN) == RankEnvironment("srun", 13, 64, 5, 8, "n1", 23456)


def test_torch_counts_before_slurm() -> None:
    assert read_environment(SRUN | TORCHRUN).launcher == "torchrun"


def test_a_task_of_srun_meets_where_it_is_told() -> None:
    told = read_environment(SRUN | {"MASTER_ADDR": "n1-ib", "MASTER_PORT": "1234"})
    assert (told.launcher, told.master_addr, told.master_port) == ("srun", "n1-ib", 1234)


def test_a_step_may_be_smaller_than_its_job() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "3,2", "SLURM_STEP_NODELIST": "n[3,5]"}
    place = {"SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "2"}
    assert read_environment(SRUN | step | place) == RankEnvironment("srun", 4, 5, 1, 2, "n3", 23658)


@pytest.mark.parametrize(
    ("tasks", "node", "here"), [("8(x8)", 7, 8), ("8(x2),4", 1, 8), ("8(x2),4", 2, 4), ("6", 0, 6), ("1,2(x3),1", 3, 2)]
)
def test_tasks_of_this_node(tasks: str, node: int, here: int) -> None:
    names = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node), "SLURM_LOCALID": "0"}
    assert read_environment(SRUN | names).local_size == here


def test_an_older_slurm_that_says_less() -> None:
    words = {name: value for name, value in SRUN.items() if "_STEP_" not in name and "TASKS_PER_NODE" not in name}
    told = read_environment(words | {"SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "8"})
    assert told == RankEnvironment("srun", 13, 64, 5, 8, "n1", 23456)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n[1-8]", "n1"),
        ("gpu[007-012,020]", "gpu007"),
        ("gpu[012,020],login1", "gpu012"),
        ("alone", "alone"),
        ("b2,b1", "b2"),
        ("rack[0-1]node[00-15]", "rack0node00"),
        ("a1-[3,5-6]-ib,b1", "a1-3-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_ports_of_a_job_and_its_steps() -> None:
    jobs, steps, starts = range(4_000_000, 4_000_100), range(20), range(3)
    ports = {job_port(job, step, start) for job in jobs for step in steps for start in starts}
    assert len(ports) > 5000
    assert all(20000 <= port < 30000 for port in ports)


def test_a_jobs_script_is_no_task() -> None:
    text = refused(SCRIPT)
    assert "SLURM_NTASKS is 64, but SLURM_STEP_ID is not set: this is the job's script, and no task of srun" in text
    assert "srun" in text.split("to do:")[1]
    assert read_environment(SCRIPT | {"SLURM_NTASKS": "1"}).launcher == "alone"


def test_everything_missing_is_named_at_once() -> None:
    text = refused({"RANK": "0", "MASTER_ADDR": ""})
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        assert f"{name} is not set" in text
    assert "RANK is not set" not in text.replace("LOCAL_RANK is not set", "")
    assert "torchrun" in text
    text = refused({"SLURM_STEP_ID": "x", "SLURM_PROCID": "0"})
    for name in ("SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_NODEID"):
        assert f"{name} is not set" in text
    for names in (
        "SLURM_STEP_NUM_TASKS or SLURM_NTASKS",
        "SLURM_STEP_TASKS_PER_NODE or SLURM_TASKS_PER_NODE",
        "SLURM_STEP_NODELIST or SLURM_JOB_NODELIST",
    ):
        assert f"{names}: none is set" in text
    assert "SLURM_STEP_ID is 'x', not a number" in text


def test_a_meeting_point_alone_is_not_enough() -> None:
    assert "RANK is not set; WORLD_SIZE is not set" in refused({"MASTER_ADDR": "node1", "MASTER_PORT": "29500"})


@pytest.mark.parametrize(
    ("words", "change", "message"),
    [
        (TORCHRUN, {"RANK": "8"}, "RANK is 8, but WORLD_SIZE is 8"),
        (TORCHRUN, {"LOCAL_RANK": "4"}, "LOCAL_RANK is 4, but LOCAL_WORLD_SIZE is 4"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE is 9, but WORLD_SIZE is 8"),
        (TORCHRUN, {"LOCAL_SIZE": "3"}, "LOCAL_SIZE is 3, but LOCAL_WORLD_SIZE is 4"),
        (TORCHRUN, {"MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a number"),
        (TORCHRUN, {"RANK": "-1"}, "RANK is '-1', not a number"),
        (DEEPSPEED, {"LOCAL_RANK": "4"}, "LOCAL_RANK is 4, but LOCAL_SIZE is 4"),
        (SRUN, {"SLURM_PROCID": "64"}, "SLURM_PROCID is 64, but SLURM_STEP_NUM_TASKS is 64"),
        (SRUN, {"SLURM_LOCALID": "8"}, "SLURM_LOCALID is 8, but SLURM_STEP_TASKS_PER_NODE is 8"),
        (SRUN, {"SLURM_NODEID": "8"}, "SLURM_NODEID is 8, but SLURM_STEP_TASKS_PER_NODE is '8(x8)'"),
        (SRUN, {"SLURM_STEP_TASKS_PER_NODE": "8x8"}, "SLURM_STEP_TASKS_PER_NODE is '8x8', not tasks per node"),
    ],
)
def test_contradictions(words: dict[str, str], change: dict[str, str], message: str) -> None:
    assert message in refused(words | change)
