"""On a real Slurm: a set is prepared by arrays, a task of which is requeued in the middle, as the runbook says it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pixart_ds.data.shards import PreparedSet
from pixart_ds.demo.pictures import write_pictures
from pixart_ds.prepare.pipeline import prepare
from tests.prepare.test_prepare import ENCODERS, config_of, content, overrides, own_captioners
from tests.slurm.cluster import Cluster, until

pytestmark = pytest.mark.slurm


def test_an_array_whose_tasks_are_requeued_makes_the_set(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    write_pictures(tmp_path / "pictures", 80, seed=3)
    more = ("rows_per_group=2", f"{own_captioners(tmp_path)}:Few")
    sets = " ".join(f"--set '{each}'" for each in overrides(tmp_path / "pictures", tmp_path / "set", *more))
    command = f"cd {ENCODERS.parents[2]} && PYTHONPATH={tmp_path} exec {sys.executable} -m pixart_ds prepare smoke/prepare {sets}"
    scan = cluster.sbatch(f"--output={tmp_path}/scan.out", f"--wrap={command} --only scan")

    def array_of(before: str, name: str, only: str = "") -> str:
        return cluster.sbatch(
            f"--dependency=afterok:{before}", "--array=0-2", "--requeue", "--open-mode=append",
            f"--output={tmp_path}/{name}-%a.out", f"--wrap={command} {only} --task $SLURM_ARRAY_TASK_ID/3",
        )  # fmt: skip

    array = array_of(array_of(scan, "captions", "--only caption"), "task")

    def said() -> str:
        return "\n".join(path.read_text()[-1500:] for path in sorted(tmp_path.glob("*.out")))

    parts = tmp_path / "set/parts"
    until(lambda: parts.is_dir() and len(list(parts.iterdir())) >= 3, 120, said)
    cluster.tell("scontrol", "requeue", f"{array}_1")
    until(lambda: not cluster.tell("squeue", "-h", "-j", array), 240, said)
    assert PreparedSet.open(tmp_path / "set").num_samples > 60, said()
    prepare(config_of(tmp_path / "pictures", tmp_path / "whole", *more))
    assert content(tmp_path / "set") == content(tmp_path / "whole")
