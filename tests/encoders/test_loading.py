"""What is said of models whose weights are damaged, missing or of another kind, with the real classes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_ds.config.schema import CaptionsConfig
from pixart_ds.encoders.captions import LlavaCaptioner
from pixart_ds.encoders.latents import KLEncoder
from pixart_ds.encoders.text import T5Encoder, text_facts
from pixart_ds.errors import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from make_tiny_llava import make_tiny_llava

ENCODERS = Path(__file__).resolve().parents[2] / "pixart_ds/demo/encoders"
Load = Callable[[Path], object]
Damage = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def t5(folder: Path) -> T5Encoder:
    return T5Encoder(str(folder), 40)


def vae(folder: Path) -> KLEncoder:
    return KLEncoder(str(folder))


def llava(folder: Path) -> LlavaCaptioner:
    return LlavaCaptioner(CaptionsConfig(captioner="llava", model=str(folder), precision="fp32"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Load, Path]:
    made = tmp_path_factory.mktemp("llava")
    make_tiny_llava(made)
    return {t5: ENCODERS / "text", vae: ENCODERS / "vae", llava: made}


@pytest.fixture(params=[t5, vae, llava])
def load(request: pytest.FixtureRequest) -> Load:
    chosen: Load = request.param
    return chosen


def copy_of(folder: Path, to: Path, damage: Damage) -> Path:
    """A model with other weights."""
    shutil.copytree(folder, to)
    (path,) = to.glob("*.safetensors")
    save_file({name: weight.clone() for name, weight in damage(load_file(path)).items()}, path, {"format": "pt"})
    return to


def test_a_checkpoint_without_some_weights_is_refused(load: Load, models: dict[Load, Path], tmp_path: Path) -> None:
    kept: list[str] = []

    def without_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept.append(next(name for name in sorted(weights) if weights[name].ndim > 1))
        return {name: weight for name, weight in weights.items() if name != kept[0]}

    with pytest.raises(ConfigError, match="lacks 1 weights of a ") as caught:
        load(copy_of(models[load], tmp_path / "lacks", without_one))
    assert kept[0].rsplit(".", 2)[-2] in str(caught.value)
    with pytest.raises(ConfigError, match=r"lacks \d+ weights of a .*, the first is "):
        load(
            copy_of(
                models[load], tmp_path / "prefixed", lambda weights: {f"_orig_mod.{k}": v for k, v in weights.items()}
            )
        )


def test_weights_that_cannot_be_read_are_refused(load: Load, models: dict[Load, Path], tmp_path: Path) -> None:
    cut = Path(shutil.copytree(models[load], tmp_path / "cut"))
    (path,) = cut.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match="can be loaded from"):
        load(cut)
    reshaped = copy_of(
        models[load],
        tmp_path / "reshaped",
        lambda weights: {k: v[:1] if v.ndim > 1 else v for k, v in weights.items()},
    )
    with pytest.raises(ConfigError, match="can be loaded from"):
        load(reshaped)


def test_a_model_of_another_kind_is_no_t5(tmp_path: Path) -> None:
    from transformers import BartConfig, BartModel, UMT5Config, UMT5EncoderModel

    other = UMT5EncoderModel(UMT5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=64))
    other.save_pretrained(tmp_path / "umt5")
    with pytest.raises(ConfigError, match="umt5 is no T5 encoder: it is a umt5"):
        text_facts(str(tmp_path / "umt5"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ENCODERS / "text" / name, tmp_path / "umt5" / name)
    with pytest.raises(ConfigError, match="has no place, encoder.block.1.layer.0.SelfAttention.relative"):
        t5(tmp_path / "umt5")
    BartModel(BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=64)).save_pretrained(
        tmp_path / "bart"
    )
    with pytest.raises(ConfigError, match="bart is no T5 encoder: it is a bart"):
        text_facts(str(tmp_path / "bart"))


def test_a_whole_t5_with_its_decoder_gives_what_its_encoder_gives(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, T5ForConditionalGeneration

    whole = T5ForConditionalGeneration(AutoConfig.from_pretrained(ENCODERS / "text"))
    whole.save_pretrained(tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ENCODERS / "text" / name, tmp_path / "whole" / name)
    (features,) = t5(tmp_path / "whole").encode(["a red circle"])
    tokens = AutoTokenizer.from_pretrained(ENCODERS / "text")(["a red circle"], return_tensors="pt")
    with torch.no_grad():
        (wanted,) = whole.eval().get_encoder()(**tokens).last_hidden_state.numpy()
    np.testing.assert_allclose(features, wanted, rtol=2e-3, atol=2e-3)  # fp16 holds so much
