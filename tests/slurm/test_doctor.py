"""The doctor in the allocations of a real Slurm."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doctor.subjects import make_run
from tests.e2e.test_demo import ROOT
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def doctor(cluster: Cluster, *words: object, nodes: int = 1, task: bool = True) -> str:
    """What the doctor prints in an allocation: as a task on each node, or in the job's script."""
    command = [sys.executable, "-m", "pixart_ds", "doctor", *map(str, words)]
    step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"] if task else []
    out = cluster.root / "doctor.out"
    wrapped = " ".join(map(shlex.quote, [*step, *command]))
    job = cluster.sbatch(
        *("--partition=gpu", f"--nodes={nodes}", "--gres=gpu:8", "--exclusive", "--time=10"),
        *("--requeue", "--signal=B:USR1@20", f"--chdir={ROOT}", f"--output={out}", f"--wrap={wrapped}"),
    )
    return cluster.wait_over(job, out)


def test_the_quick_half_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    text = doctor(cluster, run.root, "stage1", "--quick", "--device", "cpu", "--json", nodes=2)
    said = [json.loads(line) for line in text.splitlines()]
    assert sorted(each["host"] for each in said) == ["n1", "n2"]
    assert {each["verdict"] for each in said} == {"ok"}
    assert {len(each["checks"]) + each.get("left_out", 0) for each in said} == {11}


def test_the_whole_in_a_jobs_script(cluster: Cluster, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    text = doctor(cluster, run.root, "stage1", "--profile", "test-cluster", "--json", task=False)
    said = {check["name"]: check for check in json.loads(text)["checks"]}
    assert {said[f"slurm.{name}"]["verdict"] for name in ("variables", "requeue", "time_limit", "partition")} == {"ok"}
    assert said["slurm.variables"]["evidence"].endswith(", 1 node: n1")
    assert " left of 10 min 00 s, warned 20 s before the end" in said["slurm.time_limit"]["evidence"]
    assert said["slurm.partition"]["evidence"] == "partition gpu: 8 nodes with up to 8 GPUs"


def test_the_gpus_that_a_real_slurm_grants(cluster: Cluster, tmp_path: Path) -> None:
    text = subprocess.run(
        ["srun", "--partition=gpu", "--nodes=1", "--gres=gpu:8", "--exclusive", sys.executable, "-c", _GPUS],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert text.stdout.strip() == "ok 8 of 8 GPUs in CUDA_VISIBLE_DEVICES", text.stderr


_GPUS = (
    "from pixart_ds.doctor.probes import slurm; from pixart_ds.doctor.subject import Subject; "
    "check = slurm.gpus(Subject()); print(check.verdict, check.evidence)"
)
