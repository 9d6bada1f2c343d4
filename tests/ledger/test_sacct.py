"""Slurm's rows: a history that was measured, and every trap in them."""

from __future__ import annotations

import pytest

from pixart_ds.errors import DataError
from pixart_ds.ledger.sacct import DELIMITER, FIELDS, parse, summary

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
    steps = [row("7.batch", 11), row("7.0", 11), row("7.extern", 11), row("9+0", 12)]
    assert summary(parse(dump(row("7", 11), *steps), "dump"))["gpu_seconds"] == 80
    typed = row("7", 11, tres="cpu=4,gres/gpu:a100=4,gres/gpu:v100=2")
    assert summary(parse(dump(typed), "dump"))["gpu_seconds"] == 60


def test_what_slurm_does_not_count_is_named_instead_of_taken_for_none() -> None:
    found = summary(parse(dump(row("7", 11, tres="cpu=64,mem=500G,node=8"), row("8", 12)), "dump"))
    assert (found["gpu_seconds"], found["without_gpus"]) == (80, ["7"])


def test_running_pending_and_arrays() -> None:
    running = row("73", 21, "RUNNING", 42, End="Unknown", JobID="71_3")
    pending = row("74", 22, "PENDING", 0, tres="", Start="Unknown", End="Unknown")
    never = row("75", 23, "CANCELLED by 0", 0, tres="", Start="None")
    found = parse(dump(running, pending, never), "dump")
    assert [(each.job, each.start, each.running, each.gpus) for each in found.allocations] == [
        ("71_3", 1001, True, 8),
        ("74", None, False, 0),
        ("75", None, False, 0),
    ]
    assert summary(found)["gpu_seconds"] == 336


def test_other_columns_and_another_delimiter() -> None:
    names = ["Extra", *reversed(FIELDS)]
    line = DELIMITER.join(["x", *reversed(row("7", 11).split("|"))])
    assert summary(parse(f"{DELIMITER.join(names)}\n{line}\n", "dump"))["gpu_seconds"] == 80


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "sacct's columns JobIDRaw, JobID, "), ("JobID|State\n7|COMPLETED\n", "sacct's columns JobIDRaw, DBIndex, ")],
)
def test_without_its_columns_a_dump_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(text, "dump.txt")
    assert message in str(caught.value)
    assert "dump.txt" in str(caught.value)


@pytest.mark.parametrize("cut", [1, 5, 20, 60])
def test_a_line_that_is_cut_off_is_named_and_left_out(cut: int) -> None:
    """Also where a number is cut: of gres/gpu=16, gres/gpu=1 would be a wrong sum without a word."""
    found = summary(parse(dump(row("7", 11), row("8", 12))[: -1 - cut], "dump"))
    assert (found["gpu_seconds"], found["problems"]) == (80, ["line 3 is cut off"])


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (
            row("8", 12, Start="2026-11-25T17:22:00"),
            "line 3: Start is '2026-11-25T17:22:00', a time of day without its zone",
        ),
        (row("8", 12, ElapsedRaw="00:10:00"), "line 3: ElapsedRaw is '00:10:00', not seconds"),
        (row("8", 12, AllocTRES="cpu=4,gres/gpu"), "line 3: AllocTRES is 'cpu=4,gres/gpu'"),
        ("8|8|12", "line 3: 3 of 11 columns"),
    ],
)
def test_what_cannot_be_read_is_named_and_the_rest_is_reported(bad: str, problem: str) -> None:
    found = summary(parse(dump(row("7", 11), bad, row("9", 13)), "dump"))
    assert found["gpu_seconds"] == 160
    assert len(found["problems"]) == 1
    assert found["problems"][0].startswith(problem)
