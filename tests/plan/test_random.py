"""Philox words are the same for ever, and addressed without collisions."""

from __future__ import annotations

import numpy as np

from pixart_ds.plan.random import key_of, permutation, raw_words, uniform


def test_golden_words() -> None:
    # Written down once: any other release of numpy, machine or thread count must give these.
    assert key_of("order", 43) == GOLDEN_KEY
    assert raw_words((1, 2), (3, 4, 5), 5).tolist() == GOLDEN_WORDS
    assert (
        raw_words((0, 0), (0, 0, 0), 1).tolist()
        == np.random.Philox(key=0, counter=0).random_raw(1).reshape(-1).tolist()
    )


GOLDEN_KEY = (8036966228079468253, 1725251508621504190)
GOLDEN_WORDS = [
    4189792100658428757,
    12666372961043322608,
    4024337450628799383,
    1863647832253266197,
    2964524563919465196,
]


def test_a_longer_stream_begins_like_a_shorter_one() -> None:
    assert raw_words((7, 8), (1, 2, 3), 100)[:9].tolist() == raw_words((7, 8), (1, 2, 3), 9).tolist()
    assert raw_words((7, 8), (1, 2, 3), 0).tolist() == []


def test_counters_and_keys_give_different_streams() -> None:
    seen = {
        tuple(raw_words(key, (a, b, c), 2))
        for key in ((0, 0), (0, 1), (1, 0))
        for a in range(3)
        for b in range(3)
        for c in range(3)
    }
    assert len(seen) == 3 * 27
    assert len({key_of("a", "bc"), key_of("ab", "c"), key_of("abc"), key_of("a", 1), key_of("a", "1")}) == 5


def test_permutation_and_uniform() -> None:
    words = raw_words(key_of("x"), (0, 0, 0), 10_000)
    assert sorted(permutation(words).tolist()) == list(range(10_000))
    numbers = uniform(words)
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01
    assert uniform(np.array([2**64 - 1], np.uint64))[0] < 1
