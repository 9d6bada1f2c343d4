"""The cost report as one HTML file that needs no network: numbers, charts, pictures, light and dark, for screens and for paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

from pixart_ds.page.charts import digits, number
from pixart_ds.page.parts import document, section, tile
from pixart_ds.page.words import counted, moment, percent
from pixart_ds.report.curves import Curve
from pixart_ds.report.html_cost import cost_section
from pixart_ds.report.html_facts import Values, a100_ratio, devices_of, every_attempt, made_at, mapping, on_cpus
from pixart_ds.report.html_parts import per_run, state_of
from pixart_ds.report.html_style import STYLE
from pixart_ds.report.html_tables import tables_section
from pixart_ds.report.html_time import attempts_section, time_section
from pixart_ds.report.html_training import samples_section, training_section


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
        section("tiles", "", _tiles(values)),
        section("time", "Where the time went", time_section(values)),
        section("cost", "Cost beside the paper and its rivals", cost_section(values)),
        section("attempts", "Attempts", per_run(runs, lambda run: attempts_section(run, values))),
        section("training", "Loss and throughput", per_run(runs, lambda run: training_section(run, curves))),
        section("samples", "Samples", per_run(runs, lambda run: samples_section(run, pictures))),
        section("tables", "Tables", tables_section(values)),
        section("problems", "Problems", _problems(values)),
        section("assumptions", "Assumptions", _assumptions(values)),
    ]
    return document(f"Cost of {names}", _header(values), sections, STYLE)


def _header(values: Values) -> str:
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
    return f"{''.join(lines)}<p>made {escape(made)}{hint}</p>"


def _tiles(values: Values) -> str:
    account, runs = mapping(values.get("account")), values.get("runs") or []
    known = {name: number(value) for name, value in account.items()} if every_attempt(runs) else {"device_hours": 0.0}
    made = []

    def told(label: str, value: float | None, words: Callable[[float], str] = digits, below: str = "") -> None:
        if value is not None:
            made.append(tile(label, words(value), below))

    v100, days = known.get("v100_days"), known.get("device_days")
    devices = ", ".join(devices_of(runs))
    if days is None or days < 1:
        told("device-hours", known.get("device_hours"), below=devices)
    elif v100 is not None:
        paper = number(_paper_model(values).get("v100_gpu_days"))
        told("V100-days", v100, below=f"the paper: {digits(paper)}" if paper else "")
    else:
        told("device-days", days, below=devices)
    told("A100-equivalent days", known.get("a100_days"))
    measured = known.get("energy_coverage")
    told("kWh", known.get("kwh"), below="" if measured is None else f"{measured:.0%} measured")
    embodied = known.get("kg_co2e_embodied")
    told("kg CO2e", known.get("kg_co2e"), below=f"and {digits(embodied)} embodied" if embodied else "")
    told("$", known.get("usd"))
    told("goodput", known.get("goodput"), percent, "productive part of device time")
    if len(runs) == 1 and known.get("goodput") is not None:
        told("ETTR", number(runs[0].get("ettr")), percent, "productive part of the wall time")
    told("MFU", known.get("mfu"), percent, "part of the devices' peak")
    told("images/s/device" if on_cpus(runs) else "images/s/GPU", known.get("images_per_second_per_device"))
    told("$ per million images", known.get("usd_per_million_images"))
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
