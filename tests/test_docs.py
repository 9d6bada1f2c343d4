"""Every command in README and docs is one that the command line takes, and every file that they name is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pixart_ds.cli import _parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))


def commands(page: str) -> list[str]:
    """Lines of `pixart-ds …` in blocks of code, continued ones joined, comments left out."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"^(?: {4}.*\n)+", text, re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("pixart-ds ")]


def words(command: str) -> list[str]:
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    found = list(lexer)
    end = next((n for n, word in enumerate(found) if set(word) <= set("|&;")), len(found))
    return [word for word in found[1:end] if word != "…"]


@pytest.mark.parametrize(("page", "command"), [(page, command) for page in PAGES for command in commands(page)])
def test_the_command_line_takes_it(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        _parser().parse_args(words(command))
    except SystemExit as ended:  # argparse's way of refusing
        refused = bool(ended.code)
    else:
        refused = False
    assert not refused, f"{page}: {command}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES)
def test_pages_that_are_linked_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert ((ROOT / page).parent / link).exists(), f"{page} links {link}"
