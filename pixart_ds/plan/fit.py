"""What fits a GPU: memory by part, the largest micro-batch, and the fastest of all ways to run a step."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pixart_ds.config.schema import ExecutionConfig, StageConfig
from pixart_ds.errors import ConfigError, MachineError
from pixart_ds.plan import counts
from pixart_ds.plan.counts import BYTES, Net
from pixart_ds.plan.step_time import Cluster, Way, step_seconds
from pixart_ds.rates import rate_table

GIB = 2**30


def shard_elements(count: int, world: int) -> int:
    """Elements of a rank's flat shard: the whole is padded to a multiple of twice the ranks, as DeepSpeed pads it."""
    return -(-count // (2 * world)) * 2


def state_bytes(net: Net, precision: str, world: int) -> dict[str, int]:
    """Bytes of a rank's training state by part; they do not depend on the batch.

    Weights in the recipe's precision, whole and padded; the fp32 sum of the gradient, whole; the shards in fp32. DeepSpeed's own
    gradient buckets are never made: what stands in their place is the rank's part of the reduced gradient, and one fresh one.
    """
    shard = shard_elements(sum(counts.parameters(net).values()), world)
    return {
        "weights": shard * world * BYTES[precision] + counts.buffer_bytes(net),
        "gradients": 4 * shard * world,
        "optimizer": 3 * 4 * shard,  # master, exp_avg, exp_avg_sq
        "ema": 4 * shard,
        "buckets": 4 * shard + BYTES[precision] * counts.largest_parameter(net),
    }


def memory_bytes(net: Net, way: Way, micro_batch: int, world: int) -> dict[str, int]:
    """Bytes on one GPU at the worst moment of a step, by part, and their total."""
    saved = counts.saved(net, way.precision, fp32_attention=way.fp32_attention)
    parts = {
        **state_bytes(net, way.precision, world),
        "activations": micro_batch * saved.peak(net.depth, way.checkpointed),
        "workspace": micro_batch * counts.workspace(net, way.precision),
        "context": int(rate_table().estimate.memory.context_gib * GIB),
    }
    return {**parts, "total": sum(parts.values())}


def usable_bytes(cluster: Cluster) -> int:
    """What a plan may fill of one GPU."""
    return int(cluster.gpu.memory_gib * rate_table().estimate.memory.usable * GIB)


def largest_micro_batch(net: Net, way: Way, cluster: Cluster) -> int:
    """Pictures that fit at once; 0 if not even one does."""
    empty, one = (memory_bytes(net, way, size, cluster.gpus)["total"] for size in (0, 1))
    return max(0, (usable_bytes(cluster) - empty) // (one - empty))


def option(stage: StageConfig, net: Net, checkpointed: int, cluster: Cluster, micro_batch: int | None = None) -> Any:
    """One way to run a stage's step: memory, time, rate; of the largest micro-batch that fits unless one is given."""
    way = Way(stage.precision, checkpointed, fp32_attention=stage.fp32_attention)
    largest = largest_micro_batch(net, way, cluster)
    share = -(-stage.global_batch_size // cluster.gpus)
    most = min(share, micro_batch or largest)
    answer: dict[str, Any] = {"checkpointed_blocks": checkpointed, "largest_micro_batch": largest}
    answer["fits"] = 0 < most <= largest
    if most == 0:
        return answer | {"micro_batch_size": None}
    micro_batches = -(-share // most)
    even = -(-share // micro_batches)  # near-equal pieces, as the loader cuts them
    seconds = step_seconds(net, way, share, even, cluster, rate_table().estimate)
    total = sum(seconds.values())
    return answer | {
        "micro_batch_size": even,
        "micro_batches": micro_batches,
        "memory_bytes": memory_bytes(net, way, even, cluster.gpus),
        "step_seconds": {**seconds, "total": total},
        "images_per_second_per_gpu": stage.global_batch_size / cluster.gpus / total,
    }


def fastest(stage: StageConfig, net: Net, cluster: Cluster) -> Any:
    """The fastest of all ways that fit; of equal ones that with more blocks checkpointed. None if none fits."""
    return _fastest_of(stage, net, cluster, range(net.depth, -1, -1), None)


def as_recipe(stage: StageConfig, net: Net, cluster: Cluster) -> Any:
    """As the recipe's `execution` says, whether or not it fits; of what it leaves to `auto` the fastest that fits."""
    blocks, size = _given(stage.execution, net)
    every = range(net.depth, -1, -1) if blocks is None else [blocks]
    # nothing fits: what needs least of all, to be said
    return _fastest_of(stage, net, cluster, every, size) or option(stage, net, every[0], cluster, size or 1)


def _given(execution: ExecutionConfig, net: Net) -> tuple[int | None, int | None]:
    """Checkpointed blocks and micro-batch as the recipe gives them; None for auto."""
    blocks, size = execution.checkpointed_blocks, execution.micro_batch_size
    named = {"all": net.depth, "none": 0, "auto": None}
    return named[blocks] if isinstance(blocks, str) else blocks, None if size == "auto" else size


def _fastest_of(stage: StageConfig, net: Net, cluster: Cluster, every: Iterable[int], size: int | None) -> Any:
    options = [option(stage, net, blocks, cluster, size) for blocks in every]
    fitting = [each for each in options if each["fits"]]
    return min(fitting, key=lambda each: each["step_seconds"]["total"], default=None)


# ---- the choice for a training ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """How a stage is run on given GPUs; all in numbers.

    Attributes:
        execution: The recipe's, without `auto`.
        gpu: Name in the table.
        depth: Blocks of the net.
        memory_bytes: Of one GPU, estimated, at the worst moment of a step.
        usable_bytes: Of one GPU.
    """

    execution: ExecutionConfig
    gpu: str
    depth: int
    memory_bytes: int
    usable_bytes: int

    def __str__(self) -> str:
        return (
            f"micro-batches of {self.execution.micro_batch_size}, {self.execution.checkpointed_blocks} of {self.depth} blocks "
            f"checkpointed, chosen by estimate for {self.gpu}: {self.memory_bytes / GIB:.1f} of {self.usable_bytes / GIB:.1f} GiB"
        )


def choose(stage: StageConfig, gpu: str, nodes: int, gpus_per_node: int) -> Choice:
    """What `execution` leaves to `auto`, chosen as `pixart-ds estimate` chooses; what is given is kept.

    Args:
        stage: The stage.
        gpu: Name in the table.
        nodes, gpus_per_node: All of that kind.

    Raises:
        ConfigError: The GPU is not in the table, or cannot compute in the recipe's precision.
        MachineError: Nothing fits; it says what would be needed.
    """
    cluster, net = cluster_of(stage, gpu, nodes, gpus_per_node), Net.of(stage.model)
    found = as_recipe(stage, net, cluster)
    if not found["fits"]:
        raise too_large(stage, gpu, found, cluster)
    execution = stage.execution
    numbers = {"checkpointed_blocks": found["checkpointed_blocks"]}
    if execution.micro_batch_size == "auto":
        numbers["micro_batch_size"] = found["micro_batch_size"]
    return Choice(
        execution.model_copy(update=numbers), gpu, net.depth, found["memory_bytes"]["total"], usable_bytes(cluster)
    )


def cluster_of(stage: StageConfig, name: str, nodes: int, gpus_per_node: int) -> Cluster:
    """GPUs of the table that a stage is to run on.

    Raises:
        ConfigError: The GPU is not in the table, or cannot compute in the recipe's precision.
    """
    table = rate_table()
    if name not in table.estimate.gpus:
        known = ", ".join(table.estimate.gpus)
        raise ConfigError(f"there is no GPU {name!r} in the table", where="--gpu", remedy=f"choose one of: {known}")
    gpu = table.estimate.gpus[name]
    if stage.precision == "bf16" and not gpu.bf16:
        raise ConfigError(
            f"{name} has no bf16 units, and {stage.name} asks for bf16",
            where="precision",
            remedy="set precision to fp16, or choose a GPU from the A100 on",
        )
    return Cluster(gpu, table.devices[gpu.device].peak_tflops_fp16, nodes, gpus_per_node)


_SAME_MEMORY = 0.05
"""Part by which the memory that CUDA reports may differ from the table's."""


def known_gpu(cuda_name: str, memory_bytes: int) -> str | None:
    """The table's name of a GPU: `Tesla V100-SXM2-32GB` with 31.7 GiB is v100-32gb; None for one that it does not have.

    Args:
        cuda_name: As CUDA gives it.
        memory_bytes: All of its memory. A slice of a GPU (MIG) has less and is not in the table.
    """
    for name, gpu in rate_table().estimate.gpus.items():
        family = name.split("-")[0]
        named = re.search(rf"(?<![a-z0-9]){family}(?![a-z0-9])", cuda_name.lower())
        if named and abs(memory_bytes / GIB / gpu.memory_gib - 1) <= _SAME_MEMORY:
            return name
    return None


def gpu_named(cuda_name: str, memory_bytes: int) -> str:
    """`known_gpu` of one on which a plan depends.

    Raises:
        ConfigError: The table does not have it; the message lists those it has.
    """
    if (name := known_gpu(cuda_name, memory_bytes)) is not None:
        return name
    gpus = rate_table().estimate.gpus
    raise ConfigError(
        f"execution leaves numbers to auto, but the table has no GPU like this one: {cuda_name}, {memory_bytes / GIB:.1f} GiB",
        where="pixart_ds/rates.yaml, estimate.gpus: " + ", ".join(gpus),
        remedy=GIVE_NUMBERS,
    )


GIVE_NUMBERS = "give numbers: --set execution.micro_batch_size=N --set execution.checkpointed_blocks=all"


def too_large(stage: StageConfig, gpu: str, least: Any, cluster: Cluster) -> MachineError:
    """What to say when nothing fits: `least` is the way that needs least of those that the recipe leaves open."""
    memory = least["memory_bytes"]
    needed, usable = memory["total"] / GIB, usable_bytes(cluster) / GIB
    largest = max((part for part in memory if part != "total"), key=lambda part: memory[part])
    size, blocks, depth = least["micro_batch_size"], least["checkpointed_blocks"], stage.model.depth
    pictures = "one picture at a time" if size == 1 else f"micro-batches of {size}"
    checkpointed = "all blocks" if blocks == depth else f"{blocks} of {depth} blocks"
    others = [] if size == 1 else ["smaller micro-batches (execution.micro_batch_size)"]
    others += [] if blocks == depth else ["more blocks checkpointed (execution.checkpointed_blocks)"]
    remedy = "choose " + ", ".join([*others, "a GPU with more memory, more GPUs, or a smaller net"])
    return MachineError(
        f"{stage.name} does not fit {gpu}: {pictures} with {checkpointed} checkpointed needs "
        f"{needed:.1f} GiB of {usable:.1f} usable; the largest part is {largest}, {memory[largest] / GIB:.1f} GiB",
        remedy=remedy,
    )
