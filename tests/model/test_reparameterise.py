"""DiT as PixArt: equal at the chosen timestep without label and text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pixart_ds.config.schema import ModelConfig
from pixart_ds.errors import CheckpointError
from pixart_ds.model import build, initialise, reparameterise
from tests.model.test_nets import randomised, small, small_dit


def outputs(
    pair: tuple[ModelConfig, ModelConfig], at: int, asked: float, side: int = 8, shared: Any = "first"
) -> tuple[torch.Tensor, torch.Tensor]:
    """DiT's output without its label, and the re-parameterised PixArt's."""
    dit, pixart = randomised(build(pair[0])), build(pair[1])
    initialise(pixart, 0)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if "x_embedder" not in name and "bias" not in name:
                parameter.mul_(0.02 / 0.15 if pair[0].hidden_size > 1000 else 1)
        dit.y_embedder.embedding_table.weight.zero_()  # the label is left out of S⁽ⁱ⁾ (paper §2.3)
        pixart.load_state_dict(reparameterise(dit.state_dict(), pixart.state_dict(), at=at, shared_modulation=shared))
        x, t = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(5)), torch.full((2,), asked)
        captions = pair[1].caption_channels or 0
        return dit(x, t, torch.tensor([0, 1])), pixart(
            x, t, torch.randn(2, 3, captions), torch.ones(2, 3, dtype=torch.bool)
        )


@pytest.mark.parametrize("shared", ["first", "mean", 2])
@pytest.mark.parametrize("at", [500, 100])
def test_both_nets_agree_at_the_chosen_timestep(at: int, shared: Any) -> None:
    one, two = outputs((small_dit(depth=4), small(depth=4)), at, float(at), shared=shared)
    assert (one - two).abs().max() < 1e-4 * one.abs().max()


def test_they_differ_elsewhere() -> None:
    one, two = outputs((small_dit(depth=4), small(depth=4)), 500, 900.0)
    assert (one - two).norm() > 1e-2 * one.norm()


def test_both_nets_agree_at_the_papers_width() -> None:
    pair = (
        ModelConfig(kind="dit", depth=2, num_classes=10),
        ModelConfig(kind="pixart", depth=2, caption_channels=64, max_tokens=4),
    )
    one, two = outputs(pair, 500, 500.0)
    assert one.abs().max() > 1e-3
    assert (one - two).abs().max() < 1e-4 * one.abs().max()


def test_the_first_block_carries_the_shared_modulation_and_text_parts_are_new() -> None:
    dit, pixart = randomised(build(small_dit())), build(small())
    initialise(pixart, 7)
    state = reparameterise(dit.state_dict(), pixart.state_dict())
    assert torch.equal(state["t_block.1.weight"], dit.state_dict()["blocks.0.adaLN_modulation.1.weight"])
    assert not state["blocks.0.scale_shift_table"].any()
    assert state["blocks.1.scale_shift_table"].any()
    assert torch.equal(state["final_layer.linear.weight"], dit.state_dict()["final_layer.linear.weight"])
    for name in ("blocks.1.cross_attn.kv_linear.weight", "y_embedder.y_proj.fc1.weight", "y_embedder.y_embedding"):
        assert torch.equal(state[name], pixart.state_dict()[name])
    assert set(state) == set(pixart.state_dict())


@pytest.mark.parametrize(("shared", "number"), [("first", 0), (0, 0), (1, 1)])
def test_the_shared_modulation_is_the_named_blocks(shared: Any, number: int) -> None:
    dit, pixart = randomised(build(small_dit())), build(small())
    initialise(pixart, 7)
    state = reparameterise(dit.state_dict(), pixart.state_dict(), shared_modulation=shared)
    assert torch.equal(state["t_block.1.bias"], dit.state_dict()[f"blocks.{number}.adaLN_modulation.1.bias"])
    assert not state[f"blocks.{number}.scale_shift_table"].any()
    assert state[f"blocks.{1 - number}.scale_shift_table"].any()


def test_a_shared_mean_is_the_mean_of_all_blocks() -> None:
    dit, pixart = randomised(build(small_dit())), build(small())
    initialise(pixart, 7)
    state = reparameterise(dit.state_dict(), pixart.state_dict(), shared_modulation="mean")
    own = [dit.state_dict()[f"blocks.{number}.adaLN_modulation.1.weight"] for number in (0, 1)]
    assert torch.allclose(state["t_block.1.weight"], (own[0] + own[1]) / 2)


def test_nets_of_different_shapes_are_refused_with_every_key() -> None:
    with pytest.raises(CheckpointError, match="2 blocks in the DiT, 3 in the PixArt") as caught:
        reparameterise(build(small_dit(mlp_ratio=2.0)).state_dict(), build(small(depth=3)).state_dict())
    assert "blocks.1.mlp.fc1.weight: (96, 48) in the DiT, (192, 48) in the PixArt" in str(caught.value)
