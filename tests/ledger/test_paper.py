"""The paper's own account, and figures that others published, reproduced."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pixart_ds.ledger.accounting import a100_days
from pixart_ds.ledger.paper import paper_account
from pixart_ds.rates import assume, rate_table
from pixart_ds.units import DeviceTime

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("device_hours", "watts", "pue", "grams", "megawatt_hours", "tonnes"),
    [
        (10_000 * 14.8 * 24, 330, 1.10, 429, 1287, 552),  # GPT-3 on V100s (Patterson et al. 2021)
        (1_082_990, 400, 1.0, 57, 433.2, 24.7),  # BLOOM's dynamic consumption (Luccioni et al. 2022)
        (150_000, 250, 1.0, 300, 37.5, 11.25),  # Stable Diffusion 1.5's model card
    ],
    ids=["GPT-3", "BLOOM", "SD 1.5"],
)
def test_published_figures(
    device_hours: float, watts: float, pue: float, grams: float, megawatt_hours: float, tonnes: float
) -> None:
    rates = assume("v100-sxm2", watts=watts, host_watts=0, pue=pue, grams_per_kwh=grams)
    energy = rates.energy(DeviceTime(device_hours * 3600))
    assert energy.kwh / 1000 == pytest.approx(megawatt_hours, rel=0.01)
    assert rates.emissions(energy).kg / 1000 == pytest.approx(tonnes, rel=0.01)


def test_the_papers_own_conversion() -> None:
    paper = rate_table().paper
    v100_days = sum(paper.gpu_days.values())
    assert v100_days == 1656
    assert a100_days(v100_days, rate_table().a100_days_per_v100_day.value) == pytest.approx(752.7, abs=0.1)
    assert paper.dollars / (paper.a100_days * 24) == pytest.approx(1.571, abs=0.001)
    assert paper.a100_days * 24 * 0.4 * 57 / 1e6 == pytest.approx(paper.tonnes_co2, abs=0.015)


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
    assert "give either folders of runs or --paper" in both.stderr
