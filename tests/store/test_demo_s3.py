"""`make demo STORE=s3`: the whole path with the prepared set in an object store."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pixart_ds import files
from tests.helpers.s3 import ROOT

pytestmark = pytest.mark.e2e


def pixart(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pixart_ds", *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )


def test_all_stages_train_from_the_store_and_it_stops(tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = pixart("demo", "--size", "smoke", "--store", "s3", "--out", out)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    rows = json.loads(pixart("status", out / "run", "--json").stdout)["stages"]
    assert [row["state"] for row in rows] == ["done"] * 5
    assert re.search(r"sent (\d+) of \1 files", answer.stdout)
    requests = list(files.read_json_lines(out / "store" / "requests.log"))
    names = {path.relative_to(out / "data").as_posix() for path in (out / "data").rglob("*.mds")}
    read = {
        one["path"].removeprefix("/demo/data/") for one in requests if one["method"] == "GET" and one["status"] == 200
    }
    assert names <= read
    assert not [one for one in requests if one["status"] >= 400]
    (lock,) = [path for path in (out / "store").iterdir() if path.name == "lock"]
    subprocess.run(["flock", "--nonblock", lock, "true"], check=True)  # each process of the server would hold it

    last = next(line for line in answer.stdout.splitlines() if "pixart-ds sample" in line).split()
    sampled = pixart("sample", last[2], "--prompt", "a red circle", "--out", tmp_path / "picture.png")
    assert sampled.returncode == 0, sampled.stderr
