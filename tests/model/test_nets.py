"""PixArt and DiT: sizes, names, initialisation, conditions, and parity with diffusers' PixArt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pixart_ds.config.schema import ModelConfig
from pixart_ds.errors import ConfigError
from pixart_ds.model import DiT, PixArt, build, initialise, zero_size_embedders
from pixart_ds.model.positions import position_embedding, sinusoid


def small(**changes: Any) -> ModelConfig:
    values = {
        "kind": "pixart",
        "depth": 2,
        "hidden_size": 48,
        "num_heads": 4,
        "caption_channels": 20,
        "max_tokens": 9,
        "base_size": 4,
    }
    return ModelConfig(**{**values, **changes})


def small_dit(**changes: Any) -> ModelConfig:
    return ModelConfig(
        **{"kind": "dit", "depth": 2, "hidden_size": 48, "num_heads": 4, "num_classes": 5, "base_size": 4, **changes}
    )


def randomised(net: PixArt | DiT, seed: int = 0) -> PixArt | DiT:
    """All parameters random, so that nothing is hidden behind a zero."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.15, generator=random)
    if isinstance(net, PixArt):
        net.set_null_caption(torch.randn(2, net.config.caption_channels or 0, generator=random))
    return net


def inputs(height: int = 8, width: int = 8, batch: int = 3, tokens: int = 7) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    lengths = torch.tensor([tokens, 1, 4])[:batch]
    return {
        "latents": torch.randn(batch, 4, height, width, generator=random),
        "timesteps": torch.tensor([999.0, 0.0, 417.0])[:batch],
        "caption_embeds": torch.randn(batch, tokens, 20, generator=random),
        "caption_mask": torch.arange(tokens)[None] < lengths[:, None],
    }


SIZES = {
    "original_sizes": torch.tensor([[3000.0, 2000.0], [77.0, 77.0], [512.0, 1024.0]]),
    "aspect_ratios": torch.tensor([1.5, 1.0, 0.5]),
}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (ModelConfig(kind="pixart", caption_channels=4096, max_tokens=120), 610_856_096),
        (ModelConfig(kind="pixart", caption_channels=4096, max_tokens=120, micro_conditions=True), 611_349_152),
        (ModelConfig(kind="dit", num_classes=1000), 674_834_720),
    ],
    ids=["PixArt-XL/2", "PixArt-XL/2-MS", "DiT-XL/2"],
)
def test_parameters_at_full_size(config: ModelConfig, count: int) -> None:
    with torch.device("meta"):
        net = build(config)
    assert sum(parameter.numel() for parameter in net.parameters()) == count


def test_state_has_the_official_names_and_shapes() -> None:
    state = {
        name: tuple(value.shape) for name, value in build(small(depth=1, micro_conditions=True)).state_dict().items()
    }
    assert state == {
        "x_embedder.proj.weight": (48, 4, 2, 2), "x_embedder.proj.bias": (48,),
        "t_embedder.mlp.0.weight": (48, 256), "t_embedder.mlp.0.bias": (48,),
        "t_embedder.mlp.2.weight": (48, 48), "t_embedder.mlp.2.bias": (48,),
        "t_block.1.weight": (288, 48), "t_block.1.bias": (288,),
        "y_embedder.y_embedding": (9, 20),
        "y_embedder.y_proj.fc1.weight": (48, 20), "y_embedder.y_proj.fc1.bias": (48,),
        "y_embedder.y_proj.fc2.weight": (48, 48), "y_embedder.y_proj.fc2.bias": (48,),
        "csize_embedder.mlp.0.weight": (16, 256), "csize_embedder.mlp.0.bias": (16,),
        "csize_embedder.mlp.2.weight": (16, 16), "csize_embedder.mlp.2.bias": (16,),
        "ar_embedder.mlp.0.weight": (16, 256), "ar_embedder.mlp.0.bias": (16,),
        "ar_embedder.mlp.2.weight": (16, 16), "ar_embedder.mlp.2.bias": (16,),
        "blocks.0.scale_shift_table": (6, 48),
        "blocks.0.attn.qkv.weight": (144, 48), "blocks.0.attn.qkv.bias": (144,),
        "blocks.0.attn.proj.weight": (48, 48), "blocks.0.attn.proj.bias": (48,),
        "blocks.0.cross_attn.q_linear.weight": (48, 48), "blocks.0.cross_attn.q_linear.bias": (48,),
        "blocks.0.cross_attn.kv_linear.weight": (96, 48), "blocks.0.cross_attn.kv_linear.bias": (96,),
        "blocks.0.cross_attn.proj.weight": (48, 48), "blocks.0.cross_attn.proj.bias": (48,),
        "blocks.0.mlp.fc1.weight": (192, 48), "blocks.0.mlp.fc1.bias": (192,),
        "blocks.0.mlp.fc2.weight": (48, 192), "blocks.0.mlp.fc2.bias": (48,),
        "final_layer.linear.weight": (32, 48), "final_layer.linear.bias": (32,),
        "final_layer.scale_shift_table": (2, 48),
    }  # fmt: skip
    dit = set(build(small_dit(depth=1)).state_dict())
    assert {
        "y_embedder.embedding_table.weight",
        "blocks.0.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.bias",
    } <= dit


