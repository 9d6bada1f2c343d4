"""From the order to micro-batches in memory: threads of the rank's own process read ahead of the loop."""

from __future__ import annotations

import hashlib
import queue
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pixart_ds.data.mds import ShardCache
from pixart_ds.data.shards import PreparedSet
from pixart_ds.diffusion.noise import Draws, draw
from pixart_ds.errors import DataError
from pixart_ds.plan.order import Order, StepPlan
from pixart_ds.plan.shares import micro_batches

_PATIENCE_SECONDS = 120.0
_OPEN_SHARDS = 512


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one bucket, with everything that training draws for them.

    Attributes:
        sample_ids: (B,) as read from the shards.
        visits: (B,) how often each was seen before.
        latents: (B, C, h, w) fp32: drawn from the VAE's posterior, shifted and scaled.
        noise: (B, C, h, w) fp32: ε.
        timesteps: (B,) int64, 0 … 999.
        caption_embeds: (B, L, D) fp32, padded with zeros to the longest caption (at least 1).
        caption_mask: (B, L) bool, True for real tokens.
        dropped: (B,) bool: the null condition takes the place of the sample's own.
        class_labels: (B,) int64, -1 without a class.
        original_sizes: (B, 2) fp32: height and width of the original picture.
        aspect_ratios: (B,) fp32: the bucket's ratio, height / width.
        digest: Sum modulo 2⁶⁴ over the samples of a hash of id, visit, timestep and noise.
    """

    sample_ids: npt.NDArray[np.int64]
    visits: npt.NDArray[np.int64]
    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    caption_embeds: torch.Tensor
    caption_mask: torch.Tensor
    dropped: torch.Tensor
    class_labels: torch.Tensor
    original_sizes: torch.Tensor
    aspect_ratios: torch.Tensor
    digest: int

    def to(self, device: torch.device) -> MicroBatch:
        """The tensors on a device; copies from pinned memory do not block."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The tensors in page-locked memory."""
        return self._mapped(torch.Tensor.pin_memory)

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class _Sample:
    """One sample as it was read and drawn."""

    sample_id: int
    latents: npt.NDArray[np.float32]
    caption_embeds: npt.NDArray[np.float16]
    class_label: int
    original_size: tuple[int, int]
    draws: Draws
    digest: int


class Loader:
    """One rank's shares of the steps of a stage, read ahead by daemon threads; no worker process, no shared memory.

    What it delivers depends on the sets, the order, stage, seed and dropout alone, never on threads or timing.

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
        threads: Readers.
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
        threads: int = 1,
        ahead: int = 4,
    ) -> None:
        self.order, self.micro_batch_size, self.global_batch_size = order, micro_batch_size, global_batch_size
        self.rank, self.world_size, self.device, self.ahead = rank, world_size, torch.device(device), ahead
        self._reader = _Reader(sets, order, latents, stage, seed, condition_dropout)
        self._tasks: queue.SimpleQueue[tuple[Future[MicroBatch], StepPlan] | None] = queue.SimpleQueue()
        self._waiting: deque[tuple[int, deque[Future[MicroBatch]]]] = deque()  # steps whose share is being read
        self._next = self._until = 0
        self._threads = [threading.Thread(target=self._work, name=f"reader-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def steps(self, after: int, until: int) -> Iterator[int]:
        """`images_seen` before each step from `after` until `until`; take each step's `micro_batches` before the next."""
        self._waiting.clear()
        self._next, self._until = after, until
        for images_seen in range(after, until, self.global_batch_size):
            self._read_ahead()
            yield images_seen

    def micro_batches(self, images_seen: int) -> Iterator[MicroBatch]:
        """The rank's share of the step that follows `images_seen`; it may be empty.

        Raises:
            DataError: A shard or sample cannot be read; named in the message.
        """
        self._read_ahead()
        if not self._waiting or self._waiting[0][0] != images_seen:
            raise ValueError(f"the step at {images_seen} images is not the next one of steps()")
        _, futures = self._waiting[0]
        while futures:
            yield self._result(futures.popleft(), images_seen).to(self.device)
            self._read_ahead()
        self._waiting.popleft()

    def _result(self, future: Future[MicroBatch], images_seen: int) -> MicroBatch:
        try:
            return future.result(_PATIENCE_SECONDS)
        except TimeoutError as cause:
            raise DataError(
                f"no micro-batch for {_PATIENCE_SECONDS:.0f} s at {images_seen} images: the file system does not answer",
                where=", ".join(str(prepared.path) for prepared in self._reader.sets),
                remedy="look after the file system of the prepared sets, then start again",
            ) from cause

    def _read_ahead(self) -> None:
        """Plans steps until enough micro-batches are on their way."""
        while self._next < self._until and (
            len(self._waiting) < 2 or sum(len(f) for _, f in self._waiting) < self.ahead
        ):
            share = self.order.share(self._next, self.global_batch_size, self.rank, self.world_size)
            futures: deque[Future[MicroBatch]] = deque()
            for plan in micro_batches(share, self.micro_batch_size):
                futures.append(Future())
                self._tasks.put((futures[-1], plan))
            self._waiting.append((self._next, futures))
            self._next += self.global_batch_size

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, plan = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                batch = self._reader.read(plan)
                future.set_result(batch.pinned() if self.device.type == "cuda" else batch)
            except BaseException as error:  # it belongs to whoever waits for the result
                future.set_exception(error)

    def close(self) -> None:
        """Ends the threads and closes the shards; what is being read is thrown away."""
        for _, futures in self._waiting:
            for future in futures:
                future.cancel()
        self._waiting.clear()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(timeout=5)
        self._reader.cache.clear()


