"""What a cluster does to a training, on a real Slurm: each time the audit finds every sample served once, and nothing else."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pixart_ds import files
from tests.e2e.test_same_run import create
from tests.slurm.cluster import Cluster, Training, site, until

pytestmark = pytest.mark.slurm

STEPS = 300


@pytest.fixture
def run(small_set: Path, tmp_path: Path) -> Path:
    create(tmp_path / "run", small_set, f"stage1.length.steps={STEPS}")
    return tmp_path / "run"


def assert_whole(training: Training) -> None:
    assert training.audited()["proven"]["to_step"] == STEPS
    until(lambda: not training.ranks(), 60, lambda: f"ranks are left: {training.ranks()}")


@pytest.mark.parametrize("parameters", ["preempt_send_user_signal", ""])
def test_preemption_saves_in_the_grace_and_goes_on_when_there_is_room(
    cluster: Cluster, run: Path, parameters: str
) -> None:
    """With the site's user signal the script is warned, without it the tasks are: the job does not know which."""
    cluster.configure(parameters)
    training = Training(cluster, run)
    training.wait_images(1, 12)
    urgent = cluster.fill(8)
    until(lambda: bool(training.outcomes()) and training.outcomes()[0] is not None, 60, training.output)
    cluster.wait_state(urgent, "RUNNING")
    assert cluster.state(training.job) == "PENDING"
    cluster.tell("scancel", urgent)
    cluster.wait_restart(training.job, 1)
    output = training.wait_end()
    assert training.outcomes() == ["stopped", "done"]
    assert "is requeued: preempted" in output
    assert_whole(training)


def test_scontrol_requeue_is_left_to_slurm(cluster: Cluster, run: Path) -> None:
    training = Training(cluster, run)
    training.wait_images(1, 12)
    cluster.tell("scontrol", "requeue", training.job)
    cluster.wait_restart(training.job, 1)
    output = training.wait_end()
    assert training.outcomes() == ["stopped", "done"]
    assert "Slurm has put the job back into the queue itself" in output
    assert int(cluster.about(training.job)["Restarts"]) == 1
    assert_whole(training)


def test_the_time_limit_is_foreseen_and_costs_a_save(cluster: Cluster, small_set: Path, tmp_path: Path) -> None:
    create(tmp_path / "run", small_set, "stage1.length.steps=20000", "stage1.checkpoint.every.steps=400")
    training = Training(cluster, tmp_path / "run", "--time", "3", profile=site(tmp_path, "warning_s: 80"))
    training.wait_images(1, 12)
    until(lambda: training.outcomes()[0] is not None, 240, training.output)
    cluster.tell("scontrol", "update", f"JobId={training.job}", "TimeLimit=10")
    outcome = files.read_json(training.stage.attempt(1).outcome)
    assert outcome["outcome"] == "stopped"
    assert outcome["cause"] in ("SIGUSR1", "walltime")
    cluster.wait_restart(training.job, 1)
    goes_on_to = outcome["images_committed"] // 32 + 10
    training.wait_images(2, goes_on_to)
    cluster.tell("scancel", training.job)
    output = training.wait_end("CANCELLED")
    assert "is requeued: it goes on where it was saved" in output
    assert training.outcomes() == ["stopped", "stopped"]
    assert training.audited()["proven"]["to_step"] >= goes_on_to


def test_scancel_ends_and_does_not_requeue(cluster: Cluster, run: Path) -> None:
    training = Training(cluster, run)
    training.wait_images(1, 12)
    cluster.tell("scancel", training.job)
    output = training.wait_end("CANCELLED")
    assert "was cancelled, and is not requeued" in output
    assert training.outcomes() == ["stopped"]
    assert training.audited()["proven"]["to_step"] >= 12


@pytest.mark.parametrize("options", [("--signal=USR1",), ("--batch", "--signal=USR1")], ids=["tasks", "script"])
def test_a_signal_from_a_person_saves_and_starts_again(cluster: Cluster, run: Path, options: tuple[str, ...]) -> None:
    training = Training(cluster, run)
    training.wait_images(1, 12)
    cluster.tell("scancel", *options, training.job)
    cluster.wait_restart(training.job, 1)
    training.wait_end()
    assert training.outcomes() == ["stopped", "done"]
    assert_whole(training)


def test_a_stop_file_ends_the_job_for_good(cluster: Cluster, run: Path) -> None:
    training = Training(cluster, run)
    training.wait_images(1, 12)
    training.stage.stop_request.touch()
    output = training.wait_end("FAILED")
    assert "the file stop asked for the stop: the job is not requeued" in output
    assert cluster.about(training.job)["ExitCode"] == "75:0"
    assert training.audited()["proven"]["to_step"] >= 12


def test_a_node_that_dies_costs_a_launch_and_the_rest_goes_on(cluster: Cluster, run: Path) -> None:
    training = Training(cluster, run)
    training.wait_images(1, 12)
    host = cluster.about(training.job)["BatchHost"]
    other = next(node for node in files.read_json(training.stage.attempt(1).env)["nodes"] if node != host)
    cluster.script("crash", other)
    training.wait_images(1, STEPS)
    output = training.wait_end()
    assert training.outcomes() == ["done"]
    launches = training.launches(1)
    worlds = [each["world_size"] for each in launches]
    assert set(worlds[:-1]) == {2}, "Slurm itself notices only after a while"
    assert worlds[-1] == 1
    assert f"the node {other} was lost" in output
    assert launches[-2]["node"] in (other, None), "Slurm may give it up just after that launch has ended"
    assert_whole(training)


