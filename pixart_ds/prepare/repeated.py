"""Texts that come more than once among millions: in a list of pictures an error, of captions a reason to encode them only once."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from pixart_ds import files

REPEATED = "repeated.parquet"


class RepeatedCaptions:
    """Captions that several pictures share, by the batches that encode them.

    Args:
        path: Of the file that `write_repeated` wrote.

    Attributes:
        key: Of the captions and their batches.
        places: For each caption the batch that encodes it, and its place in that.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        content = path.read_bytes()
        self.key = xxhash.xxh3_64_hexdigest(content)
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            self._captions: list[str] = file.read()["caption"].to_pylist()
            self._batch_size = file.metadata.row_group(0).num_rows if self._captions else 1
        self.places = {text: divmod(number, self._batch_size) for number, text in enumerate(self._captions)}

    def batch(self, number: int) -> list[str]:
        """Captions that are encoded together, so that each one's features are the same wherever it stands."""
        return self._captions[number * self._batch_size : (number + 1) * self._batch_size]


def write_repeated(
    path: Path, captions_of: Callable[[int], list[str]], parts: int, batch: int, tell: Callable[[], None]
) -> None:
    """Lists the captions that more than one picture has; those of about one length stand in one batch, a row group of the file.

    Args:
        path: Of the file; one that another process has written meanwhile stays.
        captions_of: Gives the captions of a part.
        parts: How many there are.
        batch: Captions that are encoded together.
        tell: Called for each part that has been read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    captions = sorted(repeated_texts(captions_of, parts, tell), key=lambda text: (len(text), text))
    content = pa.BufferOutputStream()
    pq.write_table(pa.table({"caption": pa.array(captions, pa.string())}), content, row_group_size=batch)
    with suppress(FileExistsError):
        files.write_new(path, [memoryview(content.getvalue())])


def repeated_texts(read: Callable[[int], list[str]], pieces: int, tell: Callable[[], None] = lambda: None) -> list[str]:
    """Texts that come more than once, in the sequence in which they first come. Of the others only hashes are held in memory.

    Args:
        read: Gives the texts of a piece, from 0; pieces that may hold one of these are read again.
        pieces: How many there are.
        tell: Called for each piece that has been read the first time.
    """
    hashes = []
    for number in range(pieces):
        hashes.append(np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in read(number)], np.uint64))
        tell()
    found, times = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]), return_counts=True)
    suspects = found[times > 1]
    seen = Counter[str]()
    for number in range(pieces):
        suspected = is_in(suspects, hashes[number])
        if suspected.any():
            seen.update(itertools.compress(read(number), suspected.tolist()))
    return [text for text, times in seen.items() if times > 1]


def is_in(rising: npt.NDArray[np.uint64], values: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """(n,) whether each of n values is in a sorted array; `np.isin` would sort that array again for every piece."""
    if not len(rising):
        return np.zeros(len(values), np.bool_)
    places = np.minimum(np.searchsorted(rising, values), len(rising) - 1)
    there: npt.NDArray[np.bool_] = rising[places] == values
    return there
