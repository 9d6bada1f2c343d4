"""diffusers' schedulers by class name, on this project's noise schedule."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from pixart_ds.compat import hide_broken_torchvision
from pixart_ds.diffusion.schedule import BETA_END, BETA_START, NUM_TIMESTEPS
from pixart_ds.errors import ConfigError


def make_scheduler(name: str) -> Any:
    """A scheduler with linear β and ε-prediction; DPM-Solver++ is the multistep one of second order, as the paper samples.

    Only ε is handed to the scheduler: solvers use fixed variances, also those that could take the learned one.

    Raises:
        ConfigError: diffusers has no such scheduler, or it cannot work with this schedule.
    """
    hide_broken_torchvision()
    import diffusers

    known = [each for each in dir(diffusers) if each.endswith("Scheduler")]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise ConfigError(
            f"diffusers has no scheduler {name!r}", remedy=f"did you mean {' or '.join(near)}?" if near else None
        )
    kind = getattr(diffusers, name)
    accepted = inspect.signature(kind.__init__).parameters
    wanted = {
        "num_train_timesteps": NUM_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
    }
    if missing := [key for key in ("beta_start", "prediction_type") if key not in accepted]:
        raise ConfigError(
            f"{name} does not take {' or '.join(missing)}: it is made for other nets",
            remedy="use DPMSolverMultistepScheduler",
        )
    more = {"algorithm_type": "dpmsolver++", "solver_order": 2} if name == "DPMSolverMultistepScheduler" else {}
    if "clip_sample" in accepted:  # latents are not confined to -1 … 1
        more["clip_sample"] = False
    return kind(**wanted, **more)
