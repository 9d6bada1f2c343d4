"""Captions as the released checkpoints saw them: DeepFloyd's cleaning, applied twice (diffusers' `clean_caption=True`).

The rules stand in tables and are applied from top to bottom; their sequence matters. Where a rule is written otherwise than in the
released code, it matches the same text, in a time that grows with the length of the caption and not with its square.
"""

from __future__ import annotations

import html
import io
import re
from typing import NamedTuple
from urllib.parse import unquote_plus

import ftfy
from bs4 import BeautifulSoup
from bs4.exceptions import ParserRejectedMarkup


class Rule(NamedTuple):
    """What is replaced by what."""

    name: str
    pattern: re.Pattern[str]
    replacement: str = ""
    only_if: re.Pattern[str] | None = None
    """Cheaper to look for; where it is not found, the pattern is not either."""


def _rule(name: str, pattern: str, replacement: str = "", only_if: str | None = None) -> Rule:
    return Rule(name, re.compile(pattern), replacement, None if only_if is None else re.compile(only_if))


_TOP_DOMAIN = r"\.(?:com|co|ru|net|org|edu|gov|it)"
_SUFFIX = r"png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DIGIT = r"\d"


def _address(name: str, scheme: str) -> Rule:
    """An address with that scheme, or anything that ends as a host does, unless it is the name of a mailbox.

    A stretch of host characters that holds no address is matched by the last alternative, which puts it back: otherwise the search
    would begin again at each of its words. Only a scheme can still begin within it.
    """
    host = r"[a-z0-9.\-]"
    return _rule(
        name,
        rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|{host}+{_TOP_DOMAIN}[\w/-]*\b/?(?!@)|({host}+?)(?=\b{scheme}:|(?!{host})))",
        r"\1",
        only_if=rf"{scheme}:|{_TOP_DOMAIN}",
    )


BEFORE_MARKUP = (
    _rule("a person's place", "<person>", "person"),
    _address("address", "https?"),
    _address("address without scheme", "www"),
)

SIGNS = (
    _rule("nickname", r"@\w+"),
    _rule("CJK, from strokes (U+31C0) to unified ideographs (U+9FFF)", r"[\u31c0-\u9fff]+"),
    _rule(
        "dashes",
        r"[\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+",
        "-",
    ),
    _rule("double quotes", r"[`´«»“”¨]", '"'),
    _rule("single quotes", r"[‘’]", "'"),
    _rule("escaped quote", r"&quot;?"),
    _rule("escaped ampersand", r"&amp"),
    _rule("IP address", r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " ", only_if=_DIGIT),
    _rule("time at the end", r"\d:\d\d\s+$", only_if=_DIGIT),
    _rule("escaped line break", r"\\n", " "),
    _rule("short number after #", r"#\d{1,3}\b"),
    _rule("long number after #", r"#\d{5,}\b"),
    _rule("number of six digits or more", r"\b\d{6,}\b", only_if=r"\d{6}"),
    _rule("file name", rf"(?<!\S)\S+\.(?:{_SUFFIX})", only_if=rf"\.(?:{_SUFFIX})"),
    _rule("repeated quotes", r"[\"']{2,}", '"'),
    _rule("repeated dots", r"\.{2,}", " "),
    _rule("signs", r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    _rule("dot between spaces", r"(?<!\s)\s+\.\s+", " "),
)

CODES = (
    _rule("jc6640", r"\b[a-zA-Z]{1,3}\d{3,15}\b", only_if=_DIGIT),
    _rule("jc6640vc", r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", only_if=_DIGIT),
    _rule("6640vc231", r"\b\d+[a-zA-Z]+\d+\b", only_if=_DIGIT),
    _rule("shipping", r"(?:worldwide\s+)?(?:free\s+)?shipping", only_if="shipping"),
    _rule("download", r"(?:free\s)?download(?:\sfree)?", only_if="download"),
    _rule("click on", r"\bclick\b\s(?:for|on)\s\w+"),
    _rule("kind of file", rf"\b(?:{_SUFFIX})(?:\simages?)?"),
    _rule("page number", r"\bpage\s+\d+\b"),
    _rule("j2d1a2a", r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " ", only_if=_DIGIT),
    _rule("640x480", r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b", only_if=_DIGIT),
)

ENDS = (
    _rule("space before a colon", r"\b\s+:\s+", ": "),
    _rule("no space after a comma, dot or slash", r"(\D[,./])\b", r"\1 "),
    _rule("spaces", r"\s+", " "),
    _rule("quotes around it all", r"^[\"']([\w\W]+)[\"']$", r"\1"),
    _rule("sign at the start", r"^['_,\-:;]"),
    _rule("sign at the end", r"['_,\-:+]$"),
    _rule("a lone word after a dot", r"^\.\S+$"),
)

_MAY_HOLD_MARKUP = re.compile(r"<|&[a-zA-Z#]")
_JOINER = re.compile(r"[-_]")
_JOINERS_OF_PROSE = 3
"""With more hyphens and underscores than that, a caption is taken for a file's name, and they become spaces."""


def clean_caption(caption: str) -> str:
    """The caption in lower case without addresses, markup, codes and ornaments.

    One pass is not enough: each begins by decoding "%2B" and "+" as in an address, so the second changes text again. Nor is a third
    without effect.
    """
    return _clean_once(_clean_once(caption))


def _clean_once(caption: str) -> str:
    text = unquote_plus(caption).strip().lower()
    text = _apply(BEFORE_MARKUP, text)
    text = _without_markup(text)
    text = _apply(SIGNS, text)
    if len(_JOINER.findall(text)) > _JOINERS_OF_PROSE:
        text = _JOINER.sub(" ", text)
    text = _mended(text)
    text = _apply(CODES, text)
    return _apply(ENDS, text).strip()


def _apply(rules: tuple[Rule, ...], text: str) -> str:
    for rule in rules:
        if rule.only_if is None or rule.only_if.search(text):
            text = rule.pattern.sub(rule.replacement, text)
    return text


def _without_markup(text: str) -> str:
    """The text of HTML. The parser hands on all but "<" and "&" with a letter or # as it is, so the rest need not pass through it.

    What it refuses stays as it is: a caption is not worth a run.
    """
    if not _MAY_HOLD_MARKUP.search(text):
        return text
    try:
        # From a file it does not warn of text that looks like an address or a file's name.
        return BeautifulSoup(io.StringIO(text), features="html.parser").text
    except ParserRejectedMarkup:
        return text


def _mended(text: str) -> str:
    """Mojibake, control characters and entities put right; printable ASCII without & has none of them."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    return html.unescape(html.unescape(ftfy.fix_text(text)))
