"""Fixed two-dimensional sine-cosine position embedding for a grid of patches of any size (paper appendix A.5)."""

from __future__ import annotations

import torch


def position_embedding(
    height: int, width: int, channels: int, *, base_size: int, interpolation_scale: float
) -> torch.Tensor:
    """(height · width, channels) fp32, for patches in row-major order.

    A coordinate is index / (side / base_size) / interpolation_scale, for each side by itself: whatever the ratio, both axes span
    the same range. The first half of the channels holds the column, the second the row; each half is sines, then cosines.

    Args:
        height, width: Patches.
        channels: A multiple of 4.
    """
    rows = _axis(height, channels // 2, base_size, interpolation_scale)  # (height, channels / 2)
    columns = _axis(width, channels // 2, base_size, interpolation_scale)  # (width, channels / 2)
    grid = torch.cat(
        [columns[None, :, :].expand(height, -1, -1), rows[:, None, :].expand(-1, width, -1)], -1
    )  # (height, width, channels)
    return grid.reshape(height * width, channels)


def _axis(count: int, channels: int, base_size: int, interpolation_scale: float) -> torch.Tensor:
    place = torch.arange(count, dtype=torch.float64) / (count / base_size) / interpolation_scale
    frequency = 10000.0 ** (-torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))
    angle = place[:, None] * frequency[None, :]
    return torch.cat([angle.sin(), angle.cos()], 1).float()


def sinusoid(values: torch.Tensor, channels: int = 256) -> torch.Tensor:
    """(B, channels) fp32 features of numbers (B,): cosines, then sines, of value · 10000^(-i / (channels / 2)).

    Always in fp32: fp16 has no integers above 2048, and no half timesteps above 512.
    """
    half = channels // 2
    frequency = torch.exp(
        torch.arange(half, dtype=torch.float32, device=values.device)
        * (-torch.log(torch.tensor(10000.0)).item() / half)
    )
    angle = values.float()[:, None] * frequency[None, :]
    return torch.cat([angle.cos(), angle.sin()], -1)
