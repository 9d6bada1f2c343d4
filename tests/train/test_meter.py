"""What a step is measured to be: losses by timestep, rates, time left; in rows, in the line for people, and in status."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pixart_ds import files
from pixart_ds.cluster.status import run_status
from pixart_ds.config.freeze import create_run
from pixart_ds.config.schema import ChainConfig, StageConfig
from pixart_ds.diffusion.loss import Losses
from pixart_ds.engine.agree import Agreement
from pixart_ds.engine.world import World
from pixart_ds.errors import ConfigError
from pixart_ds.layout import AttemptLayout, RunLayout
from pixart_ds.log import Log
from pixart_ds.plan.counts import Net, training_flops
from pixart_ds.plan.work import Work
from pixart_ds.train import meter as meters
from pixart_ds.train.figures import QUARTERS, Figures, peak_flops, row_of, work_in
from pixart_ds.train.forecast import Forecast, images_ahead
from pixart_ds.train.meter import Meter
from pixart_ds.train.previews import Previews, held_wishes
from pixart_ds.train.sets import open_sets
from pixart_ds.train.state import TrainState
from tests.helpers.sets import tiny_set
from tests.train.test_start import stage_of

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)


def stage_with(data: Path, **changes: Any) -> StageConfig:
    values = stage_of(data, {"source": "scratch"}).model_dump()
    return StageConfig.model_validate({**values, **changes})


def micro_batch(timesteps: list[int], lengths: tuple[int, ...], size: tuple[int, int] = (4, 4)) -> Any:
    latents = torch.zeros(len(timesteps), 4, *size)
    return SimpleNamespace(latents=latents, timesteps=torch.tensor(timesteps), caption_lengths=lengths)


def losses(*values: float) -> Losses:
    total = torch.tensor(values)
    return Losses(total, total / 2, total / 2)


def agreed_of(ranks: list[Figures], samples: int) -> Agreement:
    sums, each = [rank.sums() for rank in ranks], [rank.each() for rank in ranks]
    total = {name: sum(one[name] for one in sums) for name in sums[0]}
    own = {name: [one[name] for one in each] for name in each[0]}
    return Agreement(False, False, 0, 0, samples, total, own)


def test_losses_by_quarter_of_the_timesteps(tmp_path: Path) -> None:
    stage = stage_with(tmp_path)
    ranks = [Figures(stage, CPU) for _ in range(3)]  # the last one has nothing to do
    ranks[0].add(micro_batch([0, 249, 250], (1, 2, 3)), losses(1.0, 2.0, 4.0))
    ranks[0].add(micro_batch([999], (2,)), losses(8.0))
    ranks[1].add(micro_batch([499, 750], (5, 9)), losses(6.0, 10.0))
    ranks[1].waited(0.25)
    row = row_of(agreed_of(ranks, 6))
    assert [row[name] for name in QUARTERS] == [1.5, 5.0, None, 9.0]
    assert QUARTERS == ("loss_t0_250", "loss_t250_500", "loss_t500_750", "loss_t750_1000")
    assert (row["loss"], row["mse"]) == (31 / 6, 31 / 12)
    assert row["data_wait_s"] == 0.25
    assert row["memory_bytes_most"] >= row["memory_bytes"] > 0
    work = work_in(agreed_of(ranks, 6))
    assert (work.images, work.image_tokens, work.text_tokens) == (6, 6 * 4, 22)
    bare = training_flops(Net(**{**vars(Net.of(stage.model)), "tokens": 4, "text": 0}))
    assert 6 * bare < work.model_flops < work.hardware_flops


def test_a_loss_that_is_no_number_spoils_its_own_quarter_only(tmp_path: Path) -> None:
    figures = Figures(stage_with(tmp_path), CPU)
    figures.add(micro_batch([10, 600], (1, 1)), losses(math.nan, 3.0))
    row = row_of(agreed_of([figures], 2))
    assert math.isnan(row["loss"])
    assert math.isnan(row["loss_t0_250"])
    assert (row["loss_t250_500"], row["loss_t500_750"]) == (None, 3.0)


def test_the_slowest_rank_is_named() -> None:
    names = ("loss", "mse", "vlb", *QUARTERS, *(f"{name}_samples" for name in QUARTERS))
    each = {
        "ready_s": [1.0, 3.0, 2.0],
        "data_wait_s": [0, 0, 0.5],
        "memory_bytes": [5, 6, 7],
        "reserved_bytes": [8, 8, 8],
    }
    row = row_of(Agreement(False, False, 0, 0, 4, dict.fromkeys(names, 1.0), each))
    assert (row["ready_s"], row["ready_s_least"], row["slowest_rank"], row["data_wait_s"]) == (3.0, 1.0, 1, 0.5)
    assert (row["memory_bytes"], row["memory_bytes_most"], row["reserved_bytes"]) == (5, 7, 8)


def test_time_left_is_by_the_pace_since_the_first_step() -> None:
    forecast = Forecast(1000, images_ahead=500)
    forecast.record(100, 50.0)  # the first step held the start
    assert (forecast.seconds_left, forecast.chain_seconds_left) == (None, None)
    forecast.record(200, 60.0)
    forecast.record(300, 80.0)  # a save was in it
    assert forecast.seconds_left == pytest.approx(700 * 30 / 200)
    assert forecast.chain_seconds_left == pytest.approx(1200 * 30 / 200)


def test_later_stages_count_by_their_flops(tmp_path: Path) -> None:
    first = stage_with(tmp_path, name="a")
    larger = stage_with(tmp_path, name="b", length={"steps": 8}, model={**first.model.model_dump(), "base_size": 4})
    last = stage_with(tmp_path, name="c")
    run = create_run(tmp_path / "run", ChainConfig(name="n", stages=(first, larger, last)), "n")
    ratio = training_flops(Net.of(larger.model)) / training_flops(Net.of(first.model))
    assert ratio > 2
    assert images_ahead(run, first) == pytest.approx(32 * ratio + 16)
    assert images_ahead(run, last) == 0
    files.write_json(run.stage("b").done, {})
    assert images_ahead(run, first) == pytest.approx(16)


def test_rows_line_and_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_with(tmp_path, length={"steps": 10})
    run = create_run(tmp_path / "run", ChainConfig(name="n", stages=(stage,)), "n")
    attempt, stream, now = run.stage("s").attempt(1), io.StringIO(), [100.0]
    attempt.root.mkdir(parents=True)
    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])
    row = {"loss": 0.5, "applied": True, "grad_norm": math.inf, "checkpoint_stall_s": 0.1}
    state = TrainState()
    options: dict[str, Any] = {"world_size": 2, "launch": 1, "peak_flops": 2e12, "images_ahead": 40.0}
    with Meter(attempt, stage, Log("s", stream), active=True, **options) as meter:
        for seconds in (30.0, 2.0, 25.0):
            now[0] += seconds
            state.advance(4, applied=True)
            meter.record(state, row, Work(4, 64, 20, 1e12, 1.5e12), digest=1)
        meter.picture("previews/ema", np.zeros((4, 4, 3), np.uint8), 12)
        assert meter.smooth_loss == 0.5
    rows = list(files.read_json_lines(attempt.metrics))
    assert rows[1] == {
        "images_seen": 8, "step": 2, "seconds": 2.0, "loss": 0.5, "applied": True, "grad_norm": None,
        "checkpoint_stall_s": 0.1, "skipped_steps": 0, "images_per_second": 2.0, "images_per_second_per_rank": 1.0,
        "image_tokens_per_second": 32.0, "text_tokens_per_second": 10.0, "model_tflops_per_rank": 0.25, "mfu": 0.25,
        "hfu": 0.375, "seconds_left": 16.0, "chain_seconds_left": 36.0,
    }  # fmt: skip
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # more than 20 s lay between the first and the last step
    assert " 30%  12 of 40 images  loss 0.5000  " in lines[-1]
    assert " a rank)  MFU 2.8%  1 min 34 s left (3 min 50 s to the chain's end)" in lines[-1]
    (shown,) = run_status(run)["stages"]
    assert (shown["seconds_left"], shown["chain_seconds_left"]) == (94.5, 229.5)


def test_a_cpu_has_no_peak_and_says_so() -> None:
    stream = io.StringIO()
    assert peak_flops(SimpleNamespace(precision="fp32"), ALONE, Log("s", stream)) is None  # type: ignore[arg-type]
    assert "MFU" not in stream.getvalue(), "of CPUs nobody asks it"


def test_previews_need_prompts_and_a_vae(tmp_path: Path) -> None:
    prepared = tiny_set(tmp_path / "data")
    stage = stage_with(tmp_path / "data", previews={"every": {"steps": 3}, "seed": 7})
    layout = RunLayout(tmp_path / "run").stage("s")
    with pytest.raises(ConfigError, match="there is no VAE folder v"):
        Previews(stage, prepared, layout, ALONE, Log("s", None))
    quiet = stage_with(tmp_path / "data")
    assert not Previews(quiet, prepared, layout, ALONE, Log("s", None)).due(0, 1000)
    wishes, captions = held_wishes(stage, prepared)
    assert captions == ["a cat"]
    assert [(wish.size, wish.seed) for wish in wishes] == [((32, 32), 7)]
    (tmp_path / "data/prompts.json").write_text("[]")
    with pytest.raises(ConfigError, match="there are no held prompts, which previews.every needs"):
        open_sets(stage)
    assert open_sets(quiet)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Meter(
        AttemptLayout(tmp_path), stage_with(tmp_path), Log("s", None), active=False, world_size=2, launch=1
    ) as meter:
        meter.record(TrainState(), {}, Work(1), digest=0)
        meter.picture("x", np.zeros((1, 1, 3), np.uint8), 0)
        assert meter.smooth_loss is None
    assert not list(tmp_path.iterdir())
