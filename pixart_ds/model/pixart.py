"""PixArt: a diffusion transformer with cross-attention to text and adaLN-single (paper §2.3; keys as in the released weights)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn

from pixart_ds.config.schema import ModelConfig
from pixart_ds.errors import ConfigError
from pixart_ds.model.attention import AttentionOptions, CrossAttention, SelfAttention, Text, packing
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


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention and MLP; only the first and the last are normed, modulated and gated."""

    def __init__(self, config: ModelConfig, attention: AttentionOptions) -> None:
        super().__init__()
        width = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))
        self.attn = SelfAttention(width, config.num_heads, attention)
        self.cross_attn = CrossAttention(width, config.num_heads, attention)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))

    def forward(self, x: torch.Tensor, modulation: torch.Tensor, text: Text) -> torch.Tensor:
        # (B, 6, D): shift, scale, gate of the attention, then of the MLP
        parts = self.scale_shift_table + modulation
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts.chunk(6, dim=1)  # each (B, 1, D)
        x = torch.addcmul(x, gate_a, self.attn(modulate(x, shift_a, scale_a)))  # (B, N, D)
        x = x + self.cross_attn(x, text)  # (B, N, D): no norm, no modulation, no gate
        return torch.addcmul(x, gate_m, self.mlp(modulate(x, shift_m, scale_m)))  # (B, N, D)


