"""The page's sections on time: where the device time went, and when the attempts ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from pixart_ds.log import duration
from pixart_ds.page.charts import Part, Stack, digits, number, stack_chart
from pixart_ds.page.parts import colour_keys, figure
from pixart_ds.page.words import counted, moment, percent, spaced
from pixart_ds.report.gantt import Lane, Span, gantt_chart
from pixart_ds.report.html_facts import Values, made_at, mapping
from pixart_ds.report.html_parts import hosts_told, per_run
from pixart_ds.report.words import PARTS_TOLD, unit

_OUTCOMES = {
    "done": "the stage ended",
    "stopped": "saved and left in time, to go on in the next attempt",
    "failed": "ended by an error",
    "lost": "left no word: its node or its job was gone",
    "running": "not ended yet",
}


def time_section(values: Values) -> str:
    """Parts of the device time by category: of each run's stages, of each run, and of all together."""
    runs = values.get("runs") or []
    if not _shares(mapping(values.get("account"))) and not any(_shares(mapping(run.get("account"))) for run in runs):
        return "<p>No attempt has consumed anything yet.</p>"
    made = per_run(runs, _time_of_run)
    if len(runs) > 1:
        made += "<h3>All runs</h3>" + _time_charts([(str(run.get("name")), run) for run in runs] + [("total", values)])
    shares = _shares(mapping(values.get("account")))
    if shares.get("unattributed") == 1:
        made += '<p class="note">The attempts left no account of where their time went; those of older versions did not.</p>'
    return made + _parts_legend(shares)


def _time_of_run(run: Values) -> str:
    return _time_charts([(str(stage.get("stage")), stage) for stage in run.get("stages") or []] + [("total", run)])


def _time_charts(rows: Sequence[tuple[str, Values]]) -> str:
    """Two charts of what has an account: all categories, and without the productive one, if that leaves little."""
    stacks, losses = [], []
    for name, row in rows:
        account = mapping(row.get("account"))
        shares = _shares(account)
        goodput, used = number(account.get("goodput")), _used(account)
        words = [f"goodput {percent(goodput)}"] if goodput is not None and shares else []
        words += [used] if used else [] if shares else ["no attempts"]
        parts = [Part(each, share, f"{name}: {spaced(each)} {percent(share)}") for each, share in shares.items()]
        stacks.append(Stack(name, " of ".join(words), parts))
        lost = [part for part in parts if part.colour != "productive"]
        losses.append(Stack(name, percent(sum(part.share for part in lost)) if shares else "no attempts", lost))
    label = "Device time by category, in per cent"
    charts = figure("All device time", stack_chart(stacks, label))
    if 0 < max(sum(part.share for part in stack.parts) for stack in losses) < 0.4:
        enlarged = stack_chart(losses, f"{label}, without the productive part")
        charts += figure("What was not productive, enlarged", enlarged)
    return charts


def _used(account: Values) -> str:
    """The account's device time in the unit of `words.unit`; nothing where it is not known, or none."""
    days = number(account.get("device_days"))
    if not days:
        return ""
    name, key, _ = unit({"device_days": days, "v100_days": number(account.get("v100_days"))})
    amount = number(account.get(key))
    return f"{digits(amount)} {name}" if amount else ""


def _shares(account: Values) -> dict[str, float]:
    """Parts of the account's device time by category; nothing where there is none."""
    parts = {name: number(mapping(account.get("parts")).get(name)) or 0.0 for name in PARTS_TOLD}
    total = sum(parts.values())
    return {name: seconds / total for name, seconds in parts.items()} if total > 0 else {}


def _parts_legend(total: Mapping[str, float]) -> str:
    lines = []
    for name, words in PARTS_TOLD.items():
        share = f" {percent(total[name])}" if name in total else ""
        lines.append(f'<li><i class="key {name}"></i><b>{spaced(name)}</b>{share}<br>{escape(words)}</li>')
    return f'<ul class="legend">{"".join(lines)}</ul>'


def attempts_section(run: Values, values: Values) -> str:
    """When a run's attempts ran, by outcome."""
    lanes = []
    for stage in run.get("stages") or []:
        spans = [
            span for each in stage.get("attempts") or [] if (span := _span(stage, each, made_at(values))) is not None
        ]
        times = f", {duration(sum(span.end - span.start for span in spans))}" if spans else ""
        words = (
            f"{counted(len(stage.get('attempts') or []), 'attempt')}{times}" if stage.get("attempts") else "no attempts"
        )
        lanes.append(Lane(str(stage.get("stage")), words, spans))
    if not any(lane.spans for lane in lanes):
        return "<p>There are no attempts yet.</p>"
    legend = colour_keys(
        {**{name: f"{name}: {words}" for name, words in _OUTCOMES.items()}, "wait": "waited in the queue"}
    )
    return figure("When they ran (UTC)", legend + gantt_chart(lanes, "Attempts of each stage in real time, by outcome"))


def _span(stage: Values, attempt: Values, made: float | None) -> Span | None:
    start, end = number(attempt.get("started")), number(attempt.get("ended"))
    outcome = str(attempt.get("outcome"))
    if start is None:
        return None
    if end is None:
        seconds = number(mapping(attempt.get("account")).get("seconds"))
        end = made if outcome == "running" and made is not None else start + (seconds or 0.0)
    words = [
        f"{stage.get('stage')}, attempt {attempt.get('attempt')}: {outcome}",
        str(attempt.get("cause") or ""),
        f"job {attempt['job']}" if attempt.get("job") else "",
        hosts_told(attempt.get("hosts")),
        f"{moment(start)}, {duration(max(0.0, end - start))}",
    ]
    known = outcome if outcome in _OUTCOMES else "other"
    title = "\n".join(each for each in words if each)
    return Span(start, max(start, end), known, title, max(0.0, number(attempt.get("waited_s")) or 0.0))
