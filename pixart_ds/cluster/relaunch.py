"""Whether the ranks are started again within an attempt; pure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from pixart_ds.errors import EXITS_THAT_TELL

Ending = Literal["done", "stopped", "rolled back", "failed"]


@dataclass(frozen=True)
class Launch:
    """One start of the ranks, as it ended.

    Attributes:
        ending: How.
        asked: Whether a stop had been asked for.
        code: The exit code that says why it failed, if it did.
        progress: Whether a new checkpoint was committed.
    """

    ending: Ending
    asked: bool
    code: int | None
    progress: bool


def delay_before_next(launches: list[Launch], *, retries: int, backoff_s: float) -> float | None:
    """Seconds to wait before the next launch; None if the attempt is over.

    A roll-back is followed at once: the guard itself counts them. A crash is followed too, but for the last of more than `retries`
    in a row without a new checkpoint; each of those waits four times as long as the one before.

    Args:
        launches: Those of the attempt so far, at least one.
        retries: Crashes in a row without a new checkpoint that are followed by another launch.
        backoff_s: After the first of them.
    """
    last = launches[-1]
    if last.ending in ("done", "stopped") or last.asked:
        return None
    if last.ending == "rolled back":
        return 0.0
    if last.code in EXITS_THAT_TELL:
        return None
    fruitless = len(
        list(itertools.takewhile(lambda each: each.ending == "failed" and not each.progress, reversed(launches)))
    )
    if retries == 0 or fruitless > retries:
        return None
    return backoff_s * 4.0 ** max(0, fruitless - 1)
