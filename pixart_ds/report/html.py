"""The cost report as one HTML file that needs no network: numbers, charts, pictures, light and dark, for screens and for paper."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

from pixart_ds.report.charts import digits, number
from pixart_ds.report.curves import Curve
from pixart_ds.report.html_cost import cost_section
from pixart_ds.report.html_facts import Values, a100_ratio, devices_of, every_attempt, made_at, mapping, on_cpus
from pixart_ds.report.html_parts import counted, moment, per_run, state_of
from pixart_ds.report.html_style import SCRIPT, STYLE
from pixart_ds.report.html_tables import tables_section
from pixart_ds.report.html_time import attempts_section, time_section
from pixart_ds.report.html_training import samples_section, training_section
from pixart_ds.report.words import percent


def html_page(
    values: Values,
    curves: Mapping[str, Mapping[str, list[Curve]]],
    pictures: Mapping[str, Mapping[str, list[Path]]],
) -> str:
    """The report as a page.

    Args:
        values: What `report.build` made; a number that is not known is None.
        curves: By run's path, then stage (`curves.curves_of`).
        pictures: By run's path, then stage (`pictures.pictures_of`); one that cannot be read is named in the page instead.
    """
    runs = values.get("runs") or []
    names = ", ".join(str(run.get("name") or run.get("run")) for run in runs) or "no run"
    sections = [
        _head(values, names),
        _section("tiles", "", _tiles(values)),
        _section("time", "Where the time went", time_section(values)),
        _section("cost", "Cost beside the paper and its rivals", cost_section(values)),
        _section("attempts", "Attempts", per_run(runs, lambda run: attempts_section(run, values))),
        _section("training", "Loss and throughput", per_run(runs, lambda run: training_section(run, curves))),
        _section("samples", "Samples", per_run(runs, lambda run: samples_section(run, pictures))),
        _section("tables", "Tables", tables_section(values)),
        _section("problems", "Problems", _problems(values)),
        _section("assumptions", "Assumptions", _assumptions(values)),
    ]
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    # A page that may load nothing and run nothing but its own script, whatever a run's name or a log's line holds.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Cost of {escape(names)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _head(values: Values, names: str) -> str:
    runs = values.get("runs") or []
    lines = []
    for run in runs:
        words = [f"chain {run['chain']}"] if run.get("chain") else []
        words += [state_of(run), str(run.get("run") or "")]
        subject = f"<b>{escape(str(run.get('name') or ''))}</b>: " if len(runs) > 1 else ""
        lines.append(f"<p>{subject}{escape(' · '.join(words))}</p>")
    made = moment(made_at(values))
    found = len(_all_problems(values))
    hint = f' · <a href="#problems">{counted(found, "problem")}</a>' if found else ""
    return (
        '<header><button id="theme" type="button" hidden>Dark</button>'
        f"<h1>Cost of {escape(names)}</h1>{''.join(lines)}<p>made {escape(made)}{hint}</p></header>"
    )


def _tiles(values: Values) -> str:
    account, runs = mapping(values.get("account")), values.get("runs") or []
    known = {name: number(value) for name, value in account.items()} if every_attempt(runs) else {"device_hours": 0.0}
    made = []

    def tile(label: str, value: float | None, words: Callable[[float], str] = digits, below: str = "") -> None:
        if value is not None:
            below = f'<span class="below">{escape(below)}</span>' if below else ""
            made.append(f'<div class="tile"><span>{escape(label)}</span><b>{escape(words(value))}</b>{below}</div>')

    v100, days = known.get("v100_days"), known.get("device_days")
    devices = ", ".join(devices_of(runs))
    if days is None or days < 1:
        tile("device-hours", known.get("device_hours"), below=devices)
    elif v100 is not None:
        paper = number(_paper_model(values).get("v100_gpu_days"))
        tile("V100-days", v100, below=f"the paper: {digits(paper)}" if paper else "")
    else:
        tile("device-days", days, below=devices)
    tile("A100-equivalent days", known.get("a100_days"))
    measured = known.get("energy_coverage")
    tile("kWh", known.get("kwh"), below="" if measured is None else f"{measured:.0%} measured")
    embodied = known.get("kg_co2e_embodied")
    tile("kg CO2e", known.get("kg_co2e"), below=f"and {digits(embodied)} embodied" if embodied else "")
    tile("$", known.get("usd"))
    tile("goodput", known.get("goodput"), percent, "productive part of device time")
    if len(runs) == 1 and known.get("goodput") is not None:
        tile("ETTR", number(runs[0].get("ettr")), percent, "productive part of the wall time")
    tile("MFU", known.get("mfu"), percent, "part of the devices' peak")
    tile("images/s/device" if on_cpus(runs) else "images/s/GPU", known.get("images_per_second_per_device"))
    tile("$ per million images", known.get("usd_per_million_images"))
    return f'<div class="tiles">{"".join(made)}</div>'


def _paper_model(values: Values) -> Values:
    models = mapping(mapping(values.get("paper")).get("models"))
    return mapping(next((model for name, model in models.items() if name.startswith("PixArt")), None))


def _problems(values: Values) -> str:
    found = _all_problems(values)
    return f'<ul class="box">{"".join(f"<li>{escape(each)}</li>" for each in found)}</ul>' if found else ""


def _all_problems(values: Values) -> list[str]:
    runs = values.get("runs") or []
    found = [str(each) for each in values.get("problems") or []]
    for run in runs:
        subject = f"{run.get('name')}: " if len(runs) > 1 else ""
        found += [subject + str(each) for each in run.get("problems") or []]
        found += [subject + str(each) for each in mapping(run.get("slurm")).get("problems") or []]
    return list(dict.fromkeys(found))


def _assumptions(values: Values) -> str:
    stated = values.get("assumptions") or []
    lines = [str(each) for each in (stated.get("lines") or [] if isinstance(stated, Mapping) else stated)]
    told = mapping(mapping(values.get("paper")).get("assumptions"))
    ratio, value = mapping(told.get("a100_days_per_v100_day")), a100_ratio(values)
    lines += [f"the paper's A100-days: V100-days × {value:.4g} ({ratio.get('source')})"] if value else []
    lines += [f"the paper's figures: {told['source']}"] if told.get("source") else []
    return f"<ul>{''.join(f'<li>{escape(each)}</li>' for each in lines)}</ul>" if lines else "<p>None were stated.</p>"


def _section(name: str, title: str, content: str) -> str:
    head = f"<h2>{escape(title)}</h2>" if title else ""
    return f'<section id="{name}">{head}{content}</section>' if content else ""
