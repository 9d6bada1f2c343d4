"""Slurm's rows: a history that was measured, and every trap in them."""

from __future__ import annotations

import json

import pytest

from pixart_ds.errors import DataError
from pixart_ds.ledger.sacct import COLUMNS, DELIMITER, FIELDS, from_json, of_jobs, parse, summary, to_json

TRES = "billing=64,cpu=64,gres/gpu:v100=8,gres/gpu=8,mem=62.50G,node=1"


def row(
    job: str = "5", index: int = 1, state: str = "COMPLETED", seconds: int = 10, tres: str = TRES, **more: str
) -> str:
    values = {
        "JobIDRaw": job,
        "JobID": job,
        "DBIndex": str(index),
        "JobName": "pixart",
        "User": "someone",
        "State": state,
    }
    values |= {"Submit": "1000", "Start": "1001", "End": "2000", "ElapsedRaw": str(seconds), "AllocTRES": tres, **more}
    return "|".join(values[name] for name in FIELDS)


def dump(*rows: str) -> str:
    return "\n".join(["|".join(FIELDS), *rows]) + "\n"


def without(columns: set[str], *rows: str) -> str:
    """A dump that lacks some columns."""
    kept = [number for number, name in enumerate(FIELDS) if name not in columns]
    lines = [line.split("|") for line in dump(*rows).splitlines()]
    return "\n".join("|".join(cells[number] for number in kept) for cells in lines) + "\n"


def test_a_history_of_requeue_preemption_and_cancel_adds_up() -> None:
    """Measured on Slurm 22.05: one job of 8 GPUs requeued, preempted, cancelled, and the job that preempted it: 520 GPU-seconds."""
    text = dump(
        row("7", 11, "REQUEUED", 35),
        row("7", 12, "PREEMPTED", 16),
        row("7", 14, "CANCELLED by 0", 10),
        row("8", 13, "COMPLETED", 4),
    )
    found = summary(parse(text, "dump"))
    assert found["gpu_seconds"] == 520
    assert found["by_state"] == {"REQUEUED": 280, "PREEMPTED": 128, "CANCELLED": 80, "COMPLETED": 32}
    assert found["by_job"] == {"7": 488, "8": 32}
    assert (found["starts"], found["running"], found["without_gpus"]) == (4, [], [])


def test_a_row_that_was_read_before_is_replaced() -> None:
    """Requeueing a job that had completed turns its row into REQUEUED, some seconds longer."""
    first, second = row("7", 11, "COMPLETED", 30), row("7", 11, "REQUEUED", 32)
    assert summary(parse(dump(first, second), "dump"))["by_state"] == {"REQUEUED": 256}


def test_steps_and_typed_gpus_are_not_counted_twice() -> None:
    steps = [row("7.batch", 11), row("7.0", 11), row("7.extern", 11)]
    assert summary(parse(dump(row("7", 11), *steps), "dump"))["gpu_seconds"] == 80
    typed = row("7", 11, tres="cpu=4,gres/gpu:a100=4,gres/gpu:v100=2")
    assert summary(parse(dump(typed), "dump"))["gpu_seconds"] == 60


def test_the_parts_of_a_heterogeneous_job_all_count() -> None:
    """Measured on 22.05: each has a number of its own, and only JobID shows that they belong together; 3.0 and 4.0 are steps."""
    parts = [row("3", 6, JobID="3+0", tres="gres/gpu=4"), row("4", 7, JobID="3+1", tres="gres/gpu=2")]
    steps = [row("3.0", 6, JobID="3+0.0", tres="gres/gpu=4"), row("4.0", 7, JobID="3+1.0", tres="gres/gpu=2")]
    found = of_jobs(parse(dump(*parts, *steps, row("30", 8)), "dump"), ["3"])
    assert summary(found)["by_job"] == {"3+0": 40, "3+1": 20}
    assert summary(parse(without({"JobIDRaw"}, *parts, *steps), "dump"))["gpu_seconds"] == 60


