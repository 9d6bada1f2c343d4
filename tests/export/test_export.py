"""Names both ways, and an exported folder that makes our picture in diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pixart_ds.encoders.latents import KLEncoder
from pixart_ds.encoders.text import T5Encoder
from pixart_ds.errors import CheckpointError, ConfigError
from pixart_ds.export.diffusers import export_pipeline, pipeline_of, sample_export, transformer_of
from pixart_ds.model import build
from pixart_ds.model.names import from_diffusers, to_diffusers
from pixart_ds.sampling.generate import Wish, generate
from tests.model.test_nets import SIZES, inputs, randomised, small, small_dit

ENCODERS = Path(__file__).resolve().parents[2] / "pixart_ds/demo/encoders"


@pytest.mark.parametrize("micro", [False, True])
def test_names_go_both_ways_bit_by_bit(micro: bool) -> None:
    state = dict(randomised(build(small(micro_conditions=micro))).state_dict())
    there = to_diffusers({**state, "pos_embed": torch.zeros(1, 4, 48)})
    back = from_diffusers({**there, "pos_embed.pos_embed": torch.zeros(1)})
    assert set(back) == set(state) - {"y_embedder.y_embedding"}
    assert all(torch.equal(value, state[name]) for name, value in back.items())
    transformer = transformer_of(small(micro_conditions=micro), state)
    assert set(there) == set(transformer.state_dict()) - {"pos_embed.pos_embed"}


def test_every_key_that_does_not_belong_is_named() -> None:
    state = dict(build(small()).state_dict())
    state["blocks.1.attn.q_norm.weight"] = state.pop("blocks.0.mlp.fc1.bias")
    with pytest.raises(CheckpointError) as caught:
        to_diffusers(state)
    assert "missing: blocks.0.mlp.fc1.bias" in str(caught.value)
    assert "extra: blocks.1.attn.q_norm.weight" in str(caught.value)
    with pytest.raises(CheckpointError, match="not a diffusers PixArt state"):
        from_diffusers({"x": torch.zeros(1)})


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_the_exported_transformer_is_our_net_at_any_size(micro: bool, scale: float) -> None:
    config = small(micro_conditions=micro, base_size=6, interpolation_scale=scale)
    net = randomised(build(config))
    twin = transformer_of(config, dict(net.state_dict()))
    for height, width in ((12, 12), (8, 14), (10, 4)):
        batch = inputs(height, width)
        sizes = SIZES if micro else {}
        added = {
            "resolution": sizes.get("original_sizes"),
            "aspect_ratio": SIZES["aspect_ratios"][:, None] if micro else None,
        }
        with torch.no_grad():
            ours = net(**batch, **sizes)
            theirs = twin(
                batch["latents"], encoder_hidden_states=batch["caption_embeds"], timestep=batch["timesteps"],
                encoder_attention_mask=batch["caption_mask"], added_cond_kwargs=added,
            ).sample  # fmt: skip
        assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()


def exported(folder: Path, micro: bool) -> tuple[Any, Any]:
    config = small(caption_channels=64, max_tokens=40, micro_conditions=micro, base_size=6, interpolation_scale=1.5)
    net = randomised(build(config))
    export_pipeline(
        folder,
        config,
        dict(net.state_dict()),
        vae=str(ENCODERS / "vae"),
        text_encoder=str(ENCODERS / "text"),
        about={"stage": "x"},
    )
    return config, net


@pytest.mark.parametrize(
    ("micro", "scheduler"),
    [
        (False, "DPMSolverMultistepScheduler"),
        (True, "DPMSolverMultistepScheduler"),
        (True, "DDIMScheduler"),
        (True, "DDPMScheduler"),
    ],
)
def test_the_pipelines_picture_is_ours(tmp_path: Path, micro: bool, scheduler: str) -> None:
    _, net = exported(tmp_path / "pipeline", micro)
    prompt, size = "a large red circle at the top left on a white background", (40, 56)
    theirs = sample_export(
        tmp_path / "pipeline", prompt, size, guidance_scale=2.0, num_inference_steps=6, seed=3, scheduler=scheduler
    )
    text = T5Encoder(str(ENCODERS / "text"), 40)
    features, (null, mask) = text.encode([prompt])[0], text.null()
    ours = generate(
        net.eval(), KLEncoder(str(ENCODERS / "vae")), [Wish(features, size, 3)], null_embeds=null[: mask.sum()],
        guidance_scale=2.0, num_inference_steps=6, scheduler=scheduler,
    )[0]  # fmt: skip
    assert ours.shape == theirs.shape == (40, 56, 3)
    assert np.abs(ours.astype(int) - theirs).mean() < 1.0  # features are rounded to fp16 on our side
    assert ours.std() > 5


def test_the_pipelines_negative_prompt_is_our_empty_caption() -> None:
    config = small(caption_channels=64, max_tokens=40)
    pipeline = pipeline_of(config, dict(build(config).state_dict()), str(ENCODERS / "vae"), str(ENCODERS / "text"))
    _, _, theirs, their_mask = pipeline.encode_prompt("a red circle", max_sequence_length=40)
    null, mask = T5Encoder(str(ENCODERS / "text"), 40).null()
    assert np.array_equal(their_mask[0].numpy(), mask)
    assert np.array_equal(theirs[0].detach().numpy().astype(np.float16), null)  # of the padding too


def test_an_export_replaces_its_like_and_nothing_else(tmp_path: Path) -> None:
    exported(tmp_path / "pipeline", False)
    assert json.loads((tmp_path / "pipeline/pixart_ds.json").read_text()) == {"stage": "x"}
    exported(tmp_path / "pipeline", False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipeline"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("…")
    with pytest.raises(ConfigError, match="not empty and no earlier export"):
        exported(tmp_path / "other", False)
    assert (tmp_path / "other/thesis.tex").exists()
    with pytest.raises(ConfigError, match="only PixArt nets can be exported"):
        export_pipeline(tmp_path / "dit", small_dit(), {}, vae="", text_encoder="", about={})
