"""Sampling with classifier-free guidance (Ho & Salimans 2022); each picture's noise comes from its own seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pixart_ds.sampling.schedulers import make_scheduler

Conditions = Mapping[str, torch.Tensor]


@torch.no_grad()
def sample(
    net: Any,
    *,
    conditions: Conditions,
    null_conditions: Conditions,
    size: tuple[int, int],
    seeds: Sequence[int],
    guidance_scale: float,
    num_inference_steps: int,
    scheduler: str = "DPMSolverMultistepScheduler",
    between: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Scaled latents (n, C, h, w) in fp32.

    A picture depends on its own condition and seed, not on the others of its batch.

    Args:
        net: `forward(latents, timesteps, **conditions)` gives (n, 2C, h, w): ε̂ and the variance's position.
        conditions: Tensors (n, …) by the net's names.
        null_conditions: The same names, for the unconditional half.
        size: (h, w) of the latents.
        seeds: One for each picture.
        guidance_scale: ε = ε_null + scale · (ε_own - ε_null), for all channels; 1 leaves the unconditional half out.
        num_inference_steps: Steps of the scheduler.
        scheduler: Class name of a diffusers scheduler.
        between: Called before each step; what it raises ends the sampling.
    """
    solver = make_scheduler(scheduler)
    parameter = next(net.parameters())
    device, channels = parameter.device, net.config.in_channels
    solver.set_timesteps(num_inference_steps, device=device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = torch.cat([torch.randn(1, channels, *size, generator=random) for random in generators]).to(device)
    latents = latents * solver.init_noise_sigma
    guided = guidance_scale != 1
    both = conditions
    if guided:
        both = {name: torch.cat(_same_length(null_conditions[name], own)) for name, own in conditions.items()}
    more = {"generator": generators} if "generator" in inspect.signature(solver.step).parameters else {}
    for timestep in solver.timesteps:
        if between is not None:
            between()
        scaled = solver.scale_model_input(latents, timestep)
        doubled = torch.cat([scaled, scaled]) if guided else scaled
        epsilon = net(doubled, timestep.expand(len(doubled)), **both).float()[:, :channels]
        if guided:
            null, own = epsilon.chunk(2)
            epsilon = null + guidance_scale * (own - null)
        latents = solver.step(epsilon, timestep, latents, **more).prev_sample
    return latents


def _same_length(one: torch.Tensor, other: torch.Tensor) -> list[torch.Tensor]:
    """Both with as many tokens, (n, L, …), the shorter padded with zeros (False in a mask)."""
    if one.ndim < 2 or one.shape[1:] == other.shape[1:]:
        return [one, other]
    longest = max(one.shape[1], other.shape[1])
    made = []
    for tensor in (one, other):
        padded = tensor.new_zeros(tensor.shape[0], longest, *tensor.shape[2:])
        padded[:, : tensor.shape[1]] = tensor
        made.append(padded)
    return made