def test_a_batch_host_that_dies_is_replaced(cluster: Cluster, run: Path) -> None:
    training = Training(cluster, run)
    training.wait_images(1, 12)
    cluster.script("crash", cluster.about(training.job)["BatchHost"])
    cluster.wait_restart(training.job, 1)
    training.wait_end()
    assert training.outcomes() == [None, "done"]
    assert "is lost: the job is requeued" in training.stage.attempt(1).guardian_log.read_text()
    assert_whole(training)


def test_a_task_that_is_killed_and_one_that_hangs_cost_a_launch_each(cluster: Cluster, run: Path) -> None:
    training = Training(cluster, run, "--set", "execution.deadlines.silence=15")
    training.wait_images(1, 12)
    first = training.ranks()
    os.kill(first[-1], signal.SIGKILL)
    training.wait_launch(1, 2)
    os.kill((set(training.ranks()) - set(first)).pop(), signal.SIGSTOP)
    output = training.wait_end()
    launches = training.launches(1)
    assert [each["ending"] for each in launches] == ["failed", "failed", "done"]
    assert "was killed by SIGKILL" in launches[0]["cause"]
    assert "has given no sign of life for" in launches[1]["cause"]
    assert launches[1]["node"] in files.read_json(training.stage.attempt(1).env)["nodes"]
    hang = files.read_json(training.stage.attempt(1).hang(2))
    waiting = next(each["rank"] for each in hang["seen"] if each["rank"] != hang["culprits"][0]["rank"])
    assert "most recent call first" in Path(hang["stacks_in"][str(waiting)]).read_text(), (
        "the stacks of the rank that waited"
    )
    assert output.count("trains again") == 2
    assert_whole(training)


def test_a_job_takes_the_nodes_it_gets(cluster: Cluster, run: Path) -> None:
    """1-3 nodes: three at first, one after the requeue, since others have taken the rest."""
    training = Training(cluster, run, "--nodes", "1-3")
    training.wait_images(1, 12)
    cluster.fill(7)
    cluster.wait_restart(training.job, 1)
    training.wait_end()
    worlds = [files.read_json(each.env)["world_size"] for each in training.stage.all_attempts()]
    assert worlds == [3, 1]
    assert_whole(training)


def test_an_attempt_that_lives_on_a_lost_node_publishes_nothing(
    cluster: Cluster, small_set: Path, tmp_path: Path
) -> None:
    """Slurm has given the node up and started the job elsewhere; the old supervisor hears nothing from Slurm, and goes on."""
    create(tmp_path / "run", small_set, "stage1.length.steps=900", "stage1.checkpoint.every.steps=40")
    cut_off = tmp_path / "bin"
    cut_off.mkdir()
    (cut_off / "scontrol").write_text(
        f'#!/bin/sh\n[ ! -e {cut_off}/$SLURMD_NODENAME ] || exit 1\nexec /usr/bin/scontrol "$@"\n'
    )
    (cut_off / "scontrol").chmod(0o755)
    profile = site(tmp_path, f"setup: ['export PATH={cut_off}:$PATH']")
    training = Training(cluster, tmp_path / "run", "--nodes", "1", profile=profile)
    training.wait_images(1, 12)
    old = training.ranks()
    assert len(old) == 1
    node = cluster.about(training.job)["BatchHost"]
    (cut_off / node).touch()  # behind a broken network from now on
    cluster.script("mute", node)
    cluster.wait_restart(training.job, 1)
    until(training.stage.attempt(2).root.exists, 60, training.output)
    assert set(old) & set(training.ranks()), "the old rank trains when the new attempt begins"
    until(lambda: not (set(old) & set(training.ranks())), 120, lambda: "the old rank never ended")
    output = training.wait_end()
    assert files.read_json(training.stage.done)["attempt"] == 2
    assert int(cluster.about(training.job)["Restarts"]) == 1, "the old one does not put the job back"
    told = training.stage.attempt(1).log.read_text() + training.stage.attempt(1).rank_log(1, 0).read_text()
    assert "has taken this stage over" in told, output
    assert training.audited()["proven"]["to_step"] == 900


def test_where_requeueing_is_forbidden_a_second_job_waits_behind_the_first(
    cluster: Cluster, run: Path, tmp_path: Path
) -> None:
    training = Training(cluster, run, profile=site(tmp_path, "requeue: false"))
    first, second = training.jobs
    training.wait_images(1, 12)
    assert cluster.state(second) == "PENDING"
    cluster.tell("scancel", "--batch", "--signal=USR1", first)
    cluster.wait_state(first, "COMPLETED")
    training.wait_images(2, 30)
    waiting = cluster.tell("squeue", "-h", "-t", "PENDING", "-o", "%i").split()
    assert len(waiting) == 1, "at most two are in the queue"
    cluster.wait_state(second, "COMPLETED")
    until(lambda: cluster.state(waiting[0]) == "CANCELLED", 60, lambda: cluster.tell("squeue", "-t", "all"))
    assert training.outcomes() == ["stopped", "done"]
    assert_whole(training)
