"""The cost report as a page: whole, closed to the network, and legible for runs of every size."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pixart_ds import files
from pixart_ds.errors import DataError
from pixart_ds.layout import RunLayout
from pixart_ds.ledger.paper import paper_account
from pixart_ds.page.charts import Axis, digits
from pixart_ds.report.curves import Curve, Point, curves_of, smoothed, stretches
from pixart_ds.report.gantt import Lane as ChartLane
from pixart_ds.report.gantt import Span, gantt_chart, merged, time_ticks
from pixart_ds.report.html import html_page
from pixart_ds.report.pictures import caption, embed, pictures_of
from pixart_ds.report.words import PARTS_TOLD

_VOID = {"meta", "img", "br", "link", "input", "hr"}
_SECTIONS = ["tiles", "time", "cost", "attempts", "training", "samples", "tables", "assumptions"]
_STAGES = ["stage1", "stage2", "stage3_256"]


class Page(HTMLParser):
    """A page's elements; an end without its start fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), "a handler inside the page's text"
            if name in ("src", "href", "data", "action", "poster"):
                self.links.append((tag, value or ""))
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "title":
            self.titles.append(data)


def account(hours: float, devices: int = 8, images: int = 1_000_000, *, cpu: bool = False) -> dict[str, Any]:
    seconds = 3600 * hours * devices
    shares = (0.9, 0.03, 0.01, 0.01, 0.01, 0.02, 0.01, 0.01)
    return {
        "device_seconds": seconds,
        "device_hours": seconds / 3600,
        "device_days": seconds / 86400,
        "v100_days": None if cpu else seconds / 86400,
        "a100_days": None if cpu else seconds / 86400 / 2.2,
        "kwh": seconds * 1e-4,
        "energy_coverage": 0.5,
        "kg_co2e": seconds * 4e-5,
        "kg_co2e_embodied": None,
        "usd": seconds * 3e-4,
        "seconds": 3600 * hours,
        "parts": {name: share * seconds for name, share in zip(PARTS_TOLD, shares, strict=True)},
        "goodput": 0.9 if seconds else None,
        "mfu": None if cpu or not seconds else 0.3,
        "images_per_second_per_device": images / seconds if seconds else None,
        "usd_per_million_images": 5.0 if seconds else None,
    }


def report(attempts: int = 4, *, name: str = "first", cpu: bool = False) -> dict[str, Any]:
    """Values as `report.build` makes them, of one run whose last stage has not begun."""
    stages: list[dict[str, Any]] = []
    now = 1.76e9
    for stage, state in zip(_STAGES, ("done", "running", "not started"), strict=True):
        made: list[dict[str, Any]] = []
        for number in range(1, (attempts if state != "not started" else 0) + 1):
            last = number == attempts
            outcome = state if last else ("stopped", "failed", "lost")[number % 3]
            started, now = now + 600, now + 7800
            made.append(
                {
                    "attempt": number,
                    "job": str(4000 + number),
                    "user": "ada",
                    "outcome": outcome,
                    "cause": "rank 13 on n2 was killed by signal 9" if outcome == "failed" else None,
                    "started": started,
                    "ended": now,
                    "waited_s": 600.0,
                    "hosts": [f"n{each}" for each in range(1, 9)],
                    "devices": 8,
                    "device": "cpu-core" if cpu else "v100-sxm2",
                    "launches": 1,
                    "images_from": 1000 * number,
                    "images_to": 1000 * (number + 1),
                    "account": account(2, cpu=cpu),
                }
            )
        of_stage = account(2 * len(made), cpu=cpu)
        stages.append(
            {
                "stage": stage,
                "state": state,
                "total_images": 1_000_000,
                "images_seen": 400_000 if made else 0,
                "account": of_stage,
                "paper_v100_days": 88.0,
                "attempts": made,
            }
        )
    whole = account(4 * attempts, cpu=cpu)
    run = {
        "run": f"/scratch/runs/{name}",
        "name": name,
        "chain": "pixart",
        "stages": stages,
        "account": whole,
        "ettr": 0.7,
        "wall_seconds": 1e6,
        "forecast": {"device_days_total": 12.0, "usd_total": 300.0, "ends": 1.77e9, "how": "by the newest pace"},
        "budget": [{"what": "gpu_days", "limit": 10, "used": 8.5, "part": 0.85, "forecast": 12.0}],
        "problems": ["stage2, attempt 3: line 7 of ledger.jsonl is cut off"],
        "slurm": {
            "source": "asked now",
            "gpu_seconds": 1e6,
            "ledger_seconds": 9e5,
            "difference_seconds": 1e5,
            "rows": 3,
            "unmatched": [{"job": "41", "name": "pixart", "state": "FAILED", "user": "ada", "gpu_seconds": 640}],
            "problems": [],
        },
    }
    return {
        "format": 1,
        "made": "2026-11-25T19:00:00+00:00",
        "runs": [run],
        "account": whole,
        "by_state": {"done": whole, "lost": account(1)},
        "by_user": {"ada": whole},
        "paper": paper_account(),
        "assumptions": {"lines": ["PUE 1.2; grid WORLD", "a device of 437 W"], "rates": []},
        "problems": [],
    }


