"""The sets of the stage and the place of its checkpoints: reachable, whole, and fast enough."""

from __future__ import annotations

import os
import random
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path

from pixart_ds.data.mds import ShardIndex, damage
from pixart_ds.data.shards import PreparedSet
from pixart_ds.data.store import Store, is_remote, open_store
from pixart_ds.doctor.check import Check, failed, ok, skipped, warning
from pixart_ds.doctor.probes.config import estimate_of
from pixart_ds.doctor.probes.machine import judge_clock
from pixart_ds.doctor.subject import Subject
from pixart_ds.engine.storage import FolderStorage, S3Storage, Storage, read, storage_of
from pixart_ds.errors import MachineError, PixArtError
from pixart_ds.log import si
from pixart_ds.s3 import Connection, s3_endpoint, s3_errors, split_url
from pixart_ds.train.sets import open_sets, order_of

_THREADS = 8
_MEASURE_S, _LEAST_S = 8.0, 0.2
_CHUNK_BYTES = 1 << 20
_PATIENCE_S = 15.0
_PROBE_BYTES = 4096
_NO_STAGE = "no run was given"


def judge_throughput(path: str, read_bytes: int, seconds: float, need: float | None, *, every_pass: bool) -> Check:
    """Whether a set is read as fast as the stage's GPUs of one node use it up.

    Args:
        path: Of the set.
        read_bytes, seconds: What was read in which time.
        need: Bytes a second of a node, as `pixart-ds estimate` reckons; None if there is no GPU to reckon for.
        every_pass: Whether all passes read there; else the node's cache has what it read before.
    """
    name, rate = "data.throughput", read_bytes / seconds
    if seconds < _LEAST_S:
        return ok(
            name, f"{path}: {si(read_bytes, 'B')} in {seconds:.2f} s by {_THREADS} threads: too small a set to measure"
        )
    seen = f"{path}: {si(rate, 'B/s')} ({si(read_bytes, 'B')} by {_THREADS} threads)"
    if need is None:
        return ok(name, f"{seen}; what the stage needs is not known without a GPU or a --profile")
    seen += f"; the stage needs {si(need, 'B/s')} a node"
    if rate >= need:
        return ok(name, seen)
    if every_pass:
        return failed(
            name, seen, "copy shards to the nodes (execution.cache.mode node-persistent), or use a faster file system"
        )
    return warning(
        name,
        f"{seen}: the GPUs wait, until what a node reads lies in its cache",
        "keep the cache between jobs (execution.cache.mode node-persistent), or take a faster store or network",
    )


# ---- the sets ----------------------------------------------------------------------------------------------------------


def sets(subject: Subject) -> list[Check]:
    """Each set: opened, two of its shards hashed, its speed."""
    if subject.stage is None:
        return [skipped(f"data.{name}", _NO_STAGE) for name in ("sets", "shards", "throughput")]
    return [check for each in subject.stage.data.sets for check in _set(subject, each.path)]


def _set(subject: Subject, path: str) -> list[Check]:
    assert subject.stage is not None
    latents = subject.stage.data.latents
    try:
        prepared = PreparedSet.open(path)
        parts = [
            _Part(prepared.index(name), open_store(f"{path}/{folder}"))
            for name, folder in (("captions", "captions"), (latents, f"latents-{latents}"))
        ]
    except PixArtError as error:
        return [
            _as_check("data.sets", path, error),
            *(skipped(f"data.{name}", "see data.sets") for name in ("shards", "throughput")),
        ]
    through = f" through {s3_endpoint()} with these keys" if is_remote(path) else ""
    read_here = ok(
        "data.sets", f"{path}: {prepared.num_samples:,} samples in {len(prepared.counts):,} row groups, read{through}"
    )
    with tempfile.TemporaryDirectory(prefix="pixart_ds-doctor-") as folder:
        return [read_here, _shards(path, parts, Path(folder)), _throughput(subject, path, parts, Path(folder))]


class _Part:
    """The shards of one folder of a set."""

    def __init__(self, index: ShardIndex, store: Store) -> None:
        self.index, self.store = index, store

    def look(self, number: int, folder: Path) -> str | None:
        """What is wrong with a shard; None if it is whole."""
        path = self._here(number, folder)
        try:
            with closing(_Descriptor(path)) as file:
                return damage(file.number, self.index, number)
        finally:
            self._leave(path)

    def read(self, number: int, folder: Path) -> int:
        """Reads a shard from where it lies, past this node's memory; returns its bytes."""
        path = self._here(number, folder)
        try:
            if not is_remote(self.store.url):
                with closing(_Descriptor(path)) as file:
                    os.posix_fadvise(file.number, 0, 0, os.POSIX_FADV_DONTNEED)
                    while os.read(file.number, _CHUNK_BYTES):
                        pass
        finally:
            self._leave(path)
        return int(self.index.sizes[number])

    def _here(self, number: int, folder: Path) -> Path:
        """A shard's own file, or of a store's a copy."""
        name = self.index.names[number]
        if not is_remote(self.store.url):
            return Path(self.store.url) / name
        path = folder / secrets.token_hex(8)
        self.store.fetch(name, path)
        return path

    def _leave(self, path: Path) -> None:
        if is_remote(self.store.url):
            path.unlink(missing_ok=True)


class _Descriptor:
    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        os.close(self.number)


