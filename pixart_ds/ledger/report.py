"""The cost report of a run: one page for people, or JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.errors import EXIT_DONE, DataError, PixArtError
from pixart_ds.layout import RunLayout
from pixart_ds.ledger import sacct
from pixart_ds.ledger.accounting import a100_days, account
from pixart_ds.ledger.book import read_book
from pixart_ds.ledger.paper import paper_account, paper_page
from pixart_ds.rates import Assumptions, assume, rate_table


def report(run: Path, **choices: Any) -> dict[str, Any]:
    """The report as JSON.

    Args:
        run: Folder of the run.
        choices: As for `rates.assume`.

    Raises:
        DataError: There is no run.
        ConfigError: A choice is not in the table.
    """
    book = read_book(run)
    entries = [entry for stage in book.values() for entry in stage]
    kinds = sorted({entry.device for entry in entries}) or ["cuda"]
    assumptions = {kind: assume(kind, **choices) for kind in kinds}
    stages = [
        {
            "stage": stage,
            **account(of_stage, assumptions).to_json(),
            "paper_v100_days": rate_table().paper.gpu_days.get(stage),
            "attempts": [
                {
                    "attempt": entry.attempt,
                    "launch": entry.launch,
                    "outcome": "lost" if entry.outcome == "running" else entry.outcome,
                    "devices": entry.device_count,
                    **account([entry], assumptions).to_json(),
                }
                for entry in of_stage
            ],
        }
        for stage, of_stage in book.items()
    ]
    paper = rate_table().paper
    ratio = rate_table().a100_days_per_v100_day
    return {
        "run": str(run),
        "stages": stages,
        "total": account(entries, assumptions).to_json(),
        "source": "estimate",
        "assumptions": {kind: values.model_dump() for kind, values in assumptions.items()},
        "paper": {
            "v100_days": sum(paper.gpu_days.values()),
            "a100_days": paper.a100_days,
            "a100_days_by_ratio": a100_days(sum(paper.gpu_days.values()), ratio.value),
            "ratio_source": ratio.source,
            "dollars": paper.dollars,
            "tonnes_co2": paper.tonnes_co2,
            "co2_note": paper.co2_note,
        },
    }


def slurm_account(run: Path, dump: Path) -> dict[str, Any]:
    """GPU-seconds of the run's jobs as Slurm has them, from a dump; jobs of other runs in it are left out.

    Raises:
        DataError: The dump cannot be read, or holds none of the run's jobs.
    """
    stages = [RunLayout(run).stage(name) for name in files.read_json(RunLayout(run).manifest)["stages"]]
    attempts = [attempt for stage in stages for attempt in stage.all_attempts() if attempt.env.exists()]
    jobs = {str(files.read_json(attempt.env).get("job")) for attempt in attempts} - {"None"}
    try:
        text = dump.read_text(encoding="utf-8", errors="replace")
    except OSError as cause:
        raise DataError(f"the dump cannot be read: {cause.strerror}", where=dump, remedy=sacct.COMMAND) from cause
    found = sacct.of_jobs(sacct.parse(text, dump), jobs)
    if not found.allocations:
        raise DataError(
            f"the dump holds none of the run's jobs ({', '.join(sorted(jobs)) or 'it has none'})",
            where=dump,
            remedy=sacct.COMMAND.replace("JOBS", ",".join(sorted(jobs)) or "JOBS"),
        )
    return sacct.summary(found)


def page(values: dict[str, Any]) -> str:
    """The report for people, at most 110 columns."""
    lines = [
        f"Cost of {values['run']}",
        "",
        f"{'stage':<13}{'attempt':<17}{'devices':>8}{'device-hours':>14}{'kWh':>10}{'kg CO2e':>10}{'$':>9}{'images/s':>10}"
        f"{'paper, V100-days':>18}",
    ]
    for stage in values["stages"]:
        for number, attempt in enumerate(stage["attempts"]):
            name = stage["stage"] if number == 0 else ""
            paper = _days(stage["paper_v100_days"]) if number == 0 else ""
            lines.append(
                _line(name, f"{attempt['attempt']} {attempt['outcome']}", str(attempt["devices"]), attempt, paper)
            )
        if not stage["attempts"]:
            lines.append(f"{stage['stage']:<13}{'not started':<17}{'':>61}{_days(stage['paper_v100_days']):>18}")
    lines += [
        "-" * 109,
        _line("together", "", "", values["total"], _days(values["paper"]["v100_days"])),
        "",
        "Assumptions:",
    ]
    for kind in values["assumptions"].values():
        lines += [f"  - {line}" for line in Assumptions.model_validate(kind).lines()]
    lines.append(f"  - figures are estimates from wall time, source: {values['source']}")
    lines += _slurm_lines(values["slurm"]) if "slurm" in values else []
    paper = values["paper"]
    lines += [
        "",
        "The paper's own account of the full run (Tables 2 and 4):",
        f"  {paper['v100_days']:.0f} V100-days, {paper['a100_days']:.0f} A100-days ({paper['ratio_source']}),",
        f"  ${paper['dollars']:,.0f}, {paper['tonnes_co2']:g} t CO2;",
        f"  {paper['co2_note']}",
    ]
    return "\n".join(lines)


def _slurm_lines(found: dict[str, Any]) -> list[str]:
    states = ", ".join(f"{state} {seconds / 3600:,.2f}" for state, seconds in found["by_state"].items())
    lines = [
        "",
        f"Slurm's account: {found['gpu_seconds'] / 3600:,.2f} GPU-hours in {found['starts']} starts ({states})",
    ]
    if found["running"]:
        lines.append(f"  still running: {', '.join(found['running'])}")
    if found["without_gpus"]:
        lines.append(f"  not counted, since Slurm names no GPUs: {', '.join(found['without_gpus'])}")
    return [*lines, *(f"  not read: {problem}" for problem in found["problems"])]


def _line(stage: str, attempt: str, devices: str, values: dict[str, Any], paper: str) -> str:
    figures = "".join(
        f"{_digits(values[name]):>{width}}"
        for name, width in (
            ("device_hours", 14),
            ("kwh", 10),
            ("kg_co2e", 10),
            ("dollars", 9),
            ("images_per_second", 10),
        )
    )
    return f"{stage:<13}{attempt:<17}{devices:>8}{figures}{paper:>18}"


def _days(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _digits(value: float) -> str:
    """Three significant digits without an exponent: 0.00123, 12.3, 1,234."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 6)}f}"


