"""On a real Slurm: a job that fills caches before a chain; an environment that is unpacked on each node; ranks behind a command."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.e2e.test_demo import call
from tests.e2e.test_same_run import create
from tests.slurm.cluster import Cluster, Training, site

pytestmark = pytest.mark.slurm


def test_a_job_fills_the_caches_and_the_chain_waits_for_it(cluster: Cluster, small_set: Path, tmp_path: Path) -> None:
    """All nodes of the test cluster are one machine, so their caches are one folder: each node fills its lanes' part."""
    run = tmp_path / "run"
    create(run, small_set, "stage1.length.steps=8")
    profile = site(tmp_path, f"cache: {{mode: node-persistent, folder: {tmp_path / 'disk'}}}")
    dry = call("stage-in", run, "stage1", "--profile", profile, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not cluster.tell("squeue", "-h")
    assert "Slurm may give the stage other nodes than this job" in dry.stderr
    urgent = cluster.fill(8)  # so that it can be looked at while it waits
    answer = call("stage-in", run, "stage1", "--profile", profile, "--json")
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert told["script"] == dry.stdout
    job = told["job"]
    assert "stages this stage in already" in call("stage-in", run, "stage1", "--profile", profile).stderr
    chained = call("chain", run, "--profile", profile, "--after", job, "--json")
    assert chained.returncode == 0, chained.stderr
    train = json.loads(chained.stdout)["stages"][0]["jobs"][0]
    assert f"afterok:{job}" in cluster.about(train)["Dependency"]
    cluster.tell("scancel", urgent)
    output = run / "stage1" / "submissions" / "stage-in" / f"{job}.out"
    text = cluster.wait_over(job, output)
    fetched = [line for line in text.splitlines() if " fetched " in line]
    assert sorted(line[:2] for line in fetched) == ["0:", "1:"], text
    assert (output.parent / f"{job}.sbatch").read_text() == told["script"]
    shards = len(list((tmp_path / "disk").rglob("*.mds")))
    assert shards == len(list((small_set / "captions").rglob("*.mds"))) * 2
    cluster.wait_over(train, run / "stage1" / "submissions" / f"{train}.out")
    json_rows = json.loads(call("chain", run, "--profile", profile, "--dry-run", "--json").stdout)
    assert json_rows["stages"][0]["do"] == "nothing"
    call("cancel", run, "--now")


def environment(folder: Path, witness: Path) -> Path:
    """An archive of a small real environment, made at another path: it finds the packages of this one, and says who starts it."""
    made = folder / "made"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    (packages,) = made.glob("lib/python*/site-packages")
    says = f"import os, sys; open({str(witness)!r}, 'a').write(sys.prefix + ' ' + os.environ.get('SLURM_PROCID', '-') + '\\n')"
    (packages / "witness.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{says}\n")
    archive = folder / "env.tar.gz"
    subprocess.run(["tar", "-C", made, "-czf", archive, "."], check=True)
    return archive


def test_an_environment_is_unpacked_once_and_ranks_start_in_it_behind_a_command(
    cluster: Cluster, small_set: Path, tmp_path: Path
) -> None:
    """The command stands for `apptainer exec …`: what follows it is the python on the path, as it is the image's in a container."""
    create(tmp_path / "run", small_set, "stage1.length.steps=8")
    archive, entered = environment(tmp_path, tmp_path / "witness"), tmp_path / "node" / "env"
    wrapper = tmp_path / "in-container"
    wrapper.write_text(f'#!/bin/bash\necho "$X $SLURM_PROCID $*" >>{tmp_path / "started"}\nexec "$@"\n')
    wrapper.chmod(0o755)
    profile = site(
        tmp_path,
        f"setup: ['export NODE_DISK={entered.parent}']\nenvironment_archive: {archive}\n"
        f"environment_folder: $NODE_DISK/env\ncontainer: env X=1 {wrapper}",
    )
    training = Training(cluster, tmp_path / "run", profile=profile)
    text = training.wait_end()
    assert text.count("is unpacked into") == 1, "the second node, which is the same machine, found it there"
    witness = (tmp_path / "witness").read_text().splitlines()
    assert {f"{entered} 0", f"{entered} 1"} <= set(witness), "srun starts each task with the python of that folder"
    started = sorted((tmp_path / "started").read_text().splitlines())
    assert [line.split()[:2] for line in started] == [["1", "0"], ["1", "1"]]
    assert all("python -m pixart_ds.train.rank --run" in line for line in started)
    assert training.audited()
