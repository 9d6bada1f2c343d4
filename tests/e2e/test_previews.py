"""Previews while a stage trains: at their interval, in TensorBoard, without a trace in what is trained, and stopped when asked."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from pixart_ds import files
from pixart_ds.engine.agree import gather
from pixart_ds.engine.handover import read_handover
from pixart_ds.engine.world import World
from pixart_ds.layout import RunLayout, StageLayout
from pixart_ds.log import Log
from pixart_ds.model import build
from pixart_ds.train import previews
from pixart_ds.train.previews import Previews
from pixart_ds.train.sets import open_sets
from tests.e2e.test_demo import ROOT, call
from tests.e2e.test_same_run import start, wait_for
from tests.helpers.launch import launch
from tests.helpers.sets import tiny_set
from tests.train.test_meter import stage_with

pytestmark = pytest.mark.e2e

PROMPTS = ["a red circle", "a blue square", "a green triangle", "nothing", "two things"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pixart_ds.demo.pictures import write_pictures

    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder / "pictures", 60, seed=1)
    encoders = ROOT / "pixart_ds/demo/encoders"
    sets = {"source.path": folder / "pictures", "output": folder / "set", "vae": encoders / "vae"}
    sets |= {"text_encoder": encoders / "text", "prompts": PROMPTS}
    words = (word for key, value in sets.items() for word in ("--set", f"{key}={value}"))
    answer = call("prepare", "smoke/prepare", *words)
    assert answer.returncode == 0, answer.stderr
    return folder / "set"


def create(run: Path, data: Path, *more: str) -> RunLayout:
    overrides = [f"*.data.sets=[{{path: {data}}}]", "stage2.init={source: scratch}", "stage2.data.latents=40-buckets"]
    words = (word for each in (*overrides, *more) for word in ("--set", each))
    answer = call("create", run, "--chain", "smoke/chain", *words)
    assert answer.returncode == 0, answer.stderr
    return RunLayout(run)


def trained(run: RunLayout, stage: str) -> StageLayout:
    answer = call("train", run.root, stage, "--device", "cpu", "--processes", "2")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return run.stage(stage)


def rows_of(stage: StageLayout) -> list[dict[str, Any]]:
    return list(files.read_json_lines(stage.attempt(1).metrics))


def test_they_appear_at_their_interval_and_change_nothing(data: Path, tmp_path: Path) -> None:
    with_them = trained(create(tmp_path / "on", data, "stage2.previews.every.steps=4"), "stage2")
    without = trained(create(tmp_path / "off", data), "stage2")
    assert [path.name for path in sorted(with_them.previews.iterdir())] == [
        f"img-{images:012d}.png" for images in (128, 256, 384)
    ]
    assert not without.previews.exists()
    log = with_them.attempt(1).log.read_text()
    assert log.count("images: 5 pictures in ") == 3
    keys = ("loss", "mse", "vlb", "grad_norm", "learning_rate", "loss_t0_250")
    on, off = ([[row[key] for key in keys] for row in rows_of(stage)] for stage in (with_them, without))
    assert on == off
    digests = [[row["digest"] for row in files.read_json_lines(s.attempt(1).audit)] for s in (with_them, without)]
    assert digests[0] == digests[1]
    ends = [read_handover(stage.handover, "ema").state for stage in (with_them, without)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    check_events(with_them)
    check_rows(rows_of(with_them))


def check_events(stage: StageLayout) -> None:
    """TensorBoard's own reader finds scalars, pictures and hparams."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stage.attempt(1).tensorboard), size_guidance={"images": 0, "scalars": 0}).Reload()
    images = events.Images("previews/ema")
    assert [image.step for image in images] == [128, 256, 384]
    sheet = np.asarray(Image.open(stage.preview(384)))
    assert (images[-1].height, images[-1].width) == sheet.shape[:2]
    scalars = events.Tags()["scalars"]
    names = ("loss", "loss_t0_250", "grad_norm", "images_per_second", "data_wait_s", "skipped_steps", "memory_bytes")
    assert {f"train/{name}" for name in names} <= set(scalars)
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx({row["images_seen"]: row["loss"] for row in rows_of(stage)})
    assert "_hparams_/session_start_info" in events.summary_metadata


