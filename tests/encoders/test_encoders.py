"""The encoders on the demo's toy weights: real classes, small nets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pixart_ds.demo.judge import score
from pixart_ds.demo.pictures import WORDS, caption, draw, scenes
from pixart_ds.encoders.latents import KLEncoder
from pixart_ds.encoders.text import T5Encoder
from pixart_ds.errors import ConfigError

ENCODERS = Path(__file__).resolve().parents[2] / "pixart_ds/demo/encoders"


@pytest.fixture(scope="module")
def vae() -> KLEncoder:
    return KLEncoder(str(ENCODERS / "vae"))


@pytest.fixture(scope="module")
def text() -> T5Encoder:
    return T5Encoder(str(ENCODERS / "text"), 40)


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (40, 56)])
def test_pictures_survive_the_latents(vae: KLEncoder, size: tuple[int, int]) -> None:
    random, shown = np.random.default_rng(4), scenes(40, 7)
    images = np.stack([draw(scene, random, *size) for scene in shown])
    moments = vae.encode(images)
    assert moments.shape == (40, 8, size[0] // 4, size[1] // 4)
    mean, std = moments[:, :4], moments[:, 4:]
    assert (std > 0).all()
    again = vae.decode(torch.from_numpy(mean) * vae.scaling_factor)
    assert again.shape == images.shape
    assert score(list(again), shown)["all"] >= 0.95
    assert (mean * vae.scaling_factor).std() == pytest.approx(1, abs=0.25)
    assert (vae.channels, vae.downsampling_factor, vae.shift_factor) == (4, 4, 0.0)


def test_a_batch_changes_no_picture(vae: KLEncoder) -> None:
    images = np.stack([draw(scene, np.random.default_rng(1), 32, 32) for scene in scenes(4, 1)])
    together = vae.encode(images)
    for number in range(4):
        assert np.abs(vae.encode(images[number : number + 1])[0] - together[number]).max() < 1e-4


def test_padding_changes_no_feature(text: T5Encoder) -> None:
    captions = [caption(scene) for scene in scenes(6, 1)] + ["", "a red circle"]
    together = text.encode(captions)
    for each, features in zip(captions, together, strict=True):
        (alone,) = text.encode([each])
        assert features.dtype == np.float16
        assert features.shape == alone.shape == (len(each.split()) + 1, 64)  # one token a word, and </s>
        assert np.abs(alone.astype(np.float32) - features).max() < 2e-3


def test_words_matter_where_they_stand(text: T5Encoder) -> None:
    one, two = text.encode(["a red circle and a blue square", "a blue circle and a red square"])
    assert np.abs(one[2].astype(np.float32) - two[2]).max() > 0.05  # "circle" knows its colour


def test_every_word_is_known_and_long_captions_are_cut_and_counted(text: T5Encoder) -> None:
    tokenizer = text._tokenizer
    assert tokenizer.unk_token_id not in tokenizer(" ".join(WORDS)).input_ids
    assert tokenizer.unk_token_id in tokenizer("a zebra").input_ids
    long = " ".join(["red"] * 50)
    assert len(text.encode([long])[0]) == 40
    assert text.count_truncated([long, "a red circle", " ".join(["red"] * 39)]) == 1


def test_what_is_said_of_folders_that_hold_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no VAE folder"):
        KLEncoder(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        T5Encoder(str(tmp_path), 40)
    with pytest.raises(ConfigError, match="no AutoencoderKL can be loaded"):
        KLEncoder(str(ENCODERS / "text"))


def test_fingerprints_follow_the_files(vae: KLEncoder, text: T5Encoder, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(ENCODERS / "vae", tmp_path / "vae")
    assert KLEncoder(str(tmp_path / "vae")).fingerprint == vae.fingerprint != text.fingerprint
    config = tmp_path / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.', '"scaling_factor": 1.'))
    assert KLEncoder(str(tmp_path / "vae")).fingerprint != vae.fingerprint