def test_position_embedding_by_hand() -> None:
    table = position_embedding(2, 3, 8, base_size=4, interpolation_scale=2.0)
    assert table.shape == (6, 8)
    row, column = 1, 2  # coordinates 1 / (2/4) / 2 = 1 and 2 / (3/4) / 2 = 4/3
    y, x = torch.tensor(1.0), torch.tensor(4 / 3)
    wanted = torch.stack(
        [x.sin(), (x / 100).sin(), x.cos(), (x / 100).cos(), y.sin(), (y / 100).sin(), y.cos(), (y / 100).cos()]
    )
    assert torch.allclose(table[row * 3 + column], wanted, atol=1e-6)


def test_sinusoid_is_cosines_then_sines_and_stays_exact_for_large_numbers() -> None:
    made = sinusoid(torch.tensor([0.0, 4097.0]))
    assert made[0].tolist() == [1.0] * 128 + [0.0] * 128
    assert torch.allclose(
        made[1, [0, 128]],
        torch.tensor([4097.0]).double().cos().float().repeat(2) * torch.tensor([1, 0])
        + torch.tensor([0, 1]) * torch.tensor(4097.0).double().sin().float(),
        atol=1e-3,
    )


def test_initial_weights_follow_the_table_and_the_seed() -> None:
    net, again, other = (build(small(hidden_size=96, micro_conditions=True)) for _ in range(3))
    for each, seed in ((net, 1), (again, 1), (other, 2)):
        initialise(each, seed)
    state = net.state_dict()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], other.state_dict()["blocks.0.attn.qkv.weight"])
    zero = [name for name, value in state.items() if not value.any()]
    assert {"final_layer.linear.weight", "blocks.0.cross_attn.proj.weight", "blocks.1.cross_attn.proj.weight"} <= set(
        zero
    )
    assert [name for name in zero if name.endswith("weight") and "cross_attn.proj" not in name] == [
        "final_layer.linear.weight"
    ]
    assert all(name in zero for name in state if name.endswith("bias"))
    for name in (
        "t_block.1.weight",
        "t_embedder.mlp.0.weight",
        "y_embedder.y_proj.fc2.weight",
        "ar_embedder.mlp.0.weight",
    ):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.06), name
    assert state["blocks.1.scale_shift_table"].std().item() == pytest.approx(96**-0.5, rel=0.1)
    qkv = state["blocks.0.attn.qkv.weight"]
    bound = (6 / (96 + 288)) ** 0.5
    assert 0.98 * bound < qkv.abs().max().item() <= bound
    wide = build(small(hidden_size=96, scale_init_to_width=True))
    initialise(wide, 1)
    assert wide.state_dict()["t_block.1.weight"].std().item() == pytest.approx(0.02 * (1152 / 96) ** 0.5, rel=0.06)


def test_dit_starts_as_the_identity_and_pixart_predicts_zero() -> None:
    net = build(small_dit())
    initialise(net, 0)
    assert not net.blocks[0].adaLN_modulation[1].weight.any()
    batch = inputs()
    assert not net(batch["latents"], batch["timesteps"], torch.tensor([0, 1, 2])).any()
    assert net.null_label == 5
    loose = build(small_dit(zero_init_adaln=False))
    initialise(loose, 0)
    assert loose.blocks[0].adaLN_modulation[1].weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("kind", ["plain", "micro", "dit"])
