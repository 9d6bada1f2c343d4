"""What people read while a stage runs: one line for each event, and a progress bar with the time left in a terminal."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
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


def _bar(stream: TextIO, *columns: str, time_left: bool = False) -> Progress | None:
    """A bar that vanishes at its end, between its description and columns; None where the stream is no terminal.

    Args:
        stream: Where it is drawn.
        columns: Patterns of what rich knows of a task.
        time_left: Whether rich's own guess of it is the last column.
    """
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    words = [TextColumn(column, markup=False) for column in columns]
    last = [TimeRemainingColumn()] if time_left else []
    first = TextColumn("{task.description}", markup=False)
    return Progress(first, BarColumn(bar_width=None), *words, *last, console=Console(file=stream), transient=True)


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
        self._progress = _bar(self.stream, "{task.percentage:>3.0f} %", "{task.fields[note]}", time_left=True)
        if self._progress is not None:
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


class Work:
    """Long work that is counted: a bar in a terminal, elsewhere a line now and then, as an `event` of a log.

    Args:
        subject: What is done, for example `encode`.
        total: How much there is to do; None if nobody knows.
        unit: Of what, in the plural.
        stream: Where it is shown; None: `sys.stderr`.
        done: How much of the total was done before; it does not count for the rate.
        program: Who speaks in the lines.
        every: Seconds between two lines.
        clock: Gives seconds.
    """

    WINDOW = 120.0
    """Seconds over which the rate is taken."""

    def __init__(
        self,
        subject: str,
        total: int | None,
        unit: str,
        *,
        stream: TextIO | None = None,
        done: int = 0,
        program: str = "prepare",
        every: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.subject, self.total, self.unit = subject, total, unit
        self.done, self._before = done, done
        self.stream = stream or sys.stderr
        self._log = Log(program, self.stream)
        self._every, self._clock = every, clock
        self._lock = threading.Lock()
        self._note = ""
        self._began = self._told = clock()
        self._past: deque[tuple[float, int]] = deque([(self._began, done)])
        self._progress: Progress | None = None

    def __enter__(self) -> Work:
        self._began = self._told = self._clock()
        self._past = deque([(self._began, self.done)])
        self._progress = _bar(self.stream, "{task.fields[words]}")
        if self._progress is None:
            self._log.event(self._words())
        else:
            self._progress.start()
            self._progress.add_task(self.subject, total=self.total, completed=self.done, words=self._short_words())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._log.event(self._last_words(whole=kind is None))

    def advance(self, count: int = 1, note: str = "") -> None:
        """So much more is done; any thread may say so.

        Args:
            count: How much.
            note: Stands behind the figures until another one takes its place.
        """
        with self._lock:
            now = self._clock()
            self.done += count
            self._note = note or self._note
            if now - self._past[-1][0] >= 1.0:
                self._past.append((now, self.done))
            # One mark before the window stays, so that what comes less often than a window has a rate, too.
            while len(self._past) > 1 and now - self._past[1][0] >= self.WINDOW:
                self._past.popleft()
            if self._progress is not None:
                self._progress.update(self._progress.task_ids[0], completed=self.done, words=self._short_words())
            elif now - self._told >= self._every:
                self._told = now
                self._log.event(self._words())

    def rate(self) -> float:
        """Units for each second of the last two minutes; 0 as long as nothing is known."""
        start, done = self._past[0]
        seconds = self._clock() - start
        return (self.done - done) / seconds if seconds > 0 else 0.0

    def _words(self) -> str:
        told = [f"{self.done:,} {self.unit}"]
        if self.total is not None:
            share = 100 * self.done / self.total if self.total else 100.0
            told = [f"{self.done:,} of {self.total:,} {self.unit} ({share:.1f} %)"]
        rate = self.rate()
        told += [f"{_per_second(rate)} {self.unit}/s"] if rate else []
        told += [self._left(rate), self._note]
        return f"{self.subject}: {', '.join(each for each in told if each)}"

    def _short_words(self) -> str:
        """The same without the share, which the bar shows, so that a terminal has room for it; with the time that passed."""
        rate = self.rate()
        told = [f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"]
        told += [f"{_per_second(rate)}/s"] if rate else []
        told += [duration(self._clock() - self._began), self._left(rate), self._note]
        return ", ".join(each for each in told if each)

    def _left(self, rate: float) -> str:
        left = 0 if self.total is None else self.total - self.done
        return f"{duration(left / rate)} left" if left > 0 and rate else ""

    def _last_words(self, whole: bool) -> str:
        seconds = self._clock() - self._began
        now = self.done - self._before
        pace = f", {_per_second(now / seconds)} {self.unit}/s" if now > 0 and seconds > 0 else ""
        note = f", {self._note}" if self._note else ""
        of = "" if self.total is None or (whole and self.done == self.total) else f" of {self.total:,}"
        before = f" ({self._before:,} of them before)" if self._before else ""
        state = "done" if whole else "stopped"
        return f"{self.subject}: {state}, {self.done:,}{of} {self.unit}{before} in {duration(seconds)}{pace}{note}"


def _per_second(rate: float) -> str:
    """Three digits at least, none behind the point of large ones."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
