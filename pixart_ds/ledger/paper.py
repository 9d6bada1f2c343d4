"""The paper's own account, reckoned again from its tables: which assumption gives which figure, and what others give; pure."""

from __future__ import annotations

from typing import Any

from pixart_ds.ledger.accounting import a100_days
from pixart_ds.rates import rate_table
from pixart_ds.units import CarbonIntensity, DeviceTime, Power

_DAY = 86400.0


def paper_account() -> dict[str, Any]:
    """Totals of the paper and its rivals, reckoned from the V100-days of its stages, and the same under other assumptions.

    `models` has for each model `v100_gpu_days`, `a100_gpu_days`, `usd` and `tco2e`, and under `stated` what the paper prints. Of a
    rival only A100-days are known: its dollars are these at the rate that the paper's figure for it amounts to, its tonnes come by
    the paper's method (A100-hours × 400 W × the French grid), its V100-days by the ratio 2.2.
    """
    table, ratio = rate_table().paper, rate_table().a100_days_per_v100_day
    v100 = sum(table.gpu_days.values())
    ours = a100_days(v100, ratio.value)
    rates = {"PixArt-α": _rate(table.dollars, table.a100_days)}
    rates |= {name: _rate(rival.dollars, rival.a100_days) for name, rival in table.rivals.items()}
    own = {"a100_gpu_days": table.a100_days, "usd": table.dollars, "tco2e": table.tonnes_co2}
    models = {"PixArt-α": {**_model(v100, ours, rates["PixArt-α"]), "stated": own}}
    for name, rival in table.rivals.items():
        stated = {"a100_gpu_days": rival.a100_days, "usd": rival.dollars, "tco2e": rival.tonnes_co2}
        models[name] = {**_model(rival.a100_days / ratio.value, rival.a100_days, rates[name]), "stated": stated}
    return {
        "models": models,
        "stages": {
            stage: {"v100_gpu_days": days, "gpus": table.gpus[stage], "days": days / table.gpus[stage]}
            for stage, days in table.gpu_days.items()
        },
        "on_64_gpus": _on_64(table.gpu_days),
        "prices": [_priced(price.model_dump(), v100, ours) for price in table.prices],
        "footprints": [_footprint(boundary.model_dump(), v100) for boundary in table.boundaries],
        "assumptions": {
            "a100_days_per_v100_day": ratio.model_dump(),
            "co2_watts": table.co2_watts,
            "co2_grams_per_kwh": _grams(table.co2_country),
            "source": table.source,
        },
    }


def _rate(dollars: float, a100: float) -> float:
    """Dollars for an A100-hour."""
    return dollars / (a100 * 24)


def _grams(country: str) -> float:
    return rate_table().carbon[country].grams_per_kwh


def _tonnes(gpu_days: float, watts: float, pue: float, country: str) -> float:
    energy = DeviceTime(gpu_days * _DAY).at(Power(watts)) * pue
    return CarbonIntensity(_grams(country)).of(energy).kg / 1000


def _model(v100: float, a100: float, per_hour: float) -> dict[str, Any]:
    table = rate_table().paper
    return {
        "v100_gpu_days": v100,
        "a100_gpu_days": a100,
        "usd": a100 * 24 * per_hour,
        "usd_per_a100_hour": per_hour,
        "tco2e": _tonnes(a100, table.co2_watts, 1.0, table.co2_country),
    }


def _on_64(gpu_days: dict[str, float]) -> dict[str, float]:
    """Days on 64 V100s: of the three stages that had as many, and of everything."""
    widest = {stage: days for stage, days in gpu_days.items() if rate_table().paper.gpus[stage] == 64}
    return {"stages_on_64": sum(widest.values()) / 64, "all_stages": sum(gpu_days.values()) / 64}


def _priced(price: dict[str, Any], v100: float, a100: float) -> dict[str, Any]:
    days = v100 if price["device"] == "v100" else a100
    return {**price, "usd": days * 24 * price["per_hour"]}


def _footprint(boundary: dict[str, Any], v100: float) -> dict[str, Any]:
    energy = DeviceTime(v100 * _DAY).at(Power(boundary["watts"])) * boundary["pue"]
    grids = {
        country: _tonnes(v100, boundary["watts"], boundary["pue"], country) for country in rate_table().paper.grids
    }
    return {**boundary, "mwh": energy.kwh / 1000, "tco2e": grids}


