"""GPU-seconds of a history with everything that a cluster does to jobs, held against the rows of Slurm's own database."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from pixart_ds.layout import RunLayout
from pixart_ds.ledger.sacct import Allocation, Dump, parse, summary
from pixart_ds.meters import sacct
from tests.e2e.test_demo import call
from tests.e2e.test_same_run import create
from tests.slurm.cluster import Cluster, Training, until

pytestmark = pytest.mark.slurm

STATES = {
    1: "RUNNING",
    3: "COMPLETED",
    4: "CANCELLED",
    7: "NODE_FAIL",
    8: "PREEMPTED",
    0x400: "REQUEUED",
    0x2000: "RESIZING",
}
"""Of the job table, as far as this history has them: a base state, or the bit of what ended this start before its job did."""


@dataclass(frozen=True)
class Row:
    """A start as slurmdbd has it in MariaDB."""

    index: str
    raw: str
    job: str
    state: str
    start: int
    end: int
    gpu_seconds: int


class Database:
    """MariaDB behind slurmdbd, asked around Slurm."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.gpu = self.table("SELECT id FROM tres_table WHERE type = 'gres' AND name = 'gpu'")[0][0]

    def table(self, sql: str) -> list[list[str]]:
        socket = self.cluster.root / "run" / "mariadb.sock"
        words = ("mariadb", "--no-defaults", "-NB", "-uroot", f"--socket={socket}", "slurm_acct", "-e", sql)
        return [line.split("\t") for line in self.cluster.tell(*words).splitlines()]

    def rows(self, *jobs: str) -> list[Row]:
        """Every start of these jobs; an array's number stands for all of its tasks, a heterogeneous job's for its parts."""
        own = f"IN ({','.join(jobs)})"
        found = self.table(
            "SELECT job_db_inx, id_job, CASE WHEN id_array_job THEN CONCAT(id_array_job, '_', id_array_task)"
            " WHEN het_job_id THEN CONCAT(het_job_id, '+', het_job_offset) ELSE id_job END,"
            " tres_alloc, state, time_start, time_end, time_suspended FROM test_job_table"
            f" WHERE id_job {own} OR id_array_job {own} OR het_job_id {own} ORDER BY job_db_inx"
        )
        return [self._row(*line) for line in found]

    def _row(self, index: str, raw: str, job: str, tres: str, state: str, start: str, end: str, suspended: str) -> Row:
        held = dict(part.split("=") for part in tres.split(",")) if tres else {}
        ran = int(end) - int(start) - int(suspended) if start != "0" and end != "0" else 0
        gpu_seconds = ran * int(held.get(self.gpu, "0"))
        return Row(index, raw, job, STATES.get(int(state), state), int(start), int(end), gpu_seconds)

    def steps(self, job: str) -> int:
        sql = f"SELECT COUNT(*) FROM test_step_table JOIN test_job_table USING (job_db_inx) WHERE id_job = {job}"
        return int(self.table(sql)[0][0])

    def wait(self, job: str, *states: str) -> None:
        """Until the starts of a job have ended in these states; slurmctld tells slurmdbd of them some seconds later."""
        until(lambda: self._ended(job) == list(states), 180, lambda: f"not {states}: {self.rows(job)}")

    def wait_first(self, job: str, state: str) -> None:
        """Until the first start of a job has ended in this state."""
        until(lambda: self._ended(job)[:1] == [state], 180, lambda: f"not {state} at first: {self.rows(job)}")

    def _ended(self, job: str) -> list[str]:
        return [each.state for each in self.rows(job) if each.end]

    def wait_running(self, job: str) -> None:
        def there() -> bool:
            rows = self.rows(job)
            return bool(rows) and rows[-1].state == "RUNNING"

        until(there, 180, lambda: f"{self.rows(job)}")


def asked(jobs: list[str]) -> Dump:
    text = sacct.ask(jobs)
    assert text is not None
    found = parse(text, "sacct")
    assert found.problems == ()
    return found


