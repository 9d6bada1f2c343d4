"""Guided sampling: against a loop by hand, one picture whatever its batch, and any scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pixart_ds.errors import ConfigError
from pixart_ds.model import build
from pixart_ds.sampling.sample import sample
from pixart_ds.sampling.schedulers import make_scheduler
from tests.model.test_nets import inputs, randomised, small, small_dit


def text_of(count: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    batch = inputs(batch=count)
    null = torch.randn(1, 1, 20, generator=torch.Generator().manual_seed(9)).expand(count, -1, -1)
    own = {"caption_embeds": batch["caption_embeds"], "caption_mask": batch["caption_mask"]}
    return own, {"caption_embeds": null, "caption_mask": torch.ones(count, 1, dtype=torch.bool)}


def options(**changes: Any) -> dict[str, Any]:
    return {"size": (8, 6), "guidance_scale": 3.0, "num_inference_steps": 5, **changes}


def test_against_a_loop_by_hand() -> None:
    net = randomised(build(small()))
    own, null = text_of(3)
    made = sample(net, conditions=own, null_conditions=null, seeds=[4, 5, 6], **options())
    solver = make_scheduler("DPMSolverMultistepScheduler")
    solver.set_timesteps(5)
    x = torch.cat([torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5, 6)])
    with torch.no_grad():
        for t in solver.timesteps:
            conditional = net(x, t.expand(3), **own)[:, :4]
            free = net(x, t.expand(3), **null)[:, :4]
            x = solver.step(free + 3.0 * (conditional - free), t, x).prev_sample
    assert (made - x).abs().max() < 1e-4 * x.abs().max()


@pytest.mark.parametrize(
    "scheduler", ["DPMSolverMultistepScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"]
)
def test_a_picture_does_not_depend_on_its_batch(scheduler: str) -> None:
    net = randomised(build(small()))
    own, null = text_of(3)
    together = sample(net, conditions=own, null_conditions=null, seeds=[4, 5, 6], scheduler=scheduler, **options())
    assert torch.isfinite(together).all()
    for number in range(3):
        one = {name: value[number : number + 1] for name, value in own.items()}
        nothing = {name: value[number : number + 1] for name, value in null.items()}
        alone = sample(
            net, conditions=one, null_conditions=nothing, seeds=[4 + number], scheduler=scheduler, **options()
        )
        assert (alone[0] - together[number]).abs().max() < 1e-3 * together[number].abs().max()


def test_guidance_of_one_needs_no_unconditional_half() -> None:
    net = randomised(build(small()))
    own, null = text_of(2)
    spoilt = {
        name: torch.full_like(value.float(), torch.nan) if value.dtype != torch.bool else value
        for name, value in null.items()
    }
    made = sample(net, conditions=own, null_conditions=spoilt, seeds=[1, 2], **options(guidance_scale=1.0))
    assert torch.isfinite(made).all()
    guided = sample(net, conditions=own, null_conditions=null, seeds=[1, 2], **options())
    assert not torch.allclose(made, guided)


def test_class_labels_and_micro_conditions() -> None:
    net = randomised(build(small_dit()))
    labels = torch.tensor([0, 3])
    made = sample(
        net,
        conditions={"class_labels": labels},
        null_conditions={"class_labels": torch.tensor([5, 5])},
        seeds=[1, 1],
        **options(),
    )
    assert made.shape == (2, 4, 8, 6)
    assert not torch.allclose(made[0], made[1])
    ms = randomised(build(small(micro_conditions=True)))
    own, null = text_of(2)
    outs = []
    for ratio in (1.0, 1.5):
        sizes = {"original_sizes": torch.tensor([[32.0, 24.0]] * 2), "aspect_ratios": torch.full((2,), ratio)}
        outs.append(sample(ms, conditions=own | sizes, null_conditions=null | sizes, seeds=[1, 2], **options()))
    assert not torch.allclose(outs[0], outs[1])


def test_an_unknown_or_unfit_scheduler_is_refused() -> None:
    with pytest.raises(ConfigError, match="no scheduler 'DPMSolverMultistep'") as caught:
        make_scheduler("DPMSolverMultistep")
    assert "DPMSolverMultistepScheduler" in str(caught.value)
    with pytest.raises(ConfigError, match="made for other nets"):
        make_scheduler("FlowMatchEulerDiscreteScheduler")
