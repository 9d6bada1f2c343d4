"""The encoders on the demo's toy weights: real classes, small nets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pixart_ds.demo.judge import score
from pixart_ds.demo.pictures import WORDS, caption, draw, scenes
from pixart_ds.encoders.fingerprint import Precision, fingerprint
from pixart_ds.encoders.latents import KLEncoder, LatentsOverflow
from pixart_ds.encoders.text import T5Encoder, keep_in_fp32
from pixart_ds.errors import ConfigError, DataError

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
    assert text.num_tokens([long, "a red circle", "", " ".join(["red"] * 39)]) == [51, 4, 1, 40]


def test_the_empty_caption_is_padded_and_its_padding_has_features(text: T5Encoder) -> None:
    features, mask = text.null()
    assert (features.shape, features.dtype) == ((40, 64), np.float16)
    assert mask.tolist() == [1] + [0] * 39
    assert np.abs(features[:1].astype(np.float32) - text.encode([""])[0]).max() < 2e-3
    assert (np.abs(features).max(1) > 0).all()
    shorter, mask = T5Encoder(str(ENCODERS / "text"), 7).null()
    assert mask.tolist() == [1] + [0] * 6
    assert off(shorter, features[:7]) < 1e-3


def test_captions_are_cleaned_only_where_that_is_asked_for(text: T5Encoder) -> None:
    clean = T5Encoder(str(ENCODERS / "text"), 40, clean=True)
    written = "A <b>red</b> circle &amp;amp; https://example.com/1.png"
    from pixart_ds.encoders.clean import clean_caption

    assert clean.num_tokens([written]) == text.num_tokens([clean_caption(written)]) != text.num_tokens([written])
    assert np.array_equal(clean.encode([written])[0], text.encode([clean_caption(written)])[0])
    assert np.array_equal(clean.null()[0], text.null()[0])
    assert clean.settings == "fp32, cleaned, up to 40 tokens"
    assert text.settings == "fp32, as they are, up to 40 tokens"


def off(one: npt.NDArray[np.float16], two: npt.NDArray[np.float16]) -> float:
    """Relative distance."""
    first, second = one.astype(np.float64), two.astype(np.float64)
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


def t5_with(folder: Path, change: Callable[[torch.nn.Module], None]) -> str:
    """A random T5 v1.1 (gated GELU) with the toy encoder's tokenizer, changed."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    config = T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model = T5EncoderModel(config)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    for file in (ENCODERS / "text").glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


def _enlarge(model: torch.nn.Module) -> None:
    """Outputs of the MLPs' second layers beyond 65504, as those of the published encoders."""
    for name, weight in model.named_parameters():
        if name.endswith("wo.weight"):
            weight.mul_(1e4 / weight.std())
        elif "wi_" in name:
            weight.mul_(0.3 / weight.std())


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_lower_precision_gives_nearly_the_same_features(text: T5Encoder, precision: Precision, bound: float) -> None:
    captions = [caption(scene) for scene in scenes(6, 2)]
    low = T5Encoder(str(ENCODERS / "text"), 40, precision=precision)
    assert low.settings.startswith(precision)
    for one, two in zip(low.encode(captions), text.encode(captions), strict=True):
        assert one.dtype == np.float16
        assert off(one, two) < bound


def test_fp16_stays_right_where_the_second_layers_overflow_it(tmp_path: Path) -> None:
    folder = t5_with(tmp_path / "t5", _enlarge)
    captions = [caption(scene) for scene in scenes(8, 1)]
    full, half = T5Encoder(folder, 40), T5Encoder(folder, 40, precision="fp16")
    outputs: list[torch.Tensor] = []
    layers = [each.wo for each in full._model.modules() if hasattr(each, "wo")]
    hooks = [layer.register_forward_hook(lambda *given: outputs.append(given[2])) for layer in layers]
    wanted = full.encode(captions)
    for hook in hooks:
        hook.remove()
    assert max(float(output.abs().max()) for output in outputs) > 3 * 65504
    kinds = {name.split(".")[-2]: weight.dtype for name, weight in half._model.named_parameters()}
    assert (kinds.pop("wo"), set(kinds.values())) == (torch.float32, {torch.float16})
    assert max(off(one, two) for one, two in zip(half.encode(captions), wanted, strict=True)) < 0.01
    for layer in (each.wo for each in half._model.modules() if hasattr(each, "wo")):
        layer.half()  # as a library would leave them that does not know of it
    # T5's code cuts infinities down: nothing would tell
    assert max(off(one, two) for one, two in zip(half.encode(captions), wanted, strict=True)) > 0.1
    keep_in_fp32(half._model)
    assert max(off(one, two) for one, two in zip(half.encode(captions), wanted, strict=True)) < 0.01


