"""How figures are written for people, in text, tables and pages."""

from __future__ import annotations

import math
from datetime import UTC, datetime


def digits(value: float | None) -> str:
    """Three significant digits without an exponent: 0.00123, 12.3, 1,234; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 6)}f}"


def percent(value: float | None) -> str:
    """93.1%; a dash for what is not known."""
    return "-" if value is None else f"{value:.1%}"


def spaced(name: str) -> str:
    """A key of the values as words."""
    return name.replace("_", " ")


def counted(count: int, what: str) -> str:
    """1 stage, 2,000 stages."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def moment(seconds: float | None, *, zone: bool = True) -> str:
    """Unix seconds as 3 Oct 2026, 14:05 UTC."""
    if seconds is None:
        return "at an unknown time"
    at = datetime.fromtimestamp(seconds, UTC)
    return f"{at.day} {at:%b %Y, %H:%M}{' UTC' if zone else ''}"
