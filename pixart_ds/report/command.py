"""The command line of the cost report: `pixart-ds cost`, and tools/cost_report.py, which needs no installation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.config.profile import load_profile
from pixart_ds.errors import EXIT_DONE, ConfigError, DataError, MachineError, PixArtError
from pixart_ds.layout import RunLayout
from pixart_ds.ledger import sacct
from pixart_ds.ledger.book import Book, read_book
from pixart_ds.ledger.paper import paper_account, paper_page
from pixart_ds.meters import sacct as slurm
from pixart_ds.report import tables, text
from pixart_ds.report.build import SlurmRows, build
from pixart_ds.report.curves import curves_of
from pixart_ds.report.html import html_page
from pixart_ds.report.options import RATES, add_arguments
from pixart_ds.report.pictures import pictures_of


def run(options: argparse.Namespace) -> int:
    """Prints or writes the report.

    Raises:
        PixArtError: There is no run, an option is wrong, a dump cannot be read.
    """
    if bool(options.runs) == options.paper:
        raise ConfigError("give either folders of runs or --paper", remedy="see --help")
    if options.paper:
        account = paper_account()
        if options.format not in ("text", "json"):
            raise ConfigError(f"--paper has no format {options.format}", remedy="choose text or json")
        shown = paper_page(account) if options.format == "text" else json.dumps(account, indent=2, ensure_ascii=False)
    else:
        shown = render(options.runs, options.format, _choices(options), _rows(options))
    if options.out is None:
        print(shown.rstrip("\n"))
    else:
        files.write_text(options.out, shown.rstrip("\n") + "\n")
    return EXIT_DONE


_HASTE_S = 10.0
_MANY = 1000


def render(
    runs: Sequence[Path], form: str, choices: Mapping[str, Any], rows: Mapping[Path, SlurmRows] | None = None
) -> str:
    """The report in a format.

    Args:
        runs: Folders.
        form: One of `FORMATS`.
        choices: Values for `RATES`; None leaves one open.
        rows: Slurm's account of runs.
    """
    values = build(runs, choices, rows)
    if form == "json":  # nobody reads thousands of attempts, and json indents slowly
        many = sum(len(stage["attempts"]) for run in values["runs"] for stage in run["stages"]) > _MANY
        return json.dumps(values, indent=None if many else 2, ensure_ascii=False)
    if form == "csv":
        return tables.to_csv(values)
    if form == "md":
        return tables.to_markdown(values)
    if form == "html":
        layouts = {str(each): RunLayout(each) for each in runs}
        curves = {name: curves_of(layout) for name, layout in layouts.items()}
        return html_page(values, curves, {name: pictures_of(layout) for name, layout in layouts.items()})
    return text.page(values)


def write_page(run_folder: Path) -> None:
    """Writes RUN/report.html anew, by the ledger and what Slurm says now.

    Raises:
        PixArtError, OSError: It cannot be made; the old one stays.
    """
    run_layout = RunLayout(run_folder)
    found = ask_slurm(run_layout, _HASTE_S)  # the job holds its nodes meanwhile
    rows = {run_folder: found} if found else None
    files.write_text(run_layout.report, render([run_folder], "html", {}, rows))


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    """The rates that were asked for: of the profile, and before it of single options."""
    site = {} if options.profile is None else load_profile(options.profile).site()
    return {"gpu": site.get("gpu")} | {
        name: own if (own := getattr(options, name)) is not None else site.get(name) for name in RATES
    }


def _rows(options: argparse.Namespace) -> dict[Path, SlurmRows]:
    """Slurm's account of the runs that had jobs."""
    if options.no_sacct:
        return {}
    if options.sacct is not None:
        return _dumped(options.runs, options.sacct)
    found = {each: ask_slurm(RunLayout(each)) for each in options.runs}
    return {each: rows for each, rows in found.items() if rows is not None}


def _dumped(runs: Sequence[Path], path: Path) -> dict[Path, SlurmRows]:
    """The rows of a dump that are of the runs' jobs; those of other jobs are left out."""
    try:
        dump = sacct.parse(path.read_text(encoding="utf-8", errors="replace"), path)
    except OSError as cause:
        raise DataError(f"the dump cannot be read: {cause.strerror}", where=path, remedy=sacct.COMMAND) from cause
    found: dict[Path, SlurmRows] = {}
    asked: set[str] = set()
    for each in runs:
        jobs = jobs_of(RunLayout(each), read_book(each))
        own = sacct.of_jobs(dump, jobs)
        asked |= jobs
        if own.allocations:
            found[each] = SlurmRows(own.allocations, str(path), own.problems)
    if not found:
        raise DataError(
            f"the dump holds none of the runs' jobs ({', '.join(sorted(asked)) or 'they have none'})",
            where=path,
            remedy=sacct.COMMAND.replace("JOBS", ",".join(sorted(asked)) or "JOBS"),
        )
    return found


def ask_slurm(layout: RunLayout, patience_s: float = 60.0) -> SlurmRows | None:
    """What Slurm says of a run's jobs, beside what it said before; None for a run without jobs."""
    jobs = jobs_of(layout, read_book(layout.root))
    if not jobs:
        return None
    problems: list[str] = []
    answered: Sequence[sacct.Allocation] = ()
    source = "as recorded before; there is no sacct here"
    try:
        if (answer := slurm.ask(jobs, patience_s)) is not None:
            dump = sacct.of_jobs(sacct.parse(answer, "sacct"), jobs)
            problems += dump.problems
            answered = dump.allocations
            source = "asked now"
            slurm.record(layout, dump.allocations)
    except MachineError as error:
        problems.append(error.what)
        source = "as recorded before; it gave no answer"
    except OSError as error:
        problems.append(f"Slurm's rows cannot be recorded: {error.strerror}")
    known = {row.key: row for row in (*slurm.recorded(layout), *answered)}
    rows = list(known.values())
    return SlurmRows(rows, source, problems) if rows or problems else None


def jobs_of(layout: RunLayout, book: Book) -> set[str]:
    """The run's jobs: those in which its attempts ran, and those that were submitted for it."""
    jobs = {entry.job for entries in book.stages.values() for entry in entries if entry.job is not None}
    for stage in book.stages:
        folder = layout.stage(stage).submissions
        if folder.is_dir():
            jobs |= {path.stem for path in folder.iterdir() if path.stem.isdigit()}
    return jobs


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of tools/cost_report.py."""
    parser = argparse.ArgumentParser(
        prog="cost_report.py", description="What runs cost: device-days, energy, CO2e, money.", allow_abbrev=False
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except PixArtError as error:
        print(f"cost_report.py: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
