"""The doctor's answer for people: grouped by subject, what to do below each finding."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby

from pixart_ds.doctor.check import Check

_MARKS = {"ok": "ok     ", "warning": "WARNING", "failed": "FAILED ", "skipped": "skipped"}
_WIDTH = 120


def page(about: str, checks: Sequence[Check]) -> str:
    """All checks, and how many of each verdict.

    Args:
        about: Host, device, stage, job.
        checks: Those of one subject stand together.
    """
    lines = [f"doctor: {about}"]
    for subject, group in groupby(checks, key=lambda check: check.name.partition(".")[0]):
        lines += ["", subject]
        for check in group:
            lines += _lines(check)
    return "\n".join([*lines, "", tally(checks)])


def _lines(check: Check) -> list[str]:
    name = check.name.partition(".")[2].replace("_", " ")
    head = f"  {_MARKS[check.verdict]}  {name:<14} "
    indent = " " * len(head)
    lines = textwrap.wrap(check.evidence, _WIDTH, initial_indent=head, subsequent_indent=indent, break_long_words=False)
    if check.remedy is not None:
        to_do = {"initial_indent": f"{indent}to do: ", "subsequent_indent": indent + " " * 7}
        lines += textwrap.wrap(check.remedy, _WIDTH, **to_do, break_long_words=False, break_on_hyphens=False)  # type: ignore[arg-type]
    return lines


def tally(checks: Sequence[Check]) -> str:
    """`9 ok, 1 warning, 0 failed, 4 skipped`."""
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in _MARKS}
    warnings = f"{counts['warning']} warning{'' if counts['warning'] == 1 else 's'}"
    return f"{counts['ok']} ok, {warnings}, {counts['failed']} failed, {counts['skipped']} skipped"
