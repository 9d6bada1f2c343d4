"""`pixart-ds doctor` as a person and as the supervisor call it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pixart_ds.cli import main
from pixart_ds.doctor import command, examine
from pixart_ds.doctor.ask import Child, ask, end_all
from pixart_ds.doctor.check import Check, ok
from pixart_ds.doctor.probes import config
from pixart_ds.doctor.subject import Subject
from pixart_ds.errors import MachineError
from pixart_ds.layout import RunLayout
from tests.doctor.subjects import make_run, subject

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunLayout:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    return make_run(tmp_path)


def test_the_quick_half_on_a_cpu_imports_no_torch_and_prints_one_line(run: RunLayout) -> None:
    code = (
        "import sys\nfrom pixart_ds.cli import main\n"
        f"code = main(['doctor', {str(run.root)!r}, 'stage1', '--quick', '--device', 'cpu', '--json'])\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'boto3'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)\n"
    )
    environment = {**os.environ, "SLURMD_NODENAME": "n7"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert answer.returncode == 0, answer.stderr
    (line,) = answer.stdout.splitlines()
    said = json.loads(line)
    assert list(said) == ["host", "verdict", "checks", "seconds"]
    assert (said["host"], said["verdict"]) == ("n7", "ok")
    assert set(said["checks"][0]) == {"name", "verdict", "evidence", "remedy"}
    skipped = [check for check in said["checks"] if check["verdict"] == "skipped"]
    assert {check["name"] for check in skipped if check["name"].startswith("gpu.")} == {
        "gpu.driver",
        "gpu.count",
        "gpu.health",
        "gpu.processes",
        "gpu.matmul",
    }


def test_a_failure_is_exit_code_3(run: RunLayout, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.environ["TMPDIR"], before = str(tmp_path / "none"), os.environ.get("TMPDIR")
    try:
        assert main(["doctor", str(run.root), "stage1", "--quick", "--device", "cpu", "--json"]) == 3
    finally:
        del os.environ["TMPDIR"]
        if before is not None:
            os.environ["TMPDIR"] = before
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "failed"
    assert [check["name"] for check in said["checks"] if check["verdict"] == "failed"] == ["machine.tmp_space"]


def test_a_run_that_this_node_does_not_see_is_the_nodes_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = str(tmp_path / "gone")
    assert main(["doctor", gone, "stage1", "--quick", "--device", "cpu", "--json"]) == 3
    said = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert said["machine.run_folder"]["evidence"] == f"there is no run in this folder (no manifest.json) ({gone})"
    assert said["machine.run_folder"]["remedy"] == "mount the run's file system on this node, or correct RUN"
    assert main(["doctor", gone, "stage1"]) == 2  # a person's slip of the pen
    assert "there is no run in this folder" in capsys.readouterr().err


def test_a_stage_that_the_run_does_not_have(run: RunLayout, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(run.root), "stage9", "--quick", "--device", "cpu"]) == 2
    assert "choose one of: stage1, stage2" in capsys.readouterr().err


def test_without_a_stage_it_is_the_first_that_is_not_done(run: RunLayout) -> None:
    assert command._first_to_do(run) == "stage1"
    run.stage("stage1").done.write_text("{}")
    assert command._first_to_do(run) == "stage2"


@pytest.mark.distributed
def test_the_whole_on_a_sound_machine(run: RunLayout, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(run.root), "stage1", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].endswith(f", cpu, stage1 of {run.root}")
    assert [line for line in text.splitlines() if re.fullmatch(r"[a-z]+", line)] == [
        "machine",
        "gpu",
        "network",
        "data",
        "slurm",
        "config",
    ]
    assert re.fullmatch(r"\d+ ok, \d+ warnings?, 0 failed, \d+ skipped", text.splitlines()[-1])
    assert "FAILED" not in text


@pytest.mark.distributed
def test_the_whole_as_json_and_the_table_of_all_checks_in_the_docs(
    run: RunLayout, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(run.root), "stage2", "--device", "cpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "warning"  # stage1 has handed nothing over yet
    names = [check["name"] for check in said["checks"]]
    assert len(set(names)) == len(names)
    documented = re.findall(r"^\| `([a-z]+\.[a-z_0-9]+)`", (ROOT / "docs" / "doctor.md").read_text(), re.MULTILINE)
    assert documented == names


def test_a_line_that_srun_does_not_mix_with_another_nodes() -> None:
    def answer(*verdicts: str, size: int = 50) -> dict[str, Any]:
        checks = [Check(f"machine.{n}", v, "é" * size, "…").to_json() for n, v in enumerate(verdicts)]  # type: ignore[arg-type]
        return {"host": "n1", "verdict": "failed", "checks": checks, "seconds": 1.0}

    def cut(given: dict[str, Any]) -> tuple[list[str], int, list[str | None]]:
        text = command.one_line(given, 1000)
        assert len(text.encode()) <= 1000
        assert "\n" not in text
        said = json.loads(text)
        return (
            [each["name"] for each in said["checks"]],
            said.get("left_out", 0),
            [each["remedy"] for each in said["checks"]],
        )

    assert json.loads(command.one_line(answer(*["ok"] * 20), None)) == answer(*["ok"] * 20)
    assert cut(answer("ok", "ok")) == (["machine.0", "machine.1"], 0, ["…", "…"])
    assert cut(answer(*["ok"] * 9, "warning", "failed")) == (["machine.10", "machine.9"], 9, ["…", "…"])
    assert cut(answer("ok", "failed", size=900)) == (["machine.1"], 1, [None])
    names, left_out, _ = cut(answer(*["failed"] * 20, size=200))
    assert (names, left_out) == (["machine.0", "machine.1"], 18)
    assert cut(answer(*["ok"] * 20)) == ([], 20, [])


# ---- a probe that does not behave --------------------------------------------------------------------------------------


def broken(subject: Subject) -> Check:
    raise KeyError("key")


def refused(subject: Subject) -> Check:
    raise MachineError("the disk is full", where="/r", remedy="free it")


def unexplained(subject: Subject) -> Check:
    raise MachineError("the disk is full")


def hanging(subject: Subject) -> Check:
    time.sleep(60)
    return ok("test_command.hanging", "…")


def sound(subject: Subject) -> Check:
    return ok("test_command.sound", "fine")


BUG = "this is a bug of pixart-ds unless the text says otherwise: please report it with this line"


def test_a_probe_that_raises_has_failed_and_the_others_go_on() -> None:
    found = examine.examine(subject(), [broken, refused, unexplained, sound], (10.0, 10.0))
    assert [(check.name, check.verdict, check.evidence, check.remedy) for check in found] == [
        ("test_command.broken", "failed", "the probe itself broke: KeyError: 'key'", BUG),
        ("test_command.refused", "failed", "the disk is full (/r)", "free it"),
        ("test_command.unexplained", "failed", "the disk is full", BUG),
        ("test_command.sound", "ok", "fine", None),
    ]


def test_a_probe_that_hangs_is_left_behind_and_time_for_all_is_kept() -> None:
    found = examine.examine(subject(), [hanging, sound], (1.0, 10.0))
    assert [(check.verdict, check.evidence) for check in found] == [("failed", "no answer within 1 s"), ("ok", "fine")]
    assert found[0].remedy == "see what hangs on this node (dmesg, mount), and leave the node out until then"
    found = examine.examine(subject(), [hanging, sound], (10.0, 0.1))
    assert (found[1].verdict, found[1].evidence) == ("skipped", "no time is left after those that hung")


# ---- questions to other processes --------------------------------------------------------------------------------------


def test_a_child_that_says_something_else_and_one_that_is_not_there() -> None:
    answer = ask("no_such_module", timeout_s=30.0)
    assert answer.error is not None
    assert answer.error.startswith("exit code 1: ")
    assert answer.error.endswith("No module named pixart_ds.doctor.children.no_such_module")


def test_a_child_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nsleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr("pixart_ds.doctor.ask.sys.executable", str(script))
    child = Child("nvml")
    assert child.failure() is None
    assert child.answer(0.1).error == "no answer within 0 s"
    assert child.failure() == "killed by SIGKILL: it said nothing"
    left = Child("nvml")
    end_all()
    assert left.failure() == "killed by SIGKILL: it said nothing"


# ---- config ------------------------------------------------------------------------------------------------------------


def test_what_a_stage_starts_from(run: RunLayout) -> None:
    assert config.origin(subject(run)).evidence == "stage1 starts from scratch"
    check = config.origin(subject(run, "stage2"))
    assert (check.verdict, check.evidence) == (
        "warning",
        "stage2 starts from stage1, which has handed nothing over yet",
    )
    assert check.remedy == f"finish it first: pixart-ds train {run.root} stage1"
    handover = run.stage("stage1").handover
    handover.mkdir()
    (handover / "lineage.json").write_text("{}")
    assert config.origin(subject(run, "stage2")).evidence == "stage2 starts from stage1, which is there"


def test_a_handover_by_path_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    run = make_run(tmp_path, None, "stage2.init={source: handover, path: /none/handover, weights: ema}")
    (check,) = examine.examine(subject(run, "stage2"), [config.origin], (10.0, 10.0))
    assert check.verdict == "failed"
    assert check.evidence.startswith("stage2 starts from the handover /none/handover, which is not there")


def test_what_an_attempt_would_refuse(run: RunLayout) -> None:
    assert config.recipe(subject(run)).evidence == "stage1 and its DeepSpeed file can run on cpu"
    path = run.stage("stage1").deepspeed
    path.write_text(json.dumps({**json.loads(path.read_text()), "gradient_clipping": 7.0}))
    (check,) = examine.examine(subject(run), [config.recipe], (10.0, 10.0))
    assert check.verdict == "failed"
    assert "gradient_clipping" in check.evidence


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys\nfrom pixart_ds.cli import main\n"
        "try:\n    main(['doctor', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'yaml', 'pydantic'} & set(sys.modules)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "--quick" in answer.stdout
