"""The noise schedule: linear β from 1e-4 to 0.02 over 1000 steps, as in DiT and PixArt (not Stable Diffusion's)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

NUM_TIMESTEPS = 1000
BETA_START = 1e-4
BETA_END = 0.02


@dataclass(frozen=True)
class Schedule:
    """Tables over t = 0 … 999, each (1000,), computed in float64 and kept in fp32.

    With α = 1 - β and ᾱ = Πα (Ho et al. 2020, equations 4, 6 and 7):

    Attributes:
        signal: √ᾱ.
        noise: √(1 - ᾱ).
        log_beta: log β, the upper end of the learned variance.
        log_posterior: log β̃, its lower end, β̃ = β (1 - ᾱ₋₁) / (1 - ᾱ); β̃₀ is 0 and takes β̃₁'s place.
        mean_of_clean, mean_of_noisy: Coefficients of x₀ and x_t in the mean of q(x₋₁ | x_t, x₀).
    """

    signal: torch.Tensor
    noise: torch.Tensor
    log_beta: torch.Tensor
    log_posterior: torch.Tensor
    mean_of_clean: torch.Tensor
    mean_of_noisy: torch.Tensor

    @classmethod
    def linear(cls) -> Schedule:
        """The only schedule of this project."""
        beta = torch.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=torch.float64)
        alpha_bar = torch.cumprod(1 - beta, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        posterior = beta * (1 - before) / (1 - alpha_bar)
        posterior = torch.cat([posterior[1:2], posterior[1:]])
        tables = (
            alpha_bar.sqrt(),
            (1 - alpha_bar).sqrt(),
            beta.log(),
            posterior.log(),
            beta * before.sqrt() / (1 - alpha_bar),
            (1 - before) * (1 - beta).sqrt() / (1 - alpha_bar),
        )
        return cls(*(table.float() for table in tables))

    def to(self, device: torch.device) -> Schedule:
        """The same on another device."""
        return Schedule(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@cache
def schedule_on(device: torch.device) -> Schedule:
    """The schedule's tables on a device, made once."""
    return Schedule.linear().to(device)
