"""The cost report: what adds up, in every format, by the command that people type."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pixart_ds import files
from pixart_ds.cli import main
from pixart_ds.config.freeze import create_run
from pixart_ds.config.load import load_chain
from pixart_ds.layout import RunLayout
from pixart_ds.ledger import sacct
from pixart_ds.ledger.book import write_entry
from pixart_ds.report.build import build
from pixart_ds.report.tables import to_markdown
from pixart_ds.report.text import page
from tests.ledger.worlds import History, a_run, entry

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "tools/cost_report.py")]


def call(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Runs tools/cost_report.py where no Slurm is."""
    command = [*SCRIPT, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def trained(folder: Path) -> RunLayout:
    """Two stages of two attempts, all eight days of a V100 long."""
    run = a_run(folder)
    for n, stage in enumerate(("stage1", "stage2")):
        for number in (1, 2):
            started = 1000.0 + 1e6 * n + 1e5 * number
            about = {
                "stage": stage,
                "attempt": number,
                "started": started,
                "until": started + 86400,
                "job": f"{n}{number}",
            }
            parts = {"productive": 80_000.0, "startup": 400.0, "rework": 600.0 * (number - 1)}
            images = {"images_from": 50 * (number - 1), "images_to": 100 * number}
            who = {"user": "ada" if n else "grace", "outcome": "stopped" if number == 1 else "done"}
            write_entry(run.stage(stage).attempt(number), entry(**about, **images, **who, parts=parts))
    return run


def adds_up(values: dict[str, Any]) -> None:
    """Attempts to stages, stages to runs, runs to the whole; parts to the device-seconds of each."""
    names = ("device_seconds", "kwh", "kg_co2e", "usd", "images", "images_gained", "seconds", "flops")
    accounts = [values["account"]]
    for run in values["runs"]:
        for stage in run["stages"]:
            own = [attempt["account"] for attempt in stage["attempts"]]
            accounts += [*own, stage["account"]]
            for name in names:
                assert sum(each[name] for each in own) == pytest.approx(stage["account"][name])
        accounts.append(run["account"])
        for name in names:
            assert sum(stage["account"][name] for stage in run["stages"]) == pytest.approx(run["account"][name])
    for name in names:
        for groups in ("by_state", "by_user"):
            assert sum(each[name] for each in values[groups].values()) == pytest.approx(values["account"][name])
    for each in accounts:
        assert sum(each["parts"].values()) == pytest.approx(each["device_seconds"])


def test_attempts_stages_runs_states_and_users_add_up(tmp_path: Path) -> None:
    one, two = trained(tmp_path / "a"), trained(tmp_path / "b")
    values = build([one.root, two.root], {"country": "DEU", "pue": 1.3})
    adds_up(values)
    account = values["account"]
    assert account["v100_days"] == pytest.approx(2 * 4 * 8)
    assert account["a100_days"] == pytest.approx(2 * 4 * 8 / 2.2)
    assert account["kg_co2e"] == pytest.approx(account["kwh"] * 0.381)
    assert (account["images"], account["images_gained"]) == (2 * 2 * 250, 2 * 2 * 200)
    assert account["usd_per_million_images"] == pytest.approx(account["usd"] / 800 * 1e6)
    assert {name: each["device_days"] for name, each in values["by_user"].items()} == pytest.approx(
        {"ada": 32, "grace": 32}
    )
    run = values["runs"][0]
    assert run["wall_seconds"] == pytest.approx(1e6 + 1e5 + 86400)
    assert run["waited_seconds"] == pytest.approx(run["wall_seconds"] - 4 * 86400)
    assert run["ettr"] == pytest.approx(4 * 80_000 / run["wall_seconds"])
    assert account["goodput"] == pytest.approx(80_000 / 86_400)


@pytest.mark.parametrize("seed", range(10))
def test_a_history_with_kills_adds_up(tmp_path: Path, seed: int) -> None:
    run = a_run(tmp_path, attempts=5)
    history = History(run, "stage1", seed)
    for number in range(1, 6):
        history.attempt(number)
    values = build([run.root])
    adds_up(values)
    held = sum(16 * (ended - began) for began, ended in history.spans.values())
    assert values["account"]["device_seconds"] == pytest.approx(held, abs=0.1)
    assert values["account"]["images_gained"] == history.clock


def test_the_page_for_people(tmp_path: Path) -> None:
    run = trained(tmp_path)
    text = page(build([run.root], {"country": "DEU", "pue": 1.3}))
    assert max(len(line) for line in text.splitlines()) <= 132
    assert re.search(r"stage1 +1 stopped +8 +8\.00 .* 92\.6% +88", text)
    assert re.search(r" +2 done +8 +8\.00 ", text)
    assert re.search(r"stage3_256 +not started +416", text)
    assert re.search(r"together +92\.6% +0\.5% +0\.0% +0\.0% +0\.0% +0\.3% +0\.0% +6\.6%", text)
    for words in (
        "300 W + 137 W of the node around it (node share: DGX-1 of 3.5 kW by 8)",
        "PUE 1.3 (as given)",
        "grid DEU: 381 g CO2e/kWh (2023), location-based",
        "A100-equivalent days are V100-days × 0.4545",
        "A100-equivalent days 14.5",
        "V100-days by how attempts ended: done 16.0, stopped 16.0",
        "V100-days by user: ada 16.0, grace 16.0",
        "1,656 V100-days, 753 A100-days, $28,400",
        "embodied emissions, not in the CO2e above",
    ):
        assert words in text


def test_what_cannot_be_read_stands_in_the_page(tmp_path: Path) -> None:
    run = trained(tmp_path)
    with open(run.stage("stage1").attempt(1).ledger, "a") as ledger:
        ledger.write('{"format": 9, "launch": 2}\n{"for')
    text = page(build([run.root]))
    assert "NOT READ, and not in the figures above:" in text
    assert "stage1, attempt 1: line 2 of its ledger is left out: it is of the later format 9" in text
    assert "stage1, attempt 1: the last line of its ledger is cut off" in text


def test_every_format_says_the_same(tmp_path: Path) -> None:
    run = trained(tmp_path)
    whole = json.loads(call(run.root, "--no-sacct", "--format", "json").stdout)
    rows = list(csv.DictReader(io.StringIO(call(run.root, "--no-sacct", "--format", "csv").stdout)))
    assert len(rows) == 4
    assert sum(float(each["usd"]) for each in rows) == pytest.approx(whole["account"]["usd"])
    assert sum(float(each["productive_s"]) for each in rows) == pytest.approx(whole["account"]["parts"]["productive"])
    assert to_markdown(whole) == call(run.root, "--no-sacct", "--format", "md").stdout.rstrip("\n")
    assert "| stage1 | done | 2 | 16.0 |" in to_markdown(whole)
    html = call(run.root, "--no-sacct", "--format", "html", "--out", tmp_path / "cost.html")
    assert (html.returncode, html.stdout) == (0, "")
    assert (tmp_path / "cost.html").read_text().startswith("<!DOCTYPE html>")


def test_the_verb_is_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path)
    assert main(["cost", str(run.root), "--no-sacct", "--country", "FRA"]) == 0
    assert capsys.readouterr().out == call(run.root, "--no-sacct", "--country", "FRA").stdout


