"""A stored file as one that can be sought in: only the bytes that are read are fetched."""

from __future__ import annotations

import io
from typing import Any

from pixart_ds.data.store import Store


class RangeFile(io.RawIOBase):
    """A file of a store, open for reading.

    Args:
        store: Where it lies.
        name: Of the file.
        size: In bytes, if it is known.
    """

    def __init__(self, store: Store, name: str, size: int | None = None) -> None:
        super().__init__()
        self._store, self._file, self._at = store, name, 0
        self._size = store.size(name) if size is None else size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, into: Any) -> int:
        data = self.read(len(into))
        into[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        count = left if size is None or size < 0 else min(size, left)
        data = self._store.read_range(self._file, self._at, count) if count else b""
        self._at += len(data)
        return data