@pytest.mark.parametrize(
    ("precision", "remedy"), [("fp16", "set text_precision to bf16 or fp32"), ("fp32", "look at the encoder's weights")]
)
def test_features_that_fp16_cannot_hold_are_refused_with_the_caption(
    tmp_path: Path, precision: Precision, remedy: str
) -> None:
    def loud(model: torch.nn.Module) -> None:
        """Features of one token, "red", are too large; those before it attend to it with no weight."""
        for name, weight in model.named_parameters():
            if name.endswith("final_layer_norm.weight"):
                weight.fill_(2e4)
            elif name.endswith((".o.weight", "wo.weight")):
                weight.zero_()
        token = json.loads((ENCODERS / "text/tokenizer.json").read_text())["model"]["vocab"]["red"]
        shared = model.get_input_embeddings().weight  # type: ignore[operator]
        shared.fill_(1)
        shared[token] = torch.eye(32)[0]

    encoder = T5Encoder(t5_with(tmp_path / "t5", loud), 40, precision=precision)
    assert encoder.encode(["a blue circle"])[0].max() < 65504
    with pytest.raises(DataError, match="not finite in fp16 for the caption 'a red circle'") as caught:
        encoder.encode(["a blue circle", "a red circle"])
    assert caught.value.remedy == remedy


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 5e-3), ("bf16", 5e-2)])
def test_lower_precision_gives_nearly_the_same_latents(vae: KLEncoder, precision: Precision, bound: float) -> None:
    images = np.stack([draw(scene, np.random.default_rng(1), 32, 32) for scene in scenes(4, 1)])
    low = KLEncoder(str(ENCODERS / "vae"), precision=precision)
    moments = low.encode(images)
    assert moments.dtype == np.float32
    assert (moments[:, 4:] > 0).all()
    assert off(moments[:, :4], vae.encode(images)[:, :4]) < bound
    assert off(moments[:, 4:], vae.encode(images)[:, 4:]) < bound
    assert low.decode(torch.from_numpy(moments[:, :4]) * low.scaling_factor).shape == images.shape


def test_a_vae_that_overflows_fp16_is_refused_with_the_picture_and_what_to_do(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(ENCODERS / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e5)
    vae.save_pretrained(tmp_path / "vae")
    images = np.full((3, 32, 32, 3), 128, np.uint8)  # hardly more than zero
    images[1], images[2, :16] = 255, 0
    with pytest.raises(LatentsOverflow, match="not finite in fp16 for picture 1 of a batch of 3") as caught:
        KLEncoder(str(tmp_path / "vae"), precision="fp16").encode(images)
    assert caught.value.pictures == (1, 2)
    assert "vae_precision: fp32" in str(caught.value)
    assert np.isfinite(KLEncoder(str(tmp_path / "vae"), precision="fp16").encode(images[:1])).all()
    assert np.isfinite(KLEncoder(str(tmp_path / "vae")).encode(images)).all()


def test_what_is_said_of_folders_that_hold_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no VAE folder"):
        KLEncoder(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        T5Encoder(str(tmp_path), 40)
    with pytest.raises(ConfigError, match="no AutoencoderKL can be loaded"):
        KLEncoder(str(ENCODERS / "text"))


def test_fingerprints_follow_the_files(vae: KLEncoder, text: T5Encoder, tmp_path: Path) -> None:
    shutil.copytree(ENCODERS / "vae", tmp_path / "vae")
    assert KLEncoder(str(tmp_path / "vae")).fingerprint == vae.fingerprint != text.fingerprint
    config = tmp_path / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.', '"scaling_factor": 1.'))
    assert KLEncoder(str(tmp_path / "vae")).fingerprint != vae.fingerprint


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")
def test_a_hub_name_is_known_by_the_commit_that_was_loaded(
    text: T5Encoder, vae: KLEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache as a download leaves it: a name of the branch, and a folder for each commit."""
    import huggingface_hub.constants as hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    for kind in ("text", "vae"):
        cached = tmp_path / f"models--owner--{kind}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs/main").write_text(commit)
        shutil.copytree(ENCODERS / kind, cached / "snapshots" / commit)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    named = T5Encoder("owner/text", 40)
    assert named.fingerprint == f"hub:owner/text@{commit}"
    assert np.array_equal(named.encode(["a red circle"])[0], text.encode(["a red circle"])[0])
    assert KLEncoder("owner/vae").fingerprint == f"hub:owner/vae@{commit}"
    assert fingerprint("owner/absent") == "hub:owner/absent"