def test_what_slurm_does_not_count_is_named_instead_of_taken_for_none() -> None:
    found = summary(parse(dump(row("7", 11, tres="cpu=64,mem=500G,node=8"), row("8", 12)), "dump"))
    assert (found["gpu_seconds"], found["without_gpus"]) == (80, ["7"])
    assert summary(parse(dump(row("7", 11, tres="")), "dump"))["without_gpus"] == ["7"], "it ran, and held something"


def test_running_pending_and_arrays() -> None:
    running = row("73", 21, "RUNNING", 42, End="Unknown", JobID="71_3")
    pending = row("74", 22, "PENDING", 0, tres="", Start="Unknown", End="Unknown")
    never = row("75", 23, "CANCELLED by 0", 0, tres="", Start="None")
    found = parse(dump(running, pending, never), "dump")
    assert [(each.job, each.start, each.end, each.running, each.gpus) for each in found.allocations] == [
        ("71_3", 1001, None, True, 8),
        ("74", None, None, False, 0),
        ("75", None, 2000, False, 0),
    ]
    assert summary(found)["gpu_seconds"] == 336
    assert summary(of_jobs(found, ["71"]))["running"] == ["71_3"]
    assert of_jobs(found, ["71_3"]) == of_jobs(found, ["73"]) == of_jobs(found, ["71"])


def test_a_suspended_job_still_runs_and_the_time_is_not_billed() -> None:
    """Measured on 22.05: 4 of 9 s suspended."""
    text = "\n".join(
        [
            "|".join(COLUMNS),
            row("5", 5, "CANCELLED by 0", 5, Start="1000", End="1009") + "|00:00:04",
            row("6", 6, "SUSPENDED", 7, Start="1000", End="Unknown") + "|1-00:00:01",
            "",
        ]
    )
    found = parse(text, "dump")
    assert [(each.seconds, each.suspended, each.running) for each in found.allocations] == [
        (5, 4, False),
        (7, 86401, True),
    ]
    assert summary(found)["suspended"] == ["5", "6"]
    derived = parse(dump(row("5", 5, "CANCELLED by 0", 5, Start="1000", End="1009")), "dump")
    assert derived.allocations[0].suspended == 4


def test_an_hour_that_is_there_twice_is_two_hours() -> None:
    """New York, 1 November 2026: 01:30 is 1793511000 and, an hour later, 1793514600."""
    rows = [
        row("7", 11, "REQUEUED", 60, Start="1793511000", End="1793511060"),
        row("7", 12, Start="1793514600", End="1793514660"),
    ]
    assert [each.start for each in parse(dump(*rows), "dump").allocations] == [1793511000, 1793514600]
    twice = [line.replace("1793511000", "2026-11-01T01:30:00") for line in rows]
    found = parse(dump(*twice), "dump")
    assert [each.start for each in found.allocations] == [None, 1793514600]
    assert len(found.problems) == 1


def test_dumps_may_stand_one_behind_the_other() -> None:
    first, second = dump(row("7", 11, "RUNNING", 30, End="Unknown")), dump(row("7", 11, "COMPLETED", 32), row("8", 12))
    found = summary(parse("\ufeff" + first + second, "dump"))
    assert (found["by_state"], found["running"], found["problems"]) == ({"COMPLETED": 336}, [], [])


def test_a_row_is_the_same_after_json() -> None:
    for each in parse(dump(row("7", 11), row("8", 12, "RUNNING", End="Unknown")), "dump").allocations:
        assert from_json(json.loads(json.dumps({**to_json(each), "of a later version": 1}))) == each
    for strange in ({}, {"key": ["7"]}, 7, None, {"key": ["7", "1"], "job": "7"}):
        with pytest.raises(ValueError, match="no allocation"):
            from_json(strange)


def test_other_columns_and_another_delimiter() -> None:
    names = ["Extra", *reversed(FIELDS)]
    line = DELIMITER.join(["x", *reversed(row("7", 11).split("|"))])
    assert summary(parse(f"{DELIMITER.join(names)}\n{line}\n", "dump"))["gpu_seconds"] == 80


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "sacct's columns JobIDRaw, JobID, "),
        ("JobID|State\n7|COMPLETED\n", "sacct's columns JobIDRaw, DBIndex, "),
        ("State|ElapsedRaw|AllocTRES\nCOMPLETED|5|gres/gpu=8\n", "sacct's columns JobIDRaw, JobID, DBIndex, "),
    ],
)
def test_what_cannot_be_added_up_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(text, "dump.txt")
    assert message in str(caught.value)
    assert "dump.txt" in str(caught.value)


