"""From the order to micro-batches in memory: threads of the rank's own process fetch shards and read ahead of the loop."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from pixart_ds.data.cache import CacheOptions, ShardCache
from pixart_ds.data.mds import OpenShard
from pixart_ds.data.reader import Buffer, MicroBatch, Reader, ShardKey
from pixart_ds.data.shards import PreparedSet
from pixart_ds.errors import DataError
from pixart_ds.plan.order import Order, StepPlan
from pixart_ds.plan.shares import micro_batches

_WINDOW_BYTES = 1 << 30
"""Shards are fetched while those that are open, or on their way, are smaller than this together."""
_WINDOW_BATCHES = 256
"""And at most so many micro-batches ahead: a small set would never fill the bytes."""
_PATIENCE_SECONDS = 120.0
_GRACE_SECONDS = 30.0
"""Beyond the store's patience: one try that began within it may last as long."""


@dataclass
class _Job:
    """One micro-batch on its way.

    Attributes:
        plan: Its samples.
        needs: Its shards.
        result: Filled by a reader thread.
        buffer: Where it is read to, once that has begun.
    """

    plan: StepPlan
    needs: list[ShardKey]
    result: Future[MicroBatch] = field(default_factory=Future)
    buffer: Buffer | None = None


class Loader:
    """One rank's shares of the steps of a stage, read ahead by daemon threads; no worker process, no shared memory.

    What it delivers depends on the sets, the order, stage, seed and dropout alone, never on threads, cache or timing.

    Args:
        sets: The order's sets.
        order: Which samples make up a step.
        latents: Name of the latents to read.
        stage, seed: Key of the samples' draws.
        condition_dropout: Probability of the null condition.
        micro_batch_size: Most samples of a micro-batch.
        global_batch_size: Samples of a step.
        rank, world_size: Whose share.
        device: Where micro-batches are handed over.
        captions: Whether caption features are read.
        cache: Where the node keeps shards; None reads them in place.
        readers: Threads that read samples.
        fetchers: Threads that open and download shards.
        ahead: Micro-batches that are read before they are asked for.
    """

    def __init__(
        self,
        sets: Sequence[PreparedSet],
        order: Order,
        *,
        latents: str,
        stage: str,
        seed: int,
        condition_dropout: float,
        micro_batch_size: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        device: str | torch.device = "cpu",
        captions: bool = True,
        cache: CacheOptions | None = None,
        readers: int = 2,
        fetchers: int = 4,
        ahead: int = 4,
    ) -> None:
        self.order, self.micro_batch_size, self.global_batch_size = order, micro_batch_size, global_batch_size
        self.rank, self.world_size, self.device, self.ahead = rank, world_size, torch.device(device), ahead
        self._reader = Reader(
            sets, order, latents=latents, stage=stage, seed=seed, condition_dropout=condition_dropout, captions=captions
        )
        self._shards = _Shards(sets, latents, cache, fetchers)
        self.patience_seconds = _GRACE_SECONDS + (cache.patience_seconds if cache else _PATIENCE_SECONDS)
        self._steps: deque[tuple[int, deque[_Job]]] = deque()  # planned steps
        self._planned: deque[_Job] = deque()  # jobs of which nothing is asked yet
        self._fetching: deque[_Job] = deque()  # jobs whose shards are on their way
        self._reading: deque[_Job] = deque()  # jobs that a reader has
        self._next = self._until = 0
        self._left_out: Callable[[int], bool] = lambda images: False
        self._free = [Buffer(self.device.type == "cuda") for _ in range(ahead + 2)]
        self._lent: deque[tuple[Buffer, Any]] = deque()  # with the event after which a copy to the device is done
        self._to_read: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads = _serve(self._to_read, readers, "reader")

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def steps(self, after: int, until: int, left_out: Callable[[int], bool] = lambda images: False) -> Iterator[int]:
        """`images_seen` before each step from `after` until `until`; take each step's `micro_batches` before the next.

        Args:
            after, until: Clocks.
            left_out: Whether a step is not trained: it is yielded too, but nothing is read for it.
        """
        self._forget()
        self._next, self._until, self._left_out = after, until, left_out
        for images_seen in range(after, until, self.global_batch_size):
            self._advance()
            yield images_seen

    def micro_batches(self, images_seen: int) -> Iterator[MicroBatch]:
        """The rank's share of the step that follows `images_seen`; it may be empty. Each is valid until the next is asked for.

        Raises:
            DataError: A shard or sample cannot be read; store, shard and sample are named.
        """
        self._advance()
        if not self._steps or self._steps[0][0] != images_seen:
            raise ValueError(f"the step at {images_seen} images is not the next one of steps()")
        _, jobs = self._steps[0]
        while jobs:
            job = jobs.popleft()
            batch = self._result(job, images_seen)
            yield self._handed_over(job, batch)
            self._advance()
        self._steps.popleft()

    # ---- what is under way -------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Plans, fetches and reads as far ahead as the bounds allow."""
        while self._next < self._until and (len(self._steps) < 2 or len(self._planned) < self.ahead):
            self._plan_step()
        while self._planned and not self._far_enough():
            job = self._planned.popleft()
            self._shards.want(job.needs)
            self._fetching.append(job)
        while self._fetching and len(self._reading) < self.ahead and (buffer := self._buffer()) is not None:
            job = self._fetching.popleft()
            job.buffer = buffer
            self._reading.append(job)
            shards = {key: self._shards.futures[key] for key in job.needs}
            self._to_read.put((job.result, self._read, (job.plan, shards, buffer)))

    def _far_enough(self) -> bool:
        ahead = len(self._fetching) + len(self._reading)
        return ahead >= self.ahead and (
            ahead >= _WINDOW_BATCHES or self._shards.open_bytes >= self._shards.window_bytes
        )

    def _plan_step(self) -> None:
        if self._left_out(self._next):
            self._next += self.global_batch_size
            return
        share = self.order.share(self._next, self.global_batch_size, self.rank, self.world_size)
        jobs = deque(_Job(plan, self._reader.needs(plan)) for plan in micro_batches(share, self.micro_batch_size))
        self._steps.append((self._next, jobs))
        self._planned.extend(jobs)
        self._next += self.global_batch_size

    def _buffer(self) -> Buffer | None:
        """A buffer that nobody reads from any more."""
        while self._lent and (self._lent[0][1] is None or self._lent[0][1].query()):
            self._free.append(self._lent.popleft()[0])
        return self._free.pop() if self._free else None

    def _read(self, plan: StepPlan, shards: dict[ShardKey, Future[OpenShard]], buffer: Buffer) -> MicroBatch:
        opened = {}
        for key, future in shards.items():
            try:
                opened[key] = future.result()  # bounded: each download is
            except DataError as error:
                places = zip(plan.set_index.tolist(), plan.group.tolist(), plan.sample_id.tolist(), strict=True)
                sample = next(sample for number, group, sample in places if (number, group) == (key[0], key[2]))
                raise DataError(
                    f"{error.what} (needed for sample {sample})", where=error.where, remedy=error.remedy
                ) from error
        return self._reader.read(plan, opened, buffer)

    def _result(self, job: _Job, images_seen: int) -> MicroBatch:
        try:
            return job.result.result(self.patience_seconds)
        except TimeoutError as cause:
            if job.result.done():  # a file system's, not ours
                raise
            waiting = [self._shards.name(key) for key in job.needs if not self._shards.futures[key].done()]
            raise DataError(
                f"no micro-batch for {self.patience_seconds:.0f} s at {images_seen} images; "
                f"{len(waiting)} shards are still on their way: {', '.join(waiting[:3]) or 'none'}",
                where=", ".join(str(prepared.path) for prepared in self._reader.sets),
                remedy="look after the store or file system of the prepared sets, then start again",
            ) from cause

    def _handed_over(self, job: _Job, batch: MicroBatch) -> MicroBatch:
        """The micro-batch on the device. Its buffer is read to again when the copy is done, or the next one is asked for."""
        self._reading.popleft()
        assert job.buffer is not None
        self._shards.release(job.needs)
        moved = batch.to(self.device)
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._lent.append((job.buffer, event))
        return self._reader.decoded(moved)

    def _forget(self) -> None:
        """Lets go of everything that is under way."""
        for job in self._reading:
            job.result.cancel()
        for job in (*self._reading, *self._fetching):
            self._shards.release(job.needs)
        if any(job.result.running() for job in self._reading):
            self._free = [
                Buffer(self.device.type == "cuda") for _ in range(self.ahead + 2)
            ]  # threads still write to the old
        else:
            self._free += [job.buffer for job in self._reading if job.buffer is not None]
        self._steps.clear()
        self._planned.clear()
        self._fetching.clear()
        self._reading.clear()

    def close(self) -> None:
        """Ends the threads and closes the shards; what is being read is thrown away."""
        self._forget()
        self._shards.close()
        for _ in self._threads:
            self._to_read.put(None)
        for thread in self._threads:
            thread.join(timeout=5)


