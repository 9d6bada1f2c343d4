"""An estimate for people: at most 120 columns, the comparison with the paper first, every assumption last."""

from __future__ import annotations

import itertools
import textwrap
from typing import Any

WIDTH = 118


def report(values: dict[str, Any]) -> str:
    """The text of what `estimate.estimate` or `estimate.estimate_sizes` returns."""
    body = {"stage": _stage, "chain": _chain, "sizes": _sizes}[values["kind"]]
    return "\n".join([*_check(values), "", *body(values), "", *_assumptions(values["assumptions"]["lines"])])


def _check(values: dict[str, Any]) -> list[str]:
    """Table 4: the paper's rates and the model's."""
    lines = [
        "The model held against the paper (Table 4, published settings), images/s for each V100:",
        "",
        f"  {'stage':<14}{'paper':>9}{'model':>9}{'error':>9}",
    ]
    for row in values["table4"]:
        lines.append(f"  {row['stage']:<14}{row['paper']:>9.3g}{row['model']:>9.3g}{row['error']:>+9.1%}")
    return [*lines, f"  largest error {values['table4_error']:.1%}; the time below is no surer than that"]


def _stage(values: dict[str, Any]) -> list[str]:
    return [
        f"Projection, never measured: {values['stage']} on {_machines(values)}, {values['precision']}",
        "",
        *_columns(_work(values)),
        "",
        *_memory(values),
        "",
        *_options(values),
        "",
        *_columns(_time(values)),
    ]


def _machines(values: dict[str, Any]) -> str:
    return f"{values['gpus']} × {values['gpu']} ({_nodes(values['nodes'])} of {values['gpus_per_node']})"


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _work(values: dict[str, Any]) -> list[tuple[str, str]]:
    flops, recompute = values["forward_flops_by_part"], values["recompute_flops_per_image"]
    shares = ", ".join(
        f"{part.replace('_', ' ')} {value / values['forward_flops_per_image']:.1%}"
        for part, value in flops.items()
        if value / values["forward_flops_per_image"] >= 0.0005
    )
    traffic = values["traffic_bytes_per_step"]
    return [
        ("parameters", f"{values['parameters']:,}"),
        (
            "tokens",
            f"{values['tokens']:,} of a picture"
            + (f", {values['text_tokens']} of text" if values["text_tokens"] else ""),
        ),
        (
            "images",
            f"{values['steps']:,} steps × {values['global_batch_size']:,} = {values['images']:,}; "
            f"{values['images_per_gpu_and_step']:,} for each GPU and step",
        ),
        ("forward", f"{_flops(values['forward_flops_per_image'])} an image: {shares}"),
        (
            "training",
            f"{_flops(values['training_flops_per_image'])} an image; {_flops(recompute['all'])} with all blocks checkpointed, "
            f"{_flops(recompute['chosen'])} as chosen",
        ),
        (
            "traffic",
            f"{traffic['ours'] / 1e9:.2f} GB sent by each GPU in a step = {traffic['ours'] / traffic['psi']:.2g}Ψ "
            f"(Ψ {traffic['psi'] / 1e9:.2f} GB); DeepSpeed's own ZeRO-2, which reduces "
            f"each micro-batch, would send {traffic['deepspeed_zero2'] / 1e9:.2f}",
        ),
    ]


def _memory(values: dict[str, Any]) -> list[str]:
    """A line of parts, and one of bytes for each picture."""
    memory, picture = values["memory_bytes"], values["activation_bytes_per_image"]
    usable, capacity = values["usable_bytes"] / 2**30, values["capacity_bytes"] / 2**30
    return [
        f"  memory of a GPU, GiB ({usable:.1f} usable of {capacity:.1f}):",
        "  " + "".join(f"{name:>12}" for name in memory),
        "  " + "".join(f"{size / 2**30:>12.2f}" for size in memory.values()),
        f"  activations of a picture: {picture['all'] / 2**20:,.1f} MiB with all blocks checkpointed, "
        f"{picture['none'] / 2**20:,.1f} with none, {picture['chosen'] / 2**20:,.1f} as chosen",
    ]


def _options(values: dict[str, Any]) -> list[str]:
    lines = [
        f"  {'way to run':<14}{'checkpointed':>13}{'micro-batch':>13}{'largest':>9}{'GiB':>8}{'step, s':>9}{'images/s/GPU':>14}"
    ]
    rows = {"chosen": values["chosen"], "all": values["options"]["all"], "none": values["options"]["none"]}
    rows["recipe's own"] = values["options"]["recipe"]
    for name, each in rows.items():
        head = f"  {name:<14}{each['checkpointed_blocks']:>13}"
        if each["micro_batch_size"] is None:
            lines.append(f"{head}{'-':>13}{each['largest_micro_batch']:>9}   does not fit, one picture at a time")
            continue
        figures = (
            f"{each['micro_batches']} × {each['micro_batch_size']}".rjust(13)
            + f"{each['largest_micro_batch']:>9}{each['memory_bytes']['total'] / 2**30:>8.1f}"
        )
        if each["fits"]:
            seconds, rate = each["step_seconds"]["total"], each["images_per_second_per_gpu"]
            lines.append(f"{head}{figures}{seconds:>9.3g}{rate:>14.3g}")
        else:
            lines.append(f"{head}{figures}   does not fit")
    return lines


