"""What people read while a stage runs: one line for each event, and a progress bar with the time left in a terminal."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pixart_ds import files

if TYPE_CHECKING:
    from rich.progress import Progress


class Log:
    """One line for each event: time, subject, text. Each line goes to the stream and, if given, to a file.

    Args:
        subject: Who speaks, for example the stage's name.
        stream: Where lines are shown; None for nowhere.
        path: File that lines are appended to.
    """

    def __init__(self, subject: str, stream: TextIO | None = sys.stdout, path: Path | None = None) -> None:
        self.subject = subject
        self.stream = stream
        self.path = path
        self._lock = threading.Lock()

    def event(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {self.subject:<12} {text}\n"
        with self._lock:
            if self.path is not None:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(line)
            if self.stream is not None:
                self.stream.write(line)
                self.stream.flush()


def duration(seconds: float) -> str:
    """`47 s`, `3 min 05 s`, `5 h 20 min`, `3 d 04 h`: two units at most."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def si(number: float, unit: str = "") -> str:
    """A number with three digits and a prefix: 1.71 G, 11.4 k."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


class ProgressBar:
    """A bar with the time left, drawn in a terminal from the newest attempt's metrics; nothing elsewhere.

    It only reads files, so it works beside any launcher. While it is shown, what is written to `sys.stdout` scrolls above it.

    Args:
        attempts: The stage's folder of attempts.
        total_images: Length of the stage.
        subject: Text before the bar.
        stream: The terminal.
    """

    def __init__(self, attempts: Path, total_images: int, subject: str, stream: TextIO | None = None) -> None:
        self.attempts = attempts
        self.total_images = total_images
        self.subject = subject
        self.stream = stream or sys.stdout
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._progress: Progress | None = None

    def __enter__(self) -> ProgressBar:
        if self.stream.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=Console(file=self.stream), transient=True)
            self._progress.start()
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None and self._progress is not None:
            self._thread.join()
            self._progress.stop()

    def _newest(self) -> dict[str, float] | None:
        for metrics in sorted(self.attempts.glob("*/metrics.jsonl"), reverse=True):
            if (row := files.last_json_line(metrics)) is not None:
                return dict(row)
        return None

    def _follow(self) -> None:
        assert self._progress is not None
        task = self._progress.add_task(self.subject, total=self.total_images, note="starting")
        while not self._done.wait(0.5):
            if (row := self._newest()) is not None:
                note = f"loss {row['loss']:.3f}" if row.get("loss") is not None else ""
                self._progress.update(task, completed=row["images_seen"], note=note)
