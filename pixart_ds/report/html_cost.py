"""The page's section that holds the cost against the paper's and its rivals'."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from pixart_ds.page.charts import Bar, Group, bar_chart, digits, number
from pixart_ds.page.parts import colour_keys, figure
from pixart_ds.report.html_facts import Values, a100_ratio, devices_of, every_attempt, mapping, on_cpus
from pixart_ds.report.html_parts import per_run, state_of

_MEASURES = (("a100_gpu_days", "A100-days"), ("tco2e", "tonnes CO2e"), ("usd", "dollars"))


def cost_section(values: Values) -> str:
    """Each run beside the paper's own account, stage by stage, and beside the rivals that the paper names."""
    runs = values.get("runs") or []
    return per_run(runs, lambda run: _beside_stages(run, values)) + _beside_rivals(values)


def _beside_stages(run: Values, values: Values) -> str:
    unit = _unit([run])
    if unit is None:
        return _not_comparable(run)
    stages = run.get("stages") or []
    name, key, ratio = unit, "v100_days", 1.0
    if unit == "A100-days":
        key, ratio = "a100_days", a100_ratio(values)
    groups, paper_days = [], 0.0
    for stage in stages:
        ours, paper = number(mapping(stage.get("account")).get(key)), number(stage.get("paper_v100_days"))
        paper_days += ratio * (paper or 0.0)
        told = None if paper is None else ratio * paper
        groups.append(_pair(stage, ours if stage.get("attempts") else None, told, _progress(stage)))
    if not groups:
        return "<p>The run has no stages.</p>"
    whole = number(mapping(run.get("account")).get(key)) if every_attempt([run]) else None
    groups.append(_pair({"stage": "total"}, whole or None, paper_days or None, ""))
    note = "" if paper_days else "<p>No stage of this chain is one of the paper's.</p>"
    legend = colour_keys({"ours": "this run", "paper": "the paper (Table 4)"})
    return note + figure(
        f"{name} of each stage", legend + bar_chart(groups, f"{name} of each stage, ours and the paper's")
    )


def _unit(runs: Iterable[Values]) -> str | None:
    """In what the runs can be held against the paper: V100-days, A100-days, or nothing, as on CPUs."""
    accounts = [mapping(each.get("account")) for each in every_attempt(runs)]
    used = [account for account in accounts if number(account.get("device_seconds"))]
    for name, key in (("V100-days", "v100_days"), ("A100-days", "a100_days")):
        if all(number(account.get(key)) is not None for account in used):
            return name
    return None


def _not_comparable(run: Values) -> str:
    kinds = escape(", ".join(devices_of([run])) or "not known")
    why = (
        "Nothing is published of how much of a V100 a CPU core is, and what trains on CPUs is a small net on few images."
        if on_cpus([run])
        else "The table of rates states no conversion for all of them."
    )
    return (
        f'<p class="note">This is not comparable with the paper: its unit is a V100-day, and the devices here are {kinds}. {why} '
        "The paper's own account and its rivals' stand here alone.</p>"
    )


def _pair(stage: Values, ours: float | None, paper: float | None, state: str) -> Group:
    name = str(stage.get("stage"))
    told = ["–" if ours is None else digits(ours), "–" if paper is None else digits(paper)]
    shown = f" ({state})" if state not in ("", "done") else ""
    bars = [Bar("ours", ours, f"{name}: {told[0]}{shown}"), Bar("paper", paper, f"{name}, the paper: {told[1]}")]
    return Group(name, f"{told[0]}{shown} · paper {told[1]}", bars)


def _progress(stage: Values) -> str:
    seen, total = number(stage.get("images_seen")), number(stage.get("total_images"))
    if stage.get("state") in ("done", "not started") or seen is None or not total:
        return str(stage.get("state"))
    return f"at {seen / total:.0%}"


def _beside_rivals(values: Values) -> str:
    models = {
        name: mapping(model.get("stated"))
        for name, model in mapping(mapping(values.get("paper")).get("models")).items()
    }
    if not models:
        return ""
    own, *others = sorted(
        models, key=lambda name: (not name.startswith("PixArt"), number(models[name].get("a100_gpu_days")) or 0.0)
    )
    rows: list[tuple[str, str, Values]] = []
    for run in values.get("runs") or []:
        rows += _our_rows(run) if _unit([run]) else []
    rows.append((f"{own} (paper)", "paper", models[own]))
    rows += [(name, "rival", models[name]) for name in others]
    charts = []
    for key, title in _MEASURES:
        groups = []
        for name, colour, row in rows:
            value = number(row.get(key))
            words = "–" if value is None else digits(value)
            groups.append(Group(name, words, [Bar(colour, value, f"{name}: {words} {title}")]))
        charts.append(figure(title, bar_chart(groups, f"{title}, beside the paper's models", log=True, room=280)))
    told = mapping(mapping(values.get("paper")).get("assumptions"))
    watts, grams = number(told.get("co2_watts")), number(told.get("co2_grams_per_kwh"))
    how = "by its own assumptions"
    if watts and grams:
        how = f"{digits(watts)} W for a GPU at {digits(grams)} g CO2e/kWh, without the node's share and PUE"
    return (
        "<h3>Beside the paper's rivals</h3>"
        f'<p class="note">The axes are logarithmic. What the paper states of itself and of its rivals; its tonnes: {escape(how)}; '
        f'ours: by the assumptions below.</p><div class="columns">{"".join(charts)}</div>'
    )


def _our_rows(run: Values) -> list[tuple[str, str, Values]]:
    """The run so far, and by its forecast, in the measures of the paper's models."""
    account, forecast = mapping(run.get("account")), mapping(run.get("forecast"))
    name = str(run.get("name"))
    kg = number(account.get("kg_co2e"))
    found = {
        "a100_gpu_days": account.get("a100_days"),
        "tco2e": None if kg is None else kg / 1000,
        "usd": account.get("usd"),
    }
    if not every_attempt([run]):
        return []
    if state_of(run) == "done":
        return [(name, "ours", found)]
    rows: list[tuple[str, str, Values]] = (
        [(f"{name}, so far", "ours", found)] if any(number(value) for value in found.values()) else []
    )
    days, total = number(account.get("device_days")), number(forecast.get("device_days_total"))
    a100, kg = number(account.get("a100_days")), number(forecast.get("kg_co2e_total"))
    ends = {
        "a100_gpu_days": total * a100 / days if total and a100 and days else None,
        "tco2e": None if kg is None else kg / 1000,
        "usd": forecast.get("usd_total"),
    }
    return [*rows, (f"{name}, forecast", "forecast", ends)] if any(number(value) for value in ends.values()) else rows