def _time(values: dict[str, Any]) -> list[tuple[str, str]]:
    seconds = values["step_seconds"]
    parts = ", ".join(f"{part} {_digits(value)}" for part, value in seconds.items() if part != "total")
    paper = values["paper_gpu_days"]
    beside = f"; the paper's V100-days: {paper:,.0f} on {values['paper_gpus']}" if paper else ""
    feed = values["feed_bytes_per_second_per_gpu"]
    known = values["assumptions"]["published_feed_mbytes_per_second"]
    return [
        ("step", f"{_digits(seconds['total'])} s: {parts}"),
        (
            "rate",
            f"{_digits(values['images_per_second_per_gpu'])} images/s for each GPU, {values['mfu']:.1%} of the peak (MFU)",
        ),
        (
            "reading",
            f"{feed / 1e6:.0f} MB/s for each GPU, {feed * values['gpus_per_node'] / 1e6:,.0f} MB/s for a node, must be there; "
            f"the paper's storage gave about {known:g} a GPU (inferred)",
        ),
        ("time", f"{_digits(values['days'])} days, {_digits(values['gpu_days'])} GPU-days{beside}"),
        ("cost", f"${_digits(values['dollars'])}, {_digits(values['kwh'])} kWh, {_digits(values['kg_co2e'])} kg CO2e"),
    ]


def _chain(values: dict[str, Any]) -> list[str]:
    lines = [
        f"Projection, never measured: {values['chain']} on {values['gpu']}",
        "",
        f"  {'stage':<14}{'GPUs':>5}{'ckpt.':>7}{'micro':>7}{'GiB':>7}{'step, s':>9}{'img/s/GPU':>11}{'days':>8}{'GPU-days':>10}"
        f"{'paper':>8}{'$':>10}{'MWh':>8}{'t CO2e':>8}",
    ]
    for each in values["stages"]:
        paper = "" if each["paper_gpu_days"] is None else f"{each['paper_gpu_days']:,.0f}"
        head = f"  {each['stage']:<14}{each['gpus']:>5}"
        if not each["fits"]:
            memory = each["memory_bytes"]["total"] / 2**30
            text = f"does not fit: one picture needs {memory:.1f} GiB of {each['usable_bytes'] / 2**30:.1f}"
            lines.append(f"{head}  {text:<57}{paper:>8}")
            continue
        chosen = each["chosen"]
        blocks = f"{chosen['checkpointed_blocks']:>7}{chosen['micro_batch_size']:>7}"
        lines.append(
            f"{head}{blocks}{each['memory_bytes']['total'] / 2**30:>7.1f}{_digits(each['step_seconds']['total']):>9}"
            f"{_digits(each['images_per_second_per_gpu']):>11}{_digits(each['days']):>8}{_digits(each['gpu_days']):>10}"
            f"{paper:>8}{_money(each)}"
        )
    paper = "" if values["paper_gpu_days"] is None else f"{values['paper_gpu_days']:,.0f}"
    totals = {key.removeprefix("total_"): value for key, value in values.items() if key.startswith("total_")}
    if totals["gpu_days"] is None:
        last = f"  {'together':<14}{'not to be had: a stage does not fit':<64}{paper:>8}"
    else:
        last = f"  {'together':<14}{'':>46}{_digits(totals['days']):>8}{_digits(totals['gpu_days']):>10}{paper:>8}{_money(totals)}"
    lines += [
        "  " + "-" * 110,
        last,
        *_budget(values["budget"]),
        "",
        "  ckpt.: blocks whose activations are recomputed; micro: pictures that a GPU runs at once;",
    ]
    return [*lines, "  paper: V100-days of Table 4"]