def paper_page(values: dict[str, Any]) -> str:
    """The account for people, at most 110 columns."""
    models, told = values["models"], values["assumptions"]
    ratio = told["a100_days_per_v100_day"]
    lines = [
        "The paper's account, reckoned again from its tables",
        "",
        f"{'model':<12}{'V100-days':>11}{'A100-days':>11}{'$':>12}{'$/A100-h':>10}{'t CO2e':>8}"
        f"{'paper: A100-days':>19}{'$':>12}{'t CO2':>7}",
    ]
    for name, model in models.items():
        stated = model["stated"]
        lines.append(
            f"{name:<12}{model['v100_gpu_days']:>11,.0f}{model['a100_gpu_days']:>11,.0f}{model['usd']:>12,.0f}"
            f"{model['usd_per_a100_hour']:>10.2f}{model['tco2e']:>8.2f}"
            f"{stated['a100_gpu_days']:>19,.0f}{stated['usd']:>12,.0f}{stated['tco2e']:>7g}"
        )
    ours, sd = models["PixArt-α"], models["SD 1.5"]
    at_theirs = ours["a100_gpu_days"] * 24 * sd["usd_per_a100_hour"]
    days, dollars = ours["a100_gpu_days"] / sd["a100_gpu_days"], ours["usd"] / sd["usd"]
    rates = ours["usd_per_a100_hour"], sd["usd_per_a100_hour"]
    lines += [
        f"  A100-days are V100-days × {ratio['value']:.4f}:",
        f"    {ratio['source']}",
        f"  t CO2e: A100-hours × {told['co2_watts']:g} W × {told['co2_grams_per_kwh']:g} g/kWh, GPUs alone, no PUE",
        f"  PixArt-α has {days:.1%} of SD 1.5's A100-days, but {dollars:.1%} of its dollars: an hour of its own counts",
        f"  ${rates[0]:.2f}, one of SD 1.5 ${rates[1]:.2f}; at the latter it costs ${at_theirs:,.0f}, {at_theirs / sd['usd']:.1%}",
        "",
        f"{'stage':<14}{'V100-days':>10}{'V100s':>8}{'days':>8}",
    ]
    lines += [
        f"{name:<14}{stage['v100_gpu_days']:>10,.0f}{stage['gpus']:>8}{stage['days']:>8.1f}"
        for name, stage in values["stages"].items()
    ]
    widest = [f"{s['v100_gpu_days']:.0f}" for s in values["stages"].values() if s["gpus"] == 64]
    lines += [
        f"{'together':<14}{ours['v100_gpu_days']:>10,.0f}",
        f'  "22 days on 64 V100s" are the stages that had 64: {" + ".join(widest)} = '
        f"{values['on_64_gpus']['stages_on_64']:.1f} × 64; all of it is {values['on_64_gpus']['all_stages']:.1f} × 64",
        "",
        "What the run costs at other prices:",
    ]
    for price in values["prices"]:
        asked = f"${price['per_hour']:.2f} for {_article(price['device'])} hour, {price['what']}"
        lines.append(f"  ${price['usd']:>9,.0f}   {asked} ({price['dated']}; {price['source']})")
    grids = list(values["footprints"][0]["tco2e"])
    lines += [
        "",
        f"{_footprint_title(ours):<62}{'MWh':>7}" + "".join(f"{grid:>7}" for grid in grids),
    ]
    for each in values["footprints"]:
        boundary = f"  {each['watts']:g} W × PUE {each['pue']:g}: {each['what']}"
        tonnes = "".join(f"{each['tco2e'][grid]:>7.2f}" for grid in grids)
        lines.append(f"{boundary:<62}{each['mwh']:>7.1f}{tonnes}")
    return "\n".join([*lines, "", f"Source: {told['source']}"])


def _footprint_title(model: dict[str, Any]) -> str:
    return f"t CO2e of {model['v100_gpu_days']:,.0f} V100-days, location-based"


def _article(device: str) -> str:
    return {"a100": "an A100", "v100": "a V100"}[device]
