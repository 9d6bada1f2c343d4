"""The cost report in a real browser, which can reach nothing: drawn in both themes, by its own script alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image, ImageStat

from pixart_ds.report.html import html_page
from tests.report.test_html import curves, report

pytestmark = pytest.mark.e2e

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Seen(NamedTuple):
    """What a browser made of a page."""

    document: str
    picture: Image.Image
    console: list[str]
    fetched: list[str]
    """By the page, not by the browser for itself."""


def _works(program: str | None) -> bool:
    return (
        program is not None and subprocess.run([program, "--version"], capture_output=True, check=False).returncode == 0
    )


@pytest.fixture(scope="module")
def browser() -> str:
    """A headless Chromium; Debian's package is installed where there is none."""
    found = next((path for name in _NAMES if _works(path := shutil.which(name))), None)
    if found is not None:
        return found
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(
            "there is no Chromium, and no root with apt-get to install it"
        )  # the only reason: else it must work
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "-qq"]
    for words in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
        answer = subprocess.run([*apt, *words], env=environment, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, f"apt-get cannot install Chromium: {answer.stderr[-300:]}"
    program = shutil.which("chromium")
    assert _works(program), "the package chromium of this distribution does not run here"
    assert program is not None
    return program


def look(browser: str, folder: Path, page: str, theme: str, width: int = 1280) -> Seen:
    """Opens a page twice: for its picture, and for its document as its script left it."""
    path, picture, net = (folder / name for name in ("page.html", f"{theme}-{width}.png", "net.json"))
    path.write_text(page, encoding="utf-8")
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--hide-scrollbars",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--log-net-log={net}",
        f"--window-size={width},2400",
    ]
    address = f"{path.as_uri()}#{theme}"
    told = []
    for what in (f"--screenshot={picture}", "--dump-dom"):
        answer = subprocess.run([browser, *options, what, address], capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr[-2000:]
        told.append(answer)
    console = [line for answer in told for line in answer.stderr.splitlines() if "CONSOLE" in line]
    events = json.loads(net.read_text())["events"]
    asked = [event["params"] for event in events if "url" in event.get("params", {})]
    # The browser asks for things of its own, too; what a page of a file asks for has the origin "null".
    fetched = sorted({one["url"] for one in asked if one.get("initiator") == "null" and one["url"].startswith("http")})
    return Seen(told[1].stdout, Image.open(picture).convert("L"), console, fetched)


def luminance(picture: Image.Image) -> float:
    return float(ImageStat.Stat(picture).mean[0])


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_drawn_in_both_themes_by_its_own_script_and_fetches_nothing(
    browser: str, tmp_path: Path, width: int
) -> None:
    sheet = tmp_path / "sheet.png"
    Image.effect_noise((600, 300), 90).save(sheet)
    page = html_page(report(attempts=40), curves(), {"/scratch/runs/first": {"stage1": [sheet]}})
    means = {}
    for theme, other in (("light", "Dark"), ("dark", "Light")):
        seen = look(browser, tmp_path, page, theme, width)
        assert seen.console == []
        assert seen.fetched == []
        assert f'data-theme="{theme}"' in seen.document
        assert f'<button id="theme" type="button">{other}</button>' in seen.document
        assert seen.picture.width == width
        assert ImageStat.Stat(seen.picture).stddev[0] > 10  # not one colour
        # Text and bars lie everywhere, not in the first lines alone.
        for part in range(4):
            strip = seen.picture.crop((0, 600 * part, width, 600 * part + 500))
            assert ImageStat.Stat(strip).stddev[0] > 5
        means[theme] = luminance(seen.picture)
    assert means["light"] > 190
    assert means["dark"] < 70


@pytest.mark.parametrize("attempts", [0, 1000])
def test_pages_of_no_and_of_many_attempts(browser: str, tmp_path: Path, attempts: int) -> None:
    seen = look(browser, tmp_path, html_page(report(attempts=attempts), {}, {}), "light")
    assert (seen.console, seen.fetched) == ([], [])
    assert luminance(seen.picture) > 190
    assert ImageStat.Stat(seen.picture).stddev[0] > 10


def test_the_browser_would_tell_of_what_a_page_fetches_and_this_one_may_not(browser: str, tmp_path: Path) -> None:
    picture = '<img src="https://pixart.invalid/a.png"><script>document.title = "mine"</script>'
    open_page = f"<!DOCTYPE html><html><body>{picture}<script>absent.name</script></body></html>"
    seen = look(browser, tmp_path, open_page, "light")
    assert seen.fetched == ["https://pixart.invalid/a.png"]
    assert any("absent is not defined" in line for line in seen.console)
    closed = html_page(report(), {}, {}).replace("<header>", f"{picture}<header>")
    seen = look(browser, tmp_path, closed, "light")
    assert seen.fetched == []
    assert sum("Content Security Policy" in line for line in seen.console) >= 2
    assert "<title>mine" not in seen.document
    assert 'data-theme="light"' in seen.document
