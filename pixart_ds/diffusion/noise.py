"""The random draws of one sample at one visit: functions of seed, stage, sample and visit alone.

Rank, world size, thread, device and clock never enter, so a run that is resumed elsewhere draws the same. Only Philox's raw words
are used; normals are made here. A 1024-px sample (2 × 65,536 normals) costs about 3 ms of one CPU core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixart_ds.diffusion.schedule import NUM_TIMESTEPS
from pixart_ds.plan.random import key_of, raw_words, uniform

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
    key = key_of("draws", seed, stage)
    scalars = raw_words(key, (sample_id, visit, _SCALARS), 2)
    count = math.prod(shape)
    first = raw_words(key, (sample_id, visit, _NOISE), (count + 1) // 2)
    second = raw_words(key, (sample_id, visit, _LATENT_NOISE), (count + 1) // 2)
    return Draws(
        latent_noise=normals(second, count).reshape(shape),
        noise=normals(first, count).reshape(shape),
        # 2⁶⁴ is not a multiple of 1000, which favours some timesteps by one part in 10¹⁶
        timestep=int(scalars[0]) % NUM_TIMESTEPS,
        dropped=bool(uniform(scalars[1:])[0] < condition_dropout),
        noise_key=int(first[0]),
    )


def normals(words: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.float32]:
    """`count` standard normals from ⌈count / 2⌉ words, by Box and Muller (1958): each word's halves give radius and angle.

    Computed in float64, so that the last bit of a platform's log or cosine hardly ever survives the rounding to fp32.
    """
    low = (words & np.uint64(0xFFFFFFFF)).astype(np.float64)
    high = (words >> np.uint64(32)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((high + 1.0) * 2.0**-32))  # (0, 1], so that no logarithm is infinite
    angle = (2.0 * math.pi * 2.0**-32) * low
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[:count].astype(np.float32)
