"""The weights a stage starts from: scratch, handover, or DiT re-parameterised as PixArt; with their lineage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pixart_ds.config.schema import StageConfig
from pixart_ds.data.shards import PreparedSet
from pixart_ds.engine.foreign import NULL_CAPTION
from pixart_ds.engine.handover import read_handover
from pixart_ds.errors import CheckpointError
from pixart_ds.layout import RunLayout
from pixart_ds.model import SIZE_EMBEDDERS, DiT, PixArt, build, initialise, reparameterise, zero_size_embedders
from pixart_ds.train.preflight import check_origin, origin_of

State = dict[str, torch.Tensor]


@dataclass
class Start:
    """fp32 weights and buffers by name, and where they come from."""

    state: State
    lineage: dict[str, Any]


def initial_weights(run: RunLayout, stage: StageConfig, net: PixArt | DiT, sets: list[PreparedSet]) -> Start:
    """Weights for the first step of a stage, in this order: scratch, then what the stage before hands over laid upon it.

    Args:
        net: The stage's net on the CPU in fp32; its weights are overwritten.
        sets: The stage's sets; the empty caption's features become the null caption where none is handed over.

    Raises:
        CheckpointError: The handover is missing, or holds other parameters than the net.
    """
    initialise(net, stage.seed)
    if isinstance(net, PixArt):
        longest = max(sets, key=lambda prepared: len(prepared.null_embeds))  # all are of one text encoder
        net.set_null_caption(torch.from_numpy(longest.null_embeds).float())
    fresh = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    if stage.init.source == "scratch":
        return Start(fresh, {"source": "scratch", "seed": stage.seed})
    given, lineage = _handed_over(run, stage)
    if stage.init.source == "reparameterise":
        return Start(
            reparameterise(
                given, fresh, at=stage.init.reparameterise_at, shared_modulation=stage.init.shared_modulation
            ),
            {
                **lineage,
                "reparameterised_at": stage.init.reparameterise_at,
                "shared_modulation": stage.init.shared_modulation,
            },
        )
    return Start(_overlay(fresh, given, stage), lineage)


def _handed_over(run: RunLayout, stage: StageConfig) -> tuple[State, dict[str, Any]]:
    assert stage.init.weights is not None
    check_origin(run, stage)
    found = read_handover(origin_of(run, stage), stage.init.weights)
    about = {key: value for key in ("stage", "path") if (value := getattr(stage.init, key)) is not None}
    return found.state, {"source": stage.init.source, **about, "weights": stage.init.weights, "from": found.lineage}


def _overlay(fresh: State, given: State, stage: StageConfig) -> State:
    """`given` laid upon `fresh`. Imported weights may lack the null caption: the set's empty caption stays. Only the size
    embedders may be new, and their last layer then starts at zero.
    """
    new = [name for name in fresh if name not in given and name != NULL_CAPTION]
    if new and all(name.startswith(SIZE_EMBEDDERS) for name in new):
        fresh = zero_size_embedders(fresh)
        new = []
    problems = [f"missing: {name}" for name in new]
    problems += [f"extra: {name}" for name in given if name not in fresh]
    problems += [
        f"shape of {name}: {tuple(given[name].shape)} instead of {tuple(fresh[name].shape)}"
        for name in fresh
        if name in given and given[name].shape != fresh[name].shape
    ]
    if problems:
        raise CheckpointError(
            f"the handover of {stage.init.stage or stage.init.path} does not fit the net of {stage.name}:\n"
            + "\n".join(f"  - {line}" for line in problems)
        )
    return {**fresh, **given}


def net_of(stage: StageConfig) -> PixArt | DiT:
    """The stage's net, uninitialised, on the CPU in fp32."""
    blocks = stage.execution.checkpointed_blocks
    assert blocks != "auto", "train.execution chooses it first"
    return build(
        stage.model,
        fp32_attention=stage.fp32_attention,
        attention_backend=stage.execution.attention_backend,
        packed_text=stage.execution.packed_text,
        checkpointed_blocks=blocks,
    )