class _Reader:
    """Reads planned samples and draws for them."""

    def __init__(
        self, sets: Sequence[PreparedSet], order: Order, latents: str, stage: str, seed: int, condition_dropout: float
    ) -> None:
        self.sets, self.order, self.latents, self.stage, self.seed = sets, order, latents, stage, seed
        self.condition_dropout = condition_dropout
        self.cache = ShardCache(_OPEN_SHARDS)
        self._group_of_part = [{int(part): group for group, part in enumerate(prepared.parts)} for prepared in sets]

    def read(self, plan: StepPlan) -> MicroBatch:
        samples = [
            self._sample(*place)
            for place in zip(
                plan.set_index.tolist(), plan.group.tolist(), plan.row.tolist(), plan.visit.tolist(), strict=True
            )
        ]
        about = self.sets[int(plan.set_index[0])].description
        ratio = 1.0 if about.latents[self.latents].square else about.ratios[int(plan.bucket[0])]
        longest = max(1, *(len(sample.caption_embeds) for sample in samples))
        captions = torch.zeros(len(samples), longest, about.caption_channels)
        mask = torch.zeros(len(samples), longest, dtype=torch.bool)
        for number, sample in enumerate(samples):
            captions[number, : len(sample.caption_embeds)] = torch.from_numpy(sample.caption_embeds.astype(np.float32))
            mask[number, : len(sample.caption_embeds)] = True
        return MicroBatch(
            sample_ids=np.array([sample.sample_id for sample in samples], np.int64),
            visits=plan.visit,
            latents=torch.from_numpy(np.stack([sample.latents for sample in samples])),
            noise=torch.from_numpy(np.stack([sample.draws.noise for sample in samples])),
            timesteps=torch.tensor([sample.draws.timestep for sample in samples]),
            caption_embeds=captions,
            caption_mask=mask,
            dropped=torch.tensor([sample.draws.dropped for sample in samples]),
            class_labels=torch.tensor([sample.class_label for sample in samples]),
            original_sizes=torch.tensor([sample.original_size for sample in samples], dtype=torch.float32),
            aspect_ratios=torch.full((len(samples),), ratio),
            digest=sum(sample.digest for sample in samples) % 2**64,
        )

    def _sample(self, set_index: int, group: int, row: int, visit: int) -> _Sample:
        prepared = self.sets[set_index]
        about = prepared.description
        text = self._columns(prepared, "captions", group, row)
        image = self._columns(prepared, self.latents, group, row)
        part, stored_row = _int(image["part"]), _int(image["row"])
        stored_group = self._group_of_part[set_index].get(part, -1)
        sample_id = self.order.sample_id(
            set_index, stored_group, stored_row
        )  # of what was read, not of what was planned
        shape = tuple(np.frombuffer(image["shape"], "<i4").tolist())
        moments = np.frombuffer(image["latents"], "<f2").reshape(shape).astype(np.float32)  # (2C, h, w)
        mean, std = moments[: about.latent_channels], moments[about.latent_channels :]
        draws = draw(self.seed, self.stage, sample_id, visit, mean.shape, self.condition_dropout)
        height, width = np.frombuffer(image["original_size"], "<i4").tolist()
        return _Sample(
            sample_id=sample_id,
            latents=(mean + std * draws.latent_noise - np.float32(about.shift_factor))
            * np.float32(about.scaling_factor),
            caption_embeds=np.frombuffer(text["caption_embeds"], "<f2").reshape(-1, about.caption_channels),
            class_label=_int(text["class_label"]),
            original_size=(height, width),
            draws=draws,
            digest=sample_digest(sample_id, visit, draws.timestep, draws.noise_key),
        )

    def _columns(self, prepared: PreparedSet, name: str, group: int, row: int) -> dict[str, Any]:
        """A sample's columns; its own part and row must be those of the plan."""
        shards = prepared.shard_set(name)
        columns = self.cache.get(shards, group).read(row)
        stored = (_int(columns["part"]), _int(columns["row"]))
        planned = (int(prepared.parts[group]), row)
        if stored != planned:
            raise DataError(
                f"row {row} says that it is row {stored[1]} of part {stored[0]} instead of row {planned[1]} of part {planned[0]}",
                where=shards.shards[group].path,
                remedy="prepare the set again into a new folder",
            )
        return columns


def sample_digest(sample_id: int, visit: int, timestep: int, noise_key: int) -> int:
    """The audit's 64-bit hash of one delivered sample."""
    packed = struct.pack("<qqqQ", sample_id, visit, timestep, noise_key)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def _int(column: memoryview) -> int:
    return int.from_bytes(column, "little", signed=True)
