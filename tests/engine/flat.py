"""An engine's state without DeepSpeed: one rank of any world, to save and load real files in one process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pixart_ds.config.schema import ModelConfig
from pixart_ds.engine.shards import SHARD_KEYS, FlatLayout, Place
from pixart_ds.engine.world import World
from tests.engine.toy import stage_of

SHAPES = {
    "inp.weight": (30, 5),
    "inp.bias": (30,),
    "scalar": (),
    "blocks.0.qkv.weight": (90, 30),
    "blocks.0.out.weight": (30, 30),
    "blocks.0.norm.weight": (7,),
    "blocks.1.up.weight": (83, 30),
    "head.bias": (3,),
}


def layout_of(world_size: int, shapes: Mapping[str, tuple[int, ...]] | None = None) -> FlatLayout:
    """The layout that DeepSpeed makes: back to back, padded at the end to a multiple of twice the ranks."""
    shapes = SHAPES if shapes is None else shapes
    places, at = [], 0
    for name, shape in shapes.items():
        places.append(Place(name, at, shape))
        at += math.prod(shape)
    return FlatLayout(tuple(places), -(-at // (2 * world_size)) * 2, world_size)


def content(key: str, clock: int, count: int) -> torch.Tensor:
    """A whole flat sequence at a clock: (count,) fp32, every element another value."""
    bits = torch.arange(count, dtype=torch.int64) * 2654435761 + (clock * 4 + SHARD_KEYS.index(key)) * 97
    return (bits % 16777213).float()  # whole numbers below 2²⁴ are exact


class FlatEngine:
    """What `Shelf` asks of an engine."""

    def __init__(self, rank: int = 0, world_size: int = 1, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.world = World(rank, world_size, rank, world_size, torch.device("cpu"))
        self.layout = layout_of(world_size, shapes)
        self.shards = {key: torch.full((self.layout.partition,), -1.0) for key in SHARD_KEYS}
        self.buffers = {"position": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}
        self.ticks = 0
        self.recipe: dict[str, Any] = {"precision": "fp32"}
        self.fingerprints = {"stage": "0", "deepspeed": "0"}
        self.model_config: ModelConfig = stage_of().model

    def train_to(self, clock: int) -> None:
        """Overwrites all shards, as steps would."""
        self.ticks = clock
        own = self.layout.own(self.world.rank)
        for key, shard in self.shards.items():
            shard[: len(own)] = content(key, clock, self.layout.count)[own.start : own.stop]

    def stands_at(self, clock: int) -> bool:
        """Whether every element is that of a clock."""
        own = self.layout.own(self.world.rank)
        return self.ticks == clock and all(
            torch.equal(shard[: len(own)], content(key, clock, self.layout.count)[own.start : own.stop])
            for key, shard in self.shards.items()
        )

    def shard(self, key: str) -> torch.Tensor:
        return self.shards[key]

    def fixed(self) -> dict[str, torch.Tensor]:
        return self.buffers

    def check_names(self, shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
        wanted = {place.name: place.shape for place in self.layout.places}
        assert dict(shapes) == wanted | {name: tuple(tensor.shape) for name, tensor in self.buffers.items()}, origin

    def put(self, fill: Any, keys: Sequence[str], fixed: Mapping[str, torch.Tensor]) -> None:
        wanted = [(place.name, start, end) for place, start, end in self.layout.of_rank(self.world.rank)]
        for key in keys:
            fill(key, wanted, self.shards[key][: len(self.layout.own(self.world.rank))])
        assert all(torch.equal(fixed[name], tensor) for name, tensor in self.buffers.items())

    def publish(self) -> None:
        """There are no 16-bit copies."""

    def clock(self) -> dict[str, Any]:
        return {"ticks": self.ticks}

    def set_clock(self, clock: Mapping[str, Any]) -> None:
        self.ticks = clock["ticks"]
