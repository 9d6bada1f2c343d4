"""The script of a stage-in job, and what a person is told with it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pixart_ds.cluster.jobs import Place
from pixart_ds.cluster.stage_in_job import StageInJob, notes_of
from pixart_ds.config.load import load_stage
from pixart_ds.config.profile import Profile
from pixart_ds.config.schema import CacheConfig, StageConfig

PLACE = Place(Path("/runs/a b"), Path("/runs/a b/code/0123"), Path("/venv"), Path("/runs/a b/stage2/%j.out"))


def stage_with(cache: CacheConfig) -> StageConfig:
    stage = load_stage("stage2")
    return stage.model_copy(update={"execution": stage.execution.model_copy(update={"cache": cache})})


def job_of(mode: str, **keys: object) -> StageInJob:
    cache = CacheConfig.model_validate({"mode": mode, "folder": "/disk"})
    profile = Profile.model_validate({"description": "a site", "gpus_per_node": 8, "cache": cache, **keys})
    return StageInJob(stage_with(cache), profile, PLACE, ["execution.cache.limit_gb=900"], ["n7"])


@pytest.mark.parametrize(("mode", "nodes"), [("node-persistent", "8"), ("shared", "1")])
def test_each_node_asks_slurm_which_it_is(mode: str, nodes: str) -> None:
    text = job_of(mode, partition="gpu", sbatch={"nodelist": "n[1-8]"}, setup=["module load x"]).render()
    lines = text.splitlines()
    assert f"#SBATCH --nodes={nodes}" in lines
    assert {"#SBATCH --partition=gpu", "#SBATCH --nodelist=n[1-8]", "#SBATCH --exclude=n7"} <= set(lines)
    assert "--gres" not in text
    assert "--exclusive" not in text
    assert lines.index("module load x") < lines.index("source '/runs/a b/code/0123/slurm/setup.sh'")
    assert lines[-1].startswith('exec srun --nodes="$SLURM_JOB_NUM_NODES"')
    assert ('--nodes "$SLURM_NNODES" --node "$SLURM_NODEID"' in lines[-1]) == (mode == "node-persistent")
    assert f"--set execution.cache.mode={mode} --set execution.cache.folder=/disk" in lines[-1]
    assert "--set execution.cache.limit_gb=900" in lines[-1]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_its_name_is_not_that_of_the_job_that_trains() -> None:
    assert job_of("shared").name.endswith("-stage-in")


def test_what_a_person_should_know_of_a_cache_that_stays() -> None:
    job = job_of("node-persistent")
    kept = stage_with(CacheConfig(mode="node-persistent"))
    told = list(notes_of(kept, job.profile))
    assert any("may give the stage other nodes" in note for note in told)
    assert any("$TMPDIR, which many sites make anew" in note for note in told)
    assert not list(notes_of(job.stage, job_of("node-persistent", sbatch={"nodelist": "n1"}).profile))
    assert not list(notes_of(stage_with(CacheConfig(mode="shared")), job.profile))
