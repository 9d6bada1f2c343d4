"""Schedule and loss against formulas in float64 and diffusers' scheduler."""

from __future__ import annotations

import math

import pytest
import torch

from pixart_ds.diffusion.loss import diffusion_loss, min_snr_weight, noisy
from pixart_ds.diffusion.schedule import Schedule

BETA = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA_BAR = (1 - BETA).cumprod(0)


def batch(timesteps: list[int], channels: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shape = (len(timesteps), channels, 4, 6)
    output = torch.randn(shape[0], 2 * channels, 4, 6, generator=random)
    return output, torch.randn(shape, generator=random), torch.randn(shape, generator=random), torch.tensor(timesteps)


def reference(output: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, t: int) -> tuple[float, float]:
    """MSE and bound of one sample by the formulas, float64, at t > 0 through torch's own KL divergence."""
    output, x0, noise = output.double(), x0.double(), noise.double()
    predicted, position = output.chunk(2, 0)
    before = ALPHA_BAR[t - 1] if t else torch.tensor(1.0, dtype=torch.float64)
    beta_tilde = BETA[max(t, 1)] * (1 - ALPHA_BAR[max(t, 1) - 1]) / (1 - ALPHA_BAR[max(t, 1)])
    x_t = ALPHA_BAR[t].sqrt() * x0 + (1 - ALPHA_BAR[t]).sqrt() * noise
    clean = (x_t - (1 - ALPHA_BAR[t]).sqrt() * predicted) / ALPHA_BAR[t].sqrt()

    def mean_of(start: torch.Tensor) -> torch.Tensor:
        return (BETA[t] * before.sqrt() * start + (1 - before) * (1 - BETA[t]).sqrt() * x_t) / (1 - ALPHA_BAR[t])

    share = (position + 1) / 2
    scale = (0.5 * (share * BETA[t].log() + (1 - share) * beta_tilde.log())).exp()
    model = torch.distributions.Normal(mean_of(clean), scale)
    if t:
        bound = torch.distributions.kl_divergence(torch.distributions.Normal(mean_of(x0), beta_tilde.sqrt()), model)
    else:
        upper = torch.where(x0 > 0.999, torch.ones_like(x0), model.cdf(x0 + 1 / 255))
        lower = torch.where(x0 < -0.999, torch.zeros_like(x0), model.cdf(x0 - 1 / 255))
        bound = -(upper - lower).clamp(min=1e-12).log()
    return float((noise - predicted).square().mean()), float(bound.mean() / math.log(2))


@pytest.mark.parametrize("t", [1, 2, 10, 250, 500, 998, 999])
def test_loss_is_the_formulas_value(t: int) -> None:
    output, x0, noise, timesteps = batch([t])
    made = diffusion_loss(output, x0, noise, timesteps)
    mse, bound = reference(output[0], x0[0], noise[0], t)
    assert made.mse.item() == pytest.approx(mse, rel=1e-5)
    assert made.vlb.item() == pytest.approx(bound, rel=2e-3, abs=1e-5)
    assert made.total.item() == pytest.approx(made.mse.item() + made.vlb.item())


def test_at_zero_the_bound_is_a_discretised_likelihood_with_open_ends() -> None:
    output, x0, noise, timesteps = batch([0])
    output[:, :4] = noise + 0.01 * output[:, :4]  # a good prediction, so that the mass in the bins is no rounding error
    assert (x0.abs() > 0.999).any()
    made = diffusion_loss(output, x0, noise, timesteps)
    _, bound = reference(output[0], x0[0], noise[0], 0)
    assert made.vlb.item() == pytest.approx(
        bound, rel=2e-2
    )  # the normal's distribution function is approximated by a tanh


def test_each_sample_has_its_own_loss() -> None:
    together = batch([0, 3, 700])
    losses = diffusion_loss(*together)
    for number in range(3):
        alone = diffusion_loss(*(part[number : number + 1] for part in together))
        for name in ("total", "mse", "vlb"):
            assert getattr(alone, name).item() == pytest.approx(getattr(losses, name)[number].item(), rel=1e-6)


def test_the_bound_teaches_the_variance_alone() -> None:
    output, x0, noise, timesteps = batch([3, 700])
    output.requires_grad_()
    diffusion_loss(output, x0, noise, timesteps).vlb.sum().backward()
    assert output.grad is not None
    assert not output.grad[:, :4].any()
    assert output.grad[:, 4:].all()


def test_sixteen_bit_outputs_are_judged_in_fp32() -> None:
    output, x0, noise, timesteps = batch([3, 700])
    half = diffusion_loss(output.half(), x0, noise, timesteps)
    assert half.total.dtype == torch.float32
    assert torch.allclose(half.total, diffusion_loss(output.half().float(), x0, noise, timesteps).total)


def test_schedule_is_diffusers_linear_one() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", variance_type="learned_range")
    ours = Schedule.linear()
    assert torch.allclose(ours.signal, theirs.alphas_cumprod.sqrt(), rtol=1e-4)
    _, x0, noise, timesteps = batch([0, 10, 999])
    assert torch.allclose(noisy(x0, noise, timesteps), theirs.add_noise(x0, noise, timesteps), atol=1e-5)
    for t in (1, 10, 999):  # log of the learned variance at both ends of its range
        for position, table in ((-1.0, ours.log_posterior), (1.0, ours.log_beta)):
            assert float(theirs._get_variance(t, predicted_variance=torch.tensor(position))) == pytest.approx(
                table[t].item(), rel=1e-3
            )


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_mse_alone(gamma: float) -> None:
    parts = batch([0, 100, 500, 999])
    plain, weighted = diffusion_loss(*parts), diffusion_loss(*parts, min_snr_gamma=gamma)
    snr = ALPHA_BAR[parts[3]] / (1 - ALPHA_BAR[parts[3]])
    wanted = snr.clamp(max=gamma) / snr  # Hang et al. 2023, for a prediction of the noise
    assert min_snr_weight(parts[3], gamma).tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    assert wanted[0] < 1e-2
    assert wanted[3] == 1
    assert torch.equal(weighted.mse, plain.mse)
    assert torch.equal(weighted.vlb, plain.vlb)
    assert weighted.total.tolist() == pytest.approx((wanted * plain.mse + plain.vlb).tolist(), rel=1e-4)


def test_tables_are_those_of_float64() -> None:
    before = torch.cat([torch.ones(1, dtype=torch.float64), ALPHA_BAR[:-1]])
    ours = Schedule.linear()
    for made, wanted in (
        (ours.signal, ALPHA_BAR.sqrt()),
        (ours.noise, (1 - ALPHA_BAR).sqrt()),
        (ours.log_beta, BETA.log()),
        (ours.mean_of_clean, BETA * before.sqrt() / (1 - ALPHA_BAR)),
        (ours.mean_of_noisy, (1 - before) * (1 - BETA).sqrt() / (1 - ALPHA_BAR)),
    ):
        assert torch.allclose(made.double(), wanted, rtol=1e-6, atol=0)
