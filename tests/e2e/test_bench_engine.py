"""The benchmark of the ways to reduce gradients runs, and ours is the exact one that no number of micro-batches breaks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/bench_engine.py"
pytestmark = pytest.mark.e2e


def test_ours_is_exact_and_the_figures_are_there() -> None:
    options = ["--params", "5e4", "--rounds", "1", "--micro-batches", "4", "--way", "coalesced", "--way", "each"]
    command = [sys.executable, TOOL, *options, "--precision", "bf16", "--precision", "fp16", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    rows = {(row["precision"], row["way"]): row for row in found["rows"]}
    ways = ("once32", "coalesced", "each")
    assert list(rows) == [(precision, way) for precision in ("bf16", "fp16") for way in ways]
    for row in rows.values():
        signs = ("backward_s", "step_s", "forward_s", "cpu_s", "ratio_median", "cpu_ratio_median")
        assert all(row[key] > 0 for key in (*signs, "calls", "sent_mb", "memory_mb", "error"))
        assert row["ratio_low"] <= row["ratio_median"] <= row["ratio_high"]
    for precision in ("bf16", "fp16"):
        ours, *others = (rows[precision, way] for way in ways)
        assert ours["error"] < 1e-6
        assert all(ours["error"] < row["error"] / 100 and ours["sent_mb"] < 1.01 * row["sent_mb"] for row in others)
        ours_calls = ours["large_calls"]
        assert sum(count for name, (count, _) in ours_calls.items() if name.startswith("reduce_scatter")) == 1
        assert "all_reduce" not in ours_calls
        assert rows[precision, "each"]["large_calls"]["all_reduce"][0] == 4
    assert found["worst_error"] == max(rows[precision, "once32"]["error"] for precision in ("bf16", "fp16"))
    assert found["ratio_median"] == max(rows["bf16", way]["ratio_median"] for way in ways[1:])

    uneven = {(row["missing"], row["way"]): row for row in found["uneven"]}
    assert len(uneven) == 6
    assert all(uneven[missing, "once32"]["error"] < 1e-6 for missing in ("fewer", "none"))
    for missing, way in (("fewer", "each"), ("none", "coalesced")):
        assert not uneven[missing, way]["works"], f"DeepSpeed can do it now: mend docs/deepspeed.md ({missing}, {way})"
        assert "exit code" in uneven[missing, way]["told"]
