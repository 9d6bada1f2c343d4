"""The parts that PixArt and DiT share beside attention: MLP, embedders, modulation, patches.

In shape comments: B samples, N image tokens, D hidden size, C latent channels, p patch size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pixart_ds.model.positions import position_embedding, sinusoid

NORM_EPS = 1e-6
FREQUENCIES = 256


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm without affine, then x · (1 + scale) + shift: (B, N, D) with (B, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], None, None, NORM_EPS), 1 + scale)


class Mlp(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out or width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class NumberEmbedder(nn.Module):
    """A number's sinusoid through Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(sinusoid(values).to(dtype))  # (B,) → (B, D)


class PatchEmbedder(nn.Module):
    """Patches to tokens: a convolution whose stride is its kernel, computed as one matrix product."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, patch, patch)  # the official key and shape (D, C, p, p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = F.pixel_unshuffle(x.to(self.proj.weight.dtype), self.patch)  # (B, C·p·p, h/p, w/p), channel slowest
        return F.linear(patches.flatten(2).transpose(1, 2), self.proj.weight.flatten(1), self.proj.bias)  # (B, N, D)


class Positions(nn.Module):
    """Position embeddings by grid size, made when first needed; no part of the state."""

    def __init__(self, width: int, base_size: int, interpolation_scale: float) -> None:
        super().__init__()
        self.width, self.base_size, self.interpolation_scale = width, base_size, interpolation_scale
        self._made: dict[tuple[int, int, torch.device, torch.dtype], torch.Tensor] = {}

    def forward(self, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
        key = (height, width, like.device, like.dtype)
        if key not in self._made:
            table = position_embedding(
                height, width, self.width, base_size=self.base_size, interpolation_scale=self.interpolation_scale
            )
            self._made[key] = table.to(like.device, like.dtype)
        return self._made[key]  # (N, D)


def run_blocks(blocks: nn.ModuleList, x: torch.Tensor, *conditions: Any, checkpointed: int) -> torch.Tensor:
    """x through all blocks, each given the same conditions; the first `checkpointed` recompute their activations in backward."""
    for number, block in enumerate(blocks):
        if number < checkpointed and torch.is_grad_enabled():
            # nothing in a block is random, so that no generator's state need be kept for the second time
            x = checkpoint(block, x, *conditions, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, *conditions)
    return x


def unpatchify(tokens: torch.Tensor, height: int, width: int, patch: int) -> torch.Tensor:
    """(B, N, p·p·C) with the channel fastest to (B, C, height·p, width·p); height and width in patches."""
    grid = tokens.unflatten(-1, (patch, patch, -1)).unflatten(1, (height, width))  # (B, height, width, p, p, C)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def null_where(dropped: torch.Tensor | None, values: torch.Tensor, null: torch.Tensor) -> torch.Tensor:
    """`null` for the samples whose condition is dropped, else their own values."""
    if dropped is None:
        return values
    return torch.where(dropped.view(-1, *(1,) * (values.ndim - 1)), null, values)
