"""How often each noun came, exactly, in memory that does not grow with the captions."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from pixart_ds import files
from pixart_ds.errors import MachineError

MAX_HELD = 2_000_000
"""Distinct nouns in memory, about 400 MB."""

_MAX_RUNS = 64
"""Files that are merged at once; each is open meanwhile."""


class NounCounts:
    """How often each noun came; what is more than memory may hold lies in sorted files.

    Args:
        folder: For the files.
        max_held: Distinct nouns in memory.

    Raises:
        MachineError: The disk is full.
    """

    def __init__(self, folder: Path, max_held: int = MAX_HELD) -> None:
        self._folder, self._max_held = folder, max_held
        self._held: Counter[str] = Counter()
        self._runs: list[Path] = []
        self._made = 0

    def add(self, counts: Mapping[str, int]) -> None:
        self._held.update(counts)
        if len(self._held) > self._max_held:
            self.spill()

    def spill(self) -> None:
        """Moves what is in memory to a file."""
        self._runs.append(self._write(sorted(self._held.items())))
        self._held.clear()
        if len(self._runs) >= _MAX_RUNS:
            merged = self._write(self.items())
            for run in self._runs:
                run.unlink()
            self._runs = [merged]

    def items(self) -> Iterator[tuple[str, int]]:
        """Each noun once, sorted, with how often it came."""
        return merge_counts([*map(_read_run, self._runs), sorted(self._held.items())])

    def _write(self, counts: Iterable[tuple[str, int]]) -> Path:
        path = self._folder / f"run-{self._made:05d}"
        self._made += 1
        _write_run(path, counts)
        return path


def _write_run(path: Path, counts: Iterable[tuple[str, int]]) -> None:
    try:
        with open(path, "w", encoding="utf-8", errors="surrogatepass", newline="\n") as file:
            file.writelines(f"{noun}\t{count}\n" for noun, count in counts)
    except OSError as cause:
        if files.disk_error(cause, path.parent) is None:
            raise
        raise MachineError(
            f"counts cannot be written: {cause.strerror}",
            where=path,
            remedy="set TMPDIR to a folder with more space, then start again",
        ) from cause


def _read_run(path: Path) -> Iterator[tuple[str, int]]:
    with open(path, encoding="utf-8", errors="surrogatepass", newline="\n") as file:
        for line in file:  # no token holds white space
            noun, _, count = line.partition("\t")
            yield noun, int(count)


def merge_counts(sorted_counts: Iterable[Iterable[tuple[str, int]]]) -> Iterator[tuple[str, int]]:
    """Adds up counts that are each sorted by noun; the sums are sorted too."""
    for noun, same in groupby(heapq.merge(*sorted_counts), key=itemgetter(0)):
        yield noun, sum(count for _, count in same)