def ended(allocations: tuple[Allocation, ...] | list[Allocation]) -> Dump:
    return Dump(tuple(each for each in allocations if each.end is not None), ())


def assert_exact(found: Dump, truth: list[Row]) -> int:
    """Not a second between what we say and the database, in sum, by state, by job and by start; the sum."""
    total = summary(found)
    by_state, by_job = Counter[str](), Counter[str]()
    for row in truth:
        by_state[row.state] += row.gpu_seconds
        by_job[row.job] += row.gpu_seconds
    assert total["gpu_seconds"] == sum(row.gpu_seconds for row in truth)
    assert total["by_state"] == dict(by_state)
    assert total["by_job"] == dict(by_job)
    assert {each.key: each.gpu_seconds for each in found.allocations} == {
        (row.raw, row.index): row.gpu_seconds for row in truth
    }
    return int(total["gpu_seconds"])


def test_every_gpu_second_of_a_history_is_slurms(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(cluster)

    def submit(nodes: str, *options: str, script: str = "exec sleep 300", gpus: int = 8) -> str:
        words = ("--output=/dev/null", f"--nodelist={nodes}", f"--gres=gpu:{gpus}", *options, f"--wrap={script}")
        return cluster.sbatch(*words)

    requeued = submit("n[1-2]", "--nodes=2", "--requeue", gpus=6)
    preempted = submit("n[7-8]", "--nodes=2", "--requeue")
    failed = submit("n4", "--requeue")
    shrunk = submit("n[5-6]", "--nodes=2", "--no-kill")
    cancelled = submit("n3", gpus=2)
    array = submit("n3", "--array=1-3", script="exec sleep 1", gpus=1)
    two_steps = submit("n3", script="srun sleep 1; srun sleep 1", gpus=3)
    two_parts = submit("n3", ":", "--nodelist=n2", "--gres=gpu:2", script="exec sleep 1", gpus=1)
    never = submit("n3", "--hold")
    jobs = [requeued, preempted, failed, shrunk, cancelled, array, two_steps, two_parts, never]
    for job in (requeued, preempted, failed, shrunk, cancelled):
        database.wait_running(job)

    cluster.tell("scontrol", "suspend", cancelled)
    cluster.script("crash", "n4")  # Slurm gives both up after SlurmdTimeout; the rest goes on meanwhile
    cluster.script("mute", "n6")  # nothing of the job runs there
    jobs.append(urgent := submit("n[7-8]", "--nodes=2", "--partition=urgent", script="exec sleep 1"))
    cluster.tell("scontrol", "requeue", requeued)
    cluster.tell("scancel", never)
    cluster.wait_restart(requeued, 1)
    database.wait_running(requeued)
    cluster.tell("scontrol", "resume", cancelled)
    cluster.tell("scancel", cancelled)

    database.wait(requeued, "REQUEUED")
    database.wait(preempted, "PREEMPTED")
    database.wait(urgent, "COMPLETED")
    database.wait(cancelled, "CANCELLED")
    database.wait(never, "CANCELLED")
    database.wait(array, *["COMPLETED"] * 3)
    database.wait(two_steps, "COMPLETED")
    database.wait(two_parts, "COMPLETED", "COMPLETED")
    database.wait(failed, "NODE_FAIL")
    database.wait(shrunk, "RESIZING")
    database.wait_running(shrunk)

    run = RunLayout(tmp_path)
    before, first, after = int(time.time()), asked(jobs), int(time.time())
    sacct.record(run, first.allocations)
    truth = [row for row in database.rows(*jobs) if row.end]
    assert_exact(ended(first.allocations), truth)
    assert database.steps(two_steps) >= 3, "the script and both steps"
    assert [each.gpus for each in first.allocations if each.job == two_steps] == [3]
    assert [each.gpus for each in first.allocations if each.job == shrunk] == [16, 8]
    assert [(each.start, each.gpu_seconds) for each in first.allocations if each.job == never] == [(None, 0)]
    assert summary(first)["suspended"] == [cancelled]

    running = {each.job: each for each in first.allocations if each.running}
    assert {requeued, shrunk} <= running.keys()
    assert summary(first)["running"] == sorted(running)
    started = {row.raw: row.start for row in database.rows(*jobs) if row.state == "RUNNING"}
    for job, each in running.items():
        assert each.start == started[job]
        assert before - started[job] <= each.seconds <= after - started[job]

    monkeypatch.setenv("TZ", "America/New_York")
    there = {each.key: (each.start, each.end) for each in asked(jobs).allocations}
    monkeypatch.delenv("TZ")
    assert there.items() >= {each.key: (each.start, each.end) for each in ended(first.allocations).allocations}.items()
    assert {each.key for each in running.values()} <= there.keys()

    cluster.tell("scontrol", "requeue", requeued)  # the start that was recorded as running ends after all
    cluster.tell("scontrol", "requeue", urgent)  # and one that had ended well is no longer called so
    database.wait_first(urgent, "REQUEUED")  # it may begin and end again soon
    database.wait(requeued, "REQUEUED", "REQUEUED")
    cluster.tell("scancel", *(job for job in jobs if job != shrunk))
    until(
        lambda: not cluster.tell("squeue", "-h", "-t", "PD", "-j", ",".join(jobs)), 120, lambda: cluster.tell("squeue")
    )
    until(
        lambda: all(row.end for row in database.rows(*jobs) if row.raw != shrunk),
        180,
        lambda: f"{database.rows(*jobs)}",
    )
    sacct.record(run, asked(jobs).allocations)
    kept = sacct.recorded(run)
    ended_rows = [row for row in database.rows(*jobs) if row.end]
    assert_exact(ended(kept), ended_rows)
    again = next(each for each in kept if each.key == running[requeued].key)
    assert (again.state, again.running) == ("REQUEUED", False)
    assert next(each.state for each in kept if each.job == urgent) == "REQUEUED"
    assert [each.job for each in kept if each.running] == [shrunk]


def test_a_training_jobs_seconds_are_slurms_and_its_ledger_divides_them(
    cluster: Cluster, small_set: Path, tmp_path: Path
) -> None:
    """A rank is killed, the job is requeued: every GPU-second is Slurm's, and what became of it is known."""
    steps = 240
    create(tmp_path / "run", small_set, f"stage1.length.steps={steps}", "stage1.checkpoint.every.steps=10")
    training, database = Training(cluster, tmp_path / "run"), Database(cluster)
    training.wait_images(1, 15)
    os.kill(training.ranks()[0], signal.SIGKILL)
    training.wait_launch(1, 2)
    cluster.tell("scontrol", "requeue", training.job)
    cluster.wait_restart(training.job, 1)
    training.wait_end()
    database.wait(training.job, "REQUEUED", "COMPLETED")
    truth = sum(row.gpu_seconds for row in database.rows(training.job))
    answer = call("cost", tmp_path / "run", "--format", "json")
    assert answer.returncode == 0, answer.stderr
    values = json.loads(answer.stdout)
    account, slurm = values["account"], values["runs"][0]["slurm"]
    assert slurm["gpu_seconds"] == truth
    assert account["device_seconds"] == pytest.approx(truth, abs=1e-6)
    assert (slurm["source"], slurm["rows"], slurm["unmatched"], slurm["not_in_slurm"]) == ("asked now", 2, [], [])
    attempts = values["runs"][0]["stages"][0]["attempts"]
    assert [each["outcome"] for each in attempts] == ["stopped", "done"]
    assert attempts[0]["launches"] == 2
    for each in (account, *(attempt["account"] for attempt in attempts)):
        assert sum(each["parts"].values()) == pytest.approx(each["device_seconds"])
    assert account["images_gained"] == 32 * steps < account["images"]
    for part in ("productive", "startup", "checkpoint", "rework", "idle"):
        assert account["parts"][part] > 0, account["parts"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"job {training.job}" in page
