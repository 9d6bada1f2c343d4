"""From entries to energy, emissions and money; what Slurm's rows change; which rates hold."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pixart_ds.errors import ConfigError
from pixart_ds.ledger.accounting import RatesOf, Use, alone_use, divided_by, match, total, use_of
from pixart_ds.ledger.sacct import Allocation
from pixart_ds.rates import assume, rate_table
from tests.ledger.worlds import entry

RATES = {"country": "FRA", "pue": 1.5, "price_per_hour": 2.0}


def row(start: int, seconds: int, gpus: int | None = 8, job: str = "7", index: int = 1, **more: Any) -> Allocation:
    about = {"name": "n", "user": "ada", "state": "COMPLETED", "running": False, **more}
    return Allocation(key=(job, str(index)), job=job, start=start, seconds=seconds, gpus=gpus, **about)


def test_an_account_by_hand() -> None:
    rates = RatesOf(RATES)
    made = total(use_of(each, rates(each)) for each in (entry(), entry(hours=0.5, devices=4))).to_json()
    assert made["device_hours"] == pytest.approx(8 + 2)
    assert made["kwh"] == pytest.approx(10 * (0.300 + 0.137) * 1.5)
    assert made["kg_co2e"] == pytest.approx(10 * 0.437 * 1.5 * 0.056)
    assert made["kg_co2e_embodied"] == pytest.approx(10 * 0.013)
    assert made["usd"] == pytest.approx(20)
    assert (made["v100_days"], made["a100_days"]) == (pytest.approx(10 / 24), pytest.approx(10 / 24 / 2.2))
    assert made["seconds"] == 1.5 * 3600
    assert (made["goodput"], made["mfu"]) == (None, None), "nobody wrote down where the time went"


def test_measured_energy_counts_and_the_rest_is_taken_for_as_much() -> None:
    measured = {"joules": {"nvml-energy": 200.0 * 7 * 3600}, "device_seconds": {"nvml-energy": 7.0 * 3600}}
    made = use_of(entry(energy=measured), assume("v100-sxm2", pue=1.2)).to_json()
    assert made["kwh"] == pytest.approx(8 * (0.200 + 0.137) * 1.2), "one of eight device-hours was not measured"
    assert made["kwh_measured"] == pytest.approx(7 * 0.200 * 1.2)
    assert made["energy_coverage"] == pytest.approx(7 / 8)
    assert made["energy_sources"] == pytest.approx({"nvml-energy": 7 / 8, "assumed": 1 / 8})
    assumed = {"joules": {"tdp": 300.0 * 8 * 3600}, "device_seconds": {"tdp": 8.0 * 3600}}
    made = use_of(entry(energy=assumed), assume("v100-sxm2")).to_json()
    assert (made["energy_coverage"], made["energy_sources"]) == (0, {"tdp": 1}), "a TDP is no measurement"


def test_goodput_and_mfu() -> None:
    parts = {"startup": 360.0, "productive": 2700.0, "data_wait": 180.0, "rework": 120.0, "checkpoint": 60.0}
    each = entry(parts=parts, flops=0.3 * 8 * 125e12 * 3000, peak_flops=8 * 125e12)
    made = use_of(each, assume("v100-sxm2")).to_json()
    assert made["goodput"] == pytest.approx(2700 / 3600)
    assert made["mfu"] == pytest.approx(0.3), "in steps, whatever they were"
    assert made["parts"]["unattributed"] == pytest.approx(8 * 180)
    assert sum(made["parts"].values()) == pytest.approx(made["device_seconds"]) == 8 * 3600


def test_a_conversion_that_is_not_stated_is_none() -> None:
    a100, h100, cpu = (use_of(entry(), assume(kind)) for kind in ("a100-40gb", "h100", "cpu-core"))
    assert (a100.v100_days, a100.a100_days) == (None, pytest.approx(8 / 24))
    assert (h100.v100_days, h100.a100_days, h100.kg_embodied) == (None, None, None)
    assert (cpu.v100_days, cpu.a100_days) == (None, None)
    v100 = use_of(entry(), assume("v100-sxm2"))
    assert (v100 + a100).a100_days == pytest.approx(8 / 24 + 8 / 24 / 2.2)
    assert (v100 + a100).v100_days is None
    assert (v100 + h100).to_json()["kg_co2e_embodied"] is None


def test_options_go_before_the_profile_and_that_before_the_table() -> None:
    own = entry(site={"name": "Jean Zay", "gpu": "a100-80gb", "country": "FRA", "pue": 1.1, "price_per_hour": 0.5})
    found = RatesOf()(own)
    assert (found.device, found.grams_per_kwh, found.pue, found.price_per_hour) == ("v100-sxm2", 56, 1.1, 0.5)
    found = RatesOf({"pue": 1.3, "grams_per_kwh": 20.0, "country": None})(own)
    assert (found.pue, found.grams_per_kwh, found.grid, found.price_per_hour) == (1.3, 20, "as given", 0.5)
    of_profile = entry(device_kind=None, site={"gpu": "a100-80gb"})
    assert RatesOf()(of_profile).device == "a100-80gb"
    assert RatesOf({"device": "h100"})(own).device == "h100"


def test_what_nobody_knows_is_an_error_and_no_default() -> None:
    with pytest.raises(
        ConfigError, match="stage1, attempt 1 ran on 'Tesla T4', which the table does not have"
    ) as caught:
        RatesOf()(entry(device_kind=None, device_model="Tesla T4"))
    assert "--device v100-sxm2" in str(caught.value)
    with pytest.raises(ConfigError, match="ran on an unknown GPU"):
        RatesOf()(entry(device_kind=None))
    with pytest.raises(ConfigError, match="no device 'v200'") as caught:
        RatesOf({"device": "v200"})(entry())
    assert "v100-sxm2" in str(caught.value)
    for country in ("XXX", "WLD", "XKX", "fra"):  # which another tool takes for the world's average in silence
        with pytest.raises(ConfigError, match=f"no country '{country}'"):
            RatesOf({"country": country})(entry())
    with pytest.raises(ConfigError, match="no country 'Mars'"):
        RatesOf()(entry(site={"country": "Mars"}))
    with pytest.raises(ConfigError, match="no gpu 'v100'"):
        RatesOf()(entry(device_kind=None, site={"gpu": "v100"}))
    with pytest.raises(ConfigError, match=r"pue 0\.9 is below 1"):
        assume("v100-sxm2", pue=0.9)
    with pytest.raises(ConfigError, match="watts inf is no finite number"):
        assume("v100-sxm2", watts=float("inf"))
    with pytest.raises(ConfigError, match="price nan is no finite number"):
        assume("v100-sxm2", price_per_hour=float("nan"))


def test_slurms_rows_are_the_seconds_and_the_ledger_divides_them() -> None:
    rates = RatesOf(RATES)
    parts = {"startup": 100.0, "productive": 3400.0}
    each = entry(devices=1, job="7", parts=parts, images_to=64)  # 1000 to 4600, one rank of a node with 8 GPUs
    held = divided_by([row(990, 3650)], [each], [use_of(each, rates(each))], rates).to_json()
    assert held["device_seconds"] == 8 * 3650
    assert held["parts"] == pytest.approx(
        dict.fromkeys(held["parts"], 0.0)
        | {"startup": 8 * (100 + 10), "productive": 8 * 3400, "unattributed": 8 * (100 + 40)}
    )
    assert held["usd"] == pytest.approx(8 * 3650 / 3600 * 2)
    assert held["images"] == 64
    shorter = divided_by([row(1000, 1800)], [each], [use_of(each, rates(each))], rates).to_json()
    assert shorter["device_seconds"] == 8 * 1800, "it lived on while Slurm took the job down"
    assert shorter["parts"]["productive"] == pytest.approx(8 * 1800 * 3400 / 3600)


def test_a_job_that_lost_a_node_has_two_rows() -> None:
    each = entry(devices=16, job="7", parts={"productive": 3600.0})
    rows = [row(1000, 600, 16, state="RESIZING"), row(1600, 3000, 8, index=2)]
    held = divided_by(rows, [each], [use_of(each, assume("v100-sxm2"))], RatesOf()).to_json()
    assert held["device_seconds"] == held["parts"]["productive"] == 16 * 600 + 8 * 3000


def test_where_slurm_counts_no_gpus_the_ledger_counts() -> None:
    each = entry(job="7")
    own = use_of(each, assume("v100-sxm2"))
    assert divided_by([row(1000, 3600, None)], [each], [own], RatesOf()) == own


def test_rows_find_their_attempts() -> None:
    first = entry(hours=1, job="7")  # 1000 to 4600
    second = entry(hours=1, job="7", attempt=2, started=5000.0, until=8600.0)
    other = entry(hours=1, job="9", attempt=3, started=5000.0, until=8600.0)
    local = entry(hours=1, attempt=4, started=5000.0, until=8600.0)
    attempts = {("stage1", each.attempt): [each] for each in (first, second, other, local)}
    rows = [
        row(999, 3603),
        row(4998, 3604, index=2),
        row(4700, 100, index=3, state="NODE_FAIL"),  # its node died before the attempt began
        row(4999, 3602, job="9", index=4),
        row(5000, 60, job="11", index=5),
        Allocation(("7", "6"), "7", "n", "ada", "PENDING", None, 0, None, False),
    ]
    for _ in range(5):
        random.shuffle(rows)
        found = match(attempts, rows)
        assert {key[1]: [each.key[1] for each in own] for key, own in found.of_attempt.items()} == {
            1: ["1"],
            2: ["2"],
            3: ["4"],
        }
        assert sorted(each.key[1] for each in found.alone) == ["3", "5"]


def test_an_allocation_without_an_attempt_is_unattributed() -> None:
    rates = RatesOf(RATES)
    made = alone_use(row(0, 450), entry(), rates)
    assert made is not None
    assert (made.device_seconds, made.parts, made.usd) == (3600, {"unattributed": 3600}, 2)
    assert alone_use(row(0, 450), None, rates) is None


def test_sums_do_not_depend_on_their_sequence() -> None:
    uses = [use_of(entry(hours=n, parts={"productive": 60.0 * n}), assume("v100-sxm2")) for n in range(1, 6)]
    one, other = total(uses).to_json(), total(reversed(uses)).to_json()
    assert one["parts"] == pytest.approx(other["parts"])
    assert one["kwh"] == pytest.approx(other["kwh"])
    assert total([]) == Use()
    assert rate_table().embodied.value > 0