def test_checkpointed_blocks_change_nothing(kind: str) -> None:
    config = small_dit(depth=3) if kind == "dit" else small(depth=3, micro_conditions=kind == "micro")
    batch = inputs()
    conditions: dict[str, torch.Tensor] = {"class_labels": torch.tensor([0, 4, 2])}
    if kind != "dit":
        conditions = {
            "caption_embeds": batch["caption_embeds"],
            "caption_mask": batch["caption_mask"],
            **(SIZES if kind == "micro" else {}),
        }
    results = []
    for blocks in ("none", 2, "all"):
        net = randomised(build(config, checkpointed_blocks=blocks))
        packed = {"caption_mask": "caption_lengths"}
        assert set(net.condition_names) == {packed.get(name, name) for name in conditions}
        out = net(batch["latents"], batch["timesteps"], dropped=torch.tensor([True, False, False]), **conditions)
        out.square().sum().backward()
        results.append(
            [out.detach(), *(parameter.grad for parameter in net.parameters() if parameter.grad is not None)]
        )
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_padded_tokens_are_never_attended_and_a_caption_without_tokens_is_finite() -> None:
    net, batch = randomised(build(small())), inputs()
    with torch.no_grad():
        out = net(**batch)
        spoilt = torch.where(batch["caption_mask"][..., None], batch["caption_embeds"], torch.full((), 1e4))
        assert torch.allclose(net(**{**batch, "caption_embeds": spoilt}), out, atol=1e-5)
        longer = {
            **batch,
            "caption_embeds": torch.nn.functional.pad(batch["caption_embeds"], (0, 0, 0, 2)),
            "caption_mask": torch.nn.functional.pad(batch["caption_mask"], (0, 2)),
        }
        assert torch.allclose(net(**longer), out, atol=1e-5)
        empty = {**batch, "caption_mask": torch.zeros_like(batch["caption_mask"])}
        assert torch.isfinite(net(**empty)).all()


def test_a_dropped_caption_becomes_the_null_one_under_its_own_mask() -> None:
    net, batch = randomised(build(small())), inputs()
    null = net.y_embedder.y_embedding[:7].expand(3, -1, -1)
    dropped = torch.tensor([False, True, True])
    with torch.no_grad():
        out = net(**batch, dropped=dropped)
        own = net(**batch)
        nulled = net(**{**batch, "caption_embeds": null})
    assert torch.allclose(out[0], own[0], atol=1e-6)
    assert torch.allclose(out[1:], nulled[1:], atol=1e-6)
    assert not torch.allclose(out[1:], own[1:], atol=1e-3)
    assert "y_embedder.y_embedding" not in dict(net.named_parameters())


def test_a_dropped_label_and_no_label_are_the_null_class() -> None:
    net, batch = randomised(build(small_dit())), inputs()
    with torch.no_grad():
        dropped = net(
            batch["latents"], batch["timesteps"], torch.tensor([1, 2, 3]), dropped=torch.tensor([True, True, False])
        )
        null = net(batch["latents"], batch["timesteps"], torch.tensor([5, -1, 3]))
    assert torch.equal(dropped, null)


def test_a_null_caption_that_does_not_fit_is_refused() -> None:
    net = build(small())
    assert isinstance(net, PixArt)
    for shape in ((10, 20), (2, 21)):
        with pytest.raises(ConfigError, match=r"up to \(9, 20\)"):
            net.set_null_caption(torch.zeros(shape))


