"""The benchmark runs, holds both nets to the same loss, and says what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/bench_model.py"
pytestmark = pytest.mark.e2e


def test_both_nets_take_a_step_and_the_figures_are_there() -> None:
    command = [sys.executable, TOOL, "--batch", "1", "--rounds", "1", "--checkpointing", "each", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert len(found["rows"]) == 3
    assert found["ratio_median"] == found["rows"][0]["ratio_median"] > 0
    assert 0 < found["gemm_share"] < 1.5
    assert "recomputed first 6 (peer all)" in found["rows"][1]["case"]
