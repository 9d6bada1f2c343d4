"""The page's sections on what training brought: curves of loss and throughput, and samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

from pixart_ds.errors import DataError
from pixart_ds.page.charts import Axis, Line, plot
from pixart_ds.page.parts import colour_keys, figure
from pixart_ds.report import pictures as of_pictures
from pixart_ds.report.curves import Curve, Point, Stretch, smoothed, stretches
from pixart_ds.report.html_facts import Values


def training_section(run: Values, curves: Mapping[str, Mapping[str, list[Curve]]]) -> str:
    """Loss, throughput and waiting for data of each of a run's stages, over images seen.

    Args:
        run: Of the report's values.
        curves: By run's path, then stage.
    """
    of_run, made = curves.get(str(run.get("run"))) or {}, []
    for name in [str(stage.get("stage")) for stage in run.get("stages") or []]:
        found = stretches(of_run.get(name) or [])
        plots = [
            _plot(found, name, "loss", lambda point: point.loss),
            _plot(found, name, "images/s", lambda point: point.images_per_second),
            _plot(found, name, "data wait, % of the step", lambda point: _times(100, point.data_wait)),
        ]
        if any(plots):
            made.append(f'<h3>{escape(name)}</h3><div class="columns">{"".join(plots)}</div>')
    if not made:
        return "<p>There are no metrics yet.</p>"
    keys = colour_keys(
        {"raw": "single steps, sampled", "smooth": "mean of neighbours", "again": "images trained on before (rework)"}
    )
    return f'{keys}<p class="note">Each over images seen.</p>{"".join(made)}'


def _plot(found: list[Stretch], stage: str, what: str, value: Callable[[Point], float | None]) -> str:
    thin, thick, middle = [], [], []
    for stretch in found:
        points = [(float(point.images_seen), y) for point in stretch.points if (y := value(point)) is not None]
        means = smoothed([y for _, y in points])
        middle += means
        thin.append(Line("raw", points))
        colour = "again" if stretch.again else "smooth"
        thick.append(Line(colour, [(x, mean) for (x, _), mean in zip(points, means, strict=True)]))
    if not middle:
        return ""
    raw = sorted(y for line in thin for _, y in line.points)
    trim = len(raw) // 50  # a few outliers are not to flatten the line; they are drawn on the edge
    loss = what == "loss"
    log = loss and min(middle) > 0 and max(middle) / min(middle) > 100
    y_axis = Axis.of(middle if log else [*middle, *raw[trim : len(raw) - trim]], zero=not loss, log=log)
    x_axis = Axis.of([x for line in thin for x, _ in line.points], log=False)
    return figure(what, plot([*thin, *thick], x_axis, y_axis, f"{stage}: {what} over images seen"))


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def samples_section(run: Values, pictures: Mapping[str, Mapping[str, list[Path]]]) -> str:
    """Pictures of each of a run's stages; one that cannot be read is named instead.

    Args:
        run: Of the report's values.
        pictures: By run's path, then stage.
    """
    made = []
    for stage, paths in (pictures.get(str(run.get("run"))) or {}).items():
        for path in paths:
            words = f"{stage}: {of_pictures.caption(path)}"
            try:
                found = of_pictures.embed(path)
            except DataError as error:
                made.append(
                    f'<p class="note">{escape(words)}: left out, {escape(error.what)} ({escape(str(path))})</p>'
                )
                continue
            size = f'width="{found.width}" height="{found.height}"'
            made.append(figure(words, f'<img src="{found.uri}" {size} alt="{escape(words)}">'))
    return f'<div class="samples">{"".join(made)}</div>' if made else "<p>No samples have been drawn yet.</p>"
