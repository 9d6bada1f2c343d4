"""`make demo SIZE=smoke`: the whole path on real parts, and what a user finds afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pixart_ds import files
from pixart_ds.config.freeze import open_run, read_stage
from pixart_ds.engine.checkpoint import Reader
from pixart_ds.engine.handover import read_handover
from pixart_ds.layout import RunLayout
from tests.helpers.sets import shard_file

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["stage1", "stage2", "stage3_256", "stage3_512", "stage3_1024"]


def call(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pixart_ds", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a smoke demo, and what it printed; through make where this is the checkout's own environment."""
    out = tmp_path_factory.mktemp("demo") / "out"
    if Path(sys.prefix) == ROOT / ".venv":
        answer = subprocess.run(
            ["make", "demo", "SIZE=smoke", f"OUT={out}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    else:
        answer = call("demo", "--size", "smoke", "--out", out)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    return out, answer.stdout


def test_every_stage_is_done_and_one_was_stopped_and_resumed_on_fewer_processes(demo: tuple[Path, str]) -> None:
    out, text = demo
    rows = json.loads(call("status", out / "run", "--json").stdout)["stages"]
    assert [(row["stage"], row["state"]) for row in rows] == [(stage, "done") for stage in STAGES]
    assert [row["outcomes"] for row in rows] == [["done"], ["done"], ["stopped", "done"], ["done"], ["done"]]
    interrupted = RunLayout(out / "run").stage("stage3_256")
    worlds = [files.read_json(attempt.env)["world_size"] for attempt in interrupted.all_attempts()]
    assert worlds == [2, 1]
    assert "stopped on request (SIGTERM)" in text
    assert "resumes on 1 process instead of 2" in text
    outcome = files.read_json(interrupted.attempt(1).outcome)
    assert (outcome["outcome"], outcome["exit_code"]) == ("stopped", 75)


def test_the_audit_runs_through_every_step_once(demo: tuple[Path, str]) -> None:
    for name in STAGES:
        stage = RunLayout(demo[0] / "run").stage(name)
        config = read_stage(open_run(demo[0] / "run"), name)
        lines = [line for attempt in stage.all_attempts() for line in files.read_json_lines(attempt.audit)]
        assert [line["images_seen"] for line in lines] == list(range(32, config.total_images + 1, 32))
        assert all(line["samples"] == 32 and line["applied"] for line in lines)
        assert len({line["digest"] for line in lines}) == len(lines)


def test_checkpoints_are_whole_and_sharded(demo: tuple[Path, str]) -> None:
    stage = RunLayout(demo[0] / "run").stage("stage2")
    (newest, *_) = sorted(stage.checkpoints.iterdir(), reverse=True)
    assert {"COMMITTED", "manifest.json", "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"} == {
        p.name for p in newest.iterdir()
    }
    reader = Reader.at(newest).verify()
    handed = read_handover(stage.handover, "ema")
    stored = reader.state_dict("ema")
    assert set(stored) == set(handed.state)
    assert all((stored[name] == value).all() for name, value in handed.state.items())
    assert (handed.lineage["stage"], handed.lineage["lineage"]["source"]) == ("stage2", "reparameterise")
    assert handed.lineage["lineage"]["from"]["lineage"]["source"] == "scratch"
    assert not [p for p in (demo[0] / "run").rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".bin")]


def test_pictures_pipeline_and_tensorboard_are_there(demo: tuple[Path, str]) -> None:
    out, text = demo
    assert {path.stem for path in (out / "grids").glob("*.png")} == set(STAGES)
    assert (out / "pipeline.png").stat().st_size > 500
    assert json.loads((out / "pipeline/pixart_ds.json").read_text())["stage"] == "stage3_1024"
    assert (out / "pipeline/model_index.json").exists()
    assert list((out / "run/stage2/attempts/0001").glob("events.out.tfevents.*"))
    for words in (
        "Cost of",
        "device-hours",
        "Assumptions:",
        "1,656 V100-days",
        "What the judge reads",
        "Where everything lies:",
        "Next:",
    ):
        assert words in text
    report = json.loads(
        subprocess.run(
            [sys.executable, ROOT / "tools/cost_report.py", out / "run", "--format", "json"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert [len(stage["attempts"]) for stage in report["runs"][0]["stages"]] == [1, 1, 2, 1, 1]
    account = report["account"]
    assert account["kwh"] > 0
    assert sum(account["parts"].values()) == pytest.approx(account["device_seconds"])
    assert account["parts"]["productive"] > 0
    assert account["images_gained"] == sum(stage["total_images"] for stage in report["runs"][0]["stages"])
    page = (out / "run" / "report.html").read_text()
    assert page.count("data:image/") == 5, "a sheet of each stage"


def test_running_it_again_does_nothing_twice(demo: tuple[Path, str]) -> None:
    answer = call("demo", "--size", "smoke", "--out", demo[0])
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("is done already") == 5
    rows = json.loads(call("status", demo[0] / "run", "--json").stdout)["stages"]
    assert [row["attempts"] for row in rows] == [1, 1, 2, 1, 1]


def test_the_next_commands_that_it_prints_work(demo: tuple[Path, str], tmp_path: Path) -> None:
    run = demo[0] / "run"
    picture = tmp_path / "picture.png"
    answer = call(
        "sample", run, "--prompt", "a red circle", "--prompt", "", "--size", "40x56", "--out", picture, "--json"
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) | {"stage": "stage3_1024", "pictures": 2, "size": [40, 56]} == json.loads(
        answer.stdout
    )
    assert picture.stat().st_size > 500
    assert call("sample", run, "--stage", "stage1", "--prompt", "red circle", "--out", picture).returncode == 0
    wrong = call("sample", run, "--stage", "stage1", "--prompt", "pink circle", "--out", picture)
    assert (wrong.returncode, "there is no class 'pink circle'" in wrong.stderr) == (2, True)
    assert call("export", run, "--out", tmp_path / "x", "--dry-run").returncode == 0
    assert not (tmp_path / "x").exists()
    assert call("export", run, "--stage", "stage2", "--weights", "raw", "--out", tmp_path / "x").returncode == 0
    assert json.loads((tmp_path / "x/pixart_ds.json").read_text())["weights"] == "raw"


def test_weights_go_out_of_a_sharded_checkpoint_and_come_back(demo: tuple[Path, str], tmp_path: Path) -> None:
    run = demo[0] / "run"
    (newest, *_) = sorted(RunLayout(run).stage("stage2").checkpoints.iterdir(), reverse=True)
    for weights in ("raw", "ema"):
        out = tmp_path / weights
        assert call("export", newest, "--weights", weights, "--out", out).returncode == 0
        assert call("import", out, "--out", tmp_path / f"back-{weights}").returncode == 0
        stored = Reader.at(newest).state_dict("master" if weights == "raw" else "ema")
        back = read_handover(tmp_path / f"back-{weights}", "raw").state
        assert stored.keys() == back.keys()
        assert all((stored[name] == value).all() for name, value in back.items())
    asked = ("--prompt", "a red circle", "--weights", "ema", "--out")
    for number, source in enumerate((newest, tmp_path / "ema")):
        assert call("sample", source, *asked, tmp_path / f"{number}.png").returncode == 0
    assert call("sample", RunLayout(run).stage("stage2").handover, *asked, tmp_path / "2.png").returncode == 0
    # a new run goes on from them
    sets = ("--set", f"*.data.sets=[{{path: {demo[0] / 'data'}}}]")
    other = ("--set", f"stage2.init={{source: handover, path: {tmp_path / 'back-raw'}, weights: raw}}")
    assert call("create", tmp_path / "run", "--chain", "smoke/chain", *sets, *other).returncode == 0
    answer = call("train", tmp_path / "run", "stage2", "--device", "cpu", "--processes", "1")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "starts from the raw weights of" in answer.stdout
    lineage = read_handover(tmp_path / "run/stage2/handover", "ema").lineage
    assert lineage["lineage"]["from"]["from"]["lineage"]["source"] == "reparameterise"


def test_checkpoints_are_listed_shown_and_verified(demo: tuple[Path, str], tmp_path: Path) -> None:
    run = demo[0] / "run"
    rows = json.loads(call("checkpoint", "list", run, "--json").stdout)
    assert [row["stage"] for row in rows if row["newest"]] == list(STAGES)
    assert all(row["on_line"] for row in rows)
    text = call("checkpoint", "list", run, "--stage", "stage2").stdout
    assert "milestone, to go on from" in text
    assert "stage1" not in text
    newest = next(row["path"] for row in rows if row["stage"] == "stage2" and row["newest"])
    shown = json.loads(call("checkpoint", "show", newest, "--json").stdout)
    assert (shown["images_seen"], shown["world_size"], shown["model"]["kind"]) == (384, 2, "pixart")
    assert "on 2 ranks" in call("checkpoint", "show", newest).stdout
    answer = call("checkpoint", "verify", run)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count(": whole\n") == len(rows)
    copy = Path(shutil.copytree(newest, tmp_path / Path(newest).name))
    part = copy / "rank-00001-of-00002.safetensors"
    data = bytearray(part.read_bytes())
    data[-5] ^= 4
    part.write_bytes(data)
    damaged = call("checkpoint", "verify", copy)
    assert (damaged.returncode, "rank-00001-of-00002.safetensors is damaged" in damaged.stdout) == (5, True)


def test_bad_data_is_told_before_a_process_starts(demo: tuple[Path, str], tmp_path: Path) -> None:
    shard = shard_file(demo[0] / "data", "latents-32-square", 3)
    run = tmp_path / "run"
    sets = f"*.data.sets=[{{path: {demo[0] / 'data'}}}]"
    assert call("create", run, "--chain", "smoke/chain", "--set", sets).returncode == 0
    hidden = shard.with_suffix(".away")
    shard.rename(hidden)
    try:
        answer = call("train", run, "stage1", "--device", "cpu")
        assert answer.returncode == 4
        assert f"{shard} is missing" in answer.stderr
    finally:
        hidden.rename(shard)
    assert (
        call(
            "create", tmp_path / "other", "--chain", "smoke/chain", "--set", sets, "--set", "stage1.model.num_classes=3"
        ).returncode
        == 0
    )
    answer = call("train", tmp_path / "other", "stage1", "--device", "cpu")
    assert answer.returncode == 2
    assert "there are 12 classes, model.num_classes is 3" in answer.stderr
    assert not (run / "stage1/attempts").exists()