class CaptionEmbedder(nn.Module):
    """Caption features to the net's width; the null caption is a buffer, stored but never trained."""

    y_embedding: torch.Tensor

    def __init__(self, channels: int, width: int, max_tokens: int) -> None:
        super().__init__()
        self.y_proj = Mlp(channels, width, width)
        self.register_buffer("y_embedding", torch.zeros(max_tokens, channels))

    def forward(self, captions: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
        """Features (B, L, channels), dropped captions replaced, in the net's dtype; `y_proj` comes after packing."""
        dtype = self.y_proj.fc1.weight.dtype
        null = self.y_embedding[: captions.shape[1]].to(dtype)  # (L, channels)
        return null_where(dropped, captions.to(dtype), null)

    def replace(self, captions: torch.Tensor, dropped: torch.Tensor | None, place: torch.Tensor) -> torch.Tensor:
        """The same for packed features (T, channels), of which each has its place (T,) in its caption."""
        dtype = self.y_proj.fc1.weight.dtype
        return null_where(dropped, captions.to(dtype), self.y_embedding.to(dtype)[place])


class FinalLayer(nn.Module):
    """Norm, modulation by its own table plus the raw timestep embedding, projection to patches."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, dim=1)  # each (B, 1, D)
        return self.linear(modulate(x, shift, scale))  # (B, N, p·p·2C)


class PixArt(nn.Module):
    """The text-to-image net; with `micro_conditions` the released code's MS net.

    Args:
        config: Kind `pixart`.
        attention: How attention is computed.
        checkpointed_blocks: How many of the first blocks recompute their activations in backward.
    """

    def __init__(self, config: ModelConfig, attention: AttentionOptions, checkpointed_blocks: int) -> None:
        super().__init__()
        assert config.caption_channels is not None
        assert config.max_tokens is not None
        width, patch = config.hidden_size, config.patch_size
        self.config, self.checkpointed_blocks = config, checkpointed_blocks
        self.attention_options = attention
        self.x_embedder = PatchEmbedder(config.in_channels, width, patch)
        self.t_embedder = NumberEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config.caption_channels, width, config.max_tokens)
        self.csize_embedder = NumberEmbedder(width // 3) if config.micro_conditions else None
        self.ar_embedder = NumberEmbedder(width // 3) if config.micro_conditions else None
        self.blocks = nn.ModuleList(PixArtBlock(config, attention) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, patch * patch * 2 * config.in_channels)
        self.positions = Positions(width, config.base_size, config.interpolation_scale)

    @property
    def condition_names(self) -> tuple[str, ...]:
        """The conditions that training hands to `forward`, by name."""
        sizes = ("original_sizes", "aspect_ratios") if self.config.micro_conditions else ()
        return ("caption_embeds", "caption_lengths", *sizes)

    @torch.no_grad()
    def set_null_caption(self, embeds: torch.Tensor) -> None:
        """Makes the empty caption's features (L, channels) the null caption; the rest of the buffer is zero.

        All its rows count, those of its padding too: a dropped caption has its own mask, and may have as many tokens as any.

        Raises:
            ConfigError: There are more tokens, or other channels, than the net is made for.
        """
        buffer = self.y_embedder.y_embedding
        if embeds.shape[1] != buffer.shape[1] or len(embeds) > len(buffer):
            raise ConfigError(
                f"the empty caption has features of shape {tuple(embeds.shape)}; the net takes up to {tuple(buffer.shape)}",
                remedy="set model.caption_channels and model.max_tokens to those of the prepared set",
            )
        buffer.zero_()
        buffer[: len(embeds)] = embeds

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        caption_embeds: torch.Tensor,
        caption_mask: torch.Tensor | None = None,
        dropped: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        aspect_ratios: torch.Tensor | None = None,
        caption_lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """ε̂ and the variance's position, (B, 2C, h, w).

        Args:
            latents: (B, C, h, w) noisy latents; h and w are multiples of the patch size.
            timesteps: (B,), whole or fractional.
            caption_embeds: (B, L, caption_channels) with `caption_mask`, or packed (T, caption_channels) with `caption_lengths`.
            caption_mask: (B, L) bool, True for real tokens; a caption without any attends to nothing in particular. It may lie on
                the CPU; for packed text it should, lest the host wait for the device.
            caption_lengths: Tokens of each caption, at least 1; T is their sum.
            dropped: (B,) bool: these take the null caption, under their own mask (paper.md 8, trap 5).
            original_sizes: (B, 2) height and width of the original pictures; micro-conditions only.
            aspect_ratios: (B,) height / width of the bucket; micro-conditions only.
        """
        height, width = latents.shape[-2] // self.config.patch_size, latents.shape[-1] // self.config.patch_size
        x = self.x_embedder(latents)  # (B, N, D)
        x = x + self.positions(height, width, x)  # (B, N, D)
        time = self.t_embedder(timesteps)  # (B, D)
        if self.config.micro_conditions:
            time = time + self._sizes(original_sizes, aspect_ratios)  # (B, D)
        modulation = self.t_block(time).unflatten(-1, (6, -1))  # (B, 6, D), once for all blocks
        if caption_lengths is not None:
            text = self._packed(caption_embeds, tuple(caption_lengths), dropped)
        else:
            assert caption_mask is not None, "captions need caption_mask or caption_lengths"
            text = self._padded(caption_embeds, caption_mask, dropped)
        x = run_blocks(self.blocks, x, modulation, text, checkpointed=self.checkpointed_blocks)  # (B, N, D)
        return unpatchify(self.final_layer(x, time), height, width, self.config.patch_size)

    def _packed(self, captions: torch.Tensor, lengths: tuple[int, ...], dropped: torch.Tensor | None) -> Text:
        """Packed caption features (T, channels) as the blocks attend to them; nothing is asked of the device."""
        counts, device = torch.tensor(lengths), captions.device
        sample = torch.repeat_interleave(torch.arange(len(lengths)), counts)  # (T,)
        place = torch.cat([torch.arange(count) for count in lengths])  # (T,) within its caption

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        own = None if dropped is None else dropped[moved(sample)]
        features = self.y_embedder.replace(captions, own, moved(place))
        tokens = self.y_embedder.y_proj(features)  # (T, D)
        if self.attention_options.packed_text:
            return Text(tokens, lengths=lengths, offsets=moved(torch.tensor([0, *accumulate(lengths)])))
        longest = max(lengths)
        flat = tokens.new_zeros(len(lengths) * longest, tokens.shape[1])
        flat = flat.index_copy(0, moved(sample * longest + place), tokens)
        mask = torch.arange(longest)[None] < counts[:, None]  # (B, L)
        return Text(flat.unflatten(0, (-1, longest)), moved(mask[:, None, None, :]))

    def _padded(self, captions: torch.Tensor, mask: torch.Tensor, dropped: torch.Tensor | None) -> Text:
        """Caption features (B, L, channels) as the blocks attend to them."""
        mask = mask | ~mask.any(1, keepdim=True)  # a row without tokens would give NaN
        features = self.y_embedder(captions, dropped)  # (B, L, channels)
        if not self.attention_options.packed_text:
            return Text(self.y_embedder.y_proj(features), mask.to(captions.device)[:, None, None, :])
        places, lengths = packing(mask)
        offsets = torch.tensor([0, *accumulate(lengths)])
        tokens = self.y_embedder.y_proj(features.flatten(0, 1)[places.to(captions.device, non_blocking=True)])  # (T, D)
        return Text(tokens, lengths=lengths, offsets=offsets.to(captions.device, non_blocking=True))

    def _sizes(self, original_sizes: torch.Tensor | None, aspect_ratios: torch.Tensor | None) -> torch.Tensor:
        """Embeddings of height, width and ratio side by side: (B, D)."""
        if original_sizes is None or aspect_ratios is None:
            raise ConfigError("a net with micro_conditions needs original_sizes and aspect_ratios")
        assert self.csize_embedder is not None
        assert self.ar_embedder is not None
        size = self.csize_embedder(original_sizes.flatten()).unflatten(0, (-1, 2)).flatten(1)  # (B, 2D/3)
        return torch.cat([size, self.ar_embedder(aspect_ratios)], 1)  # (B, D)
