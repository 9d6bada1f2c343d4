"""The summary of a prepared set in a real browser, which can reach nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import ImageStat

from pixart_ds.prepare.summary import html
from tests.e2e.test_html_report import browser, look, luminance
from tests.prepare.test_summary import facts_of

pytestmark = pytest.mark.e2e

__all__ = ["browser"]  # the fixture


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_drawn_in_both_themes_and_fetches_nothing(browser: str, tmp_path: Path, width: int) -> None:
    page = html(facts_of(tmp_path))
    means = {}
    for theme in ("light", "dark"):
        seen = look(browser, tmp_path, page, theme, width)
        assert seen.console == []
        assert seen.fetched == []
        assert f'data-theme="{theme}"' in seen.document
        assert seen.picture.width == width
        for part in range(4):
            strip = seen.picture.crop((0, 600 * part, width, 600 * part + 500))
            assert ImageStat.Stat(strip).stddev[0] > 5
        means[theme] = luminance(seen.picture)
    assert means["light"] > 180
    assert means["dark"] < 80


def test_a_caption_that_is_a_script_is_shown_and_not_run(browser: str, tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    page = html(facts).replace("</header>", '<script>document.title = "mine"</script></header>')
    seen = look(browser, tmp_path, page, "light")
    assert any("Content Security Policy" in line for line in seen.console)
    assert "<title>mine" not in seen.document
