"""Slurm's own account of a run's jobs: rows of `sacct -X -D`, each start of a job once; pure.

A job that was requeued or preempted has a row for each start, which only `-D` shows; job steps count the same GPUs again, which
`-X` leaves out. A row may change after it was closed, so rows are kept by their key, and the last one counts.
Requeueing a job that had ended changes its row most: the state becomes REQUEUED and the end the moment of the requeue, as if it had
held its nodes until then (measured on 22.05: 13 s of a job that ran for 1 s). It is counted as Slurm has it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields
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
COLUMNS = (*FIELDS, "Suspended")
COMMAND = f"SLURM_TIME_FORMAT=%s sacct -X -D -P --noconvert -S 2020-01-01 -j JOBS --format={','.join(COLUMNS)}"
"""What makes a dump that can be read, with `|` between its columns."""

_NOT_YET = ("", "None", "Unknown", "N/A")
_TRES = r"[^,=]+=\d+(?:[.,]\d+)?[A-Za-z]*\??"
"""gres/gpu=8, mem=62.50G without --noconvert, mem=62,50G where the comma is decimal, energy=8? of a sensor that knows no better."""


@dataclass(frozen=True)
class Allocation:
    """One start of a job.

    Attributes:
        key: JobIDRaw and DBIndex. A component of a heterogeneous job has a JobIDRaw of its own.
        job: As people write it: 71, or 71_3 of an array, or 71+1 of a heterogeneous job.
        name, user: Of the job.
        state: Without what sacct adds to it: CANCELLED, not `CANCELLED by 0`.
        start: Unix seconds; None if it never ran, or Slurm's database never heard of it, or the dump does not say.
        seconds: That it held its nodes, as sites bill them; of a running job up to now.
        gpus: That it held; None where Slurm does not count them (AccountingStorageTRES without gres/gpu).
        running: Whether it still runs.
        end: Unix seconds; None while it runs, if it never ran, or the dump does not say.
        suspended: Seconds that `scontrol suspend` took from it. `seconds` does not hold them: a job that was suspended for 4 s of
            its 9 has ElapsedRaw 5 and Suspended 00:00:04 (measured on 22.05).
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
    end: int | None = None
    suspended: int = 0

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

    A row whose seconds cannot be read is left out. One whose GPUs or times cannot be read is there without them. Both are named in
    the problems, as is every column that is missing.

    Args:
        text: What `COMMAND` printed; the columns may stand in any sequence, further ones are passed over, and several dumps with
            the same columns may stand one behind the other.
        where: The file or command, for errors.

    Raises:
        DataError: There is no ElapsedRaw, or no number of the job: then nothing can be added up.
    """
    lines = text.removeprefix("\ufeff").split("\n")
    delimiter = DELIMITER if DELIMITER in lines[0] else "|"
    header = [name.strip() for name in lines[0].split(delimiter)]
    missing = [name for name in FIELDS if name not in header]
    if "ElapsedRaw" in missing or ("JobIDRaw" in missing and "JobID" in missing):
        raise DataError(
            f"sacct's columns {', '.join(missing)} are missing", where=where, remedy=f"make it with: {COMMAND}"
        )
    problems = [f"there is no column {name}{_WITHOUT.get(name, '')}" for name in missing]
    if lines[-1] != "" and len(lines) > 1:
        problems.append(f"line {len(lines)} is cut off")
    found: dict[tuple[str, str], Allocation] = {}
    for number, line in enumerate(lines[1:-1], start=2):
        cells = [cell.strip() for cell in line.split(delimiter)]
        if not line.strip() or cells == header:
            continue
        if len(cells) != len(
            header
        ):  # fewer: cut off; more: a job's name holds the delimiter, and what follows is shifted
            problems.append(f"line {number}: {len(cells)} of {len(header)} columns; it is left out")
            continue
        allocation, doubts = _row(dict(zip(header, cells, strict=True)), number)
        problems += [f"line {number}: {doubt}" for doubt in doubts]
        if allocation is not None:
            found[allocation.key] = allocation
    return Dump(tuple(found.values()), tuple(problems))


_WITHOUT = {
    "AllocTRES": ": no start's GPUs are known, and the sum holds none",
    "DBIndex": ": a job's starts are told apart by their times",
}


def _row(row: dict[str, str], number: int) -> tuple[Allocation | None, list[str]]:
    """A row's allocation, if it is one and can be counted; and what could not be read of it."""
    raw = row.get("JobIDRaw", row.get("JobID", ""))
    if re.fullmatch(r"\d+([_+][^.]*)?\..*", raw):  # a step, 71.batch or 71.0: its GPUs are the job's
        return None, []
    if not re.fullmatch(
        r"\d+([_+][^.]*)?", raw
    ):  # 71+1 is no step, but a part of a heterogeneous job, with GPUs of its own
        return None, [f"the job's number is {raw!r}; it is left out"]
    if not row["ElapsedRaw"].isdecimal():
        return None, [f"ElapsedRaw is {row['ElapsedRaw']!r}, not seconds; it is left out"]
    seconds, doubts = int(row["ElapsedRaw"]), []
    gpus: int | None = None
    if "AllocTRES" in row:
        try:
            gpus = _gpus(row["AllocTRES"], seconds)
        except ValueError:
            doubts.append(f"AllocTRES is {row['AllocTRES']!r}; its GPUs are not counted")
    start, end = _time(row, "Start", doubts), _time(row, "End", doubts)
    state = (row.get("State") or "unknown").split(" ")[0]
    began = row.get("Start", "") not in _NOT_YET
    running = state == "RUNNING" or (began and "End" in row and row["End"] in _NOT_YET)  # also SUSPENDED
    times = f"{row.get('Submit', '')}/{row.get('Start', '')}"
    return Allocation(
        key=(raw, row.get("DBIndex") or (times if times != "/" else f"line {number}")),
        job=row.get("JobID") or raw,
        name=row.get("JobName", ""),
        user=row.get("User") or "unknown",
        state=state,
        start=start,
        seconds=seconds,
        gpus=gpus,
        running=running,
        end=None if running else end,
        suspended=_suspended(row, start, end, seconds),
    ), doubts


