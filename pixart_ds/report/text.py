"""The cost report for a terminal."""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pixart_ds.ledger.budget import WARN_AT
from pixart_ds.ledger.entries import PARTS
from pixart_ds.log import duration
from pixart_ds.page.words import digits, percent
from pixart_ds.report.words import unit

_WIDTH = 116
_MOST_ATTEMPTS = 30
"""Of one stage that are listed; more are summed up."""


def page(values: Mapping[str, Any]) -> str:
    """The report of one or several runs."""
    lines: list[str] = []
    for run in values["runs"]:
        lines += [*_run(run), ""]
    lines += [*_together(values), ""] if len(values["runs"]) > 1 else [*_groups(values), ""]
    lines += ["Assumptions:", *_listed(values["assumptions"]["lines"]), "", *_paper(values["paper"])]
    return "\n".join(lines)


def _run(run: Mapping[str, Any]) -> Iterator[str]:
    yield f"Cost of {run['run']}"
    yield ""
    name, key, _ = unit(run["account"])
    yield _row("stage", "attempt", "devices", name, "kWh", "kg CO2e", "$", "images/s/dev", "goodput", "paper, V100-d")
    for stage in run["stages"]:
        yield from _stage(stage, key)
    yield "-" * 110
    paper = sum(stage["paper_v100_days"] or 0 for stage in run["stages"])
    yield _figures("together", "", "", run["account"], key, f"{paper:,.0f}" if paper else "")
    if paper and run["account"]["v100_days"] is None:
        yield "(the devices were no V100s, and the nets may be smaller: no comparison with the paper's)"
    yield ""
    yield from _time(run)
    yield from _summary(run)
    yield from _forecast(run)
    yield from budget_lines(run["budget"])
    yield from _slurm(run)
    if run["problems"]:
        yield ""
        yield "NOT READ, and not in the figures above:"
        yield from _listed(run["problems"])


