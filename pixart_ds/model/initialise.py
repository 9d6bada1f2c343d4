"""Initial weights, from a seed alone (paper.md 1.2 for PixArt, the published DiT for stage 1)."""

from __future__ import annotations

import math

import torch
from torch import nn

from pixart_ds.model.dit import DiT
from pixart_ds.model.pixart import PixArt, PixArtBlock

SIZE_EMBEDDERS = ("csize_embedder.", "ar_embedder.")
"""What a net with micro-conditions has beyond one without."""

_STD = 0.02
_PAPER_WIDTH = 1152
_PAPER_CAPTION_CHANNELS = 4096


@torch.no_grad()
def initialise(net: PixArt | DiT, seed: int) -> None:
    """Overwrites all parameters of a net on the CPU; the same seed gives the same bits.

    Every Linear is Xavier-uniform with zero bias; the timestep, caption and size MLPs are N(0, 0.02); PixArt's tables are
    N(0, 1/√D), its cross-attention's projection and the final projection are zero. DiT's modulation and final projection are zero
    (adaLN-Zero). With `scale_init_to_width` each N(0, 0.02) is scaled by √(paper's fan-in / own fan-in).
    """
    random = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            _xavier(module.weight, random)
            nn.init.zeros_(module.bias)
    _xavier(net.x_embedder.proj.weight.view(net.config.hidden_size, -1), random)
    nn.init.zeros_(_bias(net.x_embedder.proj))
    for layer in (net.t_embedder.mlp[0], net.t_embedder.mlp[2]):
        _normal(net, layer, random, _fan_in(layer))
    if isinstance(net, PixArt):
        _initialise_pixart(net, random)
    else:
        _initialise_dit(net, random)
    nn.init.zeros_(net.final_layer.linear.weight)
    nn.init.zeros_(net.final_layer.linear.bias)


def _initialise_pixart(net: PixArt, random: torch.Generator) -> None:
    width = net.config.hidden_size
    _normal(net, net.t_block[1], random, _PAPER_WIDTH)
    _normal(net, net.y_embedder.y_proj.fc1, random, _PAPER_CAPTION_CHANNELS)
    _normal(net, net.y_embedder.y_proj.fc2, random, _PAPER_WIDTH)
    for embedder in (net.csize_embedder, net.ar_embedder):
        if embedder is not None:
            _normal(net, embedder.mlp[0], random, _fan_in(embedder.mlp[0]))
            _normal(net, embedder.mlp[2], random, _PAPER_WIDTH // 3)
    for block in net.blocks:
        assert isinstance(block, PixArtBlock)
        block.scale_shift_table.normal_(0, width**-0.5, generator=random)
        nn.init.zeros_(block.cross_attn.proj.weight)
    net.final_layer.scale_shift_table.normal_(0, width**-0.5, generator=random)


def _initialise_dit(net: DiT, random: torch.Generator) -> None:
    width = net.config.hidden_size
    scale = math.sqrt(_PAPER_WIDTH / width) if net.config.scale_init_to_width else 1.0
    net.y_embedder.embedding_table.weight.normal_(0, _STD * scale, generator=random)
    for part in (*net.blocks, net.final_layer):
        layer = part.adaLN_modulation[1]
        if net.config.zero_init_adaln:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        else:  # as PixArt's t_block and tables start
            _normal(net, layer, random, _PAPER_WIDTH)
            layer.bias.normal_(0, width**-0.5, generator=random)


def _xavier(weight: torch.Tensor, random: torch.Generator) -> None:
    bound = math.sqrt(6 / (weight.shape[0] + weight.shape[1]))
    weight.uniform_(-bound, bound, generator=random)


def _normal(net: PixArt | DiT, layer: nn.Module, random: torch.Generator, paper_fan_in: int) -> None:
    """N(0, 0.02), and where the net asks for it the gain that the paper's fan-in would give."""
    assert isinstance(layer, nn.Linear)
    if layer is net.t_embedder.mlp[2]:
        paper_fan_in = _PAPER_WIDTH
    scale = math.sqrt(paper_fan_in / layer.in_features) if net.config.scale_init_to_width else 1.0
    layer.weight.normal_(0, _STD * scale, generator=random)


def _fan_in(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Linear)
    return layer.in_features


def _bias(layer: nn.Conv2d) -> torch.Tensor:
    assert layer.bias is not None
    return layer.bias


def zero_size_embedders(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with the size embedders' last layers at zero: a net that is new to micro-conditions starts as without them."""
    last = tuple(f"{name}mlp.2." for name in SIZE_EMBEDDERS)
    return {name: torch.zeros_like(value) if name.startswith(last) else value for name, value in state.items()}
