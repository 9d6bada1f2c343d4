"""The book of a run: one append-only file for each attempt, folded when it is read."""

from __future__ import annotations

from pathlib import Path

from pixart_ds import files
from pixart_ds.errors import DataError
from pixart_ds.layout import AttemptLayout, RunLayout
from pixart_ds.ledger.entries import Entry


def open_entry(attempt: AttemptLayout, entry: Entry) -> Entry:
    """Writes an entry's first line."""
    files.append_json_line(attempt.ledger, entry.to_json())
    return entry


def update_entry(attempt: AttemptLayout, entry: Entry) -> None:
    """Writes what is true now; the line replaces the launch's earlier ones when the book is read."""
    files.append_json_line(attempt.ledger, entry.to_json())


def read_book(run: Path) -> dict[str, list[Entry]]:
    """All entries of a run by stage, in the chain's sequence; a stage that never ran has none.

    Raises:
        DataError: The folder holds no run.
    """
    layout = RunLayout(run)
    if not layout.manifest.exists():
        raise DataError(
            "there is no run in this folder (no manifest.json)", where=run.resolve(), remedy="give the folder of a run"
        )
    stages = files.read_json(layout.manifest)["stages"]
    return {stage: [e for attempt in layout.stage(stage).all_attempts() for e in _fold(attempt)] for stage in stages}


def _fold(attempt: AttemptLayout) -> list[Entry]:
    """The last line of each launch."""
    last: dict[int, Entry] = {}
    for values in files.read_json_lines(attempt.ledger):
        entry = Entry.from_json(values)
        last[entry.launch] = entry
    return [last[launch] for launch in sorted(last)]
