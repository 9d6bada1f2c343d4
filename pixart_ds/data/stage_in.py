"""Filling a node's cache before a stage begins: through the cache itself, so that what the loader finds is what it would have made.

What is there is kept, after a look at its hash; nothing is evicted; what does not fit is left to the loader.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pixart_ds.data.cache import CacheOptions, ShardCache, on_disk, room_of, shards_here
from pixart_ds.data.shards import PreparedSet
from pixart_ds.data.store import Store, open_store
from pixart_ds.errors import MachineError
from pixart_ds.log import duration, si

_REPORT_SECONDS = 5.0
_THREADS = 8
_Shard = tuple[int, str, int]
"""Number of the set, name of its shards, number of the shard."""


@dataclass(frozen=True)
class StageIn:
    """What a stage-in did, or with `dry_run` would do.

    Attributes:
        folder: The cache.
        shards, bytes: All that is wanted here.
        fetched_shards, fetched_bytes: Of these, what came from the store; the rest of what is here was there already.
        left_shards, left_bytes: What does not fit.
        limit_bytes: What the cache may hold.
        held_bytes: What it held before, of this and of other sets.
        fetching_seconds: How long it fetched; what was there was looked at before.
        dry_run: Nothing was fetched.
    """

    folder: str
    shards: int
    bytes: int
    fetched_shards: int
    fetched_bytes: int
    left_shards: int
    left_bytes: int
    limit_bytes: int
    held_bytes: int
    fetching_seconds: float
    dry_run: bool = False

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        there = self.shards - self.fetched_shards - self.left_shards
        did = "would fetch" if self.dry_run else "fetched"
        rate = ""
        if self.fetched_bytes and self.fetching_seconds:
            rate = f" in {duration(self.fetching_seconds)} ({si(self.fetched_bytes / self.fetching_seconds, 'B/s')})"
        text = (
            f"{did} {self.fetched_shards} of {self.shards} shards ({si(self.fetched_bytes, 'B')} of {si(self.bytes, 'B')}) "
            f"into {self.folder}{rate}; {there} {'was' if there == 1 else 'were'} there"
        )
        if not self.left_shards:
            return text
        return (
            f"{text}; {self.left_shards} shards ({si(self.left_bytes, 'B')}) DO NOT FIT: the cache may hold "
            f"{si(self.limit_bytes, 'B')} and held {si(self.held_bytes, 'B')} before; training fetches them when it needs them"
        )


def stage_in(
    sets: Sequence[PreparedSet],
    latents: str,
    places: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    options: CacheOptions,
    *,
    report: Callable[[str], None],
    dry_run: bool = False,
    threads: int = _THREADS,
) -> StageIn:
    """Brings row groups into a node's cache.

    Args:
        sets: The stage's.
        latents: Which of their latents.
        places: Set, and row group within it, of what is wanted.
        options: The cache.
        report: Is told what is to be done, and every few seconds how far it is.
        dry_run: Only look.
        threads: Shards that are fetched at once.

    Raises:
        DataError: A shard cannot be had, or the cache cannot be written. What was fetched stays, and the next call goes on.
        MachineError: The cache is read in place by all nodes, where a part of the shards is of no use, and not all of them fit.
    """
    plan = _Plan(sets, latents, places, options)
    report(str(plan))
    if options.in_place and plan.left:
        raise MachineError(
            f"{si(plan.size(plan.left), 'B')} of {si(plan.size(plan.wanted), 'B')} do not fit, and a part is of no use: "
            "all nodes read these shards in place",
            where=options.folder,
            remedy="free the file system, raise execution.cache.limit_gb, or name another execution.cache.folder",
        )
    fetched, seconds = (len(plan.missing), plan.size(plan.missing)), 0.0
    if not dry_run:
        with _Fill(plan, threads, report) as fill:
            fill.run("checked", plan.there)  # a damaged one is fetched anew
            began = time.monotonic()
            fill.run("fetched", plan.missing)
            fetched, seconds = fill.fetched, time.monotonic() - began
    return StageIn(
        str(options.folder),
        len(plan.wanted),
        plan.size(plan.wanted),
        *fetched,
        len(plan.left),
        plan.size(plan.left),
        plan.limit_bytes,
        plan.held_bytes,
        round(seconds, 3),
        dry_run,
    )


class _Plan:
    """What is wanted, and of that what is there, what is fetched, and what does not fit."""

    def __init__(
        self,
        sets: Sequence[PreparedSet],
        latents: str,
        places: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
        options: CacheOptions,
    ) -> None:
        self.sets, self.options = sets, options
        self.indexes = {
            (number, name): prepared.index(name)
            for number, prepared in enumerate(sets)
            for name in ("captions", latents)
        }
        self.held_bytes, self.limit_bytes = room_of(options)
        here = {key: shards_here(index, options) for key, index in self.indexes.items()}
        groups = zip(*(part.tolist() for part in places), strict=True)
        # both shards of a group, then the next group: half of one is of little use
        self.wanted: list[_Shard] = [(n, name, group) for n, group in groups for name in ("captions", latents)]
        self.there = [shard for shard in self.wanted if here[shard[:2]][shard[2]]]
        away = [shard for shard in self.wanted if not here[shard[:2]][shard[2]]]
        after = np.cumsum([on_disk(self._size(shard)) for shard in away], dtype=np.int64)
        fits = int(np.searchsorted(after, self.limit_bytes - self.held_bytes, side="right"))
        self.missing, self.left = away[:fits], away[fits:]

    def __str__(self) -> str:
        room = max(0, self.limit_bytes - self.held_bytes)
        text = (
            f"{len(self.wanted)} shards, {si(self.size(self.wanted), 'B')}, are wanted in {self.options.folder}; "
            f"{len(self.there)} are there, {len(self.missing)} ({si(self.size(self.missing), 'B')}) are missing"
        )
        if self.left:
            text += f" and fit, {len(self.left)} ({si(self.size(self.left), 'B')}) do not"
        return f"{text}; there is room for {si(room, 'B')}"

    def _size(self, shard: _Shard) -> int:
        return int(self.indexes[shard[:2]].sizes[shard[2]])

    def size(self, shards: Sequence[_Shard]) -> int:
        return sum(self._size(shard) for shard in shards)

    def caches(self) -> dict[tuple[int, str], ShardCache]:
        """The caches of all sets, which evict nothing."""
        options = replace(self.options, evict=False)
        return {
            key: ShardCache(index, _Counted(open_store(self.sets[key[0]].address(key[1]))), options)
            for key, index in self.indexes.items()
        }


class _Counted:
    """A store that counts what it has given."""

    def __init__(self, store: Store) -> None:
        self.url, self._store, self._lock = store.url, store, threading.Lock()
        self.files = self.bytes = 0

    def fetch(self, name: str, to: Path) -> None:
        self._store.fetch(name, to)
        with self._lock:
            self.files += 1
            self.bytes += to.stat().st_size


class _Fill:
    """The threads of one stage-in."""

    def __init__(self, plan: _Plan, threads: int, report: Callable[[str], None]) -> None:
        self._plan, self._threads, self._report = plan, threads, report
        self._caches = plan.caches()

    def __enter__(self) -> _Fill:
        return self

    def __exit__(self, *_: object) -> None:
        for cache in self._caches.values():
            cache.close()

    @property
    def fetched(self) -> tuple[int, int]:
        """Shards and bytes that came from the stores."""
        stores = [cache.store for cache in self._caches.values()]
        counted = [store for store in stores if isinstance(store, _Counted)]
        return sum(store.files for store in counted), sum(store.bytes for store in counted)

    def run(self, did: str, shards: Sequence[_Shard]) -> None:
        """Opens shards, which downloads those that are not here or damaged. The first error ends it."""
        began = told = time.monotonic()
        total, done = self._plan.size(shards), 0
        with ThreadPoolExecutor(self._threads, "stage-in") as pool:
            futures = [pool.submit(self._open, shard) for shard in shards]
            try:
                for number, future in enumerate(futures, 1):
                    done += future.result()
                    now = time.monotonic()
                    if now - told >= _REPORT_SECONDS:
                        told, rate = now, done / (now - began)
                        self._report(
                            f"{did} {number} of {len(shards)} shards, {si(done, 'B')} of {si(total, 'B')}, "
                            f"{si(rate, 'B/s')}, {duration((total - done) / rate)} left"
                        )
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for cache in self._caches.values():
                    cache.stop()
                raise

    def _open(self, shard: _Shard) -> int:
        self._caches[shard[:2]].open(shard[2])  # and lets go of it at once
        return int(self._caches[shard[:2]].index.sizes[shard[2]])
