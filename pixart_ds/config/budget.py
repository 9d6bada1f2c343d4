"""What a run may use up: `budget.json` in its folder, written with the run and changed on record while it is under way."""

from __future__ import annotations

import datetime
import getpass
from collections.abc import Sequence
from typing import Any

from pixart_ds import files
from pixart_ds.config.load import apply_overrides, differences, validate
from pixart_ds.config.schema import BudgetConfig
from pixart_ds.errors import ConfigError
from pixart_ds.layout import RunLayout


def read_budget(run: RunLayout) -> BudgetConfig:
    """The limits that hold now; none where the run has no such file.

    Raises:
        ConfigError: The file is damaged.
        OSError: It cannot be read.
    """
    return validate(BudgetConfig, _read(run)["limits"], run.budget)


def _read(run: RunLayout) -> dict[str, Any]:
    if not run.budget.exists():
        return {"limits": {}, "history": []}
    remedy = "write it anew: remove it, then pixart-ds budget RUN --set gpu_days=1300"
    found = files.read_json(run.budget, error=ConfigError, remedy=remedy)
    if not isinstance(found, dict) or not all(
        isinstance(found.get(k), t) for k, t in (("limits", dict), ("history", list))
    ):
        raise ConfigError("it has no limits and history", where=run.budget, remedy=remedy)
    return found


def write_first(run: RunLayout, budget: BudgetConfig | None) -> None:
    """Writes the limits that a new run begins with."""
    limits = {} if budget is None else budget.limits
    if limits:
        files.write_json(run.budget, {"limits": limits, "history": [_record({}, limits)]})
    else:  # of a creation that did not come to its end
        run.budget.unlink(missing_ok=True)


def change_budget(run: RunLayout, overrides: Sequence[str], *, dry_run: bool = False) -> list[str]:
    """Changes the limits of a run, on record; one that is under way hears of it.

    Args:
        run: The run.
        overrides: `gpu_days=1200`; `gpu_days=null` takes a limit away.
        dry_run: Only say what would change.

    Returns:
        `key: old → new` for each.

    Raises:
        ConfigError: There is no such limit, or it is not a number above 0. Nothing has changed then.
    """
    known = _read(run)
    before = validate(BudgetConfig, known["limits"], run.budget)
    after = validate(BudgetConfig, apply_overrides(before.model_dump(), overrides), "--set")
    lines = differences(before.model_dump(), after.model_dump())
    if lines and not dry_run:
        record = _record(before.limits, after.limits)
        files.write_json(run.budget, {"limits": after.limits, "history": [*known["history"], record]})
    return lines


def _record(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"when": now, "user": _user(), "before": before, "after": after}


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without this user
        return None
