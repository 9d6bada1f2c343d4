"""What a recipe leaves to `auto`, in numbers for the GPUs at hand; the same on every rank."""

from __future__ import annotations

import torch

from pixart_ds.config.freeze import with_execution
from pixart_ds.config.schema import StageConfig
from pixart_ds.engine.agree import gather, together
from pixart_ds.engine.world import World
from pixart_ds.log import Log
from pixart_ds.plan.fit import choose, gpu_named
from pixart_ds.rates import rate_table
from pixart_ds.train.preflight import refuse_auto_without_gpu


def in_numbers(stage: StageConfig, world: World, log: Log) -> StageConfig:
    """The stage with every `auto` of its `execution` chosen, and the choice in the log. A collective if there is any.

    GPUs of several kinds are taken for as many of the one that has the least memory.

    Raises:
        ConfigError: The ranks run on CPUs, or on a GPU that the table of rates does not have.
        MachineError: Nothing fits; it says what would be needed.
    """
    if not stage.execution.is_auto:
        return stage
    refuse_auto_without_gpu(stage, world.device.type)
    names = together(world, lambda: _gpu(world.device))
    known = rate_table().estimate.gpus
    name = min(names, key=lambda name: known[name].memory_gib)
    each = max(gather(world, world.local_size))
    nodes, each = (world.size // each, each) if world.size % each == 0 else (world.size, 1)
    choice = choose(stage, name, nodes, each)
    log.event(str(choice))
    return with_execution(stage, choice.execution)


def _gpu(device: torch.device) -> str:
    """The table's name of this rank's GPU."""
    about = torch.cuda.get_device_properties(device)
    return gpu_named(about.name, about.total_memory)
