"""What a stage or a chain will need and cost on given GPUs, from its recipe and rates.yaml; nothing is measured here.

`counts` counts the net, `step_time` gives seconds and holds them against the paper's Table 4, `fit` finds what fits and is fastest.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pixart_ds.config.load import find_recipe, load_chain, load_stage, read_layers
from pixart_ds.config.schema import BudgetConfig, ChainConfig, StageConfig
from pixart_ds.errors import MachineError
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
            cluster.gpu.device,
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
            raise _refusal(stage, machines)
        return {"kind": "stage", **values, **check, **_grounds([stage], machines)}
    chain = load_chain(recipe, overrides)
    return {"kind": "chain", **_chain(chain, machines), **check, **_grounds(chain.stages, machines)}


def _refusal(stage: StageConfig, machines: Machines) -> MachineError:
    cluster, net = machines.cluster(stage), Net.of(stage.model)
    return too_large(stage, machines.name, option(stage, net, net.depth, cluster, 1), cluster)


_TOTALS = ("gpu_days", "days", "dollars", "kwh", "kg_co2e")


def _chain(chain: ChainConfig, machines: Machines) -> dict[str, Any]:
    stages = [estimate_stage(stage, machines) for stage in chain.stages]
    papers = [stage.paper_gpu_days for stage in chain.stages if stage.paper_gpu_days is not None]

    def total(key: str) -> float | None:
        return sum(each[key] for each in stages) if all(each["fits"] for each in stages) else None

    totals = {key: total(key) for key in _TOTALS}
    return {
        "chain": chain.name,
        "gpu": machines.name,
        "stages": stages,
        **{f"total_{key}": value for key, value in totals.items()},
        "paper_gpu_days": sum(papers) if papers else None,
        "budget": held_against_budget(chain.budget, totals),
    }


def held_against_budget(budget: BudgetConfig | None, totals: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """A row for each limit of a chain's budget: what, limit, estimate, the part of the limit that it is, and whether it fits.

    Where a stage does not fit the GPUs, all but what and limit are null.
    """
    rows: list[dict[str, Any]] = []
    for what, limit in ({} if budget is None else budget.limits).items():
        value = totals["dollars" if what == "usd" else what]
        part = None if value is None else value / limit
        rows.append(
            {"what": what, "limit": limit, "estimate": value, "part": part, "fits": None if part is None else part <= 1}
        )
    return rows


# ---- a range of sizes --------------------------------------------------------------------------------------------------


MOST_SIZES = 16
"""Sizes that a range of nodes is given at most."""


def sizes_between(fewest: int, most: int) -> list[int]:
    """Numbers of nodes from `fewest` to `most`: all, or of more than 16 both ends and the multiples of some number between.

    Multiples, of the smallest number that leaves no more than 16, because round numbers are what people ask a cluster for.
    """
    for step in itertools.count(max(1, (most - fewest) // (MOST_SIZES - 1))):  # any smaller one leaves more
        between = range(fewest // step * step + step, most, step)
        if len(between) <= MOST_SIZES - 2:
            break
    return sorted({fewest, *between, most})


def estimate_sizes(recipe: str, overrides: Sequence[str], machines: Machines, fewest: int, most: int) -> dict[str, Any]:
    """What a recipe costs on each number of nodes from `fewest` to `most`, as JSON; `sizes` has a row for each.

    A row's keys, values and units are those of the estimate for so many nodes. In a chain's they are totals, every stage on so many
    nodes, and `too_large` names the stages that do not fit. In addition:

    - `images_per_second`: of all GPUs together; a stage's only.
    - `gpu_days_over_cheapest`: by which part it takes more GPU-days than the size that takes fewest.

    Where a stage does not fit, `fits` is false, and time and cost are null.

    Args:
        recipe, overrides: As for `estimate`.
        machines: All but the number of nodes.
        fewest, most: Nodes; between far ends not every number gets a row (`sizes_between`).

    Raises:
        ConfigError: The recipe or an option is wrong.
        MachineError: The stage does not fit these GPUs with any of these numbers of nodes. In a chain every row is marked instead.
    """
    sizes = [replace(machines, nodes=nodes) for nodes in sizes_between(fewest, most)]
    stages: Sequence[StageConfig]
    if "stages" in read_layers(find_recipe(recipe)):
        chain = load_chain(recipe, overrides)
        stages, values = chain.stages, _chain_sizes(chain, sizes)
    else:
        stage = load_stage(recipe, overrides)
        stages, values = [stage], _stage_sizes(stage, sizes)
    rows = values["sizes"]
    cheapest = min((row["gpu_days"] for row in rows if row["fits"]), default=None)
    for row in rows:
        row["gpu_days_over_cheapest"] = row["gpu_days"] / cheapest - 1 if row["fits"] else None
    return {
        "kind": "sizes",
        "fewest_nodes": fewest,
        "most_nodes": most,
        **values,
        **held_against_paper(rate_table()),
        **_grounds(stages, machines),
    }


_ALIKE = (
    "stage",
    "gpu",
    "gpus_per_node",
    "precision",
    "steps",
    "images",
    "global_batch_size",
    "paper_gpus",
    "paper_gpu_days",
)
_OF_A_SIZE = ("nodes", "gpus", "images_per_gpu_and_step", "memory_bytes", "usable_bytes", "fits", *_COST)
_OF_A_WAY = ("checkpointed_blocks", "micro_batch_size", "micro_batches")


def _stage_sizes(stage: StageConfig, sizes: Sequence[Machines]) -> dict[str, Any]:
    made = [estimate_stage(stage, size) for size in sizes]
    if not any(each["fits"] for each in made):
        raise _refusal(stage, sizes[-1])  # most ranks, so smallest shards: the one that lacks least
    return {**{key: made[0][key] for key in _ALIKE}, "sizes": [_stage_row(each) for each in made]}


def _stage_row(made: dict[str, Any]) -> dict[str, Any]:
    way = {key: made["chosen"][key] if made["fits"] else None for key in _OF_A_WAY}
    rate = made["global_batch_size"] / made["step_seconds"]["total"] if made["fits"] else None
    return {**{key: made[key] for key in _OF_A_SIZE}, **way, "images_per_second": rate}


def _chain_sizes(chain: ChainConfig, sizes: Sequence[Machines]) -> dict[str, Any]:
    made = [_chain(chain, size) for size in sizes]
    alike = {key: made[0][key] for key in ("chain", "gpu", "paper_gpu_days")}
    return {**alike, "sizes": [_chain_row(each) for each in made]}


def _chain_row(made: dict[str, Any]) -> dict[str, Any]:
    stages = made["stages"]
    too_large = [each["stage"] for each in stages if not each["fits"]]
    return {
        "nodes": stages[0]["nodes"],
        "gpus": max(each["gpus"] for each in stages),  # what the job holds; a stage may use fewer GPUs of each node
        "fits": not too_large,
        "too_large": too_large,
        **{key: made[f"total_{key}"] for key in _TOTALS},
        "budget": made["budget"],
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
        *money.lines(),
        "carbon: Ember / Our World in Data (world: IEA 2019); embodied emissions are not in it",
    ]
