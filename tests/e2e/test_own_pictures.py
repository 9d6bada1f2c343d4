"""`make demo IMAGES=folder`: a user's own pictures, and what is said when they are not as they should be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.test_demo import call

pytestmark = pytest.mark.e2e


def pictures(folder: Path, count: int = 24) -> Path:
    """Photographs of two classes, in odd sizes, as a user may have them."""
    random = np.random.default_rng(0)
    for number in range(count):
        place = folder / ("cats" if number % 3 else "dogs") / f"IMG {number}.{'JPG' if number % 2 else 'png'}"
        place.parent.mkdir(parents=True, exist_ok=True)
        size = (int(random.integers(50, 120)), int(random.integers(50, 120)), 3)
        Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(place)
        place.with_suffix(".txt").write_text(f"a photograph of an animal, number {number}")
    return folder


def test_own_pictures_go_the_whole_way(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "mine")
    (folder / "cats" / "IMG 1.JPG").write_bytes((folder / "cats" / "IMG 1.JPG").read_bytes()[:300])
    before = sorted(path.name for path in folder.rglob("*"))
    answer = call("demo", "--size", "smoke", "--images", folder, "--out", tmp_path / "out")
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    assert "the toy VAE has only seen drawn scenes" in answer.stdout
    assert "1 broken pictures were left out" in answer.stdout
    assert "What the judge reads" not in answer.stdout
    skipped = [json.loads(line)["picture"] for line in (tmp_path / "out/data/skipped.jsonl").read_text().splitlines()]
    assert skipped == ["cats/IMG 1.JPG"]
    shown = json.loads(call("status", tmp_path / "out/run", "--json").stdout)
    assert [row["state"] for row in shown["stages"]] == ["done"] * 5
    assert sorted(path.name for path in folder.rglob("*")) == before


@pytest.mark.parametrize("fault", ["no folder", "no picture", "no caption"])
def test_what_is_wrong_is_said_with_exit_code_4(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "mine"
    if fault == "no picture":
        folder.mkdir()
        (folder / "a.txt").write_text("a caption")
    elif fault == "no caption":
        next(iter(pictures(folder, 5).rglob("*3.txt"))).unlink()
    answer = call("demo", "--size", "smoke", "--images", folder, "--out", tmp_path / "out")
    assert answer.returncode == 4
    words = {
        "no folder": "no folder of pictures",
        "no picture": "holds no picture",
        "no caption": "1 of 5 pictures have no caption: ",
    }[fault]
    assert words in answer.stderr
    assert "Traceback" not in answer.stderr
