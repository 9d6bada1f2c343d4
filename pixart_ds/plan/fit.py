"""What fits a GPU: memory by part, the largest micro-batch, and the fastest of all ways to run a step."""

from __future__ import annotations

from typing import Any

from pixart_ds.config.schema import StageConfig
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
    options = [option(stage, net, blocks, cluster) for blocks in range(net.depth, -1, -1)]
    fitting = [each for each in options if each["fits"]]
    return min(fitting, key=lambda each: each["step_seconds"]["total"], default=None)


def as_recipe(stage: StageConfig, net: Net, cluster: Cluster) -> Any:
    """As the recipe's `execution` says, whether or not it fits."""
    named = {"all": net.depth, "none": 0}
    blocks = stage.execution.checkpointed_blocks
    return option(
        stage, net, named[blocks] if isinstance(blocks, str) else blocks, cluster, stage.execution.micro_batch_size
    )
