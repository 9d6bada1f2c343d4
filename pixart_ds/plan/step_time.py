"""How long a step takes: products, attention, elementwise work, traffic, each at its part of a GPU's peak, one after the other.

The same functions stand for the paper's runs, which they are held against, and for ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pixart_ds.plan.counts import (
    BYTES,
    ELEMENTWISE_PASSES,
    MLP_PASSES,
    SCALED_QUERY_PASSES,
    Net,
    block_flops,
    forward_flops,
    parameters,
    training_flops,
)
from pixart_ds.rates import EstimateRates, Gpu, PublishedStage, RateTable

_ATTENTION = ("self_attention", "cross_attention")
_BACKWARD = 2.5
"""An attention kernel's backward in forwards: five products instead of two, because it computes the scores again."""
_STATE_TRAFFIC = 46
"""Bytes of device memory that an optimizer step moves for each parameter of a shard: AdamW 28, EMA 12, the 16-bit copy 6."""
_PUBLISHED_STATE_TRAFFIC = 80
"""The same under DDP, whole on every GPU: AdamW 28, EMA 12, unscaling 8, norm and clipping 12, zeroing 4, buckets 16."""


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind.

    Attributes:
        gpu: From the table.
        peak_16bit: TFLOP/s of its tensor cores.
        nodes: How many.
        gpus_per_node: On each.
    """

    gpu: Gpu
    peak_16bit: float
    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def peak(self, size: int) -> float:
        """FLOP/s for numbers of `size` bytes."""
        return 1e12 * (self.gpu.peak_tflops_fp32 if size == 4 else self.peak_16bit)

    def ring_seconds(self, sent: float, rates: EstimateRates) -> float:
        """Seconds for rings in which each GPU sends `sent` bytes; a ring crosses each node's boundary once."""
        if self.gpus == 1:
            return 0.0
        link = self.gpu.node_link_gbytes_per_second if self.nodes > 1 else self.gpu.gpu_link_gbytes_per_second
        return sent * (self.gpus - 1) / self.gpus / (link * 1e9 * rates.efficiency.link)


@dataclass(frozen=True)
class Way:
    """How the net is run.

    Attributes:
        precision: Of weights and products.
        checkpointed: Blocks that are run forward once more.
        fp32_attention: Self-attention in fp32.
        amp: Weights, residual stream and norms in fp32, products in 16 bit (the paper's runs).
        backward_blocks: Thread blocks of the attention's backward on the GPU at once, if it has one for each picture and head.
    """

    precision: str
    checkpointed: int
    fp32_attention: bool = False
    amp: bool = False
    backward_blocks: int | None = None


def image_seconds(net: Net, way: Way, batch: int, cluster: Cluster, rates: EstimateRates) -> dict[str, float]:
    """Seconds of a GPU for one picture, forward and backward, by kind of work; `batch` pictures run at once."""
    size, again = BYTES[way.precision], way.checkpointed / net.depth
    efficiency = rates.efficiency
    attention = sum(_attention_seconds(net, way, part, batch, cluster, rates) for part in _ATTENTION)
    flops = training_flops(net, way.checkpointed)
    flops -= sum(round((3 + again) * forward_flops(net)[part]) for part in _ATTENTION)
    return {
        "gemm": flops / (efficiency.gemm * cluster.peak(size)),
        "attention": attention,
        "elementwise": elementwise_bytes(net, way) / (efficiency.memory * cluster.gpu.gbytes_per_second * 1e9),
    }


def _attention_seconds(net: Net, way: Way, part: str, batch: int, cluster: Cluster, rates: EstimateRates) -> float:
    size = 4 if way.fp32_attention and part == "self_attention" else BYTES[way.precision]
    wide = size == 4
    efficiency = rates.efficiency.attention_fp32 if wide else rates.efficiency.attention_16bit
    unit = net.depth * block_flops(net)[part] / (efficiency * cluster.peak(size))
    forwards = 1 + way.checkpointed / net.depth
    seconds = unit * (forwards + _BACKWARD / _filled(net, way, batch))
    if part == "self_attention":
        bandwidth = rates.efficiency.memory * cluster.gpu.gbytes_per_second * 1e9
        seconds += forwards * _read_again_bytes(net, size, cluster, rates) / bandwidth
    return seconds


def _filled(net: Net, way: Way, batch: int) -> float:
    """Part of the GPU that is at work when thread blocks, one for each picture and head, run in waves; 1 if they split the keys."""
    if way.backward_blocks is None:
        return 1.0
    waves = batch * net.heads / way.backward_blocks
    return waves / math.ceil(waves)


