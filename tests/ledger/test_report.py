"""Accounts: published figures reproduced, attempts that add up, and what the report says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pixart_ds import files
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.layout import RunLayout
from pixart_ds.ledger import sacct
from pixart_ds.ledger.accounting import a100_days, account
from pixart_ds.ledger.book import open_entry, read_book, update_entry
from pixart_ds.ledger.entries import Entry
from pixart_ds.ledger.paper import paper_account
from pixart_ds.ledger.report import page, report
from pixart_ds.rates import Assumptions, assume, rate_table
from pixart_ds.units import DeviceTime

ROOT = Path(__file__).resolve().parents[2]


def entry(hours: float = 1.0, devices: int = 8, **changes: Any) -> Entry:
    made = Entry.start("stage1", 1, 1, "cuda", devices, 1000.0, 0)
    return Entry(
        **{**made.to_json(), "until": 1000.0 + 3600 * hours, "outcome": "done", "images_to": 36_000, **changes}
    )


def published(watts: float, pue: float, grams: float) -> Assumptions:
    return Assumptions(
        device="x",
        watts=watts,
        boundary="",
        price_per_hour=0,
        priced="",
        pue=pue,
        country="x",
        grams_per_kwh=grams,
        year=2020,
    )


@pytest.mark.parametrize(
    ("device_hours", "assumptions", "megawatt_hours", "tonnes"),
    [
        (10_000 * 14.8 * 24, published(330, 1.10, 429), 1289, 553),  # GPT-3 on V100s (Patterson et al. 2021)
        (1_082_990, published(400, 1.0, 57), 433.2, 24.7),  # BLOOM's dynamic consumption (Luccioni et al. 2022)
        (150_000, published(250, 1.0, 300), 37.5, 11.25),  # Stable Diffusion 1.5's model card
    ],
    ids=["GPT-3", "BLOOM", "SD 1.5"],
)
def test_published_figures(device_hours: float, assumptions: Assumptions, megawatt_hours: float, tonnes: float) -> None:
    energy = assumptions.energy(DeviceTime(device_hours * 3600))
    assert energy.kwh / 1000 == pytest.approx(megawatt_hours, rel=0.01)
    assert assumptions.emissions(energy).kg / 1000 == pytest.approx(tonnes, rel=0.01)


def test_the_papers_own_conversion() -> None:
    paper = rate_table().paper
    v100_days = sum(paper.gpu_days.values())
    assert v100_days == 1656
    assert a100_days(v100_days, rate_table().a100_days_per_v100_day.value) == pytest.approx(752.7, abs=0.1)
    assert paper.dollars / (paper.a100_days * 24) == pytest.approx(1.571, abs=0.001)
    assert paper.a100_days * 24 * 0.4 * 57 / 1e6 == pytest.approx(paper.tonnes_co2, abs=0.015)


def test_an_account_by_hand() -> None:
    rates = {"cuda": assume("cuda", device="v100-sxm2", country="FRA", pue=1.5, price_per_hour=2.0)}
    made = account([entry(), entry(hours=0.5, devices=4)], rates)
    assert made.device_hours == pytest.approx(8 + 2)
    assert made.kwh == pytest.approx(10 * 0.437 * 1.5)
    assert made.kg_co2e == pytest.approx(10 * 0.437 * 1.5 * 0.056)
    assert made.dollars == pytest.approx(20)
    assert made.images_per_second == pytest.approx(72_000 / (1.5 * 3600))


def a_run(folder: Path) -> RunLayout:
    run = RunLayout(folder / "run")
    for stage in ("stage1", "stage2"):
        for number in (1, 2):
            run.stage(stage).attempt(number).root.mkdir(parents=True)
    files.write_json(run.manifest, {"stages": ["stage1", "stage2", "stage3_256"]})
    return run


def test_the_last_line_of_a_launch_counts_and_a_killed_supervisor_leaves_an_account(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    attempt = run.stage("stage1").attempt(1)
    first = open_entry(attempt, entry(hours=0, outcome="running", images_to=0))
    for seconds in (5, 10, 15):
        update_entry(attempt, first.still_running(1000.0 + seconds, {"images_seen": 10 * seconds}))
    with open(attempt.ledger, "a") as ledger:
        ledger.write('{"stage": "stage1", "att')  # torn by the kill
    (found,) = read_book(run.root)["stage1"]
    assert (found.outcome, found.until, found.images) == ("running", 1015.0, 150)
    values = report(run.root)
    assert values["stages"][0]["attempts"][0]["outcome"] == "lost"
    assert values["total"]["device_hours"] == pytest.approx(15 * 8 / 3600)


def test_stages_and_attempts_add_up_to_the_total(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for stage in ("stage1", "stage2"):
        for number in (1, 2):
            open_entry(run.stage(stage).attempt(number), entry(hours=number, stage=stage, attempt=number, device="cpu"))
    values = report(run.root, country="DEU", pue=1.3)
    for name in ("device_hours", "kwh", "kg_co2e", "dollars", "images"):
        stages = [stage[name] for stage in values["stages"]]
        attempts = [attempt[name] for stage in values["stages"] for attempt in stage["attempts"]]
        assert sum(stages) == pytest.approx(values["total"][name])
        assert sum(attempts) == pytest.approx(values["total"][name])
    assert values["total"]["device_hours"] == pytest.approx(48)
    text = page(values)
    assert max(len(line) for line in text.splitlines()) <= 130
    assert re.search(r"stage1 +1 done +8 +8\.00 ", text)
    assert re.search(r"stage3_256 +not started +416", text)
    for words in (
        "cpu-core: 10 W",
        "PUE 1.3; grid DEU, 381 g CO2e/kWh (2023)",
        "1656 V100-days, 753 A100-days",
        "$28,400",
        "French grid",
    ):
        assert words in text


def test_unknown_choices_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no device 'v200'") as caught:
        assume("cuda", device="v200")
    assert "v100-sxm2" in str(caught.value)
    with pytest.raises(ConfigError, match="no country 'XXX'"):
        assume("cuda", country="XXX")
    with pytest.raises(ConfigError, match=r"pue 0\.9 is below 1"):
        assume("cuda", pue=0.9)


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no run in this folder"):
        report(tmp_path)


def test_the_command_needs_no_torch_and_no_installation(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    open_entry(run.stage("stage1").attempt(1), entry())
    script = [sys.executable, str(ROOT / "tools/cost_report.py")]
    answer = subprocess.run(
        [*script, str(run.root), "--format", "json", "--country", "FRA"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["assumptions"]["cuda"]["grams_per_kwh"] == 56
    page_of = subprocess.run([*script, str(run.root)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "Cost of" in page_of.stdout
    wrong = subprocess.run([*script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (4, "")
    assert "there is no run" in wrong.stderr


def test_the_papers_totals_follow_from_its_table() -> None:
    """Table 4's V100-days, Table 2's A100-days and dollars, Figure 2's tonnes."""
    found = paper_account()
    ours = found["models"]["PixArt-α"]
    assert ours["v100_gpu_days"] == 1656
    assert ours["a100_gpu_days"] == pytest.approx(752.7, abs=0.1)
    assert ours["usd"] == pytest.approx(28_400, rel=0.001)
    assert ours["tco2e"] == pytest.approx(0.4, abs=0.02)
    assert ours["usd_per_a100_hour"] == pytest.approx(1.571, abs=0.001)
    for name, model in found["models"].items():
        assert model["a100_gpu_days"] == pytest.approx(model["stated"]["a100_gpu_days"], rel=0.001), name
        assert model["tco2e"] == pytest.approx(model["stated"]["tco2e"], rel=0.15), "bars read from a drawing"
    assert found["on_64_gpus"] == {"stages_on_64": 22.0, "all_stages": 25.875}
    assert found["stages"]["stage1"]["days"] == 11


