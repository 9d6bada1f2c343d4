"""Makes a golden checkpoint of the format that the package writes now: `python -m tests.engine.golden.make FOLDER`.

Each format that was ever committed has its own, made once and never again: that it still loads is what the tests prove.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pixart_ds.config.deepspeed import load_deepspeed, merge
from pixart_ds.engine.deepspeed import Engine
from pixart_ds.engine.shards import SHARD_KEYS
from pixart_ds.engine.shelf import Shelf
from pixart_ds.engine.world import World
from pixart_ds.layout import StageLayout
from tests.engine.toy import stage_of, toy
from tests.helpers.launch import launch

STATE = {
    "state": {"images_seen": 91, "applied_steps": 6, "skipped_steps": 1},
    "order": "0123456789abcdef",
    "lineage": {},
}


def expected(name: str, key: str, count: int) -> torch.Tensor:
    """What stands in a shard of a parameter: (count,) fp32."""
    salt = SHARD_KEYS.index(key) * 1009 + sum(map(ord, name))
    return ((torch.arange(count) * 7 + salt) % 9973).float() / 9973


def save(world: World, root: str) -> None:
    stage = stage_of("fp16")
    net = toy()
    engine = Engine.build(net, stage, world, merge(stage, load_deepspeed("zero2_cpu")))
    engine.initialise(net.state_dict())
    places = {place.name: place.count for place in engine.layout.places}

    def fill(key: str, wanted: Sequence[tuple[str, int, int]], out: torch.Tensor) -> None:
        torch.cat([expected(name, key, places[name])[start:end] for name, start, end in wanted], out=out)

    engine.put(fill, SHARD_KEYS, engine.fixed())
    engine.set_clock({**engine.clock(), "applied_steps": 6, "scaler": {**engine.clock()["scaler"], "cur_scale": 512.0}})
    layout = StageLayout(Path(root))
    if world.rank == 0:
        layout.attempt(1).root.mkdir(parents=True)
    shelf = Shelf(layout, 1, 1, engine, world, keep=2)
    shelf.write_start({"images_seen": 0, "applied_steps": 0, "skipped_steps": 0})
    shelf.save(91, STATE, milestone=True)
    shelf.wait()


if __name__ == "__main__":
    from tests.engine.golden.make import save as by_name  # a rank finds it in its module, not in __main__

    launch(by_name, 3, str(Path(sys.argv[1]).resolve()))
