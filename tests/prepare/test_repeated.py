"""Texts that come more than once are found, each with its place in the batches that encode them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pixart_ds.prepare import repeated
from pixart_ds.prepare.repeated import RepeatedCaptions, is_in, repeated_texts, write_repeated


def test_values_are_found_in_a_sorted_array() -> None:
    random = np.random.default_rng(0)
    top = np.iinfo(np.uint64).max
    for size in (0, 1, 2, 50):
        for span in (3, 60, top):
            rising = np.unique(random.integers(0, span, size, np.uint64, endpoint=True))
            drawn = random.integers(0, span, 100, np.uint64, endpoint=True)
            values = np.concatenate([drawn, rising, np.array([0, top], np.uint64)])
            assert is_in(rising, values).tolist() == np.isin(values, rising).tolist()
            assert is_in(rising, values[:0]).tolist() == []


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        ([], []),
        ([[], []], []),
        ([["a", "b"], ["c"]], []),
        ([["a", "b"], ["c", "b"], ["a", "ü", "ü"]], ["a", "b", "ü"]),
        ([["a", "a"], ["b"]], ["a"]),
    ],
)
def test_only_what_comes_more_than_once_is_told(pieces: list[list[str]], wanted: list[str]) -> None:
    read, told = [], []

    def texts(number: int) -> list[str]:
        read.append(number)
        return pieces[number]

    assert repeated_texts(texts, len(pieces), lambda: told.append(1)) == wanted
    assert len(told) == len(pieces)
    again = [number for number, piece in enumerate(pieces) if {*piece} & {*wanted}]
    assert read == [*range(len(pieces)), *again], "only pieces that hold one of these are read again"


def test_texts_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated.xxhash, "xxh3_64_intdigest", len)
    pieces = [["one", "two", "three"], ["six", "two"]]
    assert repeated_texts(pieces.__getitem__, 2) == ["two"]


def test_each_has_a_place_among_those_of_its_length(tmp_path: Path) -> None:
    pieces = [["bb", "a", "ccc", "dddd"], ["ccc", "dddd", "a", "bb", "once"]]
    write_repeated(tmp_path / "found", pieces.__getitem__, 2, 3, lambda: None)
    found = RepeatedCaptions(tmp_path / "found")
    assert found.places == {"a": (0, 0), "bb": (0, 1), "ccc": (0, 2), "dddd": (1, 0)}
    assert [found.batch(number) for number in (0, 1)] == [["a", "bb", "ccc"], ["dddd"]]
    write_repeated(tmp_path / "found", pieces.__getitem__, 1, 3, lambda: None)
    assert RepeatedCaptions(tmp_path / "found").places == found.places, "what another process wrote stays"
    write_repeated(tmp_path / "none", pieces.__getitem__, 1, 3, lambda: None)
    assert RepeatedCaptions(tmp_path / "none").places == {}