def test_the_script_needs_no_torch_and_no_installation(tmp_path: Path) -> None:
    run = trained(tmp_path)
    answer = call(run.root, "--format", "json", "--country", "FRA", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["assumptions"]["rates"][0]["grams_per_kwh"] == 56
    wrong = call(tmp_path)
    assert (wrong.returncode, wrong.stdout) == (4, "")
    assert "there is no run" in wrong.stderr
    both = call(run.root, "--paper")
    assert both.returncode == 2
    assert "give either folders of runs or --paper" in both.stderr


def test_an_empty_run_costs_nothing(tmp_path: Path) -> None:
    chain = load_chain("smoke/chain", ['*.data.sets=[{path: "/nowhere"}]'])
    run = create_run(tmp_path / "run", chain, "smoke/chain")
    values = build([run.root])
    assert values["account"]["device_seconds"] == 0
    assert (values["account"]["goodput"], values["runs"][0]["ettr"], values["runs"][0]["forecast"]) == (
        None,
        None,
        None,
    )
    assert values["runs"][0]["stages"][0]["total_images"] == chain.stages[0].total_images
    assert "not started" in page(values)
    for form in ("csv", "md", "html"):
        assert call(run.root, "--format", form).returncode == 0


def test_the_forecast_takes_what_is_no_training_along(tmp_path: Path) -> None:
    run = trained(tmp_path)
    row = {"images_seen": 200, "seconds_left": 40_000.0, "chain_seconds_left": 160_000.0}
    files.append_json_line(run.stage("stage2").attempt(2).metrics, row)
    ahead = build([run.root])["runs"][0]["forecast"]
    assert ahead["seconds_left"] == pytest.approx(160_000 * 86_400 / 80_000)
    assert ahead["device_days_left"] == pytest.approx(2 * 8)
    assert ahead["device_days_total"] == pytest.approx(32 + 16)
    assert ahead["usd_total"] == pytest.approx(48 * 24 * 0.97)


def dump_of(*rows: str) -> str:
    return "\n".join(["|".join(sacct.FIELDS), *rows, ""])


def test_slurms_rows_are_the_device_seconds(tmp_path: Path) -> None:
    run = trained(tmp_path)
    rows = [
        "01|01|1|n|grace|REQUEUED|100990|100999|3|86402|gres/gpu=8",
        "02|02|2|n|grace|COMPLETED|1|200990|3|86500|gres/gpu=8",
        "11|11|3|n|ada|TIMEOUT|1|1101000|3|86400|gres/gpu:v100=8,gres/gpu=8",
        "12|12|4|n|ada|COMPLETED|1|1201000|3|86400|gres/gpu=8",
        "12|12|5|n|ada|NODE_FAIL|1|1190000|3|60|gres/gpu=8",
        "99|99|6|n|x|FAILED|1|2|3|99999|gres/gpu=8",
    ]
    (tmp_path / "dump").write_text(dump_of(*rows))
    values = json.loads(call(run.root, "--sacct", tmp_path / "dump", "--format", "json").stdout)
    truth = 8 * (86402 + 86500 + 86400 + 86400 + 60)
    assert values["account"]["device_seconds"] == pytest.approx(truth, abs=1e-6)
    slurm = values["runs"][0]["slurm"]
    assert (slurm["gpu_seconds"], slurm["ledger_seconds"]) == (truth, 4 * 8 * 86400)
    assert slurm["difference_seconds"] == truth - 4 * 8 * 86400
    (alone,) = slurm["unmatched"]
    assert (alone["job"], alone["state"], alone["gpu_seconds"]) == ("12", "NODE_FAIL", 480)
    assert values["by_state"]["no attempt"]["parts"]["unattributed"] == 480
    assert sum(values["account"]["parts"].values()) == pytest.approx(truth)
    text = call(run.root, "--sacct", tmp_path / "dump").stdout
    assert f"{truth / 3600:,.2f} GPU-hours in 5 starts" in text
    assert "job 12 (NODE_FAIL): 480 GPU-seconds without an attempt" in text


def test_a_dump_of_other_jobs_and_one_that_is_cut_off(tmp_path: Path) -> None:
    run = trained(tmp_path)
    (tmp_path / "dump").write_text(dump_of("99|99|6|n|x|FAILED|1|2|3|99999|gres/gpu=8"))
    answer = call(run.root, "--sacct", tmp_path / "dump")
    assert answer.returncode == 4
    assert "the dump holds none of the runs' jobs (01, 02, 11, 12)" in answer.stderr
    (tmp_path / "dump").write_text(
        dump_of("01|01|1|n|grace|REQUEUED|100990|100999|3|86402|gres/gpu=8", "02|02|2|n|grace|COM").rstrip("\n")
    )
    text = call(run.root, "--sacct", tmp_path / "dump").stdout
    assert "line 3 is cut off" in text
    assert "by the ledger alone: stage1, attempt 2, stage2, attempt 1, stage2, attempt 2" in text


def test_what_slurm_said_before_is_kept(tmp_path: Path) -> None:
    """A fake sacct on the path: it knows a job once, and has forgotten it the second time."""
    run = trained(tmp_path)
    program = tmp_path / "bin" / "sacct"
    program.parent.mkdir()
    header = sacct.DELIMITER.join(sacct.COLUMNS)
    cells = {"JobIDRaw": "12", "JobID": "12", "DBIndex": "4", "JobName": "n", "User": "ada", "State": "COMPLETED"}
    cells |= {"Start": "1201000", "End": "1287400", "ElapsedRaw": "86400", "AllocTRES": "gres/gpu=8"}
    line = sacct.DELIMITER.join(cells.get(name, "") for name in sacct.COLUMNS)
    for rows, source in ((f"{line}\n", "asked now"), ("", "asked now")):
        program.write_text(f"#!/bin/sh\nprintf '%s' '{header}\n{rows}'\n")
        program.chmod(0o755)
        answer = call(run.root, "--format", "json", env={"PATH": f"{program.parent}:/usr/bin:/bin"})
        assert answer.returncode == 0, answer.stderr
        slurm = json.loads(answer.stdout)["runs"][0]["slurm"]
        assert (slurm["source"], slurm["gpu_seconds"], slurm["rows"]) == (source, 8 * 86400, 1)
    program.write_text("#!/bin/sh\necho 'slurmdbd: Connection refused' >&2; exit 1\n")
    text = call(run.root, env={"PATH": f"{program.parent}:/usr/bin:/bin"}).stdout
    assert "as recorded before; it gave no answer" in text
    assert "slurmdbd: Connection refused" in text