def curves() -> dict[str, dict[str, list[Curve]]]:
    points = tuple(Point(1000 * step, 1.0 / step, 300.0 + step, 0.01) for step in range(1, 60))
    return {"/scratch/runs/first": {"stage1": [Curve(1, points[:40]), Curve(2, points[30:])], "stage2": []}}


def without_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_numbers(each) for each in value]
    return None if isinstance(value, int | float) else value


def test_the_page_is_whole_has_all_sections_and_needs_no_network(tmp_path: Path) -> None:
    picture = tmp_path / "sheet.png"
    Image.new("RGB", (1200, 600), "red").save(picture)
    text = html_page(report(), curves(), {"/scratch/runs/first": {"stage1": [picture]}})
    page = Page(text)
    assert [each for each in page.ids if each in _SECTIONS] == _SECTIONS
    assert "problems" in page.ids
    assert "http://" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    for tag, target in page.links:
        assert target.startswith("data:image/" if tag == "img" else "#"), target
    assert {"img", "svg", "details", "table"} - {"details"} <= set(page.tags)
    assert "default-src 'none'" in text
    for words in ("goodput 90.0%", "Cost of first", "V100-days", "A100-equivalent days", "PixArt-α (paper)", "RAPHAEL"):
        assert words in text, words
    for words in ("by the newest pace", "cut off", "437 W", "first, forecast", "12.0 at the chain", "FAILED", "70.0%"):
        assert words in text, words
    assert any("job 4001" in title and "n1, n2, … n8 (8 hosts)" in title for title in page.titles)
    assert any("killed by signal 9" in title for title in page.titles)
    for name in PARTS_TOLD:
        assert f'class="key {name}"' in text


def test_what_runs_are_called_is_text_and_nothing_else() -> None:
    name = "<script>alert(1)</script>\" onload='x"
    values = report(name=name)
    values["runs"][0]["stages"][0]["stage"] = name
    values["runs"][0]["stages"][0]["attempts"][0].update(cause=name, hosts=[name], user=name, job=name, outcome=name)
    values["runs"][0]["problems"] = [name]
    values["by_user"] = {name: account(1)}
    values["assumptions"]["lines"] = [name]
    of_run = values["runs"][0]["run"]
    text = html_page(values, {of_run: {name: [Curve(1, (Point(1, 1.0, 1.0, 0.5),))]}}, {of_run: {name: [Path(name)]}})
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "<script>alert" not in text


def test_a_run_without_attempts() -> None:
    text = html_page(report(attempts=0), {}, {})
    page = Page(text)
    assert [each for each in page.ids if each in _SECTIONS] == _SECTIONS
    for words in ("No attempt has consumed anything yet", "There are no attempts yet", "no metrics yet", "not started"):
        assert words in text, words
    assert "paper 88.0" in text


def test_nothing_at_all() -> None:
    Page(html_page({}, {}, {}))
    Page(html_page({"runs": [{"run": "/x"}]}, {}, {}))


@pytest.mark.parametrize("attempts", [0, 3])
def test_numbers_that_are_not_known_are_left_out(attempts: int) -> None:
    values = without_numbers(report(attempts))
    text = html_page(values, {}, {})
    page = Page(text)
    assert [each for each in page.ids if each in _SECTIONS] == _SECTIONS
    assert "None" not in re.sub(r"<p>None were stated", "", text)
    assert "nan" not in re.findall(r"\bnan\b", text)


def test_several_runs_stand_apart_in_each_section() -> None:
    values, other = report(), report(name="second")
    values["runs"] += other["runs"]
    text = html_page(values, curves(), {})
    page = Page(text)
    assert "Cost of first, second" in text
    assert text.count("<h3>second</h3>") >= 4
    assert page.ids.count("attempts") == 1
    assert "<h3>All runs</h3>" in text
    assert ">Runs<" in text


