"""What the nets promise beyond their output: what is recomputed, in which dtype, from which gain, for which parameter."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixart_ds.model import PixArt, build, initialise, reparameterise
from tests.model.test_nets import SIZES, diffusers_twin, inputs, randomised, small, small_dit


@pytest.mark.parametrize("kind", ["pixart", "dit"])
@pytest.mark.parametrize(("asked", "recomputed"), [("none", 0), (2, 2), ("all", 3)])
def test_as_many_blocks_are_recomputed_as_asked(kind: str, asked: Any, recomputed: int) -> None:
    net = randomised(build((small if kind == "pixart" else small_dit)(depth=3), checkpointed_blocks=asked))
    calls = [0, 0, 0]

    def count(number: int) -> Any:
        return lambda *_: calls.__setitem__(number, calls[number] + 1)

    for number in range(3):
        net.get_submodule(f"blocks.{number}.attn").register_forward_pre_hook(count(number))
    batch = inputs()
    conditions = {"class_labels": torch.tensor([0, 1, 2])}
    if kind == "pixart":
        conditions = {name: batch[name] for name in ("caption_embeds", "caption_mask")}
    net(batch["latents"], batch["timesteps"], **conditions).square().sum().backward()
    assert calls == [2] * recomputed + [1] * (3 - recomputed)
    with torch.no_grad():  # nothing to recompute
        net(batch["latents"], batch["timesteps"], **conditions)
    assert calls == [3] * recomputed + [2] * (3 - recomputed)


@pytest.mark.parametrize(("dtype", "fp32"), [(torch.float16, False), (torch.float16, True), (torch.bfloat16, True)])
def test_attention_runs_in_the_promised_dtype_and_scale(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fp32: bool
) -> None:
    seen: list[tuple[bool, torch.dtype, float]] = []  # cross-attention?, dtype, scale inside the product
    original = F.scaled_dot_product_attention

    def spy(q: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        seen.append((named["attn_mask"] is not None, q.dtype, named["scale"]))
        return original(q, *rest, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        randomised(build(small(depth=1), fp32_attention=fp32)).to(dtype)(**inputs())
    inside = 12**-0.5
    wanted_self = (False, torch.float32 if fp32 else dtype, inside if fp32 else 1.0)
    wanted_cross = (True, dtype, 1.0 if dtype == torch.float16 else inside)  # in fp16 q is scaled before the product
    assert seen == [wanted_self, wanted_cross]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_caption_without_tokens_has_finite_gradients_and_attends_to_all(dtype: torch.dtype) -> None:
    net, batch = randomised(build(small(), checkpointed_blocks=1)).to(dtype), inputs()
    batch["caption_mask"][1] = False
    out = net(**batch)
    batch["caption_mask"] = batch["caption_mask"].clone()
    batch["caption_mask"][1] = True
    assert torch.equal(out, net(**batch))
    out.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())


def test_a_shorter_null_caption_leaves_nothing_of_the_last() -> None:
    net = build(small())
    assert isinstance(net, PixArt)
    net.set_null_caption(torch.ones(9, 20))
    net.set_null_caption(torch.full((2, 20), 3.0))
    assert net.y_embedder.y_embedding[:2].eq(3).all()
    assert not net.y_embedder.y_embedding[2:].any()


def test_small_initialisations_have_the_gain_of_the_papers_width() -> None:
    net = build(small(hidden_size=96, micro_conditions=True, scale_init_to_width=True))
    initialise(net, 1)
    gains = {  # layer: the paper's fan-in
        "t_embedder.mlp.0": 256, "t_embedder.mlp.2": 1152, "t_block.1": 1152, "y_embedder.y_proj.fc1": 4096,
        "y_embedder.y_proj.fc2": 1152, "csize_embedder.mlp.0": 256, "csize_embedder.mlp.2": 384,
        "ar_embedder.mlp.0": 256, "ar_embedder.mlp.2": 384,
    }  # fmt: skip
    for name, fan_in in gains.items():
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        assert layer.weight.std().item() == pytest.approx(0.02 * (fan_in / layer.in_features) ** 0.5, rel=0.1), name


def test_golden_initial_weights() -> None:
    # Written down once: a run that is started again from its seed must start the same.
    pixart, dit = build(small()), build(small_dit(zero_init_adaln=False))
    initialise(pixart, 43)
    initialise(dit, 43)
    made = [
        pixart.state_dict()["x_embedder.proj.weight"].flatten()[0],
        pixart.state_dict()["blocks.1.attn.qkv.weight"][3, 5],
        pixart.state_dict()["final_layer.scale_shift_table"][1, 7],
        dit.state_dict()["y_embedder.embedding_table.weight"][2, 2],
        dit.state_dict()["final_layer.adaLN_modulation.1.bias"][9],
    ]
    assert [value.item() for value in made] == pytest.approx(GOLDEN, rel=1e-6)


GOLDEN = [0.25954392552375793, 0.07783294469118118, -0.08251629769802094, -0.009821434505283833, 0.024046357721090317]


def test_the_papers_timestep_is_the_default() -> None:
    assert inspect.signature(reparameterise).parameters["at"].default == 500


@pytest.mark.parametrize("micro", [False, True])
def test_every_gradient_is_diffusers(micro: bool) -> None:
    net = randomised(build(small(micro_conditions=micro, interpolation_scale=2.0)))
    assert isinstance(net, PixArt)
    twin, batch, sizes = diffusers_twin(net, 8), inputs(12, 6), SIZES if micro else {}
    net(**batch, **sizes).square().mean().backward()
    added = {
        "resolution": sizes.get("original_sizes"),
        "aspect_ratio": sizes["aspect_ratios"][:, None] if micro else None,
    }
    twin(
        batch["latents"], encoder_hidden_states=batch["caption_embeds"], timestep=batch["timesteps"],
        encoder_attention_mask=batch["caption_mask"], added_cond_kwargs=added,
    ).sample.square().mean().backward()  # fmt: skip
    # The gradients travel by the weights' own name map: put in the weights' place, they are mapped like them.
    carrier = build(net.config)
    assert isinstance(carrier, PixArt)
    with torch.no_grad():
        for name, parameter in carrier.named_parameters():
            gradient = net.get_parameter(name).grad
            assert gradient is not None, name
            parameter.copy_(gradient)
    ours = diffusers_twin(carrier, 8).state_dict()
    for name, parameter in twin.named_parameters():
        if name.endswith("to_k.bias"):  # zero but for rounding: softmax does not see a constant
            continue
        assert parameter.grad is not None, name
        assert (ours[name] - parameter.grad).norm() < 2e-5 * parameter.grad.norm(), name
