"""A node that fails the doctor's quick look is left out by the job that finds it, and by those after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixart_ds import files
from tests.e2e.test_same_run import create
from tests.slurm.cluster import Cluster, Training, site

pytestmark = pytest.mark.slurm

BROKEN = '''"""Python's start-up on every node; on n2 the doctor finds a disk without space."""
import os, sys
if os.environ.get("SLURMD_NODENAME") == "n2" and "doctor" in sys.orig_argv:
    whole = os.statvfs
    class Full:
        def __init__(self, found): self.found = found
        def __getattr__(self, name): return 0 if name in ("f_bavail", "f_bfree") else getattr(self.found, name)
    os.statvfs = lambda path: Full(whole(path))
'''


def test_a_node_that_fails_the_quick_look_is_left_out(cluster: Cluster, small_set: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BROKEN)
    create(tmp_path / "run", small_set, "stage1.length.steps=20")
    more = f"environment: {{OMP_NUM_THREADS: 1, GLOO_SOCKET_IFNAME: lo, PYTHONPATH: {tmp_path / 'site'}}}"
    profile = site(tmp_path, f'{more}\nsbatch: {{nodelist: "n[1-2]"}}')
    training = Training(cluster, tmp_path / "run", profile=profile)
    output = training.wait_end()
    assert "node n2 fails the doctor's quick look: machine.run_space: " in output
    assert files.read_json(training.stage.attempt(1).outcome)["world_size"] == 1
    (row,) = files.read_json_lines(tmp_path / "run" / "bad-nodes.jsonl")
    assert row["node"] == "n2"
    assert "machine.run_space" in row["reason"]
    assert training.outcomes() == ["done"]
