"""Pictures from wishes, and the sheet that shows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_ds.encoders.latents import KLEncoder
from pixart_ds.errors import ConfigError
from pixart_ds.model import build
from pixart_ds.sampling.generate import Wish, conditions, generate
from pixart_ds.sampling.grid import save_grid
from tests.model.test_nets import randomised, small, small_dit

VAE = str(Path(__file__).resolve().parents[2] / "pixart_ds/demo/encoders/vae")
OPTIONS = {"guidance_scale": 2.0, "num_inference_steps": 3, "scheduler": "DPMSolverMultistepScheduler"}


def features(length: int) -> np.ndarray:
    return np.random.default_rng(length).standard_normal((length, 20)).astype(np.float16)


def test_wishes_of_mixed_sizes_come_back_in_their_sequence() -> None:
    net, vae = randomised(build(small(micro_conditions=True))).eval(), KLEncoder(VAE)
    wishes = [Wish(features(3), (32, 32), 1), Wish(features(5), (24, 40), 2), Wish(features(1), (32, 32), 3)]
    made = generate(net, vae, wishes, null_embeds=features(2), **OPTIONS)
    assert [picture.shape for picture in made] == [(32, 32, 3), (24, 40, 3), (32, 32, 3)]
    alone = generate(net, vae, wishes[2:], null_embeds=features(2), **OPTIONS)[0]
    assert np.abs(alone.astype(int) - made[2]).max() <= 2
    labels = generate(randomised(build(small_dit())).eval(), vae, [Wish(3, (32, 32), 1)], null_embeds=None, **OPTIONS)
    assert labels[0].shape == (32, 32, 3)


def test_conditions_say_the_pictures_own_size_and_the_null_caption_its_own_mask() -> None:
    net = build(small(micro_conditions=True))
    own, null = conditions(net, [Wish(features(3), (24, 48), 1), Wish(features(5), (24, 48), 2)], features(2))
    assert own["caption_mask"].sum(1).tolist() == [3, 5]
    assert null["caption_mask"].tolist() == [[True, True]] * 2
    assert torch.equal(null["caption_embeds"][1], torch.from_numpy(features(2).astype(np.float32)))
    assert own["original_sizes"].tolist() == [[24, 48]] * 2
    assert own["aspect_ratios"].tolist() == [0.5, 0.5]


def test_impossible_sizes_are_refused() -> None:
    net, vae = build(small()), KLEncoder(VAE)
    with pytest.raises(ConfigError, match="a picture of 30x32 pixels cannot be made") as caught:
        generate(net, vae, [Wish(features(1), (30, 32), 0)], null_embeds=features(1), **OPTIONS)
    assert "multiples of 8" in str(caught.value)


def test_grid_shows_every_picture_and_colours_the_verdicts(tmp_path: Path) -> None:
    red, blue = np.zeros((32, 32, 3), np.uint8), np.zeros((24, 48, 3), np.uint8)
    red[..., 0], blue[..., 2] = 200, 200
    save_grid(
        [red, blue, red],
        ["one", "two", "three"],
        tmp_path / "a" / "grid.png",
        columns=2,
        cell=64,
        right=[True, False, None],
        title="t",
    )
    sheet = np.asarray(Image.open(tmp_path / "a" / "grid.png").convert("RGB")).astype(int)
    assert (np.abs(sheet - (200, 0, 0)).sum(-1) == 0).sum() == 2 * 64 * 64
    assert (np.abs(sheet - (0, 0, 200)).sum(-1) == 0).sum() == 64 * 32
    for colour in ((32, 132, 68), (190, 60, 50), (40, 40, 44)):
        assert (np.abs(sheet - colour).sum(-1) == 0).any()
