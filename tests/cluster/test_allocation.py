"""What the supervisor makes of Slurm's answers, and the copy of the code, where something is missing."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest

from pixart_ds.cluster import afterwards, frozen
from pixart_ds.cluster.allocation import Allocation
from pixart_ds.cluster.requests import Requests
from pixart_ds.config.freeze import create_run
from pixart_ds.config.load import load_chain
from pixart_ds.layout import RunLayout
from pixart_ds.log import Log
from tests.cluster.test_supervise import FakeSlurm, no_slurm  # noqa: F401 — a fixture


def test_a_job_that_is_taken_down_has_lost_no_node(tmp_path: Path) -> None:
    """Its nodes go one by one while ranks on the others still save."""
    attempt = RunLayout(tmp_path).stage("stage1").attempt(1)
    attempt.root.mkdir(parents=True)
    slurm = FakeSlurm(nodes="n1", num_nodes=1)
    slurm.now = dataclasses.replace(slurm.now, nodes="n[1-2]", batch_host="n1")
    with Requests() as requests:
        allocation = Allocation(slurm, attempt, requests, 300.0, Log("stage1", io.StringIO()))
        allocation.launch_begins({"n2"})
        assert allocation.lost_nodes() == []
        allocation._nodes = {"n1", "n2"}
        for state, lost in (("COMPLETING", []), ("RUNNING", ["n2"])):
            allocation._seen = dataclasses.replace(slurm.now, nodes="n1", state=state)
            assert allocation.lost_nodes() == lost
        allocation.end()


def test_slurm_is_asked_once_more_which_nodes_are_left(tmp_path: Path) -> None:
    attempt = RunLayout(tmp_path).stage("stage1").attempt(1)
    attempt.root.mkdir(parents=True)
    slurm = FakeSlurm(nodes="n[1-2]", num_nodes=2)
    with Requests() as requests:
        allocation = Allocation(slurm, attempt, requests, 300.0, Log("stage1", io.StringIO()))
        allocation.launch_begins(set())
        slurm.now = dataclasses.replace(slurm.now, nodes="n1", num_nodes=1)
        assert allocation.lost_nodes() == []
        assert allocation.lost_nodes(ask=True) == ["n2"]
        allocation.end()


@pytest.mark.parametrize("told", [True, False])
def test_a_node_that_slurm_gives_up_between_two_launches_is_told_once(tmp_path: Path, told: bool) -> None:
    attempt = RunLayout(tmp_path).stage("stage1").attempt(1)
    attempt.root.mkdir(parents=True)
    slurm, output = FakeSlurm(nodes="n[1-2]", num_nodes=2), io.StringIO()
    with Requests() as requests:
        allocation = Allocation(slurm, attempt, requests, 300.0, Log("stage1", output))
        allocation.launch_begins(set())
        slurm.now = dataclasses.replace(slurm.now, nodes="n1", num_nodes=1)
        if told:
            assert allocation.lost_nodes(ask=True) == ["n2"]  # then it is the launch's failure
        allocation.launch_begins(set())
        allocation.launch_begins(set())
        allocation.end()
    assert output.getvalue().count("the node n2 was lost; this launch goes without it") == (0 if told else 1)


def test_the_code_is_frozen_where_there_is_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = frozen.freeze(RunLayout(tmp_path), "job 7")
    assert (found.commit, found.changed, found.new) == (None, False, True)
    assert (found.folder / "pixart_ds" / "cli.py").exists()
    assert frozen.freeze(RunLayout(tmp_path), "job 7").new is False


def test_jobs_that_wait_are_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    output = io.StringIO()
    run = create_run(tmp_path / "run", load_chain("smoke/chain"), "smoke/chain")
    assert afterwards.nothing_to_do(FakeSlurm(), run, "stage1", Log("stage1", output)) == 0
    assert "left as they are: squeue: Unable to contact slurm controller" in output.getvalue()
    assert (
        f"stage2 is not released: squeue: Unable to contact slurm controller; `pixart-ds chain {run.root}`"
        in output.getvalue()
    )