def test_a_cpu_is_not_held_against_the_paper() -> None:
    text = html_page(report(cpu=True), {}, {})
    Page(text)
    assert "not comparable with the paper" in text
    assert "cpu-core" in text
    assert "first, so far" not in text
    assert "RAPHAEL" in text


def test_a100s_are_held_against_the_paper_in_a100_days() -> None:
    values = report()
    for each in (values["runs"][0], *values["runs"][0]["stages"]):
        each["account"]["v100_days"] = None
    for stage in values["runs"][0]["stages"]:
        for attempt in stage["attempts"]:
            attempt["account"]["v100_days"] = None
    text = html_page(values, {}, {})
    assert "A100-days of each stage" in text
    assert "paper 40.0" in text  # 88 / 2.2


def test_two_thousand_attempts_are_a_small_page_with_a_folded_table() -> None:
    text = html_page(report(attempts=1000), {}, {})
    page = Page(text)
    assert len(text.encode()) < 2_000_000
    assert "details" in page.tags
    assert "1,000 attempts" in text
    assert page.tags.count("rect") < 4000


def test_bars_narrower_than_a_pixel_are_merged_and_no_failure_hides() -> None:
    spans = [Span(float(each), each + 1.0, "failed" if each == 500 else "stopped", "t") for each in range(1000)]
    drawn = merged(spans, 10.0)
    assert 60 <= len(drawn) <= 110
    assert all(each.end - each.start >= 9 for each in drawn[:-1])
    assert sum(int(each.title.split()[0]) for each in drawn) == 1000
    assert any("1 failed" in each.title for each in drawn)
    assert gantt_chart([ChartLane("x", "", spans)], "x").count('<circle class="failed"') == 1


@pytest.mark.parametrize("values", [[753, 6250, 60_000], [0.001, 28_400], [1e-9, 1e15], [0.0, 5.0, 4000.0]])
def test_axes_of_many_decades_are_logarithmic(values: list[float]) -> None:
    axis = Axis.of(values)
    above = [value for value in values if value > 0]
    assert axis.log == (max(above) / min(above) > 100)
    assert all(0 <= axis.at(value) <= 100 for value in values)
    assert 2 <= len(axis.ticks()) <= 8
    assert sorted(axis.at(value) for value in values) == [axis.at(value) for value in sorted(values)]


@pytest.mark.parametrize("values", [[], [0.0], [None], [3.0, 3.0], [-1.0, 1.0], [0.1500001, 0.15], [1e-30]])
def test_axes_of_little_are_axes(values: list[float | None]) -> None:
    for zero in (True, False):
        axis = Axis.of(values, zero=zero)
        assert axis.high > axis.low
        assert 2 <= len(axis.ticks()) <= 7
        assert all(axis.low - 1e-9 <= each <= axis.high + 1e-9 for each in axis.ticks())


def test_times_have_a_few_round_ticks_at_every_length() -> None:
    start = 1.76e9
    for length in (1, 7, 59, 600, 5000, 40_000, 3e5, 2e6, 1e7, 9e7, 1e9):
        ticks = time_ticks(start, start + length)
        assert len(ticks) <= 7, length
        assert all(start <= moment <= start + length for moment, _, _ in ticks)
        assert not ticks or ticks[0][2]
    weeks = time_ticks(start, start + 30 * 86400)
    assert [words for _, words, _ in weeks][:2] == ["13 Oct", "20 Oct"]  # Mondays


def test_digits_have_no_exponent_but_for_monsters() -> None:
    assert [digits(each) for each in (0, 0.00123, 12.34, 1234.5, 60_000)] == ["0", "0.00123", "12.3", "1,234", "60,000"]
    assert len(digits(1e-12)) < 10
    assert len(digits(1e15)) < 10


def a_run(folder: Path) -> RunLayout:
    run = RunLayout(folder)
    files.write_json(run.manifest, {"stages": ["stage1", "stage2"]})
    return run


