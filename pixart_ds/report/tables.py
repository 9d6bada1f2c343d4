"""The cost report as tables: CSV with a row for each attempt, Markdown with the stages."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from pixart_ds.ledger.entries import PARTS
from pixart_ds.page.words import digits, percent
from pixart_ds.report.words import unit

_ABOUT = (
    "attempt",
    "job",
    "user",
    "outcome",
    "cause",
    "started",
    "ended",
    "waited_s",
    "devices",
    "device",
    "device_model",
)
_FIGURES = (
    "device_seconds",
    "v100_days",
    "a100_days",
    "kwh",
    "kwh_measured",
    "kg_co2e",
    "kg_co2e_embodied",
    "usd",
    "images",
    "images_gained",
    "flops",
    "goodput",
    "mfu",
    "images_per_second_per_device",
    "usd_per_million_images",
)


def to_csv(values: Mapping[str, Any]) -> str:
    """A row for each attempt, and for each start of a job in which none began; times in Unix seconds, parts in device-seconds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "stage", *_ABOUT, *_FIGURES, *(f"{part}_s" for part in PARTS)])
    for run in values["runs"]:
        for stage in run["stages"]:
            for attempt in stage["attempts"]:
                account = attempt["account"]
                about = [attempt[name] for name in _ABOUT]
                figures = [account[name] for name in _FIGURES]
                writer.writerow([run["run"], stage["stage"], *about, *figures, *(account["parts"][p] for p in PARTS)])
        for row in (run["slurm"] or {}).get("unmatched", ()):
            alone = {"job": row["job"], "user": row["user"], "outcome": "no attempt", "cause": row["state"]}
            seconds = {"device_seconds": row["gpu_seconds"]}
            cells = [*(alone.get(name) for name in _ABOUT), *(seconds.get(name) for name in _FIGURES)]
            parts = [row["gpu_seconds"] if part == "unattributed" else 0 for part in PARTS]
            writer.writerow([run["run"], "", *cells, *parts])
    return out.getvalue()


def to_markdown(values: Mapping[str, Any]) -> str:
    """Tables of stages, of states and users, and the assumptions; to be pasted into a report."""
    return "\n".join(_markdown(values))


def _markdown(values: Mapping[str, Any]) -> Iterator[str]:
    name, key, _ = unit(values["account"])
    columns = [name, "kWh", "kg CO2e", "$", "goodput", "images/s/device"]
    for run in values["runs"]:
        yield f"## Cost of {_cell(run['name'])}"
        yield ""
        yield from _head(["stage", "state", "attempts", *columns, "paper, V100-days"])
        for stage in run["stages"]:
            paper = digits(stage["paper_v100_days"])
            about = [stage["stage"], stage["state"], str(len(stage["attempts"]))]
            yield _line([*about, *_figures(stage["account"], key), paper])
        yield _line(["together", "", "", *_figures(run["account"], key), ""])
        yield ""
        for problem in run["problems"]:
            yield f"- not read: {problem}"
    for title, groups in (("state", values["by_state"]), ("user", values["by_user"])):
        yield ""
        yield from _head([title, *columns])
        for group, account in groups.items():
            yield _line([group, *_figures(account, key)])
    yield ""
    yield "Assumptions:"
    yield ""
    yield from (f"- {line}" for line in values["assumptions"]["lines"])


def _figures(account: Mapping[str, Any], key: str) -> list[str]:
    numbers = [digits(account[name]) for name in (key, "kwh", "kg_co2e", "usd")]
    return [*numbers, percent(account["goodput"]), digits(account["images_per_second_per_device"])]


def _head(names: list[str]) -> Iterator[str]:
    yield _line(names)
    yield "|" + "---|" * len(names)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
