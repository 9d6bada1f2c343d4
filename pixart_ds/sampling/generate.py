"""From a net and prompts to pictures: first all latents, then the decoding, each in batches of one size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pixart_ds.errors import ConfigError
from pixart_ds.model import DiT, PixArt
from pixart_ds.sampling.sample import sample

_AT_ONCE = 32
"""Pictures that are denoised together, at most."""
_DECODED_PIXELS = 1 << 20
"""Decoded together, at most, but for a single picture that has more: a VAE needs some 5 KB for each in fp32."""

Between = Callable[[], None]
"""Called between two steps of the work; what it raises ends the work."""


class Decoder(Protocol):
    """What generating needs of an image autoencoder; `encoders.latents` has it."""

    downsampling_factor: int

    def decode(self, latents: torch.Tensor) -> npt.NDArray[np.uint8]:
        """Scaled latents (B, C, h, w) to (B, H, W, 3)."""
        ...


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


def generate(
    net: PixArt | DiT,
    vae: Decoder,
    wishes: Sequence[Wish],
    *,
    null_embeds: npt.NDArray[np.float16] | None,
    guidance_scale: float,
    num_inference_steps: int,
    scheduler: str,
    null_caption: Literal["encoder", "weights"] = "encoder",
) -> list[npt.NDArray[np.uint8]]:
    """The pictures (H, W, 3), in the sequence of the wishes; see `denoise`."""
    latents = denoise(
        net,
        vae.downsampling_factor,
        wishes,
        null_embeds=null_embeds,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        scheduler=scheduler,
        null_caption=null_caption,
    )
    return decode(vae, latents)


def denoise(
    net: PixArt | DiT,
    factor: int,
    wishes: Sequence[Wish],
    *,
    null_embeds: npt.NDArray[np.float16] | None,
    guidance_scale: float,
    num_inference_steps: int,
    scheduler: str,
    null_caption: Literal["encoder", "weights"] = "encoder",
    at_once: int = _AT_ONCE,
    between: Between | None = None,
) -> list[torch.Tensor]:
    """Scaled latents (C, h, w) on the CPU, in the sequence of the wishes; those of one size are sampled together.

    Args:
        factor: The VAE's: pixels of a side for each latent.
        null_embeds: (L, D) features of the empty caption's real tokens, for guidance; None where they are not needed.
        null_caption: What guidance leads away from: these features under their own mask, or the weights' null caption under the
            prompt's mask.
        at_once: Pictures together, at most; guidance doubles them.
        between: Called before each denoising step.

    Raises:
        ConfigError: A size that the VAE and the patches cannot make.
    """
    step = factor * net.config.patch_size
    for height, width in (wish.size for wish in wishes):
        if height % step or width % step:
            raise ConfigError(f"a picture of {height}x{width} pixels cannot be made", remedy=f"use multiples of {step}")
    made: dict[int, torch.Tensor] = {}
    for size, batch in _batches([wish.size for wish in wishes], lambda size: at_once):
        own, null = conditions(net, [wishes[number] for number in batch], null_embeds, null_caption)
        latents = sample(
            net,
            conditions=own,
            null_conditions=null,
            size=(size[0] // factor, size[1] // factor),
            seeds=[wishes[number].seed for number in batch],
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            scheduler=scheduler,
            between=between,
        )
        made.update(zip(batch, latents.cpu(), strict=True))
    return [made[number] for number in range(len(wishes))]


def decode(
    vae: Decoder, latents: Sequence[torch.Tensor], between: Between | None = None
) -> list[npt.NDArray[np.uint8]]:
    """The pictures (H, W, 3) of latents (C, h, w), in their sequence; `between` is called before each batch."""
    made: dict[int, npt.NDArray[np.uint8]] = {}
    area = vae.downsampling_factor**2

    def at_once(size: tuple[int, int]) -> int:
        return max(1, _DECODED_PIXELS // (size[0] * size[1] * area))

    for _, batch in _batches([(each.shape[1], each.shape[2]) for each in latents], at_once):
        if between is not None:
            between()
        pictures = vae.decode(torch.stack([latents[number] for number in batch]))
        made.update(zip(batch, pictures, strict=True))
    return [made[number] for number in range(len(latents))]


def _batches(
    sizes: Sequence[tuple[int, int]], at_once: Callable[[tuple[int, int]], int]
) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Each size with the places it has in the list, at most `at_once` of them together."""
    places: dict[tuple[int, int], list[int]] = {}
    for number, size in enumerate(sizes):
        places.setdefault(size, []).append(number)
    for size, numbers in places.items():
        most = at_once(size)
        for start in range(0, len(numbers), most):
            yield size, numbers[start : start + most]


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
