"""Entries and their book: time divided without rest, kills survived, what cannot be read named."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pixart_ds import files
from pixart_ds.errors import DataError
from pixart_ds.ledger.accounting import whole_parts
from pixart_ds.ledger.book import furthest, read_book, write_entry
from pixart_ds.ledger.entries import PARTS, Entry, energy_of, parts_of
from tests.ledger.worlds import History, a_run, entry, pulse


def test_what_lies_before_and_after_rank_0() -> None:
    launch = entry(hours=1, pause_s=10.0)  # 1000 to 4600; the ranks were started at 1010
    said = pulse(1, 1025.0, {"startup": 100.0, "productive": 3000.0, "checkpoint": 50.0})
    assert parts_of(launch, said, ended=True) == {
        "startup": 10 + 15 + 100,
        "productive": 3000,
        "checkpoint": 50,
        "idle": 3600 - 10 - 15 - 3150,  # it hung, or left
    }
    running = parts_of(launch, said, ended=False)
    assert (running["unattributed"], "idle" in running) == (425, False)
    again = entry(hours=1, launch=2, pause_s=10.0)
    assert parts_of(again, said, ended=True)["idle"] == 425 + 10, "a pause between launches"


def test_a_launch_whose_ranks_never_came_up_was_all_start_up() -> None:
    assert parts_of(entry(hours=1, pause_s=5.0), {}, ended=True) == {"startup": 3600}
    assert parts_of(entry(hours=1, pause_s=5.0), {}, ended=False) == {"startup": 5, "unattributed": 3595}


def test_clocks_that_differ_make_no_time() -> None:
    said = pulse(1, 1e12, {"startup": 100.0, "productive": 3700.0, "another version's": 5.0})
    parts = parts_of(entry(hours=1), said, ended=True)
    assert sum(parts.values()) == pytest.approx(3600, abs=0.01)
    assert parts["productive"] == pytest.approx(3600 * 3700 / 3800, abs=0.01)
    assert "another version's" not in parts


@pytest.mark.parametrize("seed", range(40))
def test_histories_with_kills_add_up(tmp_path: Path, seed: int) -> None:
    """Whatever was killed when: the parts of every launch are its time, and the attempts' time is the allocations'."""
    run = a_run(tmp_path, attempts=6)
    history = History(run, "stage1", seed)
    for number in range(1, 7):
        history.attempt(number)
    book = read_book(run.root)
    for number, (began, ended) in history.spans.items():
        own = [each for each in book.stages["stage1"] if each.attempt == number]
        assert (own[0].started, own[-1].until) == pytest.approx((began, ended), abs=1e-3)
        assert sum(each.seconds for each in own) == pytest.approx(ended - began, abs=1e-3)
        for each in own:
            parts = whole_parts(each)
            assert sum(parts.values()) == pytest.approx(each.seconds, abs=1e-3)
            assert min(parts.values()) >= 0
            assert set(parts) <= set(PARTS)
    assert furthest(run.stage("stage1")) == history.clock
    torn = [
        number for number in history.spans if b"sta" in run.stage("stage1").attempt(number).ledger.read_bytes()[-5:]
    ]
    assert list(book.problems) == [f"stage1, attempt {n}: the last line of its ledger is cut off" for n in torn]


def test_the_last_line_of_a_launch_counts_and_a_killed_supervisor_leaves_an_account(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    attempt = run.stage("stage1").attempt(1)
    first = entry(hours=0, outcome="running", images_to=0)
    write_entry(attempt, first)
    for seconds in (5, 10, 15):
        write_entry(attempt, first.still_running(1000.0 + seconds, {"images_seen": 10 * seconds}))
    with open(attempt.ledger, "a") as ledger:
        ledger.write('{"stage": "stage1", "att')  # torn by the kill
    (found,) = read_book(run.root).stages["stage1"]
    assert (found.outcome, found.until, found.images) == ("lost", 1015.0, 150)


def test_between_its_lines_a_running_attempt_is_known_by_its_signs_of_life(tmp_path: Path) -> None:
    run, now = a_run(tmp_path, attempts=1), time.time()
    attempt = run.stage("stage1").attempt(1)
    write_entry(attempt, entry(started=now - 100, until=now - 90, outcome="running", images_to=0))
    attempt.heartbeat.write_text(json.dumps({"time": now}))
    attempt.pulses.mkdir()
    attempt.pulse(0).write_text(json.dumps(pulse(1, now - 95, {"startup": 10.0, "productive": 80.0}, flops=5e12)))
    attempt.pulse(1).write_text("{")  # being written
    files.append_json_line(attempt.metrics, {"images_seen": 640})
    (found,) = read_book(run.root).stages["stage1"]
    assert (found.outcome, found.until, found.images_to, found.flops) == ("running", now, 640, 5e12)
    assert whole_parts(found) == pytest.approx({"startup": 15, "productive": 80, "unattributed": 5}, abs=0.01)
    attempt.heartbeat.write_bytes(b"\0\0")  # emptied by a power loss
    (found,) = read_book(run.root).stages["stage1"]
    assert found.until == now - 90


def test_lines_of_the_first_format_are_read(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    old = {
        "stage": "stage1", "attempt": 1, "launch": 1, "device": "cpu", "device_count": 2, "started": 10.0, "until": 20.0,
        "outcome": "done", "images_from": 0, "images_to": 64, "source": "estimate",
    }  # fmt: skip
    files.append_json_line(run.stage("stage1").attempt(1).ledger, old)
    book = read_book(run.root)
    (found,) = book.stages["stage1"]
    assert (found.seconds, found.images, book.problems) == (10, 64, ())
    assert whole_parts(found) == {"unattributed": 10}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"format": 3, "launch": 1}', "it is of the later format 3; this version reads up to 2"),
        ('{"launch": 1, "stage": "stage1"}', "attempt, device, device_count, started, until, outcome, "),
        ('{"launch": 1', "it is not JSON"),
        ("[1]", "it is no entry"),
        ('{"launch": "x"}', "stage, attempt, device"),
    ],
)
def test_what_cannot_be_read_is_named_and_the_rest_is_reported(tmp_path: Path, line: str, problem: str) -> None:
    run = a_run(tmp_path)
    write_entry(run.stage("stage1").attempt(1), entry())
    broken = run.stage("stage1").attempt(2)
    broken.ledger.write_text(line + "\n")
    write_entry(broken, entry(attempt=2, launch=2))
    book = read_book(run.root)
    assert [(each.attempt, each.launch) for each in book.stages["stage1"]] == [(1, 1), (2, 2)]
    (said,) = book.problems
    assert said.startswith("stage1, attempt 2: line 1 of its ledger is left out: ")
    assert problem in said


@pytest.mark.parametrize("manifest", [{"format": 2, "steps": []}, [], {"stages": {"stage1": 1}}])
def test_a_run_of_another_version_is_an_error(tmp_path: Path, manifest: object) -> None:
    run = a_run(tmp_path)
    files.write_json(run.manifest, manifest)
    with pytest.raises(DataError, match="of another version: its manifest lists no stages"):
        read_book(run.root)


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no run in this folder"):
        read_book(tmp_path)


def test_the_nodes_energies_are_summed_by_source() -> None:
    readings = [
        {"source": "nvml-energy", "joules": 1000.0, "device_seconds": 80.0, "note": None},
        {"source": "nvml-energy", "joules": 1100.0, "device_seconds": 80.0, "note": None},
        {"source": "tdp", "joules": 2400.0, "device_seconds": 8.0, "note": "no driver"},
    ]
    assert energy_of(readings) == {
        "joules": {"nvml-energy": 2100.0, "tdp": 2400.0},
        "device_seconds": {"nvml-energy": 160.0, "tdp": 8.0},
        "notes": ["no driver"],
    }
    said = [pulse(1, 1000.0, {}, rank=rank, energy=reading) for rank, reading in zip((0, 8, 16), readings, strict=True)]
    launch: Entry = entry().divided(said, ended=True)
    assert launch.energy["joules"]["tdp"] == 2400
    assert launch.hosts == ("n1", "n2", "n3")