def check_rows(rows: list[dict[str, Any]]) -> None:
    """Every figure is there, and they agree with each other."""
    assert len(rows) == 12
    for row in rows:
        rounding = 5e-6 / row["seconds"] + 1e-5  # seconds are written to five decimals
        assert row["images_per_second"] == pytest.approx(32 / row["seconds"], rel=rounding)
        assert row["images_per_second_per_rank"] == pytest.approx(row["images_per_second"] / 2, rel=1e-4)
        assert row["image_tokens_per_second"] > row["text_tokens_per_second"] > 0
        assert (row["mfu"], row["hfu"], row["reserved_bytes"]) == (None, None, None)
        assert 0 < row["ready_s_least"] <= row["ready_s"]  # by each rank's own clock
        assert row["slowest_rank"] in (0, 1)
        assert row["memory_bytes_most"] >= row["memory_bytes"] > 1e8
        assert row["skipped_steps"] == 0
    assert rows[0]["seconds_left"] is None
    assert rows[-1]["seconds_left"] == 0
    assert all(row["chain_seconds_left"] > row["seconds_left"] for row in rows[1:])
    assert rows[-1]["checkpoint_stall_s"] > 0


def test_classes_are_drawn_without_prompts(data: Path, tmp_path: Path) -> None:
    run = create(tmp_path / "run", data, "stage1.previews={every: {images: 300}, count: 3, num_inference_steps: 2}")
    stage = trained(run, "stage1")
    assert [path.name for path in stage.previews.iterdir()] == ["img-000000000320.png"]
    assert "previews at 320 images: 3 pictures in " in stage.attempt(1).log.read_text()


def test_a_stop_during_previews_is_honoured(data: Path, tmp_path: Path) -> None:
    run = create(tmp_path / "run", data, "stage2.previews={every: {steps: 4}, num_inference_steps: 1000, count: 5}")
    stage = run.stage("stage2")
    process = start(tmp_path / "run", 2, "stage2")
    wait_for(stage, 1, 128, process)
    time.sleep(1.5)
    process.terminate()
    assert process.wait() == 75, process.stdout.read() if process.stdout else ""
    assert "the previews at 128 images are given up: a stop was asked for" in stage.attempt(1).log.read_text()
    assert files.read_json(stage.attempt(1).stopped)["images_seen"] <= 160
    assert not stage.previews.exists()


def test_what_cannot_be_drawn_is_told_and_ends_no_training(data: Path, tmp_path: Path) -> None:
    run = create(tmp_path / "run", data, "stage2.previews={every: {steps: 6}, scheduler: NoScheduler}")
    stage = trained(run, "stage2")
    log = stage.attempt(1).log.read_text()
    assert log.count("images: diffusers has no scheduler 'NoScheduler'") == 2
    assert not stage.previews.exists()


def draws_with_a_failure(world: World, data: str, where: str) -> list[str]:
    """A sheet for which rank 1 lacks memory; what the rank said, and that the next collective is the same one on all ranks."""
    quiet, stream = stage_with(Path(data)), io.StringIO()
    drawn = Previews(quiet, open_sets(quiet)[0], RunLayout(Path(data)).stage("s"), world, Log("s", stream))
    net = build(quiet.model, fp32_attention=quiet.fp32_attention, attention_backend=quiet.execution.attention_backend)
    weights = dict(net.named_parameters())
    places = [SimpleNamespace(name=name, shape=one.shape, count=one.numel()) for name, one in weights.items()]

    def full(key: str) -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, one) in enumerate(weights.items()):
            whole = one.detach().clone()
            dist.broadcast(whole, number % world.size)
            # what cannot be taken over stands for a copy that fails
            yield name, torch.ones(7, 5, 3, 2) if (where, number, world.rank) == ("gathering", 1, 1) else whole

    def lacking(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    if world.rank == 1:
        if where == "wishes":
            previews.held_wishes = lacking
        if where == "room":
            drawn._make_room = lacking  # type: ignore[method-assign]
    drawn._latents = lambda *_: []  # type: ignore[method-assign]
    drawn._pictures = lambda *_: [] if world.rank else [np.zeros((32, 32, 3), np.uint8)]  # type: ignore[method-assign]
    if where == "pictures":  # two pictures, of which rank 1 has none
        held = previews.held_wishes
        previews.held_wishes = lambda *about: tuple(2 * part for part in held(*about))  # type: ignore[assignment]
    engine: Any = SimpleNamespace(
        layout=SimpleNamespace(places=places), full=full, fixed=lambda: dict(net.named_buffers())
    )
    drawn.draw(engine, 64, SimpleNamespace(picture=lambda *_: None), lambda: False)  # type: ignore[arg-type]
    return [stream.getvalue(), *gather(world, f"rank {world.rank}")]


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["nowhere", "wishes", "room", "gathering", "pictures"])
def test_a_rank_that_lacks_memory_takes_the_others_along_and_ends_no_training(where: str, tmp_path: Path) -> None:
    tiny_set(tmp_path)
    for said, *others in launch(draws_with_a_failure, 2, str(tmp_path), where):
        assert ("no previews at 64 images" in said) == (where != "nowhere"), said
        assert others == ["rank 0", "rank 1"]