def main(argv: list[str] | None = None) -> int:
    """The command line of tools/cost_report.py."""
    parser = argparse.ArgumentParser(prog="cost_report.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, nargs="?", help="folder of the run")
    parser.add_argument("--paper", action="store_true", help="the paper's own account and its rivals', from its tables")
    parser.add_argument("--sacct", type=Path, metavar="FILE", help=f"hold Slurm's account beside: {sacct.COMMAND}")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--device", help="kind of device: v100-sxm2, a100-80gb, …")
    parser.add_argument("--country", help="whose electricity: ISO code of three letters, or WORLD")
    parser.add_argument("--pue", type=float, help="power usage effectiveness of the site")
    parser.add_argument("--price", type=float, dest="price_per_hour", help="dollars for a device-hour")
    parser.add_argument("--watts", type=float, help="watts for a device, node share included")
    options = parser.parse_args(argv)
    if (options.run is None) != options.paper:
        parser.error("give either the folder of a run or --paper")
    if options.paper:
        account_of = paper_account()
        print(
            json.dumps(account_of, indent=2, ensure_ascii=False) if options.format == "json" else paper_page(account_of)
        )
        return EXIT_DONE
    choices = {name: getattr(options, name) for name in ("device", "country", "pue", "price_per_hour", "watts")}
    try:
        values = report(options.run, **choices)
        if options.sacct is not None:
            values["slurm"] = slurm_account(options.run, options.sacct)
    except PixArtError as error:
        print(f"cost_report.py: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(values, indent=2) if options.format == "json" else page(values))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
