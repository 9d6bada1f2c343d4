"""The page's tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from pixart_ds.log import duration, si
from pixart_ds.page.charts import digits, limit_chart, number, shortened
from pixart_ds.page.parts import table
from pixart_ds.page.words import moment, percent, spaced
from pixart_ds.report.html_facts import Values, mapping
from pixart_ds.report.html_parts import hosts_told, per_run, state_of

_BUDGETS = {"gpu_days": "device-days", "device_days": "device-days", "usd": "$", "kwh": "kWh", "kg_co2e": "kg CO2e"}
_FOLD = 30
"""Rows from which on a table of attempts is folded."""
_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("device-hours", "device_hours", digits),
    ("V100-days", "v100_days", digits),
    ("A100-days", "a100_days", digits),
    ("kWh", "kwh", digits),
    ("kg CO2e", "kg_co2e", digits),
    ("$", "usd", digits),
    ("goodput", "goodput", percent),
    ("MFU", "mfu", percent),
    ("images/s/device", "images_per_second_per_device", digits),
    ("$ per M images", "usd_per_million_images", digits),
)
_ATTEMPT_COLUMNS = tuple(
    each for each in _COLUMNS if each[0] in ("device-hours", "kWh", "$", "goodput", "images/s/device")
)


def tables_section(values: Values) -> str:
    """The figures behind the charts, and what no chart shows: forecasts, budgets, Slurm's account."""
    runs = values.get("runs") or []
    made = [_runs_table(runs)] if len(runs) > 1 else []
    made.append(per_run(runs, _run_tables))
    for title, key in (("By state of the attempts", "by_state"), ("By user", "by_user")):
        rows = [[str(name), *_cells(mapping(account))] for name, account in mapping(values.get(key)).items()]
        made.append(table(title, [title.split()[1], *_heads()], rows, left=1))
    return "".join(made)


def _run_tables(run: Values) -> str:
    made = [_stages_table(run), _attempts_table(run), _forecast(mapping(run.get("forecast")))]
    made += [_budget(run.get("budget") or []), _slurm(mapping(run.get("slurm")))]
    return "".join(made)


def _runs_table(runs: Sequence[Values]) -> str:
    rows = []
    for run in runs:
        ettr, wall = number(run.get("ettr")), number(run.get("wall_seconds"))
        about = [
            str(run.get("name")),
            state_of(run),
            "" if wall is None else duration(wall),
            percent(ettr),
        ]
        rows.append([*about, *_cells(mapping(run.get("account")))])
    return table("Runs", ["run", "state", "wall time", "ETTR", *_heads()], rows, left=2)


def _stages_table(run: Values) -> str:
    rows = []
    for stage in run.get("stages") or []:
        seen, total = number(stage.get("images_seen")), number(stage.get("total_images"))
        images = " of ".join("?" if each is None else si(each) for each in (seen, total))
        about = [str(stage.get("stage")), str(stage.get("state")), images, f"{len(stage.get('attempts') or []):,}"]
        rows.append(
            [*about, *(_cells(mapping(stage.get("account"))) if stage.get("attempts") else [""] * len(_COLUMNS))]
        )
    rows.append(["total", "", "", "", *_cells(mapping(run.get("account")))])
    return table("Stages", ["stage", "state", "images", "attempts", *_heads()], rows, left=2, total=True)


def _attempts_table(run: Values) -> str:
    heads = [
        "stage",
        "attempt",
        "outcome",
        "cause",
        "job",
        "user",
        "hosts",
        "started (UTC)",
        "took",
        "waited",
        "launches",
    ]
    heads += ["devices", "images from", "to", *_heads(_ATTEMPT_COLUMNS)]
    rows = [
        [str(stage.get("stage")), *_attempt_cells(attempt)]
        for stage in run.get("stages") or []
        for attempt in stage.get("attempts") or []
    ]
    return table("Attempts", heads, rows, left=8, fold=len(rows) > _FOLD)


