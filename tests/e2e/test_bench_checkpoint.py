"""The benchmark saves and loads in both ways, finds everything as it was saved, and says what it took."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/bench_checkpoint.py"
pytestmark = pytest.mark.e2e


def test_a_round_of_both_and_the_figures_are_there(tmp_path: Path) -> None:
    command = [sys.executable, TOOL, "--net", "tiny", "--rounds", "1", "--other", "1", "--folder", tmp_path, "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    ratios = {
        "stall_ratio": ("stall_s", "peer_save_s"),
        "reshard_ratio": ("load_other_s", "load_s"),
        "universal_ratio": ("load_other_s", "peer_universal_s"),
    }
    for name, (own, other) in ratios.items():
        assert found[name] == found[own] / found[other]
        assert found["spread"][name] == [found[name], found[name]]
    seconds = {key for key in found if key.endswith("_s")}
    assert {"first_stall_s", "commit_s", "load_s", "peer_load_s", "settle_s", "step_s", "step_beside_s"} < seconds
    assert all(found[key] > 0 for key in {*ratios, *seconds, "parameters", "bytes", "peer_bytes"})
    assert all(found[key] >= 0 for key in found if key.endswith("_mb"))
    assert (found["ranks"], found["other"], found["rounds"]) == (2, 1, 1)
    assert not list(tmp_path.iterdir())