def _read_again_bytes(net: Net, size: int, cluster: Cluster, rates: EstimateRates) -> int:
    """Bytes of keys and values that a forward of all blocks fetches from device memory once more for each tile of queries.

    The second-level cache serves them while it holds the keys and values of all heads that are at work.
    """
    tile = rates.kernels.queries_per_block
    queries = cluster.gpu.multiprocessors * rates.kernels.blocks_per_multiprocessor * tile
    head = 2 * net.tokens * (net.width // net.heads) * size
    if (queries / net.tokens + 1) * head <= cluster.gpu.cache_mib * 2**20:
        return 0
    return net.depth * net.heads * head * math.ceil(net.tokens / tile)


def elementwise_bytes(net: Net, way: Way) -> int:
    """Bytes of device memory that one picture's norms, modulations, gates, activations and additions move."""
    forward, backward = ELEMENTWISE_PASSES[net.kind]
    scaled = SCALED_QUERY_PASSES * (2 if net.has_text else 1) if way.precision == "fp16" and not way.amp else 0
    inner = [
        passes * net.hidden // (4 * net.width) for passes in MLP_PASSES
    ]  # as counted, the MLP is four times as wide
    size, outer = BYTES[way.precision], 4 if way.amp else BYTES[way.precision]
    once, back = (
        (passes + scaled - counted) * outer + own * size
        for passes, counted, own in zip((forward, backward), MLP_PASSES, inner, strict=True)
    )
    return net.tokens * net.width * (net.depth * (once + back) + way.checkpointed * once)


def traffic(net: Net, precision: str, micro_batches: int) -> dict[str, int]:
    """Bytes that a GPU of many sends in a step (times (W - 1) / W for W of them).

    Ours: one fp32 reduce-scatter of the sum, one all-gather of the weights. DeepSpeed's own ZeRO-2: an all-reduce for each
    micro-batch (it never calls reduce-scatter), which is 2Ψ, and the all-gather.
    """
    count, size = sum(parameters(net).values()), BYTES[precision]
    psi = count * size
    return {"psi": psi, "ours": 4 * count + psi, "deepspeed_zero2": (2 * micro_batches + 1) * psi}


def step_seconds(
    net: Net, way: Way, share: int, micro_batch: int, cluster: Cluster, rates: EstimateRates
) -> dict[str, float]:
    """Seconds of our engine's step by part, for a rank's share of pictures in micro-batches; nothing overlaps."""
    count, bandwidth = sum(parameters(net).values()), rates.efficiency.memory * cluster.gpu.gbytes_per_second * 1e9
    micro_batches = -(-share // micro_batch)
    parts = {
        kind: share * each for kind, each in image_seconds(net, way, -(-share // micro_batches), cluster, rates).items()
    }
    summing = (
        micro_batches * (8 + BYTES[way.precision]) + 4
    )  # each gradient read, the sum read and written; then zeroed
    parts["optimizer"] = count * (summing + _STATE_TRAFFIC / cluster.gpus) / bandwidth
    parts["communication"] = cluster.ring_seconds(traffic(net, way.precision, micro_batches)["ours"], rates)
    efficiency = rates.efficiency
    parts["overhead"] = efficiency.seconds_per_step + micro_batches * efficiency.seconds_per_micro_batch
    return parts


# ---- the model against the paper -------------------------------------------------------------------------------------


def published_net(stage: PublishedStage) -> Net:
    """XL/2 at a row of Table 4: captions padded to 120 tokens of 4,096 channels."""
    text = stage.kind == "pixart"
    return Net(
        kind=stage.kind,
        depth=28,
        width=1152,
        heads=16,
        hidden=4608,
        patch_in=16,
        classes=0 if text else 1001,
        channels=4096 if text else 0,
        micro_conditions=stage.micro_conditions,
        tokens=stage.base_size**2,
        text=120 if text else 0,
    )


def published_rate(stage: PublishedStage, cluster: Cluster, rates: EstimateRates) -> float:
    """Images a second for each GPU that the model gives the paper's run: AMP, fp32 attention, all blocks checkpointed, DDP."""
    net, published, batch = published_net(stage), rates.published, stage.batch_per_gpu
    slots = published.backward_blocks_per_multiprocessor * cluster.gpu.multiprocessors
    way = Way("fp16", net.depth, fp32_attention=True, amp=True, backward_blocks=slots)
    count, bandwidth = sum(parameters(net).values()), rates.efficiency.memory * cluster.gpu.gbytes_per_second * 1e9
    work = {kind: batch * each for kind, each in image_seconds(net, way, batch, cluster, rates).items()}
    state = count * (_PUBLISHED_STATE_TRAFFIC + 2 * 6) / bandwidth  # 2 × 6: weights cast to 16 bit, forward and again
    hidden = published.overlapped_communication * sum(work.values()) / 2
    exposed = max(0.0, cluster.ring_seconds(2 * 4 * count, rates) - hidden)
    efficiency = rates.efficiency
    step = sum(work.values()) + state + exposed + efficiency.seconds_per_step + efficiency.seconds_per_micro_batch
    feature_bytes = 4 * (net.text * net.channels + 2 * net.tokens * net.patch_in)  # fp32 features, mean and deviation
    return batch / max(step, batch * feature_bytes / (published.feed_mbytes_per_second * 1e6))


def table4(table: RateTable) -> list[dict[str, float | str]]:
    """Each row of Table 4: the paper's rate, the model's, and the relative error."""
    rates = table.estimate
    rows: list[dict[str, float | str]] = []
    gpu = rates.gpus["v100-32gb"]
    for name, stage in rates.table4.items():
        nodes = -(-stage.gpus // 8)
        cluster = Cluster(gpu, table.devices[gpu.device].peak_tflops_fp16, nodes, stage.gpus // nodes)
        paper = stage.images_per_second_per_gpu(table.paper.gpu_days[name])
        model = published_rate(stage, cluster, rates)
        rows.append({"stage": name, "paper": paper, "model": model, "error": model / paper - 1})
    return rows
