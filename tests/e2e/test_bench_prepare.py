"""The benchmark prepares the same pictures and captions in both ways, finds the same features, and says what each phase took."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/bench_prepare.py"
pytestmark = pytest.mark.e2e


def test_a_round_of_both_and_the_figures_are_there(tmp_path: Path) -> None:
    size = [
        "--pictures",
        "8",
        "--pixels",
        "64",
        "--words",
        "20",
        "--rounds",
        "1",
        "--batches",
        "4",
        "--rows-per-group",
        "4",
    ]
    sizes = ["--real-sizes", "--t5-layers", "1", "--t5-width", "64", "--vae-width", "32"]
    command = [sys.executable, TOOL, *size, *sizes, "--folder", tmp_path, "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)

    for name in (
        "pictures_per_s",
        "captions_per_s",
        "samples_per_s",
        "ratio_pictures",
        "ratio_captions",
        "ratio_whole",
    ):
        assert found[name] > 0
    for passes in found["passes"].values():
        (one,) = passes
        assert sum(one["phases"].values()) == pytest.approx(one["seconds"])
        assert set(one["phases"]) == set(found["phases"])
    ours, peer = found["passes"]["ours"][0]["phases"], found["passes"]["one thread"][0]["phases"]
    assert all(seconds > 0 for seconds in ours.values())
    assert {name for name, seconds in peer.items() if not seconds} == {"plan", "write_markers", "finish", "page"}
    of_pictures = ours["read"] + ours["vae"] + ours["write_latents"]
    assert found["pictures_per_s"] == pytest.approx(8 / of_pictures)

    assert found["features_error"] < 1e-3
    assert found["stored"]["peer_files"] == 3 * 8
    assert sum(found["tokens"].values()) == found["samples"] == 8
    assert found["bytes_per_caption_fp16"] == found["tokens_mean"] * 2 * 4096
    assert found["bytes_per_caption_int8"] == found["tokens_mean"] * (4096 + 4096 // 64 * 2)
    assert found["bytes_per_caption"]["fp16_padded"] == 983_040
    assert found["bytes_per_caption"]["fp32_padded"] == 1_966_080
    assert found["stored"]["ours_caption"] > found["bytes_per_caption_here"]["fp16"]
    assert found["loads"]["text"] >= 1
    assert found["nothing_to_do_ours_s"] > 0
    assert set(found["memory_mb"]) == {"ours with encoders only", "ours", "peer with encoders only", "peer"}
    assert set(found["by_batch"]) == {"4"}
    assert not list(tmp_path.iterdir())
