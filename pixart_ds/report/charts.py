"""Charts as inline SVG: no script, colours by CSS classes of the page, so that both themes work; pure.

Charts of bars stretch: their lengths are in per cent of the page's width and their text is not scaled, so a phone shows them
as well as a desk does. Words stand above a bar, never beside it. Text is escaped here; classes are the caller's own words.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pixart_ds.log import si
from pixart_ds.report import words as written
from pixart_ds.report.words import percent

_TEXT = 19
"""Height of the words above a bar, in pixels."""
_DECADES = 2.0
"""Values that span more are drawn on a logarithmic axis."""


def number(value: object) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def digits(value: float) -> str:
    """As `words.digits`, with an exponent for monsters only, so that nothing grows beyond its place."""
    return f"{value:.2e}" if value and not 1e-6 <= abs(value) < 1e12 else written.digits(value)


def shortened(name: str, most: int) -> str:
    """The name with its middle left out if it is longer."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"


@dataclass(frozen=True)
class Axis:
    """What lies where between 0 and 100 per cent."""

    low: float
    high: float
    log: bool = False
    step: float = 0.0
    """Between ticks of a linear axis; 0: by its length."""

    @classmethod
    def of(cls, values: Iterable[float | None], *, zero: bool = True, log: bool | None = None) -> Axis:
        """An axis for values; logarithmic where positive ones span more than two decades.

        Args:
            values: None and what is not above zero do not count on a logarithmic axis.
            zero: Whether a linear axis begins at zero.
            log: Whether it is logarithmic, where that is not left to the values.
        """
        known = [value for value in values if value is not None]
        above = [value for value in known if value > 0]
        if log is None:
            log = bool(above) and max(above) / min(above) > 10**_DECADES
        if log and above:
            first = math.floor(math.log10(min(above)))
            return cls(10.0**first, 10.0 ** max(first + 1, math.ceil(math.log10(max(above)))), log=True)
        low, high = min(known, default=0.0), max(known, default=1.0)
        if zero:
            low = min(low, 0.0)
        if high <= low:
            low, high = low - (0.0 if zero else abs(low) / 2), low + (abs(low) or 1.0)
        step = _step(high - low, 5)
        return cls(math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step, step=step)

    def at(self, value: float) -> float:
        """Where a value lies, in per cent; what lies outside is put on the edge."""
        if self.log:
            if value <= 0:
                return 0.0
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return 100 * min(1.0, max(0.0, part))

    def ticks(self) -> list[float]:
        """At most some six round values."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            every = math.ceil((last - first) / 6)
            return [10.0**power for power in range(first, last + 1, every)]
        step = self.step or _step(self.high - self.low, 5)
        first = math.ceil(self.low / step - 1e-9)
        return [step * each for each in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _step(span: float, count: int) -> float:
    """The smallest round step that needs at most `count` of it."""
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * count >= span * (1 - 1e-9))


def tick(value: float) -> str:
    """A number beside an axis: 0.25, 1 k, 2.5 M."""
    if value == 0:
        return "0"
    return si(value) if 1e3 <= abs(value) < 1e15 else f"{value:.6g}"


@dataclass(frozen=True)
class Part:
    """A segment of a stacked bar."""

    colour: str
    share: float
    """Of the whole bar, from 0 to 1."""
    title: str


@dataclass(frozen=True)
class Stack:
    """A stacked bar."""

    name: str
    words: str
    parts: Sequence[Part]


def stack_chart(stacks: Sequence[Stack], label: str) -> str:
    """Stacked bars of shares; the axis ends at 100 per cent, or earlier if all bars do."""
    longest = max((sum(part.share for part in stack.parts) for stack in stacks), default=1.0)
    axis = Axis(0.0, 100.0) if longest > 0.5 else Axis.of([0.0, 100 * longest])
    drawn, y = [], 0
    for stack in stacks:
        drawn += _words(y + 13, stack.name, stack.words)
        drawn.append(f'<rect class="track" x="0" y="{y + _TEXT}" width="100%" height="18"/>')
        left = 0.0
        for part in stack.parts:
            x, end = axis.at(100 * left), axis.at(100 * (left + part.share))
            left += part.share
            if end > x:
                seam = " seam" if end - x > 0.5 else ""
                drawn.append(_rect(f"{part.colour}{seam}", x, end - x, y + _TEXT, 18, part.title))
        y += _TEXT + 18 + 9
    return _svg("stack", y + 18, label, [*_grid(axis, y - 4, "%"), *drawn])


@dataclass(frozen=True)
class Bar:
    """A bar, or on a logarithmic axis a dot on a stem."""

    colour: str
    value: float | None
    title: str


@dataclass(frozen=True)
class Group:
    """Bars under one name."""

    name: str
    words: str
    bars: Sequence[Bar]


def bar_chart(groups: Sequence[Group], label: str, *, log: bool | None = None, room: int = 345) -> str:
    """Bars from zero; dots on stems where the values span more than two decades, since there no zero is to start from.

    Args:
        groups: From top to bottom.
        label: For readers of the screen.
        log: As for `Axis.of`.
        room: Pixels that the chart has at least.
    """
    axis = Axis.of((bar.value for group in groups for bar in group.bars), log=log)
    drawn, y = [], 0
    for group in groups:
        drawn += _words(y + 13, group.name, group.words, room)
        y += _TEXT
        for bar in group.bars:
            if axis.log:
                drawn += _dot(bar, axis, y + 5)
            else:
                drawn.append(f'<rect class="track" x="0" y="{y}" width="100%" height="10"/>')
                if bar.value:
                    drawn.append(_rect(bar.colour, 0, max(0.3, axis.at(bar.value)), y, 10, bar.title))
            y += 12
        y += 8
    return _svg("bars", y + 18, label, [*_grid(axis, y - 4, ""), *drawn])


def _dot(bar: Bar, axis: Axis, y: int) -> list[str]:
    if not bar.value or bar.value < 0:
        return []
    x = axis.at(bar.value)
    return [
        f'<line class="stem {bar.colour}" x1="0" x2="{x:.2f}%" y1="{y}" y2="{y}"/>',
        f'<circle class="dot {bar.colour}" cx="{x:.2f}%" cy="{y}" r="5">{_title(bar.title)}</circle>',
    ]


def limit_chart(used: float, forecast: float | None, *, marks: Sequence[float], label: str) -> str:
    """A bar against a limit.

    Args:
        used: Part of the limit, from 0.
        forecast: The same at the end.
        marks: Parts that have a line and a number, 1 the limit itself.
        label: For readers of the screen.
    """
    axis = Axis(0.0, max(1.0, used, forecast or 0.0) * 1.04)
    colour = "good" if used < min(marks, default=1.0) else "warning" if used <= 1 else "bad"
    drawn = ['<rect class="track" x="0" y="2" width="100%" height="16"/>']
    if forecast is not None:
        drawn.append(_rect("forecast", 0, axis.at(forecast), 2, 16, f"forecast: {percent(forecast)}"))
    drawn.append(_rect(colour, 0, axis.at(used), 2, 16, f"used: {percent(used)}"))
    for mark in marks:
        x = axis.at(mark)
        drawn.append(f'<line class="mark" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="22"/>')
        drawn.append(f'<text class="tick" x="{x:.2f}%" y="35" text-anchor="end">{100 * mark:.0f}%</text>')
    return _svg("limit", 40, label, drawn)


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
        drawn += _words(y + 13, lane.name, lane.words)
        drawn.append(f'<rect class="track" x="0" y="{y + _TEXT}" width="100%" height="18"/>')
        drawn += _waits(lane.spans, axis, y + _TEXT + 4)
        for span in merged(lane.spans, (axis.high - axis.low) * _PIXEL / 100):
            drawn += _bars(span, axis, y + _TEXT)
        drawn += _ends(lane.spans, axis, y + _TEXT + 20)
        y += _TEXT + 18 + 13
    return _svg("gantt", y + 32, label, [*_time_grid(axis, y - 6), *drawn] if spans else drawn)


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
        return [_rect(f"{span.outcome}{' seam' if end - x > 0.5 else ''}", x, width, y, 18, span.title)]
    drawn, top = [], 0.0
    for outcome, share in span.shares:
        height = round(18 * (top + share)) - round(18 * top)
        if height:
            drawn.append(_rect(outcome, x, width, y + round(18 * top), height, ""))
        top += share
    return ["<g>", _title(span.title), *drawn, "</g>"]


def _waits(spans: Sequence[Span], axis: Axis, y: int) -> list[str]:
    drawn = []
    for span in spans:
        x, end = axis.at(span.start - span.waited), axis.at(span.start)
        if end - x > _PIXEL:
            drawn.append(_rect("wait", x, end - x, y, 10, f"waited in the queue for {span.waited / 3600:,.1f} h"))
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


@dataclass(frozen=True)
class Line:
    """Points (x, y) that a line joins."""

    colour: str
    points: Sequence[tuple[float, float]]


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 170, 44, 12, 8, 22
"""Of a plot, in its own units: about pixels, since plots stand beside each other in columns."""


def plot(lines: Sequence[Line], x_axis: Axis, y_axis: Axis, label: str, *, unit: str = "") -> str:
    """Lines over numbers; a line of one point is a dot."""

    def place(x: float, y: float) -> tuple[float, float]:
        across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return _LEFT + across * x_axis.at(x) / 100, _TOP + down * (1 - y_axis.at(y) / 100)

    drawn = []
    for value in y_axis.ticks():
        _, y = place(x_axis.low, value)
        drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick(value)}{unit}</text>')
    for value in x_axis.ticks():
        x, _ = place(value, y_axis.low)
        anchor = "end" if x > _WIDTH - _RIGHT - 14 else "middle"
        x = _WIDTH if anchor == "end" else x
        drawn.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 5}" text-anchor="{anchor}">{tick(value)}</text>')
    for line in lines:
        places = [place(x, y) for x, y in line.points]
        if len(places) == 1:
            drawn.append(f'<circle class="point {line.colour}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="2"/>')
        elif places:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            drawn.append(f'<path class="line {line.colour}" d="M{path}"/>')
    words = html.escape(label)
    return f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{words}">{"".join(drawn)}</svg>'


def _svg(kind: str, height: int, label: str, drawn: Iterable[str]) -> str:
    words = html.escape(label)
    return f'<svg class="{kind}" width="100%" height="{height}" role="img" aria-label="{words}">{"".join(drawn)}</svg>'


def _title(words: str) -> str:
    return f"<title>{html.escape(words)}</title>" if words else ""


def _rect(colour: str, x: float, width: float, y: int, height: int, title: str) -> str:
    place = f'x="{x:.2f}%" y="{y}" width="{width:.2f}%" height="{height}"'
    return f'<rect class="{colour}" {place}>{_title(title)}</rect>' if title else f'<rect class="{colour}" {place}/>'


def _words(y: int, name: str, words: str, room: int = 345) -> list[str]:
    """The name on the left, as much of it as there is room for on a phone, and the words on the right."""
    shown = shortened(name, max(8, int((room - 6.7 * len(words)) / 7.8)))
    title = _title(name) if shown != name else ""
    return [
        f'<text class="name" x="0" y="{y}">{html.escape(shown)}{title}</text>',
        f'<text class="words" x="100%" y="{y}" text-anchor="end">{html.escape(words)}</text>',
    ]


def _anchor(x: float) -> str:
    return "start" if x < 2 else "end" if x > 98 else "middle"


def _grid(axis: Axis, height: int, unit: str) -> list[str]:
    drawn = []
    for value in axis.ticks():
        x = axis.at(value)
        drawn.append(f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{height}"/>')
        words = f"{tick(value)}{unit}"
        drawn.append(f'<text class="tick" x="{x:.2f}%" y="{height + 15}" text-anchor="{_anchor(x)}">{words}</text>')
    return drawn


def _time_grid(axis: Axis, height: int) -> list[str]:
    drawn = []
    for moment, words, below in time_ticks(axis.low, axis.high):
        x = axis.at(moment)
        drawn.append(f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{height}"/>')
        for line, y in ((words, height + 15), (below, height + 29)):
            if line:
                drawn.append(f'<text class="tick" x="{x:.2f}%" y="{y}" text-anchor="{_anchor(x)}">{line}</text>')
    return drawn
