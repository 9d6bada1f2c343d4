"""The status of a run for a terminal: a page, and one that is drawn again and again."""

from __future__ import annotations

import datetime
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from pixart_ds.cluster.status import is_done
from pixart_ds.cluster.status_stage import first_line
from pixart_ds.ledger.budget import figure
from pixart_ds.log import duration, si
from pixart_ds.page.words import digits, percent
from pixart_ds.report.words import unit

_HOME, _END_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_LEAST, _MOST = 72, 116
_INDENT = " " * 14
_MOST_WARNINGS = 20


def page(status: Mapping[str, Any], width: int = 100) -> str:
    """The status as text.

    Args:
        status: Of `run_status`.
        width: Columns; commands and paths may be longer, so that they can be copied.
    """
    width = min(max(width, _LEAST), _MOST)
    lines = [*_head(status), ""]
    lines.append(f"{'stage':<14}{'state':<12}{'images':>19}{'':>6}{'loss':>9}{'images/s':>10}")
    for row in status["stages"]:
        lines += _stage(row, status, width)
    if facts := list(_facts(status, width)):
        lines += ["", *facts]
    if status["warnings"]:
        lines += ["", "Warnings"]
        for warning in status["warnings"][:_MOST_WARNINGS]:
            lines += _wrapped(warning, width, "  - ", "    ")
        if (more := len(status["warnings"]) - _MOST_WARNINGS) > 0:
            lines.append(f"  - and {more} more; --json lists them")
    if status["next"]:
        lines += ["", "Next", *(f"  {each}" for each in status["next"])]
    return "\n".join(line.rstrip() for line in lines)


def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False, break_long_words=False
    )


