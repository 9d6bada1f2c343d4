"""Slurm's own account of a run's jobs: rows of `sacct -X -D`, each start of a job once; pure.

A job that was requeued or preempted has a row for each start, which only `-D` shows; job steps count the same GPUs again, which
`-X` leaves out. A row may change after it was closed, so rows are kept by their key, and the last one counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from pixart_ds.errors import DataError

FIELDS = (
    "JobIDRaw",
    "JobID",
    "DBIndex",
    "JobName",
    "User",
    "State",
    "Submit",
    "Start",
    "End",
    "ElapsedRaw",
    "AllocTRES",
)
DELIMITER = "\x1f"
COMMAND = f"SLURM_TIME_FORMAT=%s sacct -X -D -P --noconvert -S 2020-01-01 -j JOBS --format={','.join(FIELDS)}"
"""What makes a dump that can be read, with `|` between its columns."""

_NOT_YET = ("", "None", "Unknown", "N/A")


@dataclass(frozen=True)
class Allocation:
    """One start of a job.

    Attributes:
        key: JobIDRaw and DBIndex.
        job: As people write it: 71, or 71_3 of an array.
        name, user: Of the job.
        state: Without what sacct adds to it: CANCELLED, not `CANCELLED by 0`.
        start: Unix seconds; None if it never ran, or Slurm's database never heard of it.
        seconds: That it held its nodes, as sites bill them; of a running job up to now.
        gpus: That it held; None where Slurm does not count them (AccountingStorageTRES without gres/gpu).
        running: Whether it still runs.
    """

    key: tuple[str, str]
    job: str
    name: str
    user: str
    state: str
    start: int | None
    seconds: int
    gpus: int | None
    running: bool

    @property
    def gpu_seconds(self) -> int:
        return self.seconds * (self.gpus or 0)


@dataclass(frozen=True)
class Dump:
    """What could be read, and in words what could not."""

    allocations: tuple[Allocation, ...]
    problems: tuple[str, ...]


def parse(text: str, where: object) -> Dump:
    """The allocations of a dump with its header, one for each key; the last row of a key counts.

    Args:
        text: What `COMMAND` printed; the columns may stand in any sequence, and further ones are passed over.
        where: The file or command, for errors.

    Raises:
        DataError: Columns are missing: then nothing can be read.
    """
    lines = text.split("\n")
    delimiter = DELIMITER if DELIMITER in lines[0] else "|"
    header = [name.strip() for name in lines[0].split(delimiter)]
    missing = [name for name in FIELDS if name not in header]
    if missing:
        raise DataError(
            f"sacct's columns {', '.join(missing)} are missing", where=where, remedy=f"make it with: {COMMAND}"
        )
    problems: list[str] = []
    if lines[-1] != "" and len(lines) > 1:
        problems.append(f"line {len(lines)} is cut off")
    found: dict[tuple[str, str], Allocation] = {}
    for number, line in enumerate(lines[1:-1], start=2):
        if not line.strip():
            continue
        cells = line.split(delimiter)
        row = dict(zip(header, cells, strict=False))
        if (problem := _problem(row, len(cells), len(header))) is not None:
            problems.append(f"line {number}: {problem}")
        elif not re.search(r"[.+]", row["JobIDRaw"]):  # else a step: its GPUs are the job's
            allocation = _allocation(row)
            found[allocation.key] = allocation
    return Dump(tuple(found.values()), tuple(problems))


def _problem(row: dict[str, str], cells: int, columns: int) -> str | None:
    if cells < columns:
        return f"{cells} of {columns} columns"
    start = row["Start"].strip()
    if start not in _NOT_YET and not start.isdigit():
        return f"Start is {start!r}, a time of day without its zone; dump it with SLURM_TIME_FORMAT=%s"
    if not row["ElapsedRaw"].strip().isdigit():
        return f"ElapsedRaw is {row['ElapsedRaw']!r}, not seconds"
    if not re.fullmatch(r"([^,=]+=[^,=]+(,[^,=]+=[^,=]+)*)?", row["AllocTRES"].strip()):
        return f"AllocTRES is {row['AllocTRES']!r}"
    return None


def _allocation(row: dict[str, str]) -> Allocation:
    start = row["Start"].strip()
    return Allocation(
        key=(row["JobIDRaw"], row["DBIndex"]),
        job=row["JobID"],
        name=row["JobName"],
        user=row["User"],
        state=row["State"].split(" ")[0],
        start=None if start in _NOT_YET else int(start),
        seconds=int(row["ElapsedRaw"]),
        gpus=_gpus(row["AllocTRES"]),
        running=row["State"].startswith("RUNNING"),
    )


def _gpus(tres: str) -> int | None:
    """GPUs of `billing=64,gres/gpu:v100=8,gres/gpu=8,node=1`: the typed ones are the same GPUs as the untyped."""
    values = dict(part.split("=", 1) for part in tres.split(",") if "=" in part)
    if "gres/gpu" in values:
        return int(values["gres/gpu"])
    typed = [int(count) for name, count in values.items() if name.startswith("gres/gpu:")]
    if typed:
        return sum(typed)
    return None if values else 0


def of_jobs(dump: Dump, jobs: Collection[str]) -> Dump:
    """Only the allocations of these jobs; an array's number stands for all its tasks."""
    own = tuple(each for each in dump.allocations if each.job in jobs or each.job.split("_")[0] in jobs)
    return Dump(own, dump.problems)


def summary(dump: Dump) -> dict[str, Any]:
    """GPU-seconds together, by state, by user and by job; and what they do not hold."""
    allocations = dump.allocations
    return {
        "gpu_seconds": sum(each.gpu_seconds for each in allocations),
        "by_state": _sums((each.state, each.gpu_seconds) for each in allocations),
        "by_user": _sums((each.user, each.gpu_seconds) for each in allocations),
        "by_job": _sums((each.job, each.gpu_seconds) for each in allocations),
        "starts": len(allocations),
        "running": sorted({each.job for each in allocations if each.running}),
        "without_gpus": sorted({each.job for each in allocations if each.gpus is None}),
        "problems": list(dump.problems),
    }


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for name, seconds in pairs:
        sums[name] += seconds
    return dict(sums)
