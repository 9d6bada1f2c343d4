"""Gradients of the loss, and the tables' precision, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from pixart_ds.diffusion.loss import diffusion_loss
from pixart_ds.diffusion.schedule import Schedule
from tests.diffusion.test_loss import ALPHA_BAR, BETA, batch


def test_tables_are_rounded_once_from_float64() -> None:
    tables = Schedule.linear()
    assert torch.equal(tables.signal, ALPHA_BAR.sqrt().float())
    assert torch.equal(tables.noise, (1 - ALPHA_BAR).sqrt().float())
    assert torch.equal(tables.log_beta, BETA.log().float())
    before = ALPHA_BAR[:-1]
    posterior = (BETA[1:] * (1 - before) / (1 - ALPHA_BAR[1:])).log().float()
    assert torch.equal(tables.log_posterior, torch.cat([posterior[:1], posterior]))


@pytest.mark.parametrize("t", [1, 5, 50, 500])
def test_gradients_of_both_halves_are_the_formulas(t: int) -> None:
    output, x0, noise, timesteps = batch([t])
    output.requires_grad_()
    diffusion_loss(output, x0, noise, timesteps).total.sum().backward()

    exact = output.detach().double().requires_grad_()
    predicted, position = exact.chunk(2, 1)
    before = ALPHA_BAR[t - 1]
    beta_tilde = BETA[t] * (1 - before) / (1 - ALPHA_BAR[t])
    # the means differ by √(1 - ᾱ) / √ᾱ · (ε - ε̂) in x₀, times that of x₀ in the posterior's mean
    of_clean = BETA[t] * before.sqrt() / (1 - ALPHA_BAR[t])
    gap = of_clean * ((1 - ALPHA_BAR[t]) / ALPHA_BAR[t]).sqrt() * (noise.double() - predicted.detach())
    share = (position + 1) / 2
    scale = (0.5 * (share * BETA[t].log() + (1 - share) * beta_tilde.log())).exp()
    true = torch.distributions.Normal(torch.zeros_like(gap), beta_tilde.sqrt())
    bound = torch.distributions.kl_divergence(true, torch.distributions.Normal(gap, scale)) / math.log(2)
    ((noise.double() - predicted).square().mean() + bound.mean()).backward()

    assert output.grad is not None
    assert exact.grad is not None
    for half, tolerance in ((slice(0, 4), 1e-6), (slice(4, 8), 2e-3)):  # log β - log β̃ cancels as t grows
        wanted = exact.grad[:, half]
        assert (output.grad[:, half] - wanted).norm() < tolerance * wanted.norm()