def _budget(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each limit of the chain's budget."""
    lines = []
    for row in rows:
        said = "no estimate, as a stage does not fit the GPUs"
        if row["fits"] is not None:
            said = (
                f"{_digits(row['estimate'])} estimated, {row['part']:,.1%}: {'fits' if row['fits'] else 'DOES NOT FIT'}"
            )
        lines.append(f"  budget of {_digits(row['limit'])} {row['what']}: {said}")
    return ["", *lines] if lines else []


def _money(values: dict[str, Any]) -> str:
    return f"{_digits(values['dollars']):>10}{_digits(values['kwh'] / 1000):>8}{_digits(values['kg_co2e'] / 1000):>8}"


def _sizes(values: dict[str, Any]) -> list[str]:
    """What is the same for every number of nodes, a line for each, and what the columns mean."""
    rows, of_chain = values["sizes"], "chain" in values
    titles = _WAY_TITLES if not of_chain else []
    last = ["budget"] if any(row.get("budget") for row in rows) else []
    lines = _aligned([["nodes", "GPUs", *titles, *_COST_TITLES, *last], *(_size_cells(row, of_chain) for row in rows)])
    for place, row in enumerate(rows, 1):
        if not row["fits"]:
            lines[place] += f"   does not fit: {_lack(row, of_chain)}"
    return [*_sizes_head(values, of_chain), "", *lines, "", *_sizes_notes(values, of_chain)]


_WAY_TITLES = ["samples", "micro-batches", "step, s", "images/s"]
_COST_TITLES = ["days", "GPU-days", "dearer", "kWh", "kg CO2e", "$"]


def _sizes_head(values: dict[str, Any], of_chain: bool) -> list[str]:
    fewest, most = values["fewest_nodes"], values["most_nodes"]
    nodes = _nodes(most) if fewest == most else f"{fewest} to {_nodes(most)}"
    paper = "" if values["paper_gpu_days"] is None else f"; the paper's V100-days: {values['paper_gpu_days']:,.0f}"
    if of_chain:
        return [
            f"Projection, never measured: {values['chain']} on {nodes} of {values['gpu']}, all stages together",
            f"  each stage on as many nodes{paper}",
        ]
    on = f" on {values['paper_gpus']}" if paper else ""
    return [
        f"Projection, never measured: {values['stage']} on {nodes} of {values['gpus_per_node']} × {values['gpu']}, "
        f"{values['precision']}",
        f"  {values['steps']:,} steps × {values['global_batch_size']:,} = {values['images']:,} images, on any number of nodes"
        f"{paper}{on}",
    ]


def _size_cells(row: dict[str, Any], of_chain: bool) -> list[str]:
    cells = [str(row["nodes"]), str(row["gpus"])]
    if not row["fits"]:
        return cells
    if not of_chain:
        cells += [
            f"{row['images_per_gpu_and_step']:,}",
            f"{row['micro_batches']} × {row['micro_batch_size']}",
            _digits(row["step_seconds"]["total"]),
            _digits(row["images_per_second"]),
        ]
    over = row["gpu_days_over_cheapest"]
    return [
        *cells,
        _digits(row["days"]),
        _digits(row["gpu_days"]),
        "cheapest" if over == 0 else f"{over:+.1%}",
        *(_digits(row[key]) for key in ("kwh", "kg_co2e", "dollars")),
        *_over_budget(row.get("budget", [])),
    ]


def _over_budget(rows: list[dict[str, Any]]) -> list[str]:
    """One cell: the limits that a size exceeds, if the chain has a budget."""
    over = ", ".join(row["what"] for row in rows if not row["fits"])
    return [f"over: {over}" if over else "fits"] if rows else []


def _lack(row: dict[str, Any], of_chain: bool) -> str:
    if of_chain:
        return ", ".join(row["too_large"])
    needed, usable = row["memory_bytes"]["total"] / 2**30, row["usable_bytes"] / 2**30
    return f"one picture needs {needed:.1f} GiB of {usable:.1f}"


def _sizes_notes(values: dict[str, Any], of_chain: bool) -> list[str]:
    nodes = [row["nodes"] for row in values["sizes"]]
    count = values["most_nodes"] - values["fewest_nodes"] + 1
    notes = []
    if len(nodes) < count:
        step = nodes[2] - nodes[1]
        notes.append(f"{len(nodes)} of {count:,} sizes: both ends, and the multiples of {step:,} between them")
    if not of_chain:
        notes.append(
            "samples: the most that a rank runs in a step; micro-batches × samples of each: the fastest way that fits"
        )
        notes.append("images/s: of all GPUs together")
    notes.append("dearer: in GPU-days, than the size that takes fewest; `--nodes N` shows one size in full")
    return [f"  {note}" for note in notes]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell, aligned to the right; a row may be shorter than the first."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return ["".join(f"  {cell:>{width}}" for cell, width in zip(row, widths, strict=False)) for row in rows]


def _assumptions(lines: list[str]) -> list[str]:
    wrapped = ["Assumptions (pixart_ds/rates.yaml):"]
    for line in lines:
        wrapped += textwrap.wrap(line, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
    return wrapped


def _columns(rows: list[tuple[str, str]]) -> list[str]:
    lines: list[str] = []
    for name, text in rows:
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14, break_on_hyphens=False
        )
    return lines


def _flops(value: float) -> str:
    unit, name = (1e12, "TFLOP") if value >= 1e12 else (1e9, "GFLOP")
    return f"{value / unit:.4g} {name}"


def _digits(value: float) -> str:
    """Three significant digits without an exponent: <0.001, 0.0123, 12.3, 1,234."""
    if 0 < value < 0.001:
        return "<0.001"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
