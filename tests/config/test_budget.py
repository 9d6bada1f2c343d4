"""A run's budget: what may be said of it, where it stands, and who changes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pixart_ds import files
from pixart_ds.config.budget import change_budget, read_budget
from pixart_ds.config.freeze import create_run
from pixart_ds.config.load import load_chain, read_frozen
from pixart_ds.config.schema import BudgetConfig, ChainConfig
from pixart_ds.errors import ConfigError
from pixart_ds.layout import RunLayout


def created(folder: Path, *overrides: str) -> RunLayout:
    return create_run(folder / "run", load_chain("smoke/chain", overrides), "smoke/chain")


def test_a_chain_names_its_budget_and_an_override_reaches_it() -> None:
    assert load_chain("smoke/chain").budget is None
    chain = load_chain("smoke/chain", ["budget.gpu_days=1300", "budget.usd=2.5", "*.seed=1"])
    assert chain.budget == BudgetConfig(gpu_days=1300, usd=2.5)
    assert chain.budget.limits == {"gpu_days": 1300.0, "usd": 2.5}
    assert {stage.seed for stage in chain.stages} == {1}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("budget.gpu_day=1", "budget.gpu_day: there is no such key (value 1); did you mean gpu_days?"),
        ("budget.kwh=0", "budget.kwh: input should be greater than 0, not 0"),
        ("budget.usd=.inf", "budget.usd: input should be a finite number"),
        ("budget.usd=dear", "budget.usd: input should be a valid number, not 'dear'"),
    ],
)
def test_what_is_no_limit_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_chain("smoke/chain", [override])
    assert words in str(caught.value)


def test_a_new_run_takes_its_chains_budget_and_keeps_its_own_from_then_on(tmp_path: Path) -> None:
    run = created(tmp_path, "budget.gpu_days=2")
    assert read_budget(run).limits == {"gpu_days": 2.0}
    created(tmp_path, "budget.gpu_days=3")  # another budget is no other run
    created(tmp_path)
    assert read_budget(run).limits == {"gpu_days": 2.0}
    change_budget(run, ["gpu_days=4"])
    assert read_frozen(ChainConfig, run.chain).budget == BudgetConfig(gpu_days=2), "what the chain said stays on record"


def test_a_run_without_a_budget_has_no_file_and_no_limit(tmp_path: Path) -> None:
    run = created(tmp_path)
    assert not run.budget.exists()
    assert read_budget(run).limits == {}


def test_a_creation_that_did_not_end_leaves_no_budget_behind(tmp_path: Path) -> None:
    run = created(tmp_path, "budget.usd=2")
    run.manifest.unlink()
    created(tmp_path)
    assert read_budget(run).limits == {}


def test_a_change_is_on_record_and_null_takes_a_limit_away(tmp_path: Path) -> None:
    run = created(tmp_path, "budget.usd=2")
    before = run.budget.read_text()
    assert change_budget(run, ["gpu_days=7", "usd=null"], dry_run=True) == ["gpu_days: None → 7.0", "usd: 2.0 → None"]
    assert change_budget(run, []) == []
    assert run.budget.read_text() == before
    change_budget(run, ["gpu_days=7", "usd=null"])
    assert read_budget(run).limits == {"gpu_days": 7.0}
    first, second = json.loads(run.budget.read_text())["history"]
    assert (first["before"], first["after"]) == ({}, {"usd": 2.0})
    assert (second["before"], second["after"]) == ({"usd": 2.0}, {"gpu_days": 7.0})
    assert all(each["when"] and "user" in each for each in (first, second))


def test_a_change_that_is_none_of_these_changes_nothing(tmp_path: Path) -> None:
    run = created(tmp_path, "budget.usd=2")
    before = run.budget.read_text()
    for wrong in ("dollars=3", "usd=-1", "usd"):
        with pytest.raises(ConfigError):
            change_budget(run, ["gpu_days=7", wrong])
    assert run.budget.read_text() == before


@pytest.mark.parametrize("text", ["{", "[]", '{"limits": 3, "history": []}', '{"limits": {"usd": "x"}, "history": []}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    run = created(tmp_path)
    files.write_text(run.budget, text)
    with pytest.raises(ConfigError) as caught:
        read_budget(run)
    assert str(run.budget) in str(caught.value)
