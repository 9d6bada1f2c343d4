"""Asks Slurm for its account of a run's jobs, and keeps what it said: its database forgets, and not everybody may look."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator

from pixart_ds import files
from pixart_ds.errors import DataError, MachineError
from pixart_ds.layout import RunLayout
from pixart_ds.ledger.sacct import COLUMNS, DELIMITER, Allocation, from_json, to_json

_AT_ONCE = 200
"""Jobs that one command names: its line stays below 4 kB."""
_NUMBER = re.compile(r"\d+([_+]\d+)?")


def ask(jobs: Collection[str], patience_s: float = 60.0) -> str | None:
    """What Slurm has in its books of these jobs now, for `ledger.sacct.parse`; None where there is no sacct.

    Args:
        jobs: Numbers: 71, 71_3 of an array, 71+1 of a heterogeneous job; 71 stands for all of 71_… and 71+…, too. What is no number
            of Slurm's is passed over: sacct would refuse all of them. Jobs that Slurm does not know (any more) have no rows.

    Raises:
        MachineError: sacct refuses, or does not answer in `patience_s` seconds.
    """
    program = shutil.which("sacct")
    if program is None:
        return None
    numbers = sorted({job for job in jobs if _NUMBER.fullmatch(job)})
    end = time.monotonic() + patience_s
    header = DELIMITER.join(COLUMNS) + "\n"  # with no job at all it is the answer: sacct would take none for all
    return header + "".join(
        _answer(program, numbers[first : first + _AT_ONCE], end, patience_s)
        for first in range(0, len(numbers), _AT_ONCE)
    )


def _answer(program: str, jobs: list[str], end: float, patience_s: float) -> str:
    """Rows of some jobs, with a header, until the monotonic clock is at `end`."""
    # A start's own clock, and not the caller's zone. -S, since without it some releases show only today's.
    argv = [program, "-X", "-D", "-P", "--noconvert", "-S", "2020-01-01", f"--delimiter={DELIMITER}"]
    argv += [f"--format={','.join(COLUMNS)}", "-j", ",".join(jobs)]
    try:
        answer = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=max(0.1, end - time.monotonic()),
            start_new_session=True,  # a signal to the whole job does not cut it off
            env={**os.environ, "SLURM_TIME_FORMAT": "%s", "TZ": "UTC", "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as cause:
        raise _refused(f"no answer in {patience_s:.0f} s", program) from cause
    except OSError as cause:
        raise _refused(cause.strerror or str(cause), program) from cause
    if answer.returncode or DELIMITER.join(COLUMNS) not in answer.stdout:
        said = answer.stderr.strip() or answer.stdout.strip()[:400] or "nothing"
        raise _refused(f"{said} (exit code {answer.returncode})", program)
    return answer.stdout


def _refused(said: str, program: str) -> MachineError:
    return MachineError(
        f"sacct gives no account: {said}",
        where=program,
        remedy="try again when slurmdbd is up: sacctmgr show cluster; what was recorded before is in the run's sacct.jsonl",
    )


def record(run: RunLayout, allocations: Iterable[Allocation]) -> None:
    """Appends to RUN/sacct.jsonl what is new there, or has changed: nothing that Slurm once said is lost.

    Raises:
        OSError: The folder cannot be written. What was asked is still at hand: the caller can go on without the record.
        DataError: See `recorded`.
    """
    known = {each.key: each for each in recorded(run)}
    changed = [each for each in allocations if known.get(each.key) != each]
    if not changed:
        return
    _end_torn_line(run)
    for each in changed:
        files.append_json_line(run.sacct, to_json(each))


def recorded(run: RunLayout) -> list[Allocation]:
    """The starts that were ever recorded, as they were seen last; also those that Slurm has forgotten or shows to nobody any more.

    A line that a killed writer has left torn is passed over: its row is told again.

    Raises:
        OSError: The file cannot be read.
        DataError: A line is JSON, but no row.
    """
    return list({each.key: each for each in _lines(run)}.values())


def _lines(run: RunLayout) -> Iterator[Allocation]:
    for value in files.read_json_lines(run.sacct, torn_ok=True):
        try:
            yield from_json(value)
        except ValueError as cause:
            raise DataError(str(cause), where=run.sacct, remedy="take the line out") from cause


def _end_torn_line(run: RunLayout) -> None:
    """So that the next line is not glued to what a killed writer left."""
    if run.sacct.exists() and not run.sacct.read_bytes().endswith(b"\n"):
        with open(run.sacct, "ab") as file:
            file.write(b"\n")
