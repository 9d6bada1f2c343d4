#!/usr/bin/env python
"""How far a DiT and the PixArt made of it differ at each timestep, for each choice of the shared modulation.

The label is left out of the DiT, and the new cross-attention adds nothing, as at the start of the second stage. Each figure is
‖PixArt - DiT‖ / ‖DiT‖ over the predicted noise, for standard normal inputs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pixart_ds.config.schema import ModelConfig
from pixart_ds.engine.weights import open_weights
from pixart_ds.errors import ConfigError, PixArtError
from pixart_ds.model import build, initialise, reparameterise

TIMESTEPS = (0, 50, 100, 200, 300, 400, 450, 500, 550, 600, 700, 800, 900, 999)
SHARED: tuple[Literal["first", "mean"], ...] = ("first", "mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a run, a checkpoint or a handover with a DiT")
    parser.add_argument("--stage", help="stage of the run")
    parser.add_argument("--at", type=int, default=500, help="the timestep at which both agree (default 500)")
    parser.add_argument("--pictures", type=int, default=8)
    options = parser.parse_args()
    try:
        weights = open_weights(options.source, stage=options.stage)
        if weights.model.kind != "dit":
            raise ConfigError(
                "the weights are a PixArt's, not a DiT's", remedy="name a class-conditional stage: --stage stage1"
            )
    except PixArtError as error:
        sys.exit(f"reparameterisation_gap: {error}")
    table = {shared: gaps(weights.model, weights.state, options.at, shared, options.pictures) for shared in SHARED}
    print("|     t | " + " | ".join(f"shared: {shared}" for shared in SHARED) + " |")
    print("|------:|" + "|".join("-" * (len(shared) + 9) + ":" for shared in SHARED) + "|")
    for number, timestep in enumerate(TIMESTEPS):
        cells = " | ".join(f"{table[shared][number]:{len(shared) + 8}.2g}" for shared in SHARED)
        print(f"| {timestep:5} | {cells} |")


@torch.no_grad()
def gaps(
    model: ModelConfig, state: dict[str, torch.Tensor], at: int, shared: Literal["first", "mean"], pictures: int
) -> list[float]:
    """The relative difference at each of TIMESTEPS."""
    dit = build(model)
    dit.load_state_dict(state)
    dit.get_parameter("y_embedder.embedding_table.weight").zero_()
    values = model.model_dump(exclude={"kind", "num_classes"}) | {"caption_channels": 1, "max_tokens": 1}
    pixart = build(ModelConfig(kind="pixart", **values))
    initialise(pixart, 0)
    pixart.load_state_dict(reparameterise(state, pixart.state_dict(), at=at, shared_modulation=shared))
    side = model.base_size * model.patch_size
    x = torch.randn(pictures, model.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    labels, text = torch.zeros(pictures, dtype=torch.long), torch.zeros(pictures, 1, 1)
    made = []
    for timestep in TIMESTEPS:
        t = torch.full((pictures,), float(timestep))
        one = dit(x, t, labels)[:, : model.in_channels]
        two = pixart(x, t, text, torch.ones(pictures, 1, dtype=torch.bool))[:, : model.in_channels]
        made.append(float((two - one).norm() / one.norm()))
    return made


if __name__ == "__main__":
    main()