def test_zeroed_size_embedders_make_the_ms_net_the_plain_one() -> None:
    plain, batch = randomised(build(small())), inputs()
    ms = build(small(micro_conditions=True))
    initialise(ms, 3)
    ms.load_state_dict({**zero_size_embedders(ms.state_dict()), **plain.state_dict()})
    with torch.no_grad():
        assert torch.equal(ms(**batch, **SIZES), plain(**batch))
    with pytest.raises(ConfigError, match="needs original_sizes"):
        ms(**batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_near_fp32(dtype: torch.dtype) -> None:
    batch = inputs()
    net = randomised(build(small(micro_conditions=True)))
    with torch.no_grad():
        wanted = net(**batch, **SIZES)
        for fp32_attention in (False, True):
            low = randomised(build(small(micro_conditions=True), fp32_attention=fp32_attention)).to(dtype)
            low.y_embedder.y_embedding = net.y_embedder.y_embedding  # buffers stay fp32 in a 16-bit engine
            made = low(**batch, **SIZES)
            assert made.dtype == dtype
            error = (made.float() - wanted).norm() / wanted.norm()
            assert error < (3e-2 if dtype == torch.bfloat16 else 4e-3)


def diffusers_twin(net: PixArt, height: int) -> Any:
    """diffusers' PixArt with the same weights; the names are those of the released converters."""
    from diffusers import PixArtTransformer2DModel

    config, ours = net.config, net.state_dict()
    twin = PixArtTransformer2DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=4, out_channels=8, num_layers=config.depth, cross_attention_dim=config.hidden_size,
        sample_size=height, patch_size=2, caption_channels=20,
        use_additional_conditions=config.micro_conditions, interpolation_scale=config.interpolation_scale, norm_num_groups=1,
    )  # fmt: skip
    state = {}
    simple = {
        "pos_embed.proj": "x_embedder.proj", "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2", "adaln_single.linear": "t_block.1",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1", "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "proj_out": "final_layer.linear",
    }  # fmt: skip
    if config.micro_conditions:
        for theirs, mine in (("resolution", "csize"), ("aspect_ratio", "ar")):
            for number, layer in ((1, 0), (2, 2)):
                simple[f"adaln_single.emb.{theirs}_embedder.linear_{number}"] = f"{mine}_embedder.mlp.{layer}"
    for index in range(config.depth):
        for theirs, mine in (
            ("attn1.to_out.0", "attn.proj"),
            ("attn2.to_q", "cross_attn.q_linear"),
            ("attn2.to_out.0", "cross_attn.proj"),
            ("ff.net.0.proj", "mlp.fc1"),
            ("ff.net.2", "mlp.fc2"),
        ):
            simple[f"transformer_blocks.{index}.{theirs}"] = f"blocks.{index}.{mine}"
        for kind in ("weight", "bias"):
            parts = ours[f"blocks.{index}.attn.qkv.{kind}"].chunk(3)
            state |= {
                f"transformer_blocks.{index}.attn1.to_{n}.{kind}": part for n, part in zip("qkv", parts, strict=True)
            }
            parts = ours[f"blocks.{index}.cross_attn.kv_linear.{kind}"].chunk(2)
            state |= {
                f"transformer_blocks.{index}.attn2.to_{n}.{kind}": part for n, part in zip("kv", parts, strict=True)
            }
        state[f"transformer_blocks.{index}.scale_shift_table"] = ours[f"blocks.{index}.scale_shift_table"]
    state |= {
        f"{theirs}.{kind}": ours[f"{mine}.{kind}"] for theirs, mine in simple.items() for kind in ("weight", "bias")
    }
    state["scale_shift_table"] = ours["final_layer.scale_shift_table"]
    twin.load_state_dict(state, strict=True)
    return twin


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 6), (4, 14)])
@pytest.mark.parametrize("micro", [False, True])
def test_parity_with_diffusers_in_output_and_gradients(height: int, width: int, micro: bool) -> None:
    net = randomised(build(small(micro_conditions=micro, interpolation_scale=2.0)))
    assert isinstance(net, PixArt)
    twin, batch = diffusers_twin(net, 8), inputs(height, width)
    sizes = SIZES if micro else {}
    ours = net(**batch, **sizes)
    added = {
        "resolution": sizes.get("original_sizes"),
        "aspect_ratio": sizes["aspect_ratios"][:, None] if micro else None,
    }
    theirs = twin(
        batch["latents"], encoder_hidden_states=batch["caption_embeds"], timestep=batch["timesteps"],
        encoder_attention_mask=batch["caption_mask"], added_cond_kwargs=added,
    ).sample  # fmt: skip
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for mine, other in (
        (net.blocks[0].mlp.fc1, twin.transformer_blocks[0].ff.net[0].proj),
        (net.t_block[1], twin.adaln_single.linear),
        (net.x_embedder.proj, twin.pos_embed.proj),
        (net.y_embedder.y_proj.fc1, twin.caption_projection.linear_1),
    ):
        one, two = mine.weight.grad, other.weight.grad
        assert one is not None
        assert (one - two).norm() < 1e-4 * two.norm()
