"""The official names of PixArt's weights and diffusers' names for them, both ways, every tensor accounted for."""

from __future__ import annotations

import torch

from pixart_ds.errors import CheckpointError

State = dict[str, torch.Tensor]

_SHARED = {  # official module → diffusers module, each with weight and bias
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
_SIZES = {
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
}
_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_SPLIT = {  # official module → diffusers modules, side by side in the first dimension
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
_DROPPED = ("pos_embed", "y_embedder.y_embedding")
"""Of the official state; diffusers computes the one and takes the empty caption's features for the other."""


def _names(depth: int, micro_conditions: bool) -> list[tuple[str, tuple[str, ...]]]:
    """Every official parameter with its diffusers names."""
    modules: list[tuple[str, tuple[str, ...]]] = [
        (ours, (theirs,)) for ours, theirs in {**_SHARED, **(_SIZES if micro_conditions else {})}.items()
    ]
    for number in range(depth):
        ours, theirs = f"blocks.{number}.", f"transformer_blocks.{number}."
        modules += [(ours + name, (theirs + other,)) for name, other in _BLOCK.items()]
        modules += [(ours + name, tuple(theirs + other for other in others)) for name, others in _SPLIT.items()]
    pairs = [
        (f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs))
        for ours, theirs in modules
        for kind in ("weight", "bias")
    ]
    pairs += [
        (f"blocks.{number}.scale_shift_table", (f"transformer_blocks.{number}.scale_shift_table",))
        for number in range(depth)
    ]
    return [*pairs, ("final_layer.scale_shift_table", ("scale_shift_table",))]


def to_diffusers(state: State) -> State:
    """An official PixArt state under diffusers' names; `pos_embed` and the null caption are left out.

    Raises:
        CheckpointError: Every missing or extra key.
    """
    pairs = _names(_depth(state, "blocks."), any(name.startswith("csize_embedder.") for name in state))
    _check(set(state) - set(_DROPPED), {ours for ours, _ in pairs}, "an official PixArt state")
    made = {}
    for ours, theirs in pairs:
        for name, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True):
            made[name] = part.contiguous()
    return made


def from_diffusers(state: State) -> State:
    """diffusers' state under the official names; the null caption is not in it.

    Raises:
        CheckpointError: Every missing or extra key.
    """
    micro = any("resolution_embedder" in name for name in state)
    pairs = _names(_depth(state, "transformer_blocks."), micro)
    known = {name for _, theirs in pairs for name in theirs}
    _check(set(state) - {"pos_embed.pos_embed"}, known, "a diffusers PixArt state")
    return {ours: torch.cat([state[name] for name in theirs]) for ours, theirs in pairs}


def _depth(state: State, prefix: str) -> int:
    numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)}
    return max(numbers) + 1 if numbers else 0


def _check(found: set[str], wanted: set[str], what: str) -> None:
    lines = [f"missing: {name}" for name in sorted(wanted - found)] + [
        f"extra: {name}" for name in sorted(found - wanted)
    ]
    if lines:
        raise CheckpointError(f"the weights are not {what}:\n" + "\n".join(f"  - {line}" for line in lines))
