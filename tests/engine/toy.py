"""A small transformer with odd sizes, a frozen parameter and a buffer; its data; cuts of a step into micro-batches."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pixart_ds.config.schema import StageConfig

TOKENS, WIDTH, HIDDEN = 7, 30, 83
BATCH = 13


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 3, WIDTH // 3)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        down: torch.Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + down


class Toy(nn.Module):
    condition_names = ("caption",)

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.table = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.1, requires_grad=False)
        self.position: torch.Tensor
        self.register_buffer("position", torch.randn(TOKENS, WIDTH) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x.to(self.inp.weight.dtype))
        x = x + self.position.to(x.dtype) + self.table
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x)
        return out


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy()


def stage_of(precision: str = "fp32", **optimizer: Any) -> StageConfig:
    return StageConfig.model_validate(
        {
            "name": "toy",
            "length": {"steps": 20},
            "global_batch_size": BATCH,
            "precision": precision,
            "model": {"kind": "dit", "depth": 1, "hidden_size": 12, "num_heads": 1, "num_classes": 3},
            "init": {},
            "data": {"sets": [{"path": "none"}], "latents": "none"},
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 3, "ema_decay": 0.9, **optimizer},
            "execution": {"deepspeed": "zero2_cpu", "checkpointed_blocks": "none"},
            "checkpoint": {"every": {"steps": 5}},
        }
    )


def samples(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (BATCH, TOKENS, 5) and targets (BATCH, TOKENS, 3) of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, TOKENS, 5, generator=generator)
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))
    return x, torch.tanh(x @ weight) + x.flip(1)[..., :3] * 0.5


def loss_of(net: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sum over the samples, each weighing 1 / BATCH, in fp32."""
    return (net(x).float() - y).pow(2).mean((1, 2)).sum() / BATCH


def cuts(step: int, world_size: int) -> list[list[slice]]:
    """Each rank's micro-batches: contiguous shares, micro-batches of 1 to 4; from two ranks on, one share is empty."""
    luck = random.Random(step * 31 + world_size)
    edges = [0, *sorted(luck.randint(0, BATCH) for _ in range(world_size - 1)), BATCH]
    if world_size > 1:
        idle = luck.randrange(world_size)
        edges[idle + 1 if idle + 1 < world_size else idle] = edges[idle if idle + 1 < world_size else idle + 1]
    shares = []
    for start, end in pairwise(edges):
        at, pieces = start, []
        while at < end:
            size = min(end - at, luck.randint(1, 4))
            pieces.append(slice(at, at + size))
            at += size
        shares.append(pieces)
    return shares
