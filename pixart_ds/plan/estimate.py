"""What a stage or a chain will need and cost on given GPUs, from its recipe and rates.yaml; nothing is measured here.

`counts` counts the net, `step_time` gives seconds and holds them against the paper's Table 4, `fit` finds what fits and is fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pixart_ds.config.load import find_recipe, load_chain, load_stage, read_layers
from pixart_ds.config.schema import ChainConfig, StageConfig
from pixart_ds.plan import counts
from pixart_ds.plan.counts import BYTES, Net
from pixart_ds.plan.fit import GIB, as_recipe, cluster_of, fastest, option, too_large, usable_bytes
from pixart_ds.plan.step_time import Cluster, table4, traffic
from pixart_ds.rates import Assumptions, RateTable, assume, rate_table
from pixart_ds.units import DeviceTime


@dataclass(frozen=True)
class Machines:
    """What the user said of the machines and of the site; None: the table's, or the recipe's."""

    gpu: str | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    country: str | None = None
    pue: float | None = None
    price_per_hour: float | None = None

    def cluster(self, stage: StageConfig) -> Cluster:
        """The GPUs of a stage: as given, else as many as the paper had, eight in a node.

        Raises:
            ConfigError: A GPU that is not in the table, or that cannot compute in the recipe's precision.
        """
        wanted = stage.paper_gpus or 8
        per_node = self.gpus_per_node or min(8, wanted)
        nodes = self.nodes or -(-wanted // per_node)
        return cluster_of(stage, self.name, nodes, per_node)

    @property
    def name(self) -> str:
        return self.gpu or rate_table().estimate.default_gpu

    def assumptions(self, cluster: Cluster) -> Assumptions:
        """Power, price and grid."""
        return assume(
            "cuda",
            device=cluster.gpu.device,
            country=self.country,
            pue=self.pue,
            price_per_hour=self.price_per_hour,
        )


def estimate_stage(stage: StageConfig, machines: Machines) -> dict[str, Any]:
    """A stage's estimate as JSON. `fits` says whether there is any way to run it; without one, time and cost are null."""
    cluster = machines.cluster(stage)
    net, world = Net.of(stage.model), cluster.gpus
    chosen = fastest(stage, net, cluster)
    options = {
        "all": option(stage, net, net.depth, cluster),
        "none": option(stage, net, 0, cluster),
        "recipe": as_recipe(stage, net, cluster),
    }
    shown = chosen or option(stage, net, net.depth, cluster, 1)
    forward, saved = counts.forward_flops(net), counts.saved(net, stage.precision, fp32_attention=stage.fp32_attention)
    blocks = shown["checkpointed_blocks"]
    return {
        "stage": stage.name,
        "gpu": machines.name,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "gpus": world,
        "precision": stage.precision,
        "fp32_attention": stage.fp32_attention,
        "tokens": net.tokens,
        "text_tokens": net.text,
        "steps": stage.total_steps,
        "images": stage.total_images,
        "global_batch_size": stage.global_batch_size,
        "images_per_gpu_and_step": -(-stage.global_batch_size // world),
        "parameters": sum(counts.parameters(net).values()),
        "parameters_by_part": counts.parameters(net),
        "forward_flops_per_image": sum(forward.values()),
        "forward_flops_by_part": forward,
        "training_flops_per_image": counts.training_flops(net),
        "recompute_flops_per_image": {
            "all": counts.training_flops(net, net.depth),
            "chosen": counts.training_flops(net, blocks),
        },
        "activation_bytes_per_image": {
            "all": saved.peak(net.depth, net.depth),
            "none": saved.peak(net.depth, 0),
            "chosen": saved.peak(net.depth, blocks),
            "block": saved.block,
            "boundary": saved.boundary,
        },
        "memory_bytes": shown["memory_bytes"],
        "capacity_bytes": int(cluster.gpu.memory_gib * GIB),
        "usable_bytes": usable_bytes(cluster),
        "traffic_bytes_per_step": traffic(net, stage.precision, shown["micro_batches"]),
        "fits": chosen is not None,
        "chosen": chosen,
        "options": options,
        **_cost(stage, chosen, cluster, machines),
        "feed_bytes_per_second_per_gpu": _feed(net, chosen),
        "paper_gpus": stage.paper_gpus,
        "paper_gpu_days": stage.paper_gpu_days,
    }


_COST = ("step_seconds", "images_per_second_per_gpu", "mfu", "days", "gpu_days", "dollars", "kwh", "kg_co2e")


def _cost(stage: StageConfig, chosen: Any, cluster: Cluster, machines: Machines) -> dict[str, Any]:
    if chosen is None:
        return dict.fromkeys(_COST)
    assumptions = machines.assumptions(cluster)
    seconds = stage.total_steps * chosen["step_seconds"]["total"]
    time = DeviceTime(seconds * cluster.gpus)
    energy = assumptions.energy(time)
    rate, flops = chosen["images_per_second_per_gpu"], counts.training_flops(Net.of(stage.model))
    values = (
        chosen["step_seconds"],
        rate,
        rate * flops / cluster.peak(BYTES[stage.precision]),
        seconds / 86400,
        time.days,
        assumptions.price(time).dollars,
        energy.kwh,
        assumptions.emissions(energy).kg,
    )
    return dict(zip(_COST, values, strict=True))


def _feed(net: Net, chosen: Any) -> float | None:
    """Bytes a second that a GPU reads: fp16 caption features and latents (mean and deviation)."""
    each = 2 * (net.text * net.channels + 2 * net.tokens * net.patch_in)
    return None if chosen is None else float(chosen["images_per_second_per_gpu"] * each)


def held_against_paper(table: RateTable) -> dict[str, Any]:
    """The model of the paper's own runs beside Table 4's rates; `table4_error` is the largest relative error."""
    rows = table4(table)
    return {"table4": rows, "table4_error": max(abs(float(row["error"])) for row in rows)}


def estimate(recipe: str, overrides: Sequence[str], machines: Machines) -> dict[str, Any]:
    """The estimate of a recipe, a stage's or a chain's, as JSON.

    Raises:
        ConfigError: The recipe or an option is wrong.
        MachineError: The stage does not fit these GPUs at all. In a chain such a stage is marked instead.
    """
    table = rate_table()
    check = held_against_paper(table)
    if "stages" not in read_layers(find_recipe(recipe)):
        stage = load_stage(recipe, overrides)
        values = estimate_stage(stage, machines)
        if not values["fits"]:
            cluster, net = machines.cluster(stage), Net.of(stage.model)
            raise too_large(stage, machines.name, option(stage, net, net.depth, cluster, 1), cluster)
        return {"kind": "stage", **values, **check, **_grounds([stage], machines)}
    chain = load_chain(recipe, overrides)
    return {"kind": "chain", **_chain(chain, machines), **check, **_grounds(chain.stages, machines)}


def _chain(chain: ChainConfig, machines: Machines) -> dict[str, Any]:
    stages = [estimate_stage(stage, machines) for stage in chain.stages]
    papers = [stage.paper_gpu_days for stage in chain.stages if stage.paper_gpu_days is not None]

    def total(key: str) -> float | None:
        return sum(each[key] for each in stages) if all(each["fits"] for each in stages) else None

    return {
        "chain": chain.name,
        "gpu": machines.name,
        "stages": stages,
        **{f"total_{key}": total(key) for key in ("gpu_days", "days", "dollars", "kwh", "kg_co2e")},
        "paper_gpu_days": sum(papers) if papers else None,
    }


# ---- what it rests on --------------------------------------------------------------------------------------------------


def _grounds(stages: Sequence[StageConfig], machines: Machines) -> dict[str, Any]:
    table = rate_table()
    clusters = [machines.cluster(stage) for stage in stages]
    rates, cluster = table.estimate, clusters[0]
    money = machines.assumptions(cluster)
    return {
        "assumptions": {
            "lines": assumption_lines(table, machines.name, cluster, money),
            "rates": money.model_dump(),
            "gpu": cluster.gpu.model_dump(),
            "efficiency": rates.efficiency.model_dump(),
            "published_feed_mbytes_per_second": rates.published.feed_mbytes_per_second,
        }
    }


def assumption_lines(table: RateTable, name: str, cluster: Cluster, money: Assumptions) -> list[str]:
    """Every assumption, for people."""
    rates, gpu = table.estimate, cluster.gpu
    e, published = rates.efficiency, rates.published
    pue = table.pue.source if money.pue == table.pue.value else "as given"
    return [
        f"{name}: {gpu.memory_gib:g} GiB, {cluster.peak_16bit:g} TFLOP/s in 16 bit, {gpu.peak_tflops_fp32:g} in fp32, "
        f"{gpu.gbytes_per_second:g} GB/s ({gpu.dated}; {gpu.source})",
        f"links, one way: {gpu.gpu_link_gbytes_per_second:g} GB/s in a node, {gpu.node_link_gbytes_per_second:g} GB/s for a whole "
        "node to the next; traffic overlaps nothing",
        f"reached of the peaks: products {e.gemm:g}, attention {e.attention_fp32:g} in fp32 and {e.attention_16bit:g} in 16 bit, "
        f"memory {e.memory:g}, links {e.link:g}; fitted to Table 4 on V100s, carried over to other GPUs unmeasured",
        f"host: {e.seconds_per_step:g} s a step, {e.seconds_per_micro_batch:g} s a micro-batch; no time for checkpoints, stops, "
        "lost nodes",
        f"attention keys and values come from memory once the heads at work exceed {gpu.cache_mib:g} MiB of cache "
        f"({rates.kernels.source})",
        f"the paper's runs: AMP, fp32 self-attention, all blocks checkpointed, data parallel, captions padded to 120 tokens, fp32 "
        f"features read at {published.feed_mbytes_per_second:g} MB/s a GPU, attention backward in waves of "
        f"{published.backward_blocks_per_multiprocessor} blocks a multiprocessor ({published.source})",
        f"memory: {100 * rates.memory.usable:.0f} % may be filled, {rates.memory.context_gib:g} GiB of it by the context "
        f"({rates.memory.source})",
        "pictures have base_size² tokens, the most of any bucket, and captions all max_tokens; that buckets cut a share into "
        "smaller micro-batches, and that small products are slower, is not reckoned with",
        "ours: ZeRO-2 with one fp32 reduce-scatter and one all-gather a step; reading is not a limit while storage gives "
        "the rate above",
        *money.lines()[:2],
        f"price and power: {table.devices[money.device].source}; PUE: {pue}",
        "carbon: Ember / Our World in Data (world: IEA 2019); embodied emissions are not in it",
    ]
