"""What several of the page's sections read from the report's values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from pixart_ds.page.charts import number

Values = Mapping[str, Any]
"""The report, or a part of it, as `build.build` made it or as its JSON was read; whatever is not known is None or absent."""


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one: a part of the report that is absent or None has no figures."""
    return value if isinstance(value, Mapping) else {}


def made_at(values: Values) -> float | None:
    """When the report was made, in Unix seconds."""
    try:
        return datetime.fromisoformat(str(values.get("made"))).timestamp()
    except ValueError:
        return None


def every_attempt(runs: Iterable[Values]) -> list[Values]:
    """The attempts of all stages of runs."""
    return [attempt for run in runs for stage in run.get("stages") or [] for attempt in stage.get("attempts") or []]


def devices_of(runs: Iterable[Values]) -> list[str]:
    """The kinds of devices."""
    return sorted({str(each["device"]) for each in every_attempt(runs) if each.get("device")})


def on_cpus(runs: Iterable[Values]) -> bool:
    """Whether any attempt ran on CPU cores."""
    return any(each.startswith("cpu") for each in devices_of(runs))


def a100_ratio(values: Values) -> float:
    """A100-days for a V100-day."""
    told = mapping(mapping(mapping(values.get("paper")).get("assumptions")).get("a100_days_per_v100_day"))
    return number(told.get("value")) or 0.0