def test_the_papers_totals_under_other_assumptions() -> None:
    found = paper_account()
    dollars = {price["per_hour"]: round(price["usd"]) for price in found["prices"]}
    assert dollars[0.97] == pytest.approx(38_600, rel=0.01)
    assert dollars[3.06] == pytest.approx(121_600, rel=0.01)
    assert dollars[2.133] == pytest.approx(0.12 * 320_000, rel=0.01), "12.0 % of SD 1.5 at SD 1.5's rate"
    alone, site, average = found["footprints"]
    assert (round(alone["mwh"], 1), round(alone["tco2e"]["FRA"], 2)) == (11.9, 0.67)
    assert round(site["tco2e"]["CHN"], 1) == 12.1
    assert round(average["tco2e"]["WORLD"], 1) == 12.9


def test_the_papers_account_is_printed_without_a_run(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "tools/cost_report.py"), "--paper"]
    text = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert max(map(len, text.splitlines())) <= 110
    assert "672 + 416 + 320 = 22.0 × 64; all of it is 25.9 × 64" in text
    assert "at the latter it costs $38,540, 12.0%" in text
    answer = subprocess.run([*script, "--format", "json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["models"]["SD 1.5"]["a100_gpu_days"] == 6250
    both = subprocess.run([*script, "run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert both.returncode == 2
    assert "give either the folder of a run or --paper" in both.stderr


def test_slurms_account_stands_beside(tmp_path: Path) -> None:
    run = RunLayout(tmp_path / "run")
    attempt = run.stage("stage1").attempt(1)
    attempt.root.mkdir(parents=True)
    files.write_json(run.manifest, {"stages": ["stage1"]})
    files.write_json(attempt.env, {"job": "7"})
    open_entry(attempt, entry())
    header = "|".join(sacct.FIELDS)
    rows = [
        "7|7|1|n|u|REQUEUED|1|2|3|3600|gres/gpu=8",
        "7|7|2|n|u|COMPLETED|1|2|3|1800|gres/gpu=8",
        "9|9|3|n|u|FAILED|1|2|3|99|gres/gpu=8",
    ]
    (tmp_path / "dump").write_text("\n".join([header, *rows, ""]))
    script = [sys.executable, str(ROOT / "tools/cost_report.py"), str(run.root), "--sacct", str(tmp_path / "dump")]
    text = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert "Slurm's account: 12.00 GPU-hours in 2 starts (REQUEUED 8.00, COMPLETED 4.00)" in text
    (tmp_path / "dump").write_text("\n".join([header, rows[2], ""]))
    answer = subprocess.run(script, capture_output=True, text=True, check=False)
    assert answer.returncode == 4
    assert "the dump holds none of the run's jobs (7)" in answer.stderr
