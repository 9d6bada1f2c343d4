"""From DiT to PixArt: tables chosen so that at one timestep, without label and text, both nets agree (paper §2.3)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from pixart_ds.errors import CheckpointError
from pixart_ds.model.positions import sinusoid

State = dict[str, torch.Tensor]


def reparameterise(
    dit: State, pixart: State, *, at: int = 500, shared_modulation: Literal["first", "mean"] | int = "first"
) -> State:
    """PixArt's state with everything of a DiT that has a place in it.

    Block i's table is the difference of its own modulation and the shared one at timestep `at`, without the label:
    S⁽ⁱ⁾ = S̄ + E⁽ⁱ⁾ holds there exactly, whichever function of the timestep is shared. The final layer's table is treated alike,
    against the raw timestep embedding that is added to it.

    Args:
        dit: State dict of a DiT, fp32.
        pixart: State dict of a freshly initialised PixArt of the same shape, fp32; not changed.
        at: The timestep; the paper chose 500 empirically.
        shared_modulation: S̄, the `t_block`: of DiT's first block (paper: "only at the first block"), the mean over all blocks,
            or that of the block with this number.

    Returns:
        A new state; cross-attention, caption embedder and null caption are PixArt's own.

    Raises:
        CheckpointError: The two have different depths or widths; every such key.
    """
    state = {name: value.clone() for name, value in pixart.items()}
    shared = [name for name in pixart if name in dit and not name.startswith("y_embedder.")]
    problems = [
        f"{name}: {tuple(dit[name].shape)} in the DiT, {tuple(pixart[name].shape)} in the PixArt"
        for name in shared
        if dit[name].shape != pixart[name].shape
    ]
    blocks = [sum(name.endswith(".attn.qkv.weight") for name in each) for each in (dit, pixart)]
    if blocks[0] != blocks[1]:
        problems.append(f"{blocks[0]} blocks in the DiT, {blocks[1]} in the PixArt")
    if problems:
        raise CheckpointError(
            "the DiT and the PixArt do not have the same shape:\n" + "\n".join(f"  - {line}" for line in problems)
        )
    for name in shared:
        state[name] = dit[name].clone()
    time = _time_embedding(dit, at)  # (D,)
    active = F.silu(time)
    for kind in ("weight", "bias"):
        state[f"t_block.1.{kind}"] = _shared(
            [dit[f"blocks.{number}.adaLN_modulation.1.{kind}"] for number in range(blocks[0])], shared_modulation
        )
    common = F.linear(active, state["t_block.1.weight"], state["t_block.1.bias"])  # (6D,)
    for number in range(blocks[0]):
        own = f"blocks.{number}.adaLN_modulation.1."
        modulation = F.linear(active, dit[own + "weight"], dit[own + "bias"])  # (6D,)
        state[f"blocks.{number}.scale_shift_table"] = (modulation - common).view(6, -1)
    final = "final_layer.adaLN_modulation.1."
    modulation = F.linear(active, dit[final + "weight"], dit[final + "bias"]).view(2, -1)  # (2, D)
    state["final_layer.scale_shift_table"] = modulation - time
    return state


def _shared(own: list[torch.Tensor], which: Literal["first", "mean"] | int) -> torch.Tensor:
    if which == "mean":
        return torch.stack(own).mean(0)
    return own[0 if which == "first" else which].clone()


def _time_embedding(dit: State, at: int) -> torch.Tensor:
    """DiT's embedding of one timestep, (D,)."""
    hidden = F.linear(sinusoid(torch.tensor([float(at)])), dit["t_embedder.mlp.0.weight"], dit["t_embedder.mlp.0.bias"])
    return F.linear(F.silu(hidden), dit["t_embedder.mlp.2.weight"], dit["t_embedder.mlp.2.bias"])[0]