def _head(status: Mapping[str, Any]) -> Iterator[str]:
    rows = status["stages"]
    done = sum(row["state"] == "done" for row in rows)
    now = datetime.datetime.fromtimestamp(status["time"], datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    yield f"Run {status['run']}"
    yield f"of the chain {status['chain']}: {done} of {len(rows)} stages are done; {now}"


def _stage(row: Mapping[str, Any], status: Mapping[str, Any], width: int) -> Iterator[str]:
    images = "-" if row["total_images"] is None else f"{si(row['images_seen'])} of {si(row['total_images'])}"
    if row["state"] == "not started":
        yield f"{row['stage']:<14}{row['state']:<12}{images:>19}"
        return
    part = "-" if row["part"] is None else f"{int(100 * row['part'])}%"
    loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
    running = row["state"] == "running"
    rate = "-" if row["images_per_second"] is None or not running else si(row["images_per_second"])
    yield f"{row['stage']:<14}{row['state']:<12}{images:>19}{part:>6}{loss:>9}{rate:>10}"
    for text in _about(row, status):
        yield from _wrapped(text, width, _INDENT, _INDENT + "  ")


def _about(row: Mapping[str, Any], status: Mapping[str, Any]) -> Iterator[str]:
    """The lines below a stage that is under way, or was."""
    if row["state"] == "done":
        return
    if row["cause"] is not None:
        ending = "failed" if row["state"] == "failed" else "ended"
        code = f" (exit code {row['exit_code']})" if row["state"] == "failed" and row["exit_code"] is not None else ""
        yield f"{ending}{code}: {first_line(row['cause'])}"
        remedy = next((line.strip() for line in row["cause"].splitlines() if line.strip().startswith("to do: ")), None)
        if remedy is not None:
            yield remedy
    for job in status["jobs"]:
        if job["stage"] == row["stage"]:
            yield _job(job, status["time"])
    if row["attempts"]:
        yield _attempts(row["outcomes"])
    if row["checkpoint"] is not None:
        age, late = row["checkpoint_age_s"], ", LATE" if row["checkpoint_is_late"] else ""
        yield f"checkpoint {row['checkpoint']}" + ("" if age is None else f", {duration(age)} ago") + late
    elif row["attempts"]:
        yield "no checkpoint yet" + (", LATE" if row["checkpoint_is_late"] else "")
    if row["state"] == "running" and row["seconds_left"] is not None:
        yield f"{duration(row['seconds_left'])} left of the stage"


def _job(job: Mapping[str, Any], now: float) -> str:
    """`job 72, 8 nodes, PENDING (Resources): is next, as soon as nodes are free`."""
    nodes = "1 node" if job["nodes"] == "1" else f"{job['nodes']} nodes"
    told = f"job {job['job']}, {nodes}, {job['state']}"
    starts = job["starts"]
    if job["state"] != "PENDING":
        return told + ("" if starts is None else f" for {duration(max(0.0, now - starts))}")
    reason = "" if job["reason"] is None else f" ({job['reason']})"
    when = f"; expected to start in {duration(starts - now)}" if starts is not None and starts > now else ""
    return f"{told}{reason}: {job['words']}{when}"


def _attempts(outcomes: Sequence[str]) -> str:
    """attempt 7 (2 stopped, 4 failed before); without those of which there are none."""
    before = [f"{count} {word}" for word in dict.fromkeys(outcomes[:-1]) if (count := outcomes[:-1].count(word))]
    return f"attempt {len(outcomes)}: {outcomes[-1]}" + (f" (before: {', '.join(before)})" if before else "")


def _facts(status: Mapping[str, Any], width: int) -> Iterator[str]:
    if status["seconds_left"] is not None:
        ends = datetime.datetime.fromtimestamp(status["time"] + status["seconds_left"], datetime.UTC)
        running = any(row["state"] == "running" for row in status["stages"])
        when = f"about {ends:%Y-%m-%d %H:%M} UTC" if running else "once it runs"
        how = "by the newest steps" if status["forecast"] is None else status["forecast"]["how"]
        text = f"{duration(status['seconds_left'])} to the chain's end, {when} ({how})"
        yield from _wrapped(text, width, "Time left   ", " " * 12)
    if (account := status["account"]) is not None and account["device_seconds"]:
        name, key, _ = unit(account)
        money = "-" if account["usd"] is None else f"${digits(account['usd'])}"
        text = (
            f"{digits(account[key])} {name}, {digits(account['kwh'])} kWh, {money}, {digits(account['kg_co2e'])} kg CO2e; "
            f"goodput {percent(account['goodput'])}"
        )
        yield from _wrapped(text, width, "Cost so far ", " " * 12)
    for row in status["budget"]:
        ahead = "" if row["forecast"] is None else f"; {figure(row['forecast'])} by the chain's end at this pace"
        text = f"{figure(row['used'])} of {figure(row['limit'])} {row['what']}, {percent(row['part'])}{ahead}"
        yield from _wrapped(text, width, "Budget      ", " " * 12)


def show(
    look: Callable[[], dict[str, Any]],
    *,
    every_s: float | None = None,
    as_json: bool = False,
    stream: TextIO | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Prints a status, once or again and again until the run is done or Ctrl-C is pressed.

    Args:
        look: `run_status` of the run.
        every_s: Seconds between two looks; None: one.
        as_json: As JSON, one line for each look where there are several.
        stream: By default the standard output; a terminal is drawn anew, elsewhere one page follows the other.
        sleep: Waits.
    """
    stream = stream or sys.stdout
    drawn = every_s is not None and not as_json and stream.isatty()
    try:
        while True:
            status = look()
            size = shutil.get_terminal_size((100, 50))
            if as_json:
                text = json.dumps(status, indent=2 if every_s is None else None, ensure_ascii=False)
            else:
                text = page(status, size.columns)
            stream.write(_screen(text, size.lines) if drawn else text + "\n")
            stream.flush()
            if every_s is None or is_done(status):
                break
            sleep(every_s)
            if not drawn and not as_json:
                stream.write("\n")
    except KeyboardInterrupt:
        stream.write("\n")
        if every_s is None:
            raise


def _screen(text: str, height: int) -> str:
    """The page from the top of a terminal on, over what was there; what does not fit is left out, since it would scroll."""
    lines = text.split("\n")
    if len(lines) >= height:
        lines = [*lines[: height - 2], "…"]
    return _HOME + "".join(f"{line}{_END_OF_LINE}\n" for line in lines) + _BELOW
