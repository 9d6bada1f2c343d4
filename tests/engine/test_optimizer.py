"""AdamW with EMA against torch's AdamW; the learning rate against its definition."""

from __future__ import annotations

import pytest
import torch

from pixart_ds.config.schema import OptimizerConfig
from pixart_ds.engine.optimizer import AdamWEMA, learning_rate


def _config(**values: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"learning_rate": 1e-2, **values})


def _gradients(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(101, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("warmup", [False, True])
def test_steps_equal_torchs_adamw_and_the_ema_its_definition(warmup: bool) -> None:
    config = _config(ema_decay=0.6, ema_warmup=warmup, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.03)
    start = torch.randn(101, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    adam = AdamWEMA([ours], config)
    adam.seed()
    plain = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.03, foreach=False)
    average = start.double()
    for step, gradient in enumerate(_gradients(30), start=1):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        adam.step()
        plain.step()
        decay = min(0.6, (1 + step) / (10 + step)) if warmup else 0.6
        average = decay * average + (1 - decay) * ours.detach().double()
        assert adam.current_ema_decay() == decay
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(adam.state[ours]["ema"].double(), average, rtol=1e-6, atol=1e-7)
    assert adam.applied_steps == 30


def test_a_clock_that_is_set_goes_on_as_if_it_had_run() -> None:
    """What a resume does: moments and EMA copied, the count set."""
    config = _config(ema_decay=0.99, ema_warmup=True)
    gradients = _gradients(8)
    runs = []
    for stop in (None, 4):
        weights = torch.nn.Parameter(torch.ones(101))
        adam = AdamWEMA([weights], config)
        adam.seed()
        for number, gradient in enumerate(gradients):
            if number == stop:
                kept, state = weights.detach().clone(), {k: v.clone() for k, v in adam.state[weights].items()}
                weights = torch.nn.Parameter(kept)
                adam = AdamWEMA([weights], config)
                adam.seed()
                for key in ("exp_avg", "exp_avg_sq", "ema"):
                    adam.state[weights][key].copy_(state[key])
                adam.set_applied_steps(number)
            weights.grad = gradient.clone()
            adam.step()
        runs.append((weights.detach(), adam.state[weights]["ema"]))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def _rates(config: OptimizerConfig, steps: int, batch: int = 256) -> list[float]:
    return [learning_rate(config, step, global_batch_size=batch, total_steps=steps) for step in range(steps)]


def test_the_papers_rate_is_a_warm_up_and_then_constant() -> None:
    rates = _rates(_config(learning_rate=2e-5, warmup_steps=1000), 3000)
    assert rates[0] == 2e-5 / 1000
    assert rates[499] == pytest.approx(1e-5)
    assert rates[999:] == [2e-5] * 2001


def test_no_warm_up() -> None:
    assert _rates(_config(learning_rate=1e-3, warmup_steps=0), 5) == [1e-3] * 5


def test_the_square_root_rule() -> None:
    config = _config(learning_rate=2e-5, learning_rate_rule="sqrt", warmup_steps=0)
    assert _rates(config, 1, batch=1024) == [4e-5]


def test_the_decay_ends_at_the_final_rate() -> None:
    config = _config(learning_rate=1.0, warmup_steps=2, decay_fraction=0.4, final_rate=0.1)
    assert _rates(config, 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1])
    assert learning_rate(config, 50, global_batch_size=256, total_steps=10) == pytest.approx(0.1)