def write_rows(run: RunLayout, attempt: int, first: int, count: int, **more: Any) -> Path:
    path = run.stage("stage1").attempt(attempt).metrics
    path.parent.mkdir(parents=True)
    rows = [
        {"images_seen": 32 * step, "step": step, "seconds": 0.5, "loss": 1.0 / step, "data_wait_s": 0.05, **more}
        for step in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_curves_of_a_long_stage_are_sampled_evenly(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for attempt in range(1, 11):
        write_rows(run, attempt, 1000 * (attempt - 1) + 1, 1000, images_per_second=250.0)
    found = curves_of(run)
    assert list(found) == ["stage1", "stage2"]
    assert found["stage2"] == []
    assert [curve.attempt for curve in found["stage1"]] == list(range(1, 11))
    points = [point for curve in found["stage1"] for point in curve.points]
    assert 250 <= len(points) <= 310
    assert (points[0].images_seen, points[-1].images_seen) == (32, 320_000)
    gaps = [after.images_seen - before.images_seen for before, after in itertools.pairwise(points)]
    assert 0 < min(gaps) <= max(gaps) < 4 * 320_000 / 300
    assert points[0].images_per_second == 250
    assert points[0].data_wait == pytest.approx(0.1)


def test_curves_of_a_short_stage_lack_no_row_and_old_rows_have_a_rate(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    write_rows(run, 1, 1, 50)
    (curve,) = curves_of(run)["stage1"]
    assert [point.images_seen for point in curve.points] == [32 * step for step in range(1, 51)]
    assert curve.points[7].images_per_second == pytest.approx(64)


def test_rows_that_are_torn_or_strange_are_passed_over(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    path = write_rows(run, 1, 1, 20)
    lines = path.read_text().splitlines()
    lines[3] = lines[3][:20]
    lines[5] = "[1, 2]"
    lines[7] = '{"images_seen": 256, "loss": NaN, "seconds": null}'
    path.write_text("\n".join(lines) + "\n" + lines[0][:-9])
    (curve,) = curves_of(run)["stage1"]
    assert [point.images_seen // 32 for point in curve.points] == [1, 2, 3, 5, 7, *range(8, 21)]
    assert curve.points[5] == Point(256, None, None, None)
    for content in ("", '{"images_seen": 3', "\n\n\n"):
        path.write_text(content)
        assert curves_of(run)["stage1"] == []


def test_a_thousand_attempts_are_joined(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for attempt in range(1, 1001):
        write_rows(run, attempt, 10 * attempt, 10)
    found = curves_of(run)["stage1"]
    points = [point for curve in found for point in curve.points]
    assert 250 <= len(points) <= 300  # where an offset lies in the last row of a file, none is behind it
    (line,) = stretches(found)
    assert line.points == tuple(points)
    assert not line.again


def test_rework_is_a_line_of_its_own_until_it_caught_up() -> None:
    def points(*images: int) -> tuple[Point, ...]:
        return tuple(Point(each, 1.0, None, None) for each in images)

    found = stretches([Curve(1, points(10, 20, 30)), Curve(2, points(15, 25, 35, 45)), Curve(3, points(50))])
    assert [([p.images_seen for p in each.points], each.again) for each in found] == [
        ([10, 20, 30], False),
        ([15, 25], True),
        ([25, 35, 45, 50], False),
    ]
    assert stretches([]) == []


def test_smoothing_keeps_length_and_mean_level() -> None:
    assert smoothed([]) == []
    assert smoothed([3.0]) == [3.0]
    wild = smoothed([0.0, 2.0] * 100)
    assert len(wild) == 200
    assert all(0.8 < each < 1.2 for each in wild[10:-10])


def test_pictures_are_the_sheet_or_the_newest_preview(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    stage = run.stage("stage1")
    stage.previews.mkdir(parents=True)
    for clock in (1_000_000, 20_000_000):
        Image.new("RGB", (20, 10)).save(stage.preview(clock))
    assert pictures_of(run) == {"stage1": [stage.preview(20_000_000)], "stage2": []}
    assert caption(stage.preview(20_000_000)) == "preview at 20 M images"
    Image.new("RGB", (20, 10)).save(stage.sheet)
    assert pictures_of(run)["stage1"] == [stage.sheet]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "I;16"])
def test_pictures_are_embedded_small(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((2000, 1000), 90).convert(mode if mode != "I;16" else "I").convert(mode).save(path)
    found = embed(path)
    assert (found.width, found.height) == (900, 450)
    assert found.uri.startswith("data:image/")
    assert len(found.uri) < 280_000


def test_a_picture_that_cannot_be_read_is_named_in_the_page(tmp_path: Path) -> None:
    path = tmp_path / "img-000000001000.png"
    whole = tmp_path / "b.png"
    Image.effect_noise((300, 300), 90).save(whole)
    path.write_bytes(whole.read_bytes()[:2000])
    for wrong in (path, tmp_path / "absent.png", tmp_path):
        with pytest.raises(DataError):
            embed(wrong)
    path.write_text("no picture")
    text = html_page(report(), {}, {"/scratch/runs/first": {"stage1": [path]}})
    Page(text)
    assert "preview at 1 k images: left out, no picture that Pillow knows" in text
