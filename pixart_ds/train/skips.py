"""Which images of a stage are left out because training went wrong there; recorded before the launch that goes around them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pixart_ds import files
from pixart_ds.errors import CheckpointError
from pixart_ds.layout import StageLayout


@dataclass(frozen=True, order=True)
class Window:
    """The images (after, upto] of a stage, whole steps."""

    after: int
    upto: int

    def holds(self, images_seen: int) -> bool:
        """Whether the step that begins at this clock is one of them."""
        return self.after <= images_seen < self.upto

    def __str__(self) -> str:
        return f"images {self.after + 1:,} to {self.upto:,}"


def read_windows(layout: StageLayout) -> tuple[Window, ...]:
    """The recorded windows of a stage, by clock.

    Raises:
        CheckpointError: The file is damaged.
    """
    return tuple(sorted(Window(row["after"], row["upto"]) for row in read_records(layout)))


def read_records(layout: StageLayout) -> list[dict[str, Any]]:
    """What `record_window` has written, oldest first."""
    if not layout.skips.exists():
        return []
    remedy = "put the file back: it says which images are left out"
    records: list[dict[str, Any]] = files.read_json(layout.skips, error=CheckpointError, remedy=remedy)["windows"]
    return records


def record_window(layout: StageLayout, window: Window, about: Mapping[str, Any]) -> None:
    """Durably adds a window: every launch from now on goes around it.

    Args:
        layout: The stage.
        window: What is left out.
        about: Why, and by which launch.
    """
    row = {"after": window.after, "upto": window.upto, "time": time.time(), **about}
    files.write_json(layout.skips, {"format": 1, "windows": [*read_records(layout), row]})


def is_clean(images_seen: int, left_out: Iterable[Window], windows: Iterable[Window]) -> bool:
    """Whether a checkpoint is from before each window, or its training left the window out too.

    Args:
        images_seen: The checkpoint's clock.
        left_out: The windows that its training went around.
        windows: Those recorded now.
    """
    known = set(left_out)
    return all(images_seen <= window.after or window in known for window in windows)