@pytest.mark.parametrize("column", [name for name in FIELDS if name not in ("ElapsedRaw", "AllocTRES")])
def test_a_missing_column_is_named_and_the_sum_is_right(column: str) -> None:
    rows = [row("7", 11, "REQUEUED", 10, Start="1001"), row("7", 12, seconds=5, Start="1020"), row("8", 13, seconds=1)]
    found = summary(parse(without({column}, *rows), "dump"))
    assert (found["gpu_seconds"], found["starts"]) == (128, 3)
    assert len(found["problems"]) == 1
    assert found["problems"][0].startswith(f"there is no column {column}")


def test_without_the_gpus_no_start_is_taken_for_one_that_had_none() -> None:
    found = summary(parse(without({"AllocTRES"}, row("7", 11), row("8", 12)), "dump"))
    assert (found["gpu_seconds"], found["without_gpus"]) == (0, ["7", "8"])
    assert found["problems"] == ["there is no column AllocTRES: no start's GPUs are known, and the sum holds none"]


def test_without_keys_and_times_no_start_is_lost() -> None:
    text = without({"DBIndex", "Submit", "Start"}, row("7", 11, "REQUEUED"), row("7", 12))
    assert summary(parse(text, "dump"))["gpu_seconds"] == 160


@pytest.mark.parametrize("cut", [1, 5, 20, 60])
def test_a_line_that_is_cut_off_is_named_and_left_out(cut: int) -> None:
    """Also where a number is cut: of gres/gpu=16, gres/gpu=1 would be a wrong sum without a word."""
    found = summary(parse(dump(row("7", 11), row("8", 12))[: -1 - cut], "dump"))
    assert (found["gpu_seconds"], found["problems"]) == (80, ["line 3 is cut off"])


@pytest.mark.parametrize(
    ("bad", "counted", "problem"),
    [
        (
            row("8", 12, Start="2026-11-25T17:22:00"),
            80,
            "line 3: Start is '2026-11-25T17:22:00', a time of day without its zone",
        ),
        (row("8", 12, End="25.11.2026 17:22"), 80, "line 3: End is '25.11.2026 17:22', a time of day"),
        (row("8", 12, ElapsedRaw="00:10:00"), 0, "line 3: ElapsedRaw is '00:10:00', not seconds; it is left out"),
        (row("8", 12, ElapsedRaw="10,0"), 0, "line 3: ElapsedRaw is '10,0', not seconds"),
        (
            row("8", 12, AllocTRES="cpu=4,gres/gpu"),
            0,
            "line 3: AllocTRES is 'cpu=4,gres/gpu'; its GPUs are not counted",
        ),
        (row("8", 12, AllocTRES="gres/gpu=6+"), 0, "line 3: AllocTRES is 'gres/gpu=6+'"),
        (row("8", 12, AllocTRES="gres/gpu=1K"), 0, "line 3: AllocTRES is 'gres/gpu=1K'"),
        ("8|8|12", 0, "line 3: 3 of 11 columns; it is left out"),
        (row("8", 12, JobName="a|b"), 0, "line 3: 12 of 11 columns"),
        (row("", 12), 0, "line 3: the job's number is ''; it is left out"),
    ],
)
def test_what_cannot_be_read_is_named_and_the_rest_is_reported(bad: str, counted: int, problem: str) -> None:
    found = summary(parse(dump(row("7", 11), bad, row("9", 13)), "dump"))
    assert found["gpu_seconds"] == 160 + counted
    assert len(found["problems"]) == 1
    assert found["problems"][0].startswith(problem)


@pytest.mark.parametrize("memory", ["62.50G", "62,50G", "4000M", "500G", "64000"])
def test_a_decimal_comma_is_no_end_of_a_part(memory: str) -> None:
    found = parse(dump(row("7", 11, tres=f"cpu=4,energy=8?,mem={memory},gres/gpu=8,node=1")), "dump")
    assert (summary(found)["gpu_seconds"], found.problems) == (80, ())
