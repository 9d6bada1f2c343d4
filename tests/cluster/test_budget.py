"""The guard of a run's budget: when it warns and stops, what it does where it cannot know, and a supervisor that listens to it."""

from __future__ import annotations

import io
import json
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from pixart_ds import files
from pixart_ds.cluster.budget import BudgetGuard
from pixart_ds.cluster.requests import Requests
from pixart_ds.cluster.submit import budget_notes
from pixart_ds.cluster.supervise import Timing
from pixart_ds.config.freeze import create_run, read_stage
from pixart_ds.config.load import load_chain, validate
from pixart_ds.config.profile import Profile
from pixart_ds.errors import ConfigError
from pixart_ds.layout import RunLayout, StageLayout
from pixart_ds.ledger.book import write_entry
from pixart_ds.ledger.entries import Entry
from pixart_ds.log import Log
from pixart_ds.train.attempt import AttemptRecord
from tests.cluster.test_supervise import FakeSlurm, a_run, go, no_slurm, outcome  # noqa: F401 — a fixture

DAY = 86400.0


class World:
    """A run whose attempt 2 is under way on eight GPUs, after an attempt that took two device-days; and its guard."""

    def __init__(self, folder: Path, period_s: float = 60.0, **about: Any) -> None:
        self.run, self.now, self.output = RunLayout(folder / "run"), 0.0, io.StringIO()
        self.run.root.mkdir(parents=True)
        files.write_json(self.run.manifest, {"stages": ["stage1"]})
        past = Entry.start("stage1", 1, 1, "cuda", 2, 1000.0, 0)
        about = {"device_model": "V", "device_kind": "v100-sxm2", **about}
        self.write(replace(past, until=1000.0 + DAY, outcome="stopped", **about))
        self.entry = replace(Entry.start("stage1", 2, 1, "cuda", 8, 200_000.0, 0), **about)
        self.write(self.entry)
        self.requests = cast(Requests, Names())
        record = cast(AttemptRecord, self)
        self.guard = BudgetGuard(
            self.run, record, self.requests, Log("stage1", self.output), period_s, clock=lambda: self.now
        )

    def write(self, entry: Entry) -> None:
        attempt = self.run.stage("stage1").attempt(entry.attempt)
        attempt.root.mkdir(parents=True, exist_ok=True)
        write_entry(attempt, entry)

    def entry_now(self) -> Entry:
        return replace(self.entry, until=self.entry.started + self.now)

    def limit(self, **limits: float) -> None:
        files.write_json(self.run.budget, {"limits": limits, "history": []})

    def after(self, days: float) -> str:
        """Lets time pass, and what the log says of it."""
        self.now += days * DAY
        before = len(self.output.getvalue())
        self.guard.look()
        return self.output.getvalue()[before:]


