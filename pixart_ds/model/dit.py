"""DiT: stage 1's class-conditional net (Peebles & Xie 2022), with the key names of its published weights."""

from __future__ import annotations

import torch
from torch import nn

from pixart_ds.config.schema import ModelConfig
from pixart_ds.model.attention import AttentionOptions, SelfAttention
from pixart_ds.model.blocks import (
    Mlp,
    NumberEmbedder,
    PatchEmbedder,
    Positions,
    modulate,
    null_where,
    run_blocks,
    unpatchify,
)


class DiTBlock(nn.Module):
    """Self-attention and MLP, each modulated by the block's own function of timestep and label."""

    def __init__(self, config: ModelConfig, attention: AttentionOptions) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = SelfAttention(width, config.num_heads, attention)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        parts = self.adaLN_modulation(condition)[:, None]  # (B, 1, 6D), in the sequence of PixArt's table
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts.chunk(6, dim=-1)  # each (B, 1, D)
        x = torch.addcmul(x, gate_a, self.attn(modulate(x, shift_a, scale_a)))  # (B, N, D)
        return torch.addcmul(x, gate_m, self.mlp(modulate(x, shift_m, scale_m)))  # (B, N, D)


class LabelEmbedder(nn.Module):
    """One vector for each class; the last is the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(labels)  # (B,) → (B, D)


class FinalLayer(nn.Module):
    """Norm, modulation, projection to patches."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)  # each (B, 1, D)
        return self.linear(modulate(x, shift, scale))  # (B, N, p·p·2C)


class DiT(nn.Module):
    """The class-conditional net.

    Args:
        config: Kind `dit`.
        attention: How attention is computed.
        checkpointed_blocks: How many of the first blocks recompute their activations in backward.
    """

    condition_names: tuple[str, ...] = ("class_labels",)

    def __init__(self, config: ModelConfig, attention: AttentionOptions, checkpointed_blocks: int) -> None:
        super().__init__()
        assert config.num_classes is not None
        width, patch = config.hidden_size, config.patch_size
        self.config, self.checkpointed_blocks = config, checkpointed_blocks
        self.attention_options = attention
        self.x_embedder = PatchEmbedder(config.in_channels, width, patch)
        self.t_embedder = NumberEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.blocks = nn.ModuleList(DiTBlock(config, attention) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, patch * patch * 2 * config.in_channels)
        self.positions = Positions(width, config.base_size, config.interpolation_scale)

    @property
    def null_label(self) -> int:
        """The label of the null class."""
        assert self.config.num_classes is not None
        return self.config.num_classes

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor,
        dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ε̂ and the variance's position, (B, 2C, h, w).

        Args:
            latents: (B, C, h, w) noisy latents.
            timesteps: (B,).
            class_labels: (B,) int64; -1, a picture without a class, is the null class.
            dropped: (B,) bool: these take the null class.
        """
        height, width = latents.shape[-2] // self.config.patch_size, latents.shape[-1] // self.config.patch_size
        x = self.x_embedder(latents)  # (B, N, D)
        x = x + self.positions(height, width, x)  # (B, N, D)
        null = torch.full_like(class_labels, self.null_label)
        labels = null_where(dropped, torch.where(class_labels < 0, null, class_labels), null)  # (B,)
        condition = self.t_embedder(timesteps) + self.y_embedder(labels)  # (B, D)
        x = run_blocks(self.blocks, x, condition, checkpointed=self.checkpointed_blocks)  # (B, N, D)
        return unpatchify(self.final_layer(x, condition), height, width, self.config.patch_size)
