"""Lines and figures for people."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pixart_ds.log import Log, ProgressBar, Work, duration, si


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (86400 * 3 + 4 * 3600, "3 d 04 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (11_392, "11.4 k"), (1.7088e9, "1.71 G"), (3e12, "3 T")]
)
def test_si(number: float, text: str) -> None:
    assert si(number) == text


def test_log_writes_one_line_for_each_event_to_stream_and_file(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = Log("stage2", stream, tmp_path / "log.txt")
    log.event("saved at 4 k images")
    log.event("done")
    assert stream.getvalue() == (tmp_path / "log.txt").read_text()
    assert re.fullmatch(r"(\d\d:\d\d:\d\d stage2 +(saved at 4 k images|done)\n){2}", stream.getvalue())


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_follows_the_newest_metrics_and_is_silent_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "0001").mkdir()
    (tmp_path / "0001" / "metrics.jsonl").write_text('{"images_seen": 50, "loss": 0.25}\n')
    quiet, terminal = io.StringIO(), _Terminal()
    with ProgressBar(tmp_path, 100, "stage2", quiet), ProgressBar(tmp_path, 100, "stage2", terminal):
        end = time.monotonic() + 20
        while "loss 0.250" not in terminal.getvalue() and time.monotonic() < end:
            time.sleep(0.05)
    assert quiet.getvalue() == ""
    assert "50 %" in terminal.getvalue()
    assert "loss 0.250" in terminal.getvalue()


class _Clock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def said(stream: io.StringIO) -> list[str]:
    """The lines without their times."""
    lines = stream.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d prepare {6}", line) for line in lines)
    return [line[22:] for line in lines]


def test_work_says_a_line_at_its_ends_and_at_most_one_each_30_seconds() -> None:
    stream, clock = io.StringIO(), _Clock()
    with Work("encode", 1000, "pictures", stream=stream, clock=clock) as work:
        for second in range(1, 101):
            clock.now = 1000.0 + second
            work.advance(10, note="" if second < 50 else "2 broken")
    assert said(stream) == [
        "encode: 0 of 1,000 pictures (0.0 %)",
        "encode: 300 of 1,000 pictures (30.0 %), 10 pictures/s, 1 min 10 s left",
        "encode: 600 of 1,000 pictures (60.0 %), 10 pictures/s, 40 s left, 2 broken",
        "encode: 900 of 1,000 pictures (90.0 %), 10 pictures/s, 10 s left, 2 broken",
        "encode: done, 1,000 pictures in 1 min 40 s, 10 pictures/s, 2 broken",
    ]


def test_what_was_done_before_is_no_work_of_now() -> None:
    stream, clock = io.StringIO(), _Clock()
    with Work("encode", 1_000_000, "pictures", stream=stream, done=900_000, clock=clock) as work:
        clock.now += 30
        work.advance(6300)
        assert work.rate() == 210
        clock.now += 30
        work.advance(93_700)
    first, second, third, last = said(stream)
    assert first == "encode: 900,000 of 1,000,000 pictures (90.0 %)"
    assert second == "encode: 906,300 of 1,000,000 pictures (90.6 %), 210 pictures/s, 7 min 26 s left"
    assert third == "encode: 1,000,000 of 1,000,000 pictures (100.0 %), 1,667 pictures/s"
    assert last == "encode: done, 1,000,000 pictures (900,000 of them before) in 1 min 00 s, 1,667 pictures/s"


def test_the_rate_is_of_the_last_two_minutes() -> None:
    clock = _Clock()
    with Work("scan", None, "files", stream=io.StringIO(), clock=clock) as work:
        for _ in range(1000):
            clock.now += 1
            work.advance(100)
        for _ in range(150):
            clock.now += 1
            work.advance(5)
        assert work.rate() == pytest.approx(5)
        clock.now += 600  # what comes less often than that has a rate, too
        work.advance(300)
        assert 0 < work.rate() < 5


def test_nothing_to_do_an_unknown_total_and_a_clock_that_stands_still_divide_by_nothing() -> None:
    stream, clock = io.StringIO(), _Clock()
    with Work("scan", 0, "files", stream=stream, clock=clock):
        pass
    with Work("scan", None, "files", stream=stream, clock=clock, every=0) as work:
        work.advance(7)
        assert work.rate() == 0
    assert said(stream) == [
        "scan: 0 of 0 files (100.0 %)",
        "scan: done, 0 files in 0 s",
        "scan: 0 files",
        "scan: 7 files",
        "scan: done, 7 files in 0 s",
    ]


def _fails(stream: io.StringIO) -> None:
    with Work("scan", 10, "files", stream=stream, clock=_Clock()) as work:
        work.advance(3)
        raise ValueError("broken")


def test_work_that_fails_says_how_far_it_came() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="broken"):
        _fails(stream)
    assert said(stream)[-1] == "scan: stopped, 3 of 10 files in 0 s"


def test_threads_lose_no_count() -> None:
    with Work("scan", 40_000, "files", stream=io.StringIO()) as work:
        threads = [threading.Thread(target=lambda: [work.advance() for _ in range(10_000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert work.done == 40_000


def test_work_is_a_bar_in_a_terminal_and_leaves_one_line() -> None:
    code = """
import select, sys, time
from pixart_ds.log import Work
with Work("encode", 400, "pictures") as work:
    for number in range(4):
        time.sleep(0.3)
        work.advance(100, note="part [bold]7[/bold]")
        if number == 1:
            select.select([sys.stdin], [], [], 20)  # until that was drawn
"""
    drawn = re.compile(r"encode ━.* 200/400, [\d.]+/s, \d+ s, \d+ s left, part \[bold\]7\[/bold\]")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "110"}
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=theirs, stdout=theirs, env=environment
    )
    os.close(theirs)
    assert child.stdin is not None
    shown, text = b"", ""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # a terminal whose last process has left
            break
        if not more:
            break
        shown += more
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="ignore"))
        if drawn.search(text):
            child.stdin.close()
    os.close(ours)
    assert child.wait() == 0
    assert drawn.search(text)
    assert len(re.findall(r"prepare", text)) == 1
    assert re.search(
        r"prepare {6}encode: done, 400 pictures in \d+ s, [\d.]+ pictures/s, part \[bold\]7\[/bold\]\r\n$", text
    )