def _listed(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        yield from textwrap.wrap(line, _WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)


def _row(*cells: str) -> str:
    widths = (13, 17, 8, 13, 10, 9, 9, 13, 8, 14)
    first, second, *rest = cells
    numbers = "".join(f"{cell:>{width}}" for cell, width in zip(rest, widths[2:], strict=True))
    return f"{first:<{widths[0]}}{second[: widths[1]]:<{widths[1]}}{numbers}"[:114].rstrip()


def _figures(first: str, second: str, devices: str, account: Mapping[str, Any], key: str, paper: str) -> str:
    names = (key, "kwh", "kg_co2e", "usd", "images_per_second_per_device")
    return _row(first, second, devices, *(digits(account[each]) for each in names), percent(account["goodput"]), paper)


def _stage(stage: Mapping[str, Any], key: str) -> Iterator[str]:
    attempts: Sequence[Mapping[str, Any]] = stage["attempts"]
    paper = "" if stage["paper_v100_days"] is None else f"{stage['paper_v100_days']:,.0f}"
    if not attempts:
        yield _row(stage["stage"], "not started", "", "", "", "", "", "", "", paper)
        return
    if len(attempts) > _MOST_ATTEMPTS:
        yield _figures(stage["stage"], f"{len(attempts)} attempts", "", stage["account"], key, paper)
        return
    for number, attempt in enumerate(attempts):
        name, told = (stage["stage"], paper) if number == 0 else ("", "")
        yield _figures(
            name,
            f"{attempt['attempt']} {attempt['outcome']}",
            str(attempt["devices"]),
            attempt["account"],
            key,
            told,
        )


def _time(run: Mapping[str, Any]) -> Iterator[str]:
    """A line for each stage: which part of the device-time went where."""
    rows = [(stage["stage"], stage["account"]) for stage in run["stages"] if stage["attempts"]]
    if not rows:
        return
    yield "Where the device-time went:"
    yield f"  {'':<13}" + "".join(f"{name:>13}" for name in PARTS[:7]) + f"{PARTS[7]:>14}"
    for name, account in [*rows, ("together", run["account"])]:
        whole = account["device_seconds"] or 1.0
        cells = [percent(account["parts"][part] / whole) for part in PARTS]
        yield f"  {name:<13}" + "".join(f"{cell:>13}" for cell in cells[:7]) + f"{cells[7]:>14}"
    yield ""


def _summary(run: Mapping[str, Any]) -> Iterator[str]:
    account = run["account"]
    if run["wall_seconds"]:
        mfu = "" if account["mfu"] is None else f", MFU {percent(account['mfu'])}"
        waited = f"of which {duration(run['waited_seconds'])} without an allocation"
        yield f"From the first start to the last end {duration(run['wall_seconds'])}, {waited};"
        yield f"goodput {percent(account['goodput'])} of the device-time, ETTR {percent(run['ettr'])} of the time{mfu}"
    if account["a100_days"] is not None and account["device_days"] >= 1:
        yield f"A100-equivalent days {digits(account['a100_days'])} (by the stated conversion)"
    if account["images_gained"]:
        yield (
            f"A million images cost {digits(account['kwh_per_million_images'])} kWh, "
            f"{digits(account['kg_co2e_per_million_images'])} kg CO2e, ${digits(account['usd_per_million_images'])}"
        )
    if account["device_seconds"]:
        sources = ", ".join(f"{name} {percent(part)}" for name, part in account["energy_sources"].items())
        yield f"Energy was measured for {percent(account['energy_coverage'])} of the device-time ({sources})"
        yield from _listed(run["energy_notes"])
    if account["kg_co2e_embodied"]:
        yield f"Making the devices: {digits(account['kg_co2e_embodied'])} kg CO2e fall on this time, apart from the above"


def _forecast(run: Mapping[str, Any]) -> Iterator[str]:
    if (ahead := run["forecast"]) is None:
        return
    ends = datetime.datetime.fromtimestamp(ahead["ends"], datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    name, _, factor = unit(run["account"])
    yield ""
    left = digits(ahead["device_days_left"] * factor)
    yield f"To the chain's end: {left} {name} more, {duration(ahead['seconds_left'])}, about {ends};"
    yield (
        f"  then {digits(ahead['device_days_total'] * factor)} {name}, {digits(ahead['kwh_total'])} kWh, "
        f"{digits(ahead['kg_co2e_total'])} kg CO2e, ${digits(ahead['usd_total'])} in all"
    )
    yield from textwrap.wrap(f"({ahead['how']})", _WIDTH, initial_indent="  ", subsequent_indent="  ")


def budget_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each limit of a run's budget (`ledger.budget.rows`)."""
    for row in rows:
        part, ahead, said = row["part"], row["forecast"], ""
        if part is None:
            said = ": NOT KNOWN, and not watched"
        elif part >= 1:
            said = ": USED UP; no attempt begins before it is raised"
        elif part >= WARN_AT:
            said = ": NEARLY USED UP"
        if ahead is not None:
            said += f"; by the forecast {digits(ahead)} at the chain's end" + (
                ": TOO MUCH" if ahead > row["limit"] else ""
            )
        yield f"Budget {row['what']}: {digits(row['used'])} of {digits(row['limit'])} used, {percent(part)}{said}"


def _slurm(run: Mapping[str, Any]) -> Iterator[str]:
    if (found := run["slurm"]) is None:
        return
    yield ""
    yield (
        f"Slurm's account ({found['source']}): {found['gpu_seconds'] / 3600:,.2f} GPU-hours in {found['rows']} starts; "
        f"the ledger's of the same attempts: {found['ledger_seconds'] / 3600:,.2f} device-hours"
    )
    if found["running"]:
        yield f"  still running, counted up to now: {', '.join(found['running'])}"
    if found["without_gpus"]:
        yield f"  Slurm names no GPUs for {', '.join(found['without_gpus'])}: there the ledger counts"
    for row in found["unmatched"]:
        yield f"  job {row['job']} ({row['state']}): {row['gpu_seconds']:,} GPU-seconds without an attempt, unattributed above"
    if found["not_in_slurm"]:
        yield f"  not in Slurm's account, by the ledger alone: {', '.join(found['not_in_slurm'])}"


def _groups(values: Mapping[str, Any]) -> Iterator[str]:
    """Of one run: a line for its states, and one for its users."""
    name, key, _ = unit(values["account"])
    for title, groups in (("how attempts ended", values["by_state"]), ("user", values["by_user"])):
        told = ", ".join(f"{group} {digits(account[key])}" for group, account in groups.items())
        if told:
            yield from textwrap.wrap(f"{name} by {title}: {told}", _WIDTH, subsequent_indent="  ")


def _together(values: Mapping[str, Any]) -> Iterator[str]:
    name, key, _ = unit(values["account"])
    yield f"All {len(values['runs'])} runs together"
    yield ""
    yield _row("", "", "", name, "kWh", "kg CO2e", "$", "images/s/dev", "goodput", "")
    for title, groups in (("user", values["by_user"]), ("state", values["by_state"])):
        for group, account in groups.items():
            yield _figures(title, group, "", account, key, "")
    yield "-" * 110
    yield _figures("together", "", "", values["account"], key, "")


def _paper(paper: Mapping[str, Any]) -> Iterator[str]:
    ours = paper["models"]["PixArt-α"]
    stated, told = ours["stated"], paper["assumptions"]
    yield "The paper's own account of the full run (Tables 2 and 4); --paper shows what it rests on:"
    yield (
        f"  {ours['v100_gpu_days']:,.0f} V100-days, {stated['a100_gpu_days']:,.0f} A100-days, ${stated['usd']:,.0f}, "
        f"{stated['tco2e']:g} t CO2"
    )
    rivals = [f"{name} {model['a100_gpu_days']:,.0f}" for name, model in paper["models"].items() if name != "PixArt-α"]
    yield f"  A100-days of others, as it states them: {', '.join(rivals)}"
    yield f"  ({told['a100_days_per_v100_day']['source']})"