def _shards(path: str, parts: Sequence[_Part], folder: Path) -> Check:
    """The first shard and another one, of captions and of latents."""
    name = "data.shards"
    count = len(parts[0].index)
    chosen = sorted({0, random.randrange(count)})
    for number in chosen:
        for part in parts:
            shard = f"{part.store.url}/{part.index.names[number]}"
            try:
                wrong = part.look(number, folder)
            except PixArtError as error:
                return _as_check(name, shard, error)
            except OSError as error:
                return failed(name, f"{shard}: {error.strerror}", "look after the file system, and TMPDIR")
            if wrong is not None:
                return failed(
                    name, f"{shard} is damaged: {wrong}", "copy the shard there again, or prepare the set again"
                )
    words = " and ".join(str(number) for number in chosen)
    return ok(name, f"{path}: shard{'s' if len(chosen) > 1 else ''} {words} of {count:,} whole, captions and latents")


def _throughput(subject: Subject, path: str, parts: Sequence[_Part], folder: Path) -> Check:
    name = "data.throughput"
    assert subject.stage is not None
    numbers = list(range(len(parts[0].index)))
    random.shuffle(numbers)
    readers = (lambda part=part, number=number: part.read(number, folder) for number in numbers for part in parts)
    try:
        size, seconds = measure(readers, _THREADS, _MEASURE_S)
    except PixArtError as error:
        return _as_check(name, path, error)
    except OSError as error:
        return failed(name, f"{path}: {error.strerror}", "look after the file system, and TMPDIR")
    estimated = estimate_of(subject)
    need = None
    if estimated is not None and estimated["feed_bytes_per_second_per_gpu"] is not None:
        need = estimated["feed_bytes_per_second_per_gpu"] * estimated["gpus_per_node"]
    cache = (subject.profile.cache if subject.profile else None) or subject.stage.execution.cache
    return judge_throughput(path, size, seconds, need, every_pass=cache.mode == "shared")


def measure(readers: Iterator[Callable[[], int]], threads: int, seconds: float) -> tuple[int, float]:
    """Bytes that threads have read, and the seconds it took them; none begins another one after `seconds`.

    Raises:
        Exception: The first error of a reader.
    """
    began, lock, sizes = time.monotonic(), threading.Lock(), list[int]()

    def work() -> None:
        while time.monotonic() - began < seconds:
            with lock:
                reader = next(readers, None)
            if reader is None:
                return
            sizes.append(reader())

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()
    return sum(sizes), max(time.monotonic() - began, 1e-6)


def recipe(subject: Subject) -> Check:
    """The sets fit the recipe and each other."""
    name, stage = "data.recipe", subject.stage
    if stage is None:
        return skipped(name, _NO_STAGE)
    found = open_sets(stage)
    order_of(stage, found)
    return ok(name, f"{len(found)} set{' fits' if len(found) == 1 else 's fit'} the recipe of {stage.name}")


def store_clock(subject: Subject) -> Check:
    """This node's clock against a store's: one refuses requests whose date is too far off."""
    name = "data.store_clock"
    if subject.stage is None:
        return skipped(name, _NO_STAGE)
    url = next((each.path for each in subject.stage.data.sets if is_remote(each.path)), None)
    if url is None:
        return skipped(name, "no set lies in an object store")
    bucket, prefix = split_url(url)
    before = time.time()
    with s3_errors(url, "manifest.json"):
        answer = Connection(1).client().head_object(Bucket=bucket, Key=f"{prefix}manifest.json")
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    if date is None:
        return skipped(name, "the store's answer has no date")
    skew_s = (before + time.time()) / 2 - parsedate_to_datetime(date).timestamp()
    return judge_clock(name, skew_s, f"the store's, {s3_endpoint()}")


# ---- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoints(subject: Subject) -> Check:
    """A small file is written where checkpoints lie, read and removed, in a folder of its own."""
    name = "data.checkpoints"
    if subject.run is None or subject.stage is None:
        return skipped(name, _NO_STAGE)
    place = storage_of(subject.run.stage(subject.stage.name))
    if isinstance(place, S3Storage):
        place = S3Storage(place.where, _PATIENCE_S)
    own, content = place.sub(f"doctor-{subject.host}-{secrets.token_hex(4)}"), os.urandom(_PROBE_BYTES)
    there = not isinstance(place, FolderStorage) or place.folder.is_dir()
    try:
        own.make()
        try:
            own.write("probe", lambda: [content])
            same = read(own, "probe") == content
        finally:
            own.delete("probe")
    except MachineError as error:
        return _as_check(name, place.where, error)
    finally:
        if not there:
            _remove_if_empty(place)
    if not same:
        return failed(
            name, f"{place.where}: a file reads otherwise than it was written", "have the store or the disk checked"
        )
    return ok(name, f"{place.where}: a file was written, read and removed")


def _remove_if_empty(place: Storage) -> None:
    """The folder that the probe made on the way."""
    if isinstance(place, FolderStorage):
        with suppress(OSError):
            os.rmdir(place.folder)


def _as_check(name: str, about: str, error: PixArtError) -> Check:
    where = "" if error.where in (None, about) else f" ({error.where})"
    return failed(name, f"{about}: {error.what}{where}", error.remedy or "see the message")


FULL = (sets, recipe, store_clock, checkpoints)
