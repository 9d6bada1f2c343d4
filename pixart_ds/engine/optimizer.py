"""AdamW with the EMA of the weights as its third moment, and the learning rate as a function of applied steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from pixart_ds.config.schema import OptimizerConfig
from pixart_ds.engine.shards import SHARD_KEYS

STATE_KEYS = SHARD_KEYS[1:]
"""The optimizer's tensors of a parameter, each of the parameter's shape, in fp32."""


class AdamWEMA(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) that also keeps an exponential moving average of what it optimizes.

    Under ZeRO its only parameter is this rank's flat fp32 shard, so the average is sharded and in fp32 for free, and a
    step that was skipped leaves it alone. After the s-th applied step the average is `d·ema + (1 - d)·weights`, with
    d = `ema_decay`, or min(`ema_decay`, (1 + s) / (10 + s)) under `ema_warmup`.

    Args:
        params: Parameters or groups, as for torch's AdamW.
        config: Rate rule, betas, eps, weight decay (on every parameter, as the released code does) and EMA.
    """

    def __init__(self, params: Iterable[torch.Tensor] | Iterable[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(
            params,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.ema_decay = config.ema_decay
        self.ema_warmup = config.ema_warmup
        self.applied_steps = 0

    def _parameters(self) -> Iterator[torch.Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def seed(self) -> None:
        """Fresh state: no step applied, moments zero, EMA equal to the parameters."""
        self.applied_steps = 0
        for parameter in self._parameters():
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
                "ema": parameter.detach().clone(),
            }

    def set_applied_steps(self, count: int) -> None:
        """Puts the clock of Adam's bias correction and of the EMA's warm-up to `count` applied steps."""
        self.applied_steps = count
        for parameter in self._parameters():
            self.state[parameter]["step"].fill_(count)

    def current_ema_decay(self) -> float:
        """d for the step that was applied last."""
        if self.ema_warmup:
            return min(self.ema_decay, (1 + self.applied_steps) / (10 + self.applied_steps))
        return self.ema_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One applied step of all parameters, and of their EMA."""
        result = super().step(closure)
        self.applied_steps += 1
        for parameter in self._parameters():
            self.state[parameter]["ema"].lerp_(parameter, 1 - self.current_ema_decay())
        return result


def learning_rate(config: OptimizerConfig, applied_steps: int, *, global_batch_size: int, total_steps: int) -> float:
    """The rate of the step that comes after `applied_steps` applied ones.

    Linear warm-up over `warmup_steps`, then constant; over the last `decay_fraction` of `total_steps` it falls linearly
    to `final_rate` of the constant one.
    """
    factor = 1.0
    if applied_steps < config.warmup_steps:
        factor = (applied_steps + 1) / config.warmup_steps
    decay_steps = config.decay_fraction * total_steps
    if decay_steps > 0:
        into_decay = (applied_steps + 1 - (total_steps - decay_steps)) / decay_steps
        factor *= 1 - (1 - config.final_rate) * min(1.0, max(0.0, into_decay))
    return config.effective_learning_rate(global_batch_size) * factor
