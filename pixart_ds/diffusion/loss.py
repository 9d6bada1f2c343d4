"""The training loss of a sample: ε-MSE plus the variational bound for the learned variance (Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pixart_ds.diffusion.schedule import schedule_on


@dataclass(frozen=True)
class Losses:
    """Losses of each sample, (B,) in fp32, means over its elements.

    Attributes:
        total: mse + vlb; with min-SNR weighting, weight · mse + vlb.
        mse: (ε - ε̂)², unweighted.
        vlb: The bound's term of this timestep, in bits; its gradient reaches the variance only.
    """

    total: torch.Tensor
    mse: torch.Tensor
    vlb: torch.Tensor


def noisy(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """x_t = √ᾱ x₀ + √(1 - ᾱ) ε: (B, C, h, w) fp32 from latents and noise of that shape and timesteps (B,)."""
    tables = schedule_on(latents.device)
    return _at(tables.signal, timesteps) * latents + _at(tables.noise, timesteps) * noise


def diffusion_loss(
    output: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    min_snr_gamma: float | None = None,
) -> Losses:
    """Losses of a micro-batch.

    Args:
        output: (B, 2C, h, w), any float dtype: ε̂ and the variance's position v between log β̃ (v = -1) and log β (v = 1).
        latents: (B, C, h, w) fp32, x₀.
        noise: (B, C, h, w) fp32, ε.
        timesteps: (B,) int64 in 0 … 999.
        min_snr_gamma: γ of min(SNR, γ) / SNR, the weight of a timestep's ε-MSE (Hang et al. 2023); None weighs all alike.
    """
    predicted, position = output.float().chunk(2, 1)
    mse = (noise - predicted).square().flatten(1).mean(1)
    vlb = _bound(predicted.detach(), position, latents, noise, timesteps).flatten(1).mean(1)
    weighted = mse if min_snr_gamma is None else mse * min_snr_weight(timesteps, min_snr_gamma)
    return Losses(weighted + vlb, mse, vlb)


def min_snr_weight(timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, γ) / SNR with SNR = ᾱ / (1 - ᾱ), for an ε-prediction: (B,) fp32 from timesteps (B,)."""
    tables = schedule_on(timesteps.device)
    inverse = (tables.noise[timesteps] / tables.signal[timesteps]).square()
    return (gamma * inverse).clamp(max=1.0)


def _bound(
    predicted: torch.Tensor, position: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """KL(q(x₋₁ | x_t, x₀) ‖ p(x₋₁ | x_t)) in bits, elementwise; at t = 0 the discretised negative log-likelihood."""
    tables = schedule_on(latents.device)
    x_t = noisy(latents, noise, timesteps)
    low, high = _at(tables.log_posterior, timesteps), _at(tables.log_beta, timesteps)
    share = (position + 1) / 2
    log_variance = share * high + (1 - share) * low
    clean = (x_t - _at(tables.noise, timesteps) * predicted) / _at(tables.signal, timesteps)
    to_clean, to_noisy = _at(tables.mean_of_clean, timesteps), _at(tables.mean_of_noisy, timesteps)
    mean = to_clean * clean + to_noisy * x_t
    true_mean = to_clean * latents + to_noisy * x_t
    divergence = 0.5 * (
        log_variance - low - 1 + torch.exp(low - log_variance) + (true_mean - mean).square() * torch.exp(-log_variance)
    )
    likelihood = -_discretised_log_likelihood(latents, mean, 0.5 * log_variance)
    first = (timesteps == 0)[:, None, None, None]
    return torch.where(first, likelihood, divergence) / math.log(2.0)


def _discretised_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Log of the Gaussian's mass in the bin of width 2/255 around x; the bins beyond ±0.999 are open."""
    centred = x - mean
    inverse = torch.exp(-log_scale)
    below_upper = _normal_cdf(inverse * (centred + 1 / 255))
    below_lower = _normal_cdf(inverse * (centred - 1 / 255))
    inner = below_upper - below_lower
    mass = torch.where(x < -0.999, below_upper, torch.where(x > 0.999, 1 - below_lower, inner))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of Φ that DiT and PixArt train with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _at(table: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    return table[timesteps][:, None, None, None]
