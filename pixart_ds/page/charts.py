"""Charts as inline SVG: no script, colours by CSS classes of the page, so that both themes work; pure.

Charts of bars stretch: their lengths are in per cent of the page's width and their text is not scaled, so a phone shows them
as well as a desk does. Words stand above a bar, never beside it. Text is escaped here; classes are the caller's own words.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pixart_ds.log import si
from pixart_ds.page import words as written
from pixart_ds.page.words import percent

TEXT = 19
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
        drawn += words_above(y + 13, stack.name, stack.words)
        drawn.append(f'<rect class="track" x="0" y="{y + TEXT}" width="100%" height="18"/>')
        left = 0.0
        for part in stack.parts:
            x, end = axis.at(100 * left), axis.at(100 * (left + part.share))
            left += part.share
            if end > x:
                seam = " seam" if end - x > 0.5 else ""
                drawn.append(rect(f"{part.colour}{seam}", x, end - x, y + TEXT, 18, part.title))
        y += TEXT + 18 + 9
    return svg("stack", y + 18, label, [*_grid(axis, y - 4, "%"), *drawn])


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
        drawn += words_above(y + 13, group.name, group.words, room)
        y += TEXT
        for bar in group.bars:
            if axis.log:
                drawn += _dot(bar, axis, y + 5)
            else:
                drawn.append(f'<rect class="track" x="0" y="{y}" width="100%" height="10"/>')
                if bar.value:
                    drawn.append(rect(bar.colour, 0, max(0.3, axis.at(bar.value)), y, 10, bar.title))
            y += 12
        y += 8
    return svg("bars", y + 18, label, [*_grid(axis, y - 4, ""), *drawn])


def _dot(bar: Bar, axis: Axis, y: int) -> list[str]:
    if not bar.value or bar.value < 0:
        return []
    x = axis.at(bar.value)
    return [
        f'<line class="stem {bar.colour}" x1="0" x2="{x:.2f}%" y1="{y}" y2="{y}"/>',
        f'<circle class="dot {bar.colour}" cx="{x:.2f}%" cy="{y}" r="5">{title_of(bar.title)}</circle>',
    ]


@dataclass(frozen=True)
class Column:
    """A bar that stands, and its name below it."""

    name: str
    value: float
    title: str
    colour: str = "blue"


def column_chart(columns: Sequence[Column], label: str, *, height: int = 150, room: int = 1000) -> str:
    """Bars that stand on zero, with as many of their names as there is room for.

    Args:
        columns: From left to right.
        label: For readers of the screen.
        height: Of the highest bar's room, in pixels.
        room: Pixels that the chart has on a desk; on a phone it has 300.
    """
    axis = Axis.of((each.value for each in columns), log=False)
    slot = 100 / max(1, len(columns))
    named = len(columns) * (7 * max((len(each.name) for each in columns), default=1) + 4)
    lines = 2 if named > room else 1  # by turns, so that twice as many have room
    every = max(1, math.ceil(named / room / lines))
    rarely = every * max(1, math.ceil(named / 300 / every))
    drawn, top = [], 6
    for value in axis.ticks():
        y = top + round(height * (1 - axis.at(value) / 100))
        drawn.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        drawn.append(f'<text class="tick" x="-6" y="{y + 4}" text-anchor="end">{tick(value)}</text>')
    for number, each in enumerate(columns):
        if each.value > 0:
            tall = max(1, round(height * axis.at(each.value) / 100))
            drawn.append(rect(each.colour, slot * (number + 0.1), 0.8 * slot, top + height - tall, tall, each.title))
        if number % every == 0:
            often = number % rarely == 0
            kind, words = "tick" if often else "tick desk", html.escape(each.name)
            x, y = slot * (number + 0.5), top + height + 15 + 13 * (number // every % lines)
            drawn.append(f'<text class="{kind}" x="{x:.2f}%" y="{y}" text-anchor="middle">{words}</text>')
    return svg("standing", top + height + 7 + 13 * lines, label, drawn)


_EIGHTHS = " ▁▂▃▄▅▆▇█"


def block_chart(values: Sequence[float], *, height: int = 3, width: int = 80) -> list[str]:
    """Bars that stand on zero, as lines of block characters for a terminal; what is not zero shows.

    Args:
        values: From left to right, none below zero.
        height: Lines.
        width: Characters of a line at most, unless there are more values than that.
    """
    if not values or max(values) <= 0:
        return []
    each = max(1, min(4, width // len(values)))
    tall = [math.ceil(8 * height * value / max(values)) for value in values]
    gap = " " if each > 2 else ""
    return [
        "".join(_EIGHTHS[max(0, min(8, eighths - 8 * line))] * (each - len(gap)) + gap for eighths in tall).rstrip()
        for line in reversed(range(height))
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
        drawn.append(rect("forecast", 0, axis.at(forecast), 2, 16, f"forecast: {percent(forecast)}"))
    drawn.append(rect(colour, 0, axis.at(used), 2, 16, f"used: {percent(used)}"))
    for mark in marks:
        x = axis.at(mark)
        drawn.append(f'<line class="mark" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="22"/>')
        drawn.append(f'<text class="tick" x="{x:.2f}%" y="35" text-anchor="end">{100 * mark:.0f}%</text>')
    return svg("limit", 40, label, drawn)


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


def svg(kind: str, height: int, label: str, drawn: Iterable[str]) -> str:
    words = html.escape(label)
    return f'<svg class="{kind}" width="100%" height="{height}" role="img" aria-label="{words}">{"".join(drawn)}</svg>'


def title_of(words: str) -> str:
    return f"<title>{html.escape(words)}</title>" if words else ""


def rect(colour: str, x: float, width: float, y: int, height: int, title: str) -> str:
    place = f'x="{x:.2f}%" y="{y}" width="{width:.2f}%" height="{height}"'
    return f'<rect class="{colour}" {place}>{title_of(title)}</rect>' if title else f'<rect class="{colour}" {place}/>'


def words_above(y: int, name: str, words: str, room: int = 345) -> list[str]:
    """The name on the left, as much of it as there is room for on a phone, and the words on the right."""
    shown = shortened(name, max(8, int((room - 6.7 * len(words)) / 7.8)))
    title = title_of(name) if shown != name else ""
    return [
        f'<text class="name" x="0" y="{y}">{html.escape(shown)}{title}</text>',
        f'<text class="words" x="100%" y="{y}" text-anchor="end">{html.escape(words)}</text>',
    ]


def anchor(x: float) -> str:
    return "start" if x < 2 else "end" if x > 98 else "middle"


def _grid(axis: Axis, height: int, unit: str) -> list[str]:
    drawn = []
    for value in axis.ticks():
        x = axis.at(value)
        drawn.append(f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{height}"/>')
        words = f"{tick(value)}{unit}"
        drawn.append(f'<text class="tick" x="{x:.2f}%" y="{height + 15}" text-anchor="{anchor(x)}">{words}</text>')
    return drawn
