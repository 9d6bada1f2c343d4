"""Slurm is asked, and what it said is kept: a program of our own stands for sacct."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pixart_ds import files
from pixart_ds.errors import DataError, MachineError
from pixart_ds.layout import RunLayout
from pixart_ds.ledger.sacct import COLUMNS, DELIMITER, Allocation, parse, summary
from pixart_ds.meters import sacct

ASKED = """
for word; do case $last in -j) jobs=$word ;; esac; last=$word; done
printf '%s\\n' "$*" "$SLURM_TIME_FORMAT $TZ $LC_ALL" >>"$0.asked"
"""


def row(job: str, index: int, state: str = "COMPLETED", seconds: int = 10) -> str:
    cells = [job, job, str(index), "pixart", "someone", state, "1000", "1001", "2000", str(seconds), "gres/gpu=8", ""]
    return DELIMITER.join(cells)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program; it is written by `says`."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin" / "sacct"


def says(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh{ASKED}{script}\n", errors="surrogateescape")
    program.chmod(0o755)


def prints(*rows: str) -> str:
    return "cat <<'END'\n" + "\n".join([DELIMITER.join(COLUMNS), *rows]) + "\nEND"


def allocation(job: str = "7", index: int = 11, state: str = "COMPLETED", seconds: int = 10) -> Allocation:
    return Allocation((job, str(index)), job, "pixart", "someone", state, 1001, seconds, 8, state == "RUNNING")


def test_where_there_is_no_sacct_there_is_no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sacct.ask(["7"]) is None


def test_it_is_asked_in_a_way_that_no_site_and_no_zone_changes(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(program, prints(row("7", 11), row("71_3", 12)))
    monkeypatch.setenv("TZ", "America/New_York")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    text = sacct.ask(["7", "71_3", "71+1", "7", "", "-a", "no number"])
    assert text is not None
    found = summary(parse(text, "sacct"))
    assert (found["gpu_seconds"], found["problems"]) == (160, [])
    words, environment = Path(f"{program}.asked").read_text().splitlines()
    assert words == (
        f"-X -D -P --noconvert -S 2020-01-01 --delimiter={DELIMITER} --format={','.join(COLUMNS)} -j 7,71+1,71_3"
    )
    assert environment == "%s UTC C"


def test_many_jobs_are_several_commands(program: Path) -> None:
    rest = row("", 0).split(DELIMITER, 2)[2]
    line = f'printf "%s\\n" "$job{DELIMITER}$job{DELIMITER}{rest}"'
    says(program, f"{prints()}\nIFS=,\nfor job in $jobs; do {line}; done")
    text = sacct.ask([str(1_000_000 + number) for number in range(450)])
    assert text is not None
    found = parse(text, "sacct")
    assert (len(found.allocations), found.problems) == (450, ())
    asked = Path(f"{program}.asked").read_text().splitlines()[::2]
    assert len(asked) == 3
    assert max(map(len, asked)) < 4096


def test_no_job_at_all_is_not_every_job(program: Path) -> None:
    says(program, prints(row("7", 11)))
    text = sacct.ask([])
    assert text is not None
    assert parse(text, "sacct").allocations == ()
    assert not Path(f"{program}.asked").exists()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'sacct: error: Problem talking to the database: Connection refused' >&2; exit 1", "Connection refused"),
        ("echo 'Slurm accounting storage is disabled'; exit 1", "Slurm accounting storage is disabled (exit code 1)"),
        ("exit 0", "nothing (exit code 0)"),
        (f"{prints(row('7', 11))}\nexit 1", "(exit code 1)"),
        ("exec sleep 60", "no answer in 1 s"),
    ],
)
def test_a_refusal_is_told(program: Path, script: str, said: str) -> None:
    says(program, script)
    with pytest.raises(MachineError) as caught:
        sacct.ask(["7"], patience_s=1.0)
    assert str(caught.value).startswith("sacct gives no account: ")
    assert said in str(caught.value)
    assert "slurmdbd" in str(caught.value)
    assert str(program) in str(caught.value)


def test_a_program_that_does_not_start_is_told(program: Path) -> None:
    program.write_bytes(b"\x7fELF nonsense")
    program.chmod(0o755)
    with pytest.raises(MachineError, match="Exec format error"):
        sacct.ask(["7"])


def test_a_name_in_no_encoding_does_not_stop_it(program: Path) -> None:
    says(program, prints(row("7", 11)).replace("pixart", "pix\udcff"))
    text = sacct.ask(["7"])
    assert text is not None
    assert [each.name for each in parse(text, "sacct").allocations] == ["pix\ufffd"]


def test_the_last_word_on_a_start_counts_and_only_news_are_written(tmp_path: Path) -> None:
    run = RunLayout(tmp_path)
    assert sacct.recorded(run) == []
    sacct.record(run, [allocation("7", 11, "RUNNING", 10), allocation("8", 12)])
    sacct.record(run, [allocation("7", 11, "RUNNING", 10), allocation("8", 12)])
    assert len(run.sacct.read_text().splitlines()) == 2
    sacct.record(run, [allocation("7", 11, "REQUEUED", 32), allocation("7", 13, "RUNNING", 1)])
    assert sacct.recorded(run) == [
        allocation("7", 11, "REQUEUED", 32),
        allocation("8", 12),
        allocation("7", 13, "RUNNING", 1),
    ], "8 stays: Slurm has forgotten it"
    assert len(run.sacct.read_text().splitlines()) == 4


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_line_costs_no_other(tmp_path: Path, cut: int) -> None:
    run = RunLayout(tmp_path)
    sacct.record(run, [allocation("7", 11), allocation("8", 12)])
    run.sacct.write_bytes(run.sacct.read_bytes()[:-cut])
    whole = [allocation("7", 11), allocation("8", 12)] if cut == 1 else [allocation("7", 11)]
    assert sacct.recorded(run) == whole
    sacct.record(run, [allocation("8", 12), allocation("9", 13)])
    assert sacct.recorded(run) == [allocation("7", 11), allocation("8", 12), allocation("9", 13)]


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    run = RunLayout(tmp_path)
    files.append_json_line(run.sacct, {"job": "7"})
    with pytest.raises(DataError, match="no allocation: {'job': '7'}"):
        sacct.recorded(run)


def test_a_folder_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        sacct.record(RunLayout(tmp_path / "nowhere"), [allocation()])
