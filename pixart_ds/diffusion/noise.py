"""The random draws of one sample at one visit: functions of seed, stage, sample and visit alone.

Rank, world size, thread, device and clock never enter, so a run that is resumed elsewhere draws the same. Only Philox's raw words
are used; normals are made here. A 1024-px sample (2 × 65,536 normals) costs about 1.5 ms of one CPU core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pixart_ds.diffusion.schedule import NUM_TIMESTEPS
from pixart_ds.plan.random import key_of, raw_words, uniform

_AT_ONCE = 1 << 14
"""Words that are turned into normals at once: they stay in the core's cache, and torch keeps to one thread."""
_LOW = 0xFFFFFFFF
_SCALARS, _LATENT_NOISE, _NOISE = range(3)  # purposes: the third counter word


@dataclass(frozen=True)
class Draws:
    """What is drawn for one sample.

    Attributes:
        latent_noise: (C, h, w) fp32 standard normals: which point of the VAE's posterior is taken.
        noise: (C, h, w) fp32 standard normals: the diffusion's ε.
        timestep: 0 … 999, uniform.
        dropped: Whether the condition is replaced by the null one.
        noise_key: The first raw word of `noise`, for the audit.
    """

    latent_noise: npt.NDArray[np.float32]
    noise: npt.NDArray[np.float32]
    timestep: int
    dropped: bool
    noise_key: int


def draw(
    seed: int, stage: str, sample_id: int, visit: int, shape: tuple[int, int, int], condition_dropout: float
) -> Draws:
    """Draws for the `visit`-th time (from 0) that a stage sees a sample whose latents have `shape` (C, h, w)."""
    return draw_all(seed, stage, [(sample_id, visit)], shape, condition_dropout)[0]


def draw_all(
    seed: int,
    stage: str,
    samples: Sequence[tuple[int, int]],
    shape: tuple[int, int, int],
    condition_dropout: float,
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> list[Draws]:
    """The same for several (sample id, visit) of one shape: the normals of all are made together, which is faster.

    Args:
        into: Contiguous memory (n, C, h, w) fp32 for their latent noise, and for their noise; the draws' arrays are views of it.
    """
    key, count = key_of("draws", seed, stage), math.prod(shape)
    places = into or (torch.empty(len(samples), *shape), torch.empty(len(samples), *shape))
    first_words: list[int] = []
    for purpose, place in zip((_LATENT_NOISE, _NOISE), places, strict=True):
        words = np.empty((len(samples), (count + 1) // 2), np.uint64)
        for number, sample in enumerate(samples):
            words[number] = raw_words(key, (*sample, purpose), words.shape[1])
        normals(words, place.view(-1, count))
        first_words = words[:, 0].tolist()  # the noise's come last
    draws = []
    for number, (sample, latent_noise, noise) in enumerate(
        zip(samples, *(place.numpy() for place in places), strict=True)
    ):
        scalars = raw_words(key, (*sample, _SCALARS), 2)
        draws.append(
            Draws(
                latent_noise=latent_noise,
                noise=noise,
                # 2⁶⁴ is not a multiple of 1000, which favours some timesteps by one part in 10¹⁶
                timestep=int(scalars[0]) % NUM_TIMESTEPS,
                dropped=bool(uniform(scalars[1:])[0] < condition_dropout),
                noise_key=first_words[number],
            )
        )
    return draws


def normals(words: npt.NDArray[np.uint64], place: torch.Tensor) -> None:
    """Standard normals from words, by Box and Muller (1958): a word's halves give radius and angle.

    Computed in float64, so that the last bit of a platform's log or cosine hardly ever survives the rounding to fp32.

    Args:
        words: (n, ⌈count / 2⌉).
        place: (n, count) fp32, which is filled.
    """
    rows, count = torch.from_numpy(words.view(np.int64)), place.shape[1]
    step = max(1, _AT_ONCE // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part, filled = rows[start : start + step], place[start : start + step]
        # (0, 1], so that no logarithm is infinite
        radius = ((part >> 32) & _LOW).double().add_(1.0).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = (part & _LOW).double().mul_(2.0 * math.pi * 2.0**-32)
        filled[:, 0::2] = radius * angle.cos()
        filled[:, 1::2] = (radius * angle.sin_())[:, : count // 2]
