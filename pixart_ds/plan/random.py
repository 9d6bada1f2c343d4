"""Counter-based randomness: raw 64-bit words of numpy's Philox, addressed by key and counter, and what is made of them.

Only `random_raw` of numpy is used: its distributions may change between releases, the words may not.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]


def key_of(*parts: str | int) -> tuple[int, int]:
    """A 128-bit key, as two 64-bit words, from a sequence of texts and numbers; ("a", "bc") and ("ab", "c") differ."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def raw_words(key: tuple[int, int], counter: tuple[int, int, int], count: int) -> Words:
    """The first `count` words of the Philox4x64-10 stream with this key and these upper three counter words.

    The lowest counter word runs; streams of different counters never meet before 2⁶⁶ words.
    """
    bits = np.random.Philox(
        key=np.array(key, np.uint64), counter=np.array((0, *(part % 2**64 for part in counter)), np.uint64)
    )
    return np.asarray(bits.random_raw(count), np.uint64)


def permutation(words: Words) -> npt.NDArray[np.int64]:
    """A permutation of range(len(words)): the stable order of the words."""
    return np.argsort(words, kind="stable").astype(np.int64)


def uniform(words: Words) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each word, from its upper 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