class _Shards:
    """Shards that are needed soon, opened by threads; each stays open as long as a micro-batch on its way needs it."""

    def __init__(self, sets: Sequence[PreparedSet], latents: str, cache: CacheOptions | None, fetchers: int) -> None:
        self._sources = {
            (number, name): prepared.source(name, cache)
            for number, prepared in enumerate(sets)
            for name in ("captions", latents)
        }
        limits = [source.limit_bytes for source in self._sources.values() if isinstance(source, ShardCache)]
        # a shard that is open takes its place on the disk even after it was evicted
        self.window_bytes = min([_WINDOW_BYTES, *(limit // 4 for limit in limits)])
        self.futures: dict[ShardKey, Future[OpenShard]] = {}
        self.open_bytes = 0
        self._users: dict[ShardKey, int] = {}
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads = _serve(self._tasks, fetchers, "fetcher")

    def want(self, keys: Sequence[ShardKey]) -> None:
        """Opens shards in the background, unless they are open."""
        for key in keys:
            if key not in self.futures:
                self.futures[key] = Future()
                self._users[key] = 0
                self.open_bytes += self._size(key)
                self._tasks.put((self.futures[key], self._sources[key[:2]].open, (key[2],)))
            self._users[key] += 1

    def release(self, keys: Sequence[ShardKey]) -> None:
        """Closes those that nobody needs any more."""
        for key in keys:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self.futures.pop(key).cancel()  # one that is open is closed with its last reader
                self.open_bytes -= self._size(key)

    def name(self, key: ShardKey) -> str:
        return self._sources[key[:2]].index.names[key[2]]

    def _size(self, key: ShardKey) -> int:
        return int(self._sources[key[:2]].index.sizes[key[2]])

    def close(self) -> None:
        """Ends the threads. A download that hangs is left to its thread, which ends with the process."""
        for source in self._sources.values():
            source.stop()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(timeout=2)
        self.futures.clear()
        if not any(thread.is_alive() for thread in self._threads):
            for source in self._sources.values():
                source.close()


def _serve(tasks: queue.SimpleQueue[Any], count: int, name: str) -> list[threading.Thread]:
    """Daemon threads that fill futures: one that hangs in a socket does not hold up the end of the process."""
    threads = [threading.Thread(target=_work, args=(tasks,), name=f"{name}-{n}", daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    return threads


def _work(tasks: queue.SimpleQueue[Any]) -> None:
    while (task := tasks.get()) is not None:
        future: Future[Any] = task[0]
        function: Callable[..., Any] = task[1]
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(*task[2]))
        except BaseException as error:  # it belongs to whoever waits for the result
            future.set_exception(error)
        del task, future, function
