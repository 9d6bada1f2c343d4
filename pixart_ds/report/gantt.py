"""When attempts ran, as inline SVG in real time; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pixart_ds.page.charts import TEXT, Axis, anchor, rect, svg, title_of, words_above


@dataclass(frozen=True)
class Span:
    """An attempt on the time axis, in seconds since 1970."""

    start: float
    end: float
    outcome: str
    title: str
    waited: float = 0.0
    """Seconds in the queue before the start."""
    shares: Sequence[tuple[str, float]] = ()
    """Of several attempts: outcomes, each with its part of their time."""


@dataclass(frozen=True)
class Lane:
    """A row of attempts."""

    name: str
    words: str
    spans: Sequence[Span] = field(default_factory=tuple)


_PIXEL = 0.1
"""Per cent of the width: about a pixel of a wide screen."""


def gantt_chart(lanes: Sequence[Lane], label: str) -> str:
    """Attempts in real time; those narrower than a pixel are drawn together with their neighbours.

    A marker below the bars stands at each end that was failed or lost, so that none hides in a merged bar.
    """
    spans = [span for lane in lanes for span in lane.spans]
    start = min((span.start - span.waited for span in spans), default=0.0)
    axis = Axis(start, max(max((span.end for span in spans), default=1.0), start + 1.0))
    drawn, y = [], 0
    for lane in lanes:
        drawn += words_above(y + 13, lane.name, lane.words)
        drawn.append(f'<rect class="track" x="0" y="{y + TEXT}" width="100%" height="18"/>')
        drawn += _waits(lane.spans, axis, y + TEXT + 4)
        for span in merged(lane.spans, (axis.high - axis.low) * _PIXEL / 100):
            drawn += _bars(span, axis, y + TEXT)
        drawn += _ends(lane.spans, axis, y + TEXT + 20)
        y += TEXT + 18 + 13
    return svg("gantt", y + 32, label, [*_time_grid(axis, y - 6), *drawn] if spans else drawn)


def merged(spans: Sequence[Span], pixel: float) -> list[Span]:
    """The spans in their sequence; those that share a pixel become one, with the shares of their outcomes."""
    bins: list[list[Span]] = []
    for span in sorted(spans, key=lambda each: each.start):
        if bins and span.end - bins[-1][0].start < 1.5 * pixel:
            bins[-1].append(span)
        else:
            bins.append([span])
    return [each[0] if len(each) == 1 else _together(each) for each in bins]


def _together(spans: Sequence[Span]) -> Span:
    times: dict[str, float] = {}
    counts: dict[str, int] = {}
    for span in sorted(spans, key=lambda each: each.outcome):
        times[span.outcome] = times.get(span.outcome, 0.0) + span.end - span.start
        counts[span.outcome] = counts.get(span.outcome, 0) + 1
    title = f"{len(spans)} attempts: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    whole = sum(times.values())
    shares = [(outcome, time / whole if whole else counts[outcome] / len(spans)) for outcome, time in times.items()]
    most = max(shares, key=lambda each: each[1])[0]
    return Span(spans[0].start, max(span.end for span in spans), most, title, shares=shares)


def _bars(span: Span, axis: Axis, y: int) -> list[str]:
    """One bar, or for several attempts one that is divided from top to bottom."""
    x, end = axis.at(span.start), axis.at(span.end)
    width = max(end - x, 1.5 * _PIXEL)
    if not span.shares:
        return [rect(f"{span.outcome}{' seam' if end - x > 0.5 else ''}", x, width, y, 18, span.title)]
    drawn, top = [], 0.0
    for outcome, share in span.shares:
        height = round(18 * (top + share)) - round(18 * top)
        if height:
            drawn.append(rect(outcome, x, width, y + round(18 * top), height, ""))
        top += share
    return ["<g>", title_of(span.title), *drawn, "</g>"]


def _waits(spans: Sequence[Span], axis: Axis, y: int) -> list[str]:
    drawn = []
    for span in spans:
        x, end = axis.at(span.start - span.waited), axis.at(span.start)
        if end - x > _PIXEL:
            drawn.append(rect("wait", x, end - x, y, 10, f"waited in the queue for {span.waited / 3600:,.1f} h"))
    return drawn


def _ends(spans: Sequence[Span], axis: Axis, y: int) -> list[str]:
    drawn, before = [], -1.0
    for span in spans:
        x = axis.at(span.end)
        if span.outcome in ("failed", "lost") and x - before > 2 * _PIXEL:
            drawn.append(f'<circle class="{span.outcome}" cx="{x:.2f}%" cy="{y + 2}" r="2"/>')
            before = x
    return drawn


_STEPS = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800, 1209600)
_DAY = 86400


def time_ticks(start: float, end: float, count: int = 6) -> list[tuple[float, str, str]]:
    """Round moments between two, in UTC: seconds since 1970, words, and below them the day or the year where it is a new one."""
    step = next((each for each in _STEPS if (end - start) / each <= count), 0)
    if step:
        phase = 4 * _DAY if step % (7 * _DAY) == 0 else 0  # weeks begin on Mondays; 1970 began on a Thursday
        first = math.ceil((start - phase) / step)
        moments = [float(phase + step * each) for each in range(first, math.floor((end - phase) / step) + 1)]
    else:
        moments = _months(start, end, count)
    found: list[tuple[float, str, str]] = []
    before = ""
    for moment in moments:
        at = datetime.fromtimestamp(moment, UTC)
        day = f"{at.day} {at:%b}"
        if step == 0:
            words, below = f"{at:%b}", f"{at:%Y}"
        elif step >= _DAY:
            words, below = day, f"{at:%Y}"
        else:
            words, below = f"{at:%H:%M}" if step >= 60 else f"{at:%H:%M:%S}", day
        found.append((moment, words, "" if below == before else below))
        before = below
    return found


def _months(start: float, end: float, count: int) -> list[float]:
    first, last = datetime.fromtimestamp(start, UTC), datetime.fromtimestamp(end, UTC)
    months = range(first.year * 12 + first.month, last.year * 12 + last.month)
    every = next(
        (each for each in (1, 2, 3, 6, 12) if len(months) <= count * each), 12 * math.ceil(len(months) / 12 / count)
    )
    return [datetime(each // 12, each % 12 + 1, 1, tzinfo=UTC).timestamp() for each in months if each % every == 0]


def _time_grid(axis: Axis, height: int) -> list[str]:
    drawn = []
    for moment, words, below in time_ticks(axis.low, axis.high):
        x = axis.at(moment)
        drawn.append(f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{height}"/>')
        for line, y in ((words, height + 15), (below, height + 29)):
            if line:
                drawn.append(f'<text class="tick" x="{x:.2f}%" y="{y}" text-anchor="{anchor(x)}">{line}</text>')
    return drawn