class Names:
    """Requests without handlers."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @property
    def first(self) -> str | None:
        return self.names[0] if self.names else None


def test_it_warns_once_and_stops_when_nothing_is_left(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.limit(gpu_days=10.0, usd=1e6)
    assert world.after(0.5) == ""  # 2 + 4
    said = world.after(0.25)
    assert "budget: 80% used, 8 of 10 gpu_days; at this pace used up in 6 h 00 min" in said
    assert world.after(0.2) == ""
    assert (world.requests.names, world.guard.asked()) == ([], None)
    said = world.after(0.05)
    assert "budget used up: 10 of 10 gpu_days; the run stops until it is raised: pixart-ds budget" in said
    assert world.requests.names == ["budget"]
    assert world.guard.asked() == "budget used up: 10 of 10 gpu_days"
    assert world.after(1) == ""
    assert world.requests.names == ["budget"], "asked for once"


def test_the_running_attempt_counts_to_the_moment_and_its_line_in_the_ledger_not_beside_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.write(world.entry_now())
    world.limit(gpu_days=8.0)
    world.write(replace(world.entry, until=world.entry.started + 0.7 * DAY))
    assert world.after(0.74) != "", "2 + 5.92 is 99 %, and not 2 + 5.6 + 5.92"
    assert world.requests.names == []


@pytest.mark.parametrize("what", ["kwh", "kg_co2e", "usd"])
def test_every_limit_is_watched(tmp_path: Path, what: str) -> None:
    world = World(tmp_path)
    world.limit(**{what: 1.0})
    assert what in world.after(0.1)
    assert world.requests.names == ["budget"]


def test_a_limit_that_is_raised_or_lowered_under_way_counts_at_the_next_look(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.limit(gpu_days=10.0)
    assert "80% used" in world.after(0.75)
    world.limit(gpu_days=100.0)
    assert world.after(1.0) == ""
    world.limit(gpu_days=20.0)
    assert "of 20 gpu_days" in world.after(0.25), "another limit is warned of anew"
    world.run.budget.unlink()
    assert world.after(10) == ""
    assert world.requests.names == []


def test_it_looks_when_it_is_time_and_sooner_where_a_limit_is_near(tmp_path: Path) -> None:
    world = World(tmp_path, period_s=0.5 * DAY)
    world.limit(gpu_days=20.0)
    world.after(0.0)
    world.limit(gpu_days=1.0)
    assert world.after(0.4) == "", "not yet"
    world.limit(gpu_days=10.0)
    assert "gpu_days" in world.after(0.6), "the period is over"
    near = World(tmp_path / "near", period_s=0.5 * DAY)
    near.limit(gpu_days=10.0)
    near.after(0.0)  # 80 % are reached in 0.75 days, after the period
    near.after(0.6)
    assert "80% used" in near.after(0.15), "reached within the period"
    assert "used up" in near.after(0.25), "and so is the limit"


def test_a_stop_that_was_asked_for_before_keeps_its_name_and_hears_of_the_budget(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.limit(gpu_days=2.5)
    world.requests.names.append("walltime")
    world.after(0.5)
    assert world.requests.names == ["walltime", "budget"]
    assert world.guard.asked() == "walltime"


def test_of_an_unknown_device_the_time_alone_is_watched(tmp_path: Path) -> None:
    world = World(tmp_path, device_model="Voodoo 2", device_kind=None)
    world.limit(usd=1.0, kwh=1.0, gpu_days=9.0)
    said = world.after(0.1)
    assert "kwh, usd cannot be watched: stage1, attempt 1 ran on 'Voodoo 2'" in said
    assert world.after(0.1) == ""
    world.after(2)
    assert world.guard.asked() == "budget used up: 19.6 of 9 gpu_days"


def test_before_the_ranks_have_said_what_they_run_on_nothing_is_said_of_them(tmp_path: Path) -> None:
    world = World(tmp_path, device_model=None, device_kind=None)
    world.limit(usd=1.0, gpu_days=9.0)
    assert world.after(0.1) == ""
    world.entry = replace(world.entry, device_model="V", device_kind="v100-sxm2")
    assert "of 1 usd" in world.after(0.1)


def test_what_cannot_be_read_is_said_once_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    world.limit(gpu_days=4.0)

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr("pixart_ds.cluster.budget.read_budget", refuse)
        assert "the budget is not watched while it cannot be read: [Errno 5]" in world.after(0.1)
        assert world.after(1) == ""
    files.write_text(world.run.budget, "{")
    assert "budget.json is not JSON" in world.after(0.1)
    assert world.requests.names == []
    world.limit(gpu_days=4.0)
    world.after(0.1)
    assert world.requests.names == ["budget"], "once it can be read again"


# ---- the supervisor --------------------------------------------------------------------------------------------------


def seconds(count: float) -> dict[str, Any]:
    return {"limits": {"gpu_days": count / DAY}, "history": []}


def limited(stage: StageLayout, count: float) -> Callable[[], None]:
    """Gives the run its budget: once the ranks are up, as they may take longer than it lasts."""
    return lambda: files.write_json(RunLayout(stage.root.parent).budget, seconds(count))


def test_a_supervisor_stops_the_ranks_and_the_job_is_not_requeued(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    run = RunLayout(stage.root.parent)
    slurm = FakeSlurm()
    timing = Timing(budget_s=0.1)
    code, text = go(stage, "save-when-asked", then=limited(stage, 2.5), timing=timing, slurm=slurm)
    assert (code, slurm.told) == (75, [])
    assert "job 4711: the run's budget is used up: the job is not requeued" in text
    said = outcome(stage)
    assert said["outcome"] == "stopped"
    assert re.fullmatch(r"budget used up: [\d.e-]+ of 2\.894e-05 gpu_days", said["cause"])
    with pytest.raises(ConfigError, match="the run's budget is used up") as caught:
        go(stage, "done")
    assert f"pixart-ds budget {run.root} --set gpu_days=MORE" in str(caught.value)
    assert len(stage.all_attempts()) == 1, "no attempt begins"
    files.write_json(run.budget, seconds(1000))
    assert go(stage, "done")[0] == 0
    files.write_json(run.budget, seconds(1))
    assert go(stage, "done")[0] == 0, "a stage that is done needs no budget"


def test_a_job_whose_budget_is_used_up_while_it_saves_is_not_requeued(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    slurm = FakeSlurm()
    about: dict[str, Any] = {"after": 0.4, "signals": (signal.SIGUSR1,), "then": limited(stage, 1.7)}
    code, text = go(stage, "save-late", **about, timing=Timing(budget_s=3600), slurm=slurm)
    assert (code, slurm.told, outcome(stage)["cause"]) == (75, [], "SIGUSR1")
    assert "the run's budget is used up: the job is not requeued" in text


def test_a_budget_stop_and_the_scancel_after_it_do_not_hurry_the_ranks(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    timing = Timing(budget_s=0.1, hurry_grace_s=0.1, retries=0)
    slurm = FakeSlurm(state="COMPLETING")
    code, _ = go(stage, "save-late", after=1.2, then=limited(stage, 0.01), timing=timing, slurm=slurm)
    assert (code, outcome(stage)["outcome"]) == (75, "stopped")
    assert outcome(stage)["cause"].startswith("budget used up"), "it came first"


def test_ranks_that_die_in_a_budget_stop_are_not_started_again(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    slurm = FakeSlurm()
    timing = Timing(peers_s=5, budget_s=0.1)
    code, _ = go(stage, "leave-when-asked,die-when-asked", then=limited(stage, 2.5), timing=timing, slurm=slurm)
    assert (code, slurm.told, len(outcome(stage)["launches"])) == (75, [], 1)
    assert outcome(stage)["cause"].startswith("asked to stop (budget used up: ")


# ---- before a job is submitted ---------------------------------------------------------------------------------------


def test_a_job_that_would_exceed_the_budget_is_told_of(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", load_chain("chain", ["budget.gpu_days=300", "budget.usd=1e6"]), "chain")
    stage = read_stage(run, "stage2")
    site = {"description": "a site", "gpu": "v100-32gb", "gpus_per_node": 8, "stages": {"stage2": {"nodes": "8"}}}
    profile = validate(Profile, site, "site")
    (note,) = budget_notes(run, stage, profile)
    assert "0 gpu_days are used, and the rest of stage2 is estimated at 336" in note
    assert f"raise it: pixart-ds budget {run.root}" in note
    half = Entry.start("stage2", 1, 1, "cuda", 64, 0.0, 0)
    layout = run.stage("stage2").attempt(1)
    layout.root.mkdir(parents=True)
    told = {"device_kind": "v100-sxm2", "outcome": "stopped", "until": DAY, "images_to": stage.total_images // 2}
    write_entry(layout, Entry.from_json({**half.to_json(), **told}))
    assert budget_notes(run, stage, profile) == [], "64 are used, and 168 still needed"
    assert budget_notes(run, stage, validate(Profile, {**site, "gpu": None}, "site")) == [], "no GPU, no estimate"
    assert json.loads(run.budget.read_text())["limits"] == {"gpu_days": 300.0, "usd": 1e6}
