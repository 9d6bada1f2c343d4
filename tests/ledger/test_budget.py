"""What a run has used up of its budget, from its ledger alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pixart_ds import files
from pixart_ds.errors import ConfigError
from pixart_ds.layout import RunLayout
from pixart_ds.ledger import budget
from pixart_ds.ledger.accounting import RatesOf, use_of
from pixart_ds.ledger.book import read_book, write_entry
from pixart_ds.ledger.budget import GrowingBook, refuse_used_up, rows, spent, spent_by, told
from pixart_ds.ledger.entries import Entry


def entry(attempt: int = 1, hours: float = 24.0, devices: int = 2, stage: str = "stage1", **changes: Any) -> Entry:
    made = Entry.start(stage, attempt, 1, "cuda", devices, 1000.0, 0)
    about = {"until": 1000.0 + 3600 * hours, "outcome": "stopped", "device_model": "V", "device_kind": "v100-sxm2"}
    return Entry.from_json({**made.to_json(), **about, **changes})


def a_run(folder: Path, *entries: Entry) -> RunLayout:
    run = RunLayout(folder / "run")
    run.root.mkdir()
    files.write_json(run.manifest, {"stages": ["stage1", "stage2"]})
    for each in entries:
        add(run, each)
    return run


def add(run: RunLayout, each: Entry) -> None:
    attempt = run.stage(each.stage).attempt(each.attempt)
    attempt.root.mkdir(parents=True, exist_ok=True)
    write_entry(attempt, each)


def limit(run: RunLayout, **limits: float) -> None:
    files.write_json(run.budget, {"limits": limits, "history": []})


def test_all_stages_and_attempts_count_and_as_the_report_counts_them(tmp_path: Path) -> None:
    entries = [entry(1), entry(2, hours=12), entry(1, stage="stage2", devices=8)]
    run = a_run(tmp_path, *entries)
    found = spent(run.root)
    assert found.account["device_days"] == pytest.approx(2 + 1 + 8)
    uses = [use_of(each, RatesOf()(each)) for each in entries]
    assert found.account["usd"] == pytest.approx(sum(use.usd for use in uses))
    assert found.account["kwh"] == pytest.approx(sum(use.kwh for use in uses))
    assert found.account["kg_co2e"] == pytest.approx(sum(use.kg for use in uses))
    assert (found.unknown, found.open) == ((), False)


def test_a_device_that_nobody_knows_leaves_only_its_time(tmp_path: Path) -> None:
    found = spent_by([entry(1), entry(2, device_model="Voodoo 2", device_kind=None)])
    assert found.account == {"device_days": pytest.approx(4), "kwh": None, "kg_co2e": None, "usd": None}
    assert "Voodoo 2" in found.unknown[0]


def test_ranks_that_never_said_what_they_run_on_are_priced_as_the_others_of_the_run() -> None:
    silent = entry(2, device_model=None, device_kind=None)
    found = spent_by([silent, entry(1)])
    assert found.account["usd"] == pytest.approx(2 * use_of(entry(1), RatesOf()(entry(1))).usd)
    alone = spent_by([silent])
    assert alone.account["usd"] is None
    assert alone.account["device_days"] == pytest.approx(2)
    assert (alone.open, alone.unknown) == (True, ()), "it may still be said"


def test_a_row_says_what_is_used_of_a_limit_and_what_the_forecast_sees() -> None:
    account = {"device_days": 900.0, "kwh": None, "kg_co2e": 5.0, "usd": 10.0}
    forecast = {"device_days_total": 1310.0, "kwh_total": 7.0, "kg_co2e_total": 8.0, "usd_total": 9.0}
    days, kwh = rows({"gpu_days": 1300.0, "kwh": 2.0}, account, forecast)
    assert days == {
        "what": "gpu_days",
        "limit": 1300.0,
        "used": 900.0,
        "part": pytest.approx(900 / 1300),
        "forecast": 1310.0,
    }
    assert (kwh["used"], kwh["part"], kwh["forecast"]) == (None, None, 7.0)
    assert rows({"usd": 4.0}, account)[0]["forecast"] is None
    assert rows({}, account) == []
    assert told([days, kwh]) == "900 of 1,300 gpu_days, ? of 2 kwh"


def test_a_budget_that_is_used_up_is_refused_with_the_command_that_raises_it(tmp_path: Path) -> None:
    run = a_run(tmp_path, entry())
    refuse_used_up(run)  # without a budget
    limit(run, gpu_days=2.1, usd=1e6)
    refuse_used_up(run)
    limit(run, gpu_days=2.0, usd=1.0, kwh=1e6)
    with pytest.raises(ConfigError) as caught:
        refuse_used_up(run)
    text = str(caught.value)
    assert "the run's budget is used up: 2 of 2 gpu_days, 46.56 of 1 usd" in text
    assert f"pixart-ds budget {run.root} --set gpu_days=MORE --set usd=MORE" in text
    assert caught.value.exit_code == 2


def test_what_is_not_known_refuses_nobody(tmp_path: Path) -> None:
    run = a_run(tmp_path, entry(device_model="Voodoo 2", device_kind=None))
    limit(run, usd=0.01, kwh=0.01, kg_co2e=0.01)
    refuse_used_up(run)


def test_a_growing_book_reads_attempts_that_are_over_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path, *(entry(number) for number in (1, 2, 3)), entry(1, stage="stage2"))
    asked: list[tuple[str, int]] = []
    read = budget.read_attempt_book

    def watched(attempt: Any, stage: str, problems: list[str], *, newest: bool) -> list[Entry]:
        asked.append((stage, attempt.number))
        return read(attempt, stage, problems, newest=newest)

    monkeypatch.setattr(budget, "read_attempt_book", watched)
    book = GrowingBook(run)
    everything = [each for entries in read_book(run.root).stages.values() for each in entries]
    assert book.read() == (everything, [])
    asked.clear()
    assert book.read() == (everything, [])
    assert asked == [("stage1", 3), ("stage2", 1)]
    add(run, entry(4))
    add(run, entry(3, hours=30))  # its last line came late
    asked.clear()
    entries, _ = book.read()
    assert asked == [("stage1", 3), ("stage1", 4), ("stage2", 1)]
    assert spent_by(entries) == spent(run.root)


def test_an_attempt_that_cannot_be_read_is_tried_again(tmp_path: Path) -> None:
    run = a_run(tmp_path, entry(1), entry(2))
    ledger = run.stage("stage1").attempt(1).ledger
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[:-5])
    book = GrowingBook(run)
    entries, problems = book.read()
    assert [each.attempt for each in entries] == [2]
    assert "stage1, attempt 1: the last line of its ledger is cut off" in problems
    ledger.write_bytes(whole)
    entries, problems = book.read()
    assert ([each.attempt for each in entries], problems) == ([1, 2], [])
