"""Pieces that pages are made of, and the page itself: one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from pixart_ds.page.style import SCRIPT, STYLE


def document(title: str, header: str, sections: Iterable[str], style: str = "") -> str:
    """A page that may load nothing and run nothing but its own script, whatever a name or a caption in it holds.

    Args:
        title: Text; also the headline.
        header: What stands under it (HTML).
        sections: As `section` makes them; empty ones are left out.
        style: CSS that goes after the common one.
    """
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        '<header><button id="theme" type="button" hidden>Dark</button>'
        f"<h1>{escape(title)}</h1>{header}</header>\n"
        + "\n".join(each for each in sections if each)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(name: str, title: str, content: str) -> str:
    """Content (HTML) under its headline (text); nothing if there is none.

    Args:
        name: Of its place in the page's address.
        title: Empty for a section without a headline.
        content: What it holds.
    """
    head = f"<h2>{escape(title)}</h2>" if title else ""
    return f'<section id="{name}">{head}{content}</section>' if content else ""


def tile(label: str, value: str, below: str = "") -> str:
    """A figure of the row at the top of a page: its label, the figure, and a line below it."""
    note = f'<span class="below">{escape(below)}</span>' if below else ""
    return f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b>{note}</div>'


def figure(title: str, content: str) -> str:
    """Content (HTML) under its title (text)."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{content}</figure>"


def colour_keys(words: Mapping[str, str]) -> str:
    """What the colours mean: words by the CSS class of a chart's marks."""
    lines = [f'<li><i class="key {name}"></i>{escape(each)}</li>' for name, each in words.items()]
    return f'<ul class="keys">{"".join(lines)}</ul>'


def table(
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int,
    total: bool = False,
    fold: bool = False,
) -> str:
    """A table without the columns that are empty in all rows; nothing if it has no rows.

    Args:
        title: Above it.
        heads: One for each column; without any these are facts, whose text may be long.
        rows: Text, not yet escaped.
        left: How many columns are text; the others are numbers.
        total: Whether the last row is a sum.
        fold: Whether it is folded at first.
    """
    if not rows:
        return ""
    kept = [column for column in range(len(rows[0])) if any(row[column] for row in rows)]
    words = len([column for column in kept if column < left])

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cells[column])}</{tag}>" for column in kept) + "</tr>"

    head = f"<thead>{line(heads, 'th')}</thead>" if heads else ""
    body = "".join(line(row, "td") for row in rows)
    kind = f"left{words}{' sum' if total else ''}{'' if heads else ' facts'}"
    made = f'<div class="wide"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'
    if fold:
        return f"<details><summary>{escape(title)} ({len(rows):,})</summary>{made}</details>"
    return figure(title, made)
