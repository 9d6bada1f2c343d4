"""A stage's loss and throughput, sampled from its attempts' metrics without reading them whole."""

from __future__ import annotations

import bisect
import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.layout import RunLayout, StageLayout

_ROWS = 300
"""Of a stage, at most: a stage may have 150,000 rows in 1,000 attempts."""
_LONGEST_ROW = 1 << 16


@dataclass(frozen=True)
class Point:
    """One step; a figure that its row lacks is None."""

    images_seen: int
    loss: float | None
    images_per_second: float | None
    """Over all ranks."""
    data_wait: float | None
    """Part of the step's time, from 0 to 1, on the rank that waited longest."""


@dataclass(frozen=True)
class Curve:
    """What was sampled of an attempt, in the sequence of its file: after a rollback `images_seen` goes back."""

    attempt: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Stretch:
    """Points that one line joins."""

    points: tuple[Point, ...]
    again: bool
    """Whether training had been there before: rework."""


def curves_of(run: RunLayout) -> dict[str, list[Curve]]:
    """The curves of each stage, oldest attempt first; an attempt of which no row was sampled has none.

    Raises:
        DataError: There is no run.
    """
    return {name: stage_curves(run.stage(name)) for name in files.read_json(run.manifest)["stages"]}


def stage_curves(stage: StageLayout) -> list[Curve]:
    """The curves of one stage from at most some 300 rows, at even distances in bytes over all its attempts."""
    found = [(attempt.number, attempt.metrics, _size(attempt.metrics)) for attempt in stage.all_attempts()]
    found = [each for each in found if each[2] > 0]
    if not found:
        return []
    # Where attempts are few, the first and the last row of each are read, too: there a line ends and rework begins.
    ends = 4 * len(found) <= _ROWS
    spread = _ROWS - 2 * len(found) if ends else _ROWS
    starts = list(itertools.accumulate((size for _, _, size in found), initial=0))
    offsets: list[list[int]] = [[0] if ends else [] for _ in found]
    for number in range(spread):
        position = starts[-1] * number // spread
        file = bisect.bisect_right(starts, position) - 1
        offsets[file].append(position - starts[file])
    curves = []
    for (number, path, _), of_file in zip(found, offsets, strict=True):
        points = [point for row in _rows_at(path, of_file) if (point := _point(row)) is not None]
        last = _point(_last_row(path)) if ends else None
        if last is not None and last not in points[-1:]:
            points.append(last)
        if points:
            curves.append(Curve(number, tuple(points)))
    return curves


def stretches(curves: list[Curve]) -> list[Stretch]:
    """All points in lines: a new one begins where `images_seen` goes back, and where it passes what was reached before."""
    made: list[Stretch] = []
    line: list[Point] = []
    again, furthest = False, -1
    for point in (point for curve in curves for point in curve.points):
        back = bool(line) and point.images_seen < line[-1].images_seen
        caught_up = again and point.images_seen > furthest
        if back or caught_up:
            made.append(Stretch(tuple(line), again))
            line = [] if back else line[-1:]  # a line that goes on has no gap
            again = back
        line.append(point)
        furthest = max(furthest, point.images_seen)
    return [*made, Stretch(tuple(line), again)] if line else made


def smoothed(values: list[float]) -> list[float]:
    """Means over each value and its neighbours on both sides, so that nothing lags."""
    reach = len(values) // 25
    sums = list(itertools.accumulate(values, initial=0.0))
    edges = ((max(0, at - reach), min(len(values), at + reach + 1)) for at in range(len(values)))
    return [(sums[last] - sums[first]) / (last - first) for first, last in edges]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a launch has not written its first row yet
        return 0


def _rows_at(path: Path, offsets: list[int]) -> Iterator[Any]:
    """The first whole row at or after each offset, none twice; what is torn or no JSON is passed over."""
    if not offsets:
        return
    with open(path, "rb") as file:
        done = -1
        for offset in sorted(set(offsets)):
            if offset:
                file.seek(offset - 1)
                file.readline(_LONGEST_ROW)  # the rest of the row that holds the byte before
            else:
                file.seek(0)
            start = file.tell()
            if start <= done:
                continue
            done = start
            line = file.readline(_LONGEST_ROW)
            if line.endswith(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError:
                    continue


def _last_row(path: Path) -> Any | None:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_ROW))
        whole = file.read().split(b"\n")[-2:-1]  # behind the last line's end there is nothing, or what is torn
    try:
        return json.loads(whole[0]) if whole else None
    except ValueError:
        return None


def _point(row: Any) -> Point | None:
    if not isinstance(row, dict) or (images := _number(row.get("images_seen"))) is None:
        return None
    seconds, step, wait = (_number(row.get(key)) for key in ("seconds", "step", "data_wait_s"))
    rate = _number(row.get("images_per_second"))
    if rate is None and seconds and step:  # rows from before there was such a key
        rate = images / step / seconds
    share = min(1.0, wait / seconds) if wait is not None and seconds else None
    return Point(int(images), _number(row.get("loss")), rate, share)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