def _attempt_cells(attempt: Values) -> list[str]:
    start, end, waited = (number(attempt.get(name)) for name in ("started", "ended", "waited_s"))
    images = [number(attempt.get(name)) for name in ("images_from", "images_to")]
    devices, launches = number(attempt.get("devices")), number(attempt.get("launches"))
    account = mapping(attempt.get("account"))
    took = number(account.get("seconds")) if start is None or end is None else end - start
    return [
        _plain(attempt.get("attempt")),
        _plain(attempt.get("outcome")),
        shortened(_plain(attempt.get("cause")), 160),
        *(_plain(attempt.get(name)) for name in ("job", "user")),
        hosts_told(attempt.get("hosts")),
        "" if start is None else moment(start, zone=False),
        "" if took is None else duration(took),
        "" if waited is None else duration(waited),
        "" if launches is None else f"{launches:.0f}",
        "" if devices is None else f"{devices:.0f} {attempt.get('device') or ''}".rstrip(),
        *("" if each is None else si(each) for each in images),
        *_cells(account, _ATTEMPT_COLUMNS),
    ]


def _forecast(forecast: Values) -> str:
    if not forecast:
        return ""
    known = {name: number(value) for name, value in forecast.items()}
    ends, left = known.get("ends"), known.get("seconds_left")
    rows = [["ends", moment(ends)]] if ends is not None else []
    rows += [["time left", duration(left)]] if left is not None else []
    for label, name in (
        ("device-days left", "device_days_left"),
        ("device-days, total", "device_days_total"),
        ("$, total", "usd_total"),
        ("kWh, total", "kwh_total"),
        ("kg CO2e, total", "kg_co2e_total"),
    ):
        value = known.get(name)
        if value is not None:
            rows.append([label, digits(value)])
    how = f'<p class="note">{escape(str(forecast["how"]))}</p>' if forecast.get("how") else ""
    return table("Forecast to the end of the chain", [], rows, left=2) + how if rows else how


def _budget(budget: Iterable[Values]) -> str:
    made = []
    for each in budget:
        what = _BUDGETS.get(str(each.get("what")), spaced(str(each.get("what"))))
        limit, used, part, ends = (number(each.get(name)) for name in ("limit", "used", "part", "forecast"))
        if part is None and limit and used is not None:
            part = used / limit
        words = [f"{what}: {'?' if used is None else digits(used)} of {'?' if limit is None else digits(limit)}"]
        words += [] if part is None else [f"{percent(part)} used"]
        words += [] if ends is None else [f"{digits(ends)} at the chain's end by the forecast"]
        chart = (
            ""
            if part is None
            else limit_chart(
                part, ends / limit if ends is not None and limit else None, marks=(0.8, 1.0), label=words[0]
            )
        )
        over = ' class="over"' if limit is not None and max(ends or 0.0, used or 0.0) > limit else ""
        made.append(f"<p{over}>{escape(', '.join(words))}</p>{chart}")
    return f"<figure><figcaption>Budget</figcaption>{''.join(made)}</figure>" if made else ""


def _slurm(found: Values) -> str:
    if not found:
        return ""
    rows = []
    for label, name in (
        ("Slurm", "gpu_seconds"),
        ("this report", "ledger_seconds"),
        ("difference", "difference_seconds"),
    ):
        seconds = number(found.get(name))
        rows.append([label, "?" if seconds is None else digits(seconds / 3600)])
    count = number(found.get("rows"))
    if count is not None:
        rows.append(["Slurm's rows", f"{count:.0f}"])
    for label, name in (("still running", "running"), ("not in Slurm's account", "not_in_slurm")):
        rows += [[label, ", ".join(map(str, found[name]))]] if found.get(name) else []
    if found.get("without_gpus"):
        rows.append(["not counted, since Slurm names no GPUs", ", ".join(map(str, found["without_gpus"]))])
    rows += [["source", str(found["source"])]] if found.get("source") else []
    unmatched = []
    for each in found.get("unmatched") or []:
        seconds = number(each.get("gpu_seconds"))
        about = [_plain(each.get(name)) for name in ("job", "name", "stage", "state", "user")]
        unmatched.append([*about, "" if seconds is None else digits(seconds / 3600)])
    heads = ["job", "name", "stage", "state", "user", "GPU-hours"]
    made = table("Slurm's account, in GPU-hours", [], rows, left=2)
    return made + table("Slurm's rows in which no attempt ran", heads, unmatched, left=5)


def _heads(columns: Sequence[tuple[str, str, Callable[[float], str]]] = _COLUMNS) -> list[str]:
    return [head for head, _, _ in columns]


def _cells(account: Values, columns: Sequence[tuple[str, str, Callable[[float], str]]] = _COLUMNS) -> list[str]:
    return ["" if (value := number(account.get(name))) is None else words(value) for _, name, words in columns]


def _plain(value: object) -> str:
    return "" if value is None else str(value)