def _time(row: dict[str, str], name: str, doubts: list[str]) -> int | None:
    """Unix seconds. A time of day is in the zone of whoever made the dump, and an hour a year is there twice."""
    text = row.get(name, "")
    if text in _NOT_YET:
        return None
    if text.isdecimal():
        return int(text)
    doubts.append(f"{name} is {text!r}, a time of day without its zone; dump it with SLURM_TIME_FORMAT=%s")
    return None


def _suspended(row: dict[str, str], start: int | None, end: int | None, seconds: int) -> int:
    """Seconds of `1-02:03:04`; without the column what is missing between start and end."""
    if found := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", row.get("Suspended", "")):
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + rest
    return max(0, end - start - seconds) if start is not None and end is not None else 0


def _gpus(tres: str, seconds: int) -> int | None:
    """GPUs of `billing=64,gres/gpu:v100=8,gres/gpu=8,node=1`: the typed ones are the same GPUs as the untyped.

    Raises:
        ValueError: It is something else, or cut off.
    """
    if not re.fullmatch(f"({_TRES}(,{_TRES})*)?", tres):
        raise ValueError(tres)
    values = dict(part.split("=", 1) for part in re.split(r",(?=[^,=]+=)", tres) if part)
    if "gres/gpu" in values:
        return int(values["gres/gpu"])
    typed = [int(count) for name, count in values.items() if name.startswith("gres/gpu:")]
    if typed:
        return sum(typed)
    return None if values or seconds else 0  # what never ran holds nothing; what ran held something


def to_json(allocation: Allocation) -> dict[str, Any]:
    """For a line of a file."""
    return asdict(allocation)


def from_json(value: Any) -> Allocation:
    """What `to_json` gave; what a later version has added is passed over.

    Raises:
        ValueError: It is something else.
    """
    try:
        known = {each.name: value[each.name] for each in fields(Allocation) if each.name in value}
        job, index = known["key"]
        return Allocation(**known | {"key": (str(job), str(index))})
    except (TypeError, KeyError, ValueError) as cause:
        raise ValueError(f"no allocation: {str(value)[:80]}") from cause


def of_jobs(dump: Dump, jobs: Collection[str]) -> Dump:
    """Only the allocations of these jobs; an array's number stands for all its tasks, a heterogeneous job's for all its parts."""
    own = tuple(
        each
        for each in dump.allocations
        if each.job in jobs or each.key[0] in jobs or re.split(r"[_+]", each.job)[0] in jobs
    )
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
        "suspended": sorted({each.job for each in allocations if each.suspended}),
        "without_gpus": sorted({each.job for each in allocations if each.gpus is None}),
        "problems": list(dump.problems),
    }


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for name, seconds in pairs:
        sums[name] += seconds
    return dict(sums)
