"""From a stage's weights and prompts to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from pixart_ds.config.schema import StageConfig
from pixart_ds.encoders.latents import LatentEncoder
from pixart_ds.engine.handover import read_handover
from pixart_ds.errors import ConfigError
from pixart_ds.model import DiT, PixArt, build
from pixart_ds.sampling.sample import sample

_AT_ONCE = 32


@dataclass(frozen=True)
class Wish:
    """One picture that is asked for.

    Attributes:
        condition: Caption features (L, D), or a class label.
        size: (height, width) in pixels.
        seed: Of its noise.
    """

    condition: npt.NDArray[np.float16] | int
    size: tuple[int, int]
    seed: int


def load_net(stage: StageConfig, handover: Path, weights: Literal["ema", "raw"], device: str = "cpu") -> PixArt | DiT:
    """A stage's net with the weights that it handed over, ready to sample.

    Raises:
        CheckpointError: There is no handover, or it does not fit the recipe.
    """
    net = build(stage.model, fp32_attention=stage.fp32_attention)
    state, _ = read_handover(handover, weights)
    net.load_state_dict(state)
    return net.to(device).eval()


def generate(
    net: PixArt | DiT,
    vae: LatentEncoder,
    wishes: Sequence[Wish],
    *,
    null_embeds: npt.NDArray[np.float16] | None,
    guidance_scale: float,
    num_inference_steps: int,
    scheduler: str,
) -> list[npt.NDArray[np.uint8]]:
    """The pictures (H, W, 3), in the sequence of the wishes; those of one size are sampled together.

    Args:
        null_embeds: (L, D) features of the empty caption, for guidance; None for a class-conditional net.

    Raises:
        ConfigError: A size that the VAE and the patches cannot make.
    """
    made: list[npt.NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(wishes)
    step = vae.downsampling_factor * net.config.patch_size
    by_size: dict[tuple[int, int], list[int]] = {}
    for number, wish in enumerate(wishes):
        if wish.size[0] % step or wish.size[1] % step:
            raise ConfigError(
                f"a picture of {wish.size[0]}x{wish.size[1]} pixels cannot be made", remedy=f"use multiples of {step}"
            )
        by_size.setdefault(wish.size, []).append(number)
    for size, numbers in by_size.items():
        for start in range(0, len(numbers), _AT_ONCE):
            batch = numbers[start : start + _AT_ONCE]
            own, null = conditions(net, [wishes[number] for number in batch], null_embeds)
            latents = sample(
                net,
                conditions=own,
                null_conditions=null,
                size=(size[0] // vae.downsampling_factor, size[1] // vae.downsampling_factor),
                seeds=[wishes[number].seed for number in batch],
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
                scheduler=scheduler,
            )
            for number, picture in zip(batch, vae.decode(latents), strict=True):
                made[number] = picture
    return made


def conditions(
    net: PixArt | DiT, wishes: Sequence[Wish], null_embeds: npt.NDArray[np.float16] | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The wishes' own and null conditions as the net takes them, for wishes of one size."""
    device, count = next(net.parameters()).device, len(wishes)
    if isinstance(net, DiT):
        labels = torch.tensor([int(wish.condition) for wish in wishes], device=device)  # type: ignore[call-overload]
        return {"class_labels": labels}, {"class_labels": torch.full_like(labels, net.null_label)}
    assert null_embeds is not None
    embeds, mask = padded([np.asarray(wish.condition) for wish in wishes])
    null, null_mask = padded([null_embeds] * count)
    own = {"caption_embeds": embeds.to(device), "caption_mask": mask.to(device)}
    other = {"caption_embeds": null.to(device), "caption_mask": null_mask.to(device)}
    if net.config.micro_conditions:  # the picture's own size, as the released pipeline says it
        height, width = wishes[0].size
        sizes = {
            "original_sizes": torch.tensor([[height, width]] * count, dtype=torch.float32, device=device),
            "aspect_ratios": torch.full((count,), height / width, device=device),
        }
        own, other = own | sizes, other | sizes
    return own, other


def padded(features: Sequence[npt.NDArray[np.float16]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (L_i, D) as (n, L, D) fp32 with zeros behind, and the mask (n, L) of real tokens."""
    longest = max(len(each) for each in features)
    embeds = torch.zeros(len(features), longest, features[0].shape[1])
    mask = torch.zeros(len(features), longest, dtype=torch.bool)
    for number, each in enumerate(features):
        embeds[number, : len(each)] = torch.from_numpy(each.astype(np.float32))
        mask[number, : len(each)] = True
    return embeds, mask
