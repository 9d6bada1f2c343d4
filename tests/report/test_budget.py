"""A run's budget in its cost report."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixart_ds import files
from pixart_ds.cli import main
from pixart_ds.config.freeze import create_run
from pixart_ds.config.load import load_chain
from pixart_ds.layout import RunLayout
from pixart_ds.ledger.book import write_entry
from pixart_ds.ledger.entries import Entry
from pixart_ds.report.build import build
from pixart_ds.report.text import budget_lines


def row(part: float | None, forecast: float | None = None) -> dict[str, object]:
    used = None if part is None else 1300 * part
    return {"what": "gpu_days", "limit": 1300.0, "used": used, "part": part, "forecast": forecast}


@pytest.mark.parametrize(
    ("part", "forecast", "said"),
    [
        (0.5, None, "650 of 1,300 used, 50.0%"),
        (0.5, 1200.0, "650 of 1,300 used, 50.0%; by the forecast 1,200 at the chain's end"),
        (0.5, 1310.0, "650 of 1,300 used, 50.0%; by the forecast 1,310 at the chain's end: TOO MUCH"),
        (0.8, None, "1,040 of 1,300 used, 80.0%: NEARLY USED UP"),
        (1.0, 1310.0, "1,300 of 1,300 used, 100.0%: USED UP; no attempt begins before it is raised"),
        (None, None, "- of 1,300 used, -: NOT KNOWN, and not watched"),
    ],
)
def test_a_line_says_how_much_is_left_and_whether_it_lasts(
    part: float | None, forecast: float | None, said: str
) -> None:
    (line,) = budget_lines([row(part, forecast)])
    assert line.startswith(f"Budget gpu_days: {said}")


def a_run(folder: Path, *overrides: str) -> RunLayout:
    run = create_run(folder / "run", load_chain("smoke/chain", overrides), "smoke/chain")
    attempt = run.stage("stage1").attempt(1)
    attempt.root.mkdir(parents=True)
    write_entry(attempt, Entry.start("stage1", 1, 1, "cpu", 2, 0.0, 0).still_running(86400.0, {}).ended_as("stopped"))
    return run


def test_the_report_holds_the_account_against_each_limit(tmp_path: Path) -> None:
    run = a_run(tmp_path, "budget.gpu_days=2.5", "budget.usd=1")
    (found,) = build([run.root])["runs"]
    days, dollars = found["budget"]
    assert (days["used"], days["limit"], days["part"]) == (2.0, 2.5, 0.8)
    assert dollars["part"] == found["account"]["usd"] > 1
    files.write_text(run.budget, "[]")
    (found,) = build([run.root])["runs"]
    assert found["budget"] == []
    assert "its budget cannot be read: it has no limits and history" in found["problems"]


def test_the_verb_shows_and_changes_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path, "budget.gpu_days=2.5")
    assert main(["budget", str(run.root)]) == 0
    text = capsys.readouterr().out
    assert "Budget gpu_days: 2.00 of 2.50 used, 80.0%: NEARLY USED UP\n" in text
    assert "Without a limit: 0.576 kwh, 0.274 kg_co2e, 1.92 usd\n" in text
    assert main(["budget", str(run.root), "--set", "gpu_days=4", "--set", "usd=1", "--dry-run"]) == 0
    assert "gpu_days: 2.5 → 4.0 (would change)\n" in capsys.readouterr().out
    assert main(["budget", str(run.root), "--set", "gpu_days=4", "--set", "usd=1"]) == 0
    assert "Budget usd: 1.92 of 1.00 used, 192.0%: USED UP" in capsys.readouterr().out
    assert main(["budget", str(run.root), "--set", "hours=4"]) == 2
    assert "hours: there is no such key" in capsys.readouterr().err
    assert main(["budget", str(tmp_path)]) == 2
    assert "there is no run in this folder" in capsys.readouterr().err


def test_a_run_keeps_its_budget_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path, "budget.gpu_days=2.5")
    for words, said in (([], False), (["--set", "budget.gpu_days=2.5"], False), (["--set", "budget.gpu_days=3"], True)):
        assert main(["create", str(run.root), "--chain", "smoke/chain", *words]) == 0
        assert ("the run keeps its own budget" in capsys.readouterr().err) is said
