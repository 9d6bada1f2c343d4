"""The sbatch files: what their headers must and must not say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pixart_ds.config.load import load_stage

FOLDER = Path(__file__).resolve().parents[1] / "slurm"
STAGES = ("stage1", "stage2", "stage3_256", "stage3_512", "stage3_1024")


def test_there_is_one_for_each_stage() -> None:
    assert {path.stem for path in FOLDER.glob("*.sbatch")} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_header_and_last_line(stage: str) -> None:
    text = (FOLDER / f"{stage}.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    assert {"requeue", "no-kill", "exclusive"} <= set(options)
    assert (options["open-mode"], options["gres"], options["job-name"]) == ("append", "gpu:8", f"pixart-{stage}")
    assert options["signal"].startswith("B:USR1@")
    assert not {"ntasks", "ntasks-per-node", "gpus", "cpus-per-task"} & set(options)  # they freeze the number of nodes
    assert int(options["nodes"]) * 8 == load_stage(stage).paper_gpus
    assert text.rstrip().splitlines()[-1] == f'exec pixart-ds train "$RUN" {stage} --launcher srun --device cuda'
    subprocess.run(["bash", "-n", str(FOLDER / f"{stage}.sbatch")], check=True)
    subprocess.run(["bash", "-n", str(FOLDER / "setup.sh")], check=True)
