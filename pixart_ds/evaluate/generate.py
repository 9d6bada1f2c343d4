"""From a stage's weights and prompts to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from pixart_ds.encoders.latents import LatentEncoder
from pixart_ds.engine.foreign import NULL_CAPTION
from pixart_ds.engine.weights import Weights
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


def load_net(weights: Weights, device: str = "cpu") -> PixArt | DiT:
    """The net with these weights, ready to sample; a null caption that they lack is zero."""
    fp32_attention = weights.model.fp32_attention if weights.stage is None else weights.stage.fp32_attention
    net = build(weights.model, fp32_attention=fp32_attention)
    state = dict(weights.state)
    if isinstance(net, PixArt):
        state.setdefault(NULL_CAPTION, net.y_embedder.y_embedding)
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
    null_caption: Literal["encoder", "weights"] = "encoder",
) -> list[npt.NDArray[np.uint8]]:
    """The pictures (H, W, 3), in the sequence of the wishes; those of one size are sampled together.

    Args:
        null_embeds: (L, D) features of the empty caption, for guidance; None where they are not needed.
        null_caption: What guidance leads away from: these features under their own mask, or the weights' null caption under the
            prompt's mask.

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
            own, null = conditions(net, [wishes[number] for number in batch], null_embeds, null_caption)
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
    net: PixArt | DiT,
    wishes: Sequence[Wish],
    null_embeds: npt.NDArray[np.float16] | None,
    null_caption: Literal["encoder", "weights"] = "encoder",
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The wishes' own and null conditions as the net takes them, for wishes of one size."""
    device, count = next(net.parameters()).device, len(wishes)
    if isinstance(net, DiT):
        labels = torch.tensor([int(wish.condition) for wish in wishes], device=device)  # type: ignore[call-overload]
        return {"class_labels": labels}, {"class_labels": torch.full_like(labels, net.null_label)}
    embeds, mask = padded([np.asarray(wish.condition) for wish in wishes])
    if null_caption == "weights":
        null, null_mask = _stored_null(net, mask.shape[1]).expand(count, -1, -1), mask
    else:
        assert null_embeds is not None
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


def _stored_null(net: PixArt, tokens: int) -> torch.Tensor:
    """The first `tokens` of the weights' null caption, (tokens, D)."""
    stored = net.y_embedder.y_embedding[:tokens].float()
    if not stored.any():
        raise ConfigError("the weights hold no null caption", remedy="use the text encoder's: --null-caption encoder")
    return stored


def padded(features: Sequence[npt.NDArray[np.float16]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (L_i, D) as (n, L, D) fp32 with zeros behind, and the mask (n, L) of real tokens."""
    longest = max(len(each) for each in features)
    embeds = torch.zeros(len(features), longest, features[0].shape[1])
    mask = torch.zeros(len(features), longest, dtype=torch.bool)
    for number, each in enumerate(features):
        embeds[number, : len(each)] = torch.from_numpy(each.astype(np.float32))
        mask[number, : len(each)] = True
    return embeds, mask
