"""Lines and figures for people."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from pixart_ds.log import Log, ProgressBar, duration, si


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
    import time

    (tmp_path / "0001").mkdir()
    (tmp_path / "0001" / "metrics.jsonl").write_text('{"images_seen": 50, "loss": 0.25}\n')
    quiet, terminal = io.StringIO(), _Terminal()
    with ProgressBar(tmp_path, 100, "stage2", quiet), ProgressBar(tmp_path, 100, "stage2", terminal):
        time.sleep(1.2)
    assert quiet.getvalue() == ""
    assert "50 %" in terminal.getvalue()
    assert "loss 0.250" in terminal.getvalue()
