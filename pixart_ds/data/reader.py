"""From planned samples to a micro-batch: text and latents straight from the shards into reused memory, and what training draws."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pixart_ds.data.codecs import CODECS
from pixart_ds.data.mds import Extent, OpenShard, ShardIndex
from pixart_ds.data.shards import PreparedSet
from pixart_ds.diffusion.noise import draw_all
from pixart_ds.errors import DataError
from pixart_ds.plan.order import Order, StepPlan

_INTEGER = struct.Struct("<q")

ShardKey = tuple[int, str, int]
"""(index of the set, `captions` or the name of latents, row group)."""


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one bucket, with everything that training draws for them.

    Captions are packed: real tokens only, one sample's behind the other's. Latents, noise and captions lie in memory of the loader,
    and stay valid until the next micro-batch is asked for.

    Attributes:
        sample_ids: (B,) as read from the shards.
        visits: (B,) how often each was seen before.
        latents: (B, C, h, w) fp32: drawn from the VAE's posterior, shifted and scaled.
        noise: (B, C, h, w) fp32: ε.
        timesteps: (B,) int64, 0 … 999.
        caption_embeds: (T, D) fp16, T = Σ caption_lengths; (0, D) where the net takes no captions. Until `Reader.decoded` it is
            what the shards hold: (T, bytes) uint8.
        caption_lengths: Tokens of each sample, at least 1: a caption without any has one of zeros.
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
    caption_lengths: tuple[int, ...]
    dropped: torch.Tensor
    class_labels: torch.Tensor
    original_sizes: torch.Tensor
    aspect_ratios: torch.Tensor
    digest: int

    def to(self, device: torch.device) -> MicroBatch:
        """The tensors on a device; copies from pinned memory do not block."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def kept(self) -> MicroBatch:
        """A copy in memory of its own."""
        return self._mapped(torch.Tensor.clone)

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **changed)


class Buffer:
    """Memory that grows to the largest micro-batch and is reused, so that its pages are touched, and pinned, only once."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._whole = torch.empty(0, dtype=torch.uint8)

    def take(self, *wanted: tuple[torch.dtype, tuple[int, ...]]) -> list[torch.Tensor]:
        """Tensors of these dtypes and shapes, one behind the other; their content is whatever was there."""
        sizes = [_bytes_of(dtype, shape) for dtype, shape in wanted]
        starts = np.cumsum([0, *(-(-size // 64) * 64 for size in sizes)]).tolist()
        if len(self._whole) < starts[-1]:
            self._whole = torch.empty(starts[-1] * 5 // 4, dtype=torch.uint8, pin_memory=self._pinned)
        return [
            self._whole[start : start + size].view(dtype).view(shape)
            for start, size, (dtype, shape) in zip(starts, sizes, wanted, strict=False)
        ]


def _bytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * dtype.itemsize


@dataclass(frozen=True)
class _Rows:
    """Where the captions, or the latents, of planned samples lie: an entry of each list for a sample.

    Attributes:
        index: Of their shards.
        sets: Which set.
        shards: Which shard.
        rows: Which row of it.
        parts: The part that this row group is.
        extents: Where in the shard's file.
    """

    index: ShardIndex
    sets: list[int]
    shards: list[OpenShard]
    rows: list[int]
    parts: list[int]
    extents: list[Extent]

    def numbers(self, column: str, around: Sequence[bytearray]) -> list[int]:
        """A column of one integer, of what `read` gave; between it and the large column none varies."""
        between = self.index.column_sizes[self.index.large + 1 : self.index.columns.index(column)]
        more = sum(size or 0 for size in between)
        return [
            _INTEGER.unpack_from(each, extent.before + more)[0]
            for each, extent in zip(around, self.extents, strict=True)
        ]

    @property
    def large_sizes(self) -> list[int]:
        """Bytes of the large column in each row."""
        return [extent.size for extent in self.extents]

    def read(self, places: Iterable[Any]) -> tuple[list[bytearray], dict[str, npt.NDArray[np.uint8]]]:
        """Reads the rows, their large columns into these places.

        Returns:
            Of each row what is around its large column; and the columns behind the last one of variable size, (n, bytes) each.

        Raises:
            DataError: A row cannot be read, or is another one than planned.
        """
        around = [
            shard.read_into(extent, place)
            for shard, extent, place in zip(self.shards, self.extents, places, strict=True)
        ]
        last = max(place for place, size in enumerate(self.index.column_sizes) if size is None) + 1
        ends = list(accumulate(size or 0 for size in self.index.column_sizes[last:]))
        tails = np.frombuffer(b"".join([each[-ends[-1] :] for each in around]), np.uint8).reshape(-1, ends[-1])
        fixed = dict(zip(self.index.columns[last:], np.split(tails, ends[:-1], axis=1), strict=True))
        stored = (_ints(fixed["row"]), _ints(fixed["part"]))
        for shard, row, part, *found in zip(self.shards, self.rows, self.parts, *stored, strict=True):
            if found != [row, part]:
                raise DataError(
                    f"row {row} says that it is row {found[0]} of part {found[1]} instead of row {row} of part {part}",
                    where=shard.name,
                    remedy="prepare the set again into a new folder",
                )
        return around, fixed


def _ints(column: npt.NDArray[np.uint8]) -> list[int]:
    numbers: list[int] = np.ascontiguousarray(column).view("<i8")[:, 0].tolist()
    return numbers


class Reader:
    """Reads planned samples and draws for them.

    Args:
        sets: The order's sets.
        order: For the numbers of samples.
        latents: Name of the latents to read.
        stage, seed: Key of the samples' draws.
        condition_dropout: Probability of the null condition.
        captions: Whether caption features are read.
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
        captions: bool = True,
    ) -> None:
        self.sets, self.order, self.latents, self.stage, self.seed = sets, order, latents, stage, seed
        self.condition_dropout, self.captions = condition_dropout, captions
        self._channels = sets[0].description.caption_channels
        self._codec = CODECS[sets[0].description.caption_codec]
        self._token_bytes = self._codec.bytes_per_token(self._channels)
        self._parts: list[list[int]] = [prepared.parts.tolist() for prepared in sets]
        self._first_id = [
            {part: order.sample_id(number, group, 0) for group, part in enumerate(parts)}
            for number, parts in enumerate(self._parts)
        ]

    def needs(self, plan: StepPlan) -> list[ShardKey]:
        """The shards of a micro-batch, each once, in the sequence in which they are needed."""
        places = dict.fromkeys(zip(plan.set_index.tolist(), plan.group.tolist(), strict=True))
        return [(number, name, group) for number, group in places for name in ("captions", self.latents)]

    def read(self, plan: StepPlan, shards: Mapping[ShardKey, OpenShard], buffer: Buffer) -> MicroBatch:
        """The micro-batch of a plan of one bucket, its captions as they are stored: see `decoded`.

        Raises:
            DataError: A sample cannot be read, or is not the planned one; shard and sample.
        """
        about = self.sets[int(plan.set_index[0])].description
        info, bucket = about.latents[self.latents], int(plan.bucket[0])
        size = info.sizes[0 if info.square else bucket]
        count, shape = len(plan), (about.latent_channels, *size)
        texts = self._rows(plan, "captions", shards)
        images = self._rows(plan, self.latents, shards, size=math.prod(shape) * 2 * 2)
        tokens = self._tokens(texts)
        lengths = tuple(max(1, each) for each in tokens) if self.captions else ()
        captions, moments, latents, noise = buffer.take(
            (torch.uint8, (sum(lengths), self._token_bytes)),
            (torch.float16, (count, 2 * shape[0], *size)),
            (torch.float32, (count, *shape)),
            (torch.float32, (count, *shape)),
        )
        labels = self._read_texts(texts, tokens, lengths, captions)
        ids, original_sizes = self._read_latents(images, moments)
        visits = plan.visit.tolist()
        draws = draw_all(self.seed, self.stage, list(zip(ids, visits, strict=True)), shape, self.condition_dropout)  # type: ignore[arg-type]
        np.stack([each.latent_noise for each in draws], out=latents.numpy())
        np.stack([each.noise for each in draws], out=noise.numpy())
        mean, std = moments.chunk(2, 1)  # fp16, computed in fp32 beside the latents, without a copy of all
        latents.mul_(std).add_(mean)
        if about.shift_factor:
            latents.sub_(about.shift_factor)
        latents.mul_(about.scaling_factor)
        digests = (sample_digest(i, v, d.timestep, d.noise_key) for i, v, d in zip(ids, visits, draws, strict=True))
        return MicroBatch(
            sample_ids=np.array(ids, np.int64),
            visits=plan.visit,
            latents=latents,
            noise=noise,
            timesteps=torch.tensor([each.timestep for each in draws]),
            caption_embeds=captions,
            caption_lengths=lengths,
            dropped=torch.tensor([each.dropped for each in draws]),
            class_labels=torch.tensor(labels),
            original_sizes=torch.from_numpy(original_sizes),
            aspect_ratios=torch.full((count,), 1.0 if info.square else about.ratios[bucket]),
            digest=sum(digests) % 2**64,
        )

    def decoded(self, batch: MicroBatch) -> MicroBatch:
        """The micro-batch with caption features in fp16, made on the device where it is: what is copied there is what is stored."""
        return replace(batch, caption_embeds=self._codec.decode(batch.caption_embeds, self._channels))

    def _rows(self, plan: StepPlan, name: str, shards: Mapping[ShardKey, OpenShard], size: int | None = None) -> _Rows:
        """Where the plan's samples lie, if their large columns have that size, or whatever they have."""
        sets, groups, rows = plan.set_index.tolist(), plan.group.tolist(), plan.row.tolist()
        mine = [shards[number, name, group] for number, group in zip(sets, groups, strict=True)]
        parts = [self._parts[number][group] for number, group in zip(sets, groups, strict=True)]
        extents = [shard.extent(row, size) for shard, row in zip(mine, rows, strict=True)]
        return _Rows(self.sets[0].index(name), sets, mine, rows, parts, extents)

    def _tokens(self, texts: _Rows) -> list[int]:
        """How long each caption is."""
        found = []
        for number, shard, row, size in zip(texts.sets, texts.shards, texts.rows, texts.large_sizes, strict=True):
            about = self.sets[number].description
            tokens, rest = divmod(size, self._token_bytes)
            if rest or tokens > about.max_tokens:
                raise DataError(
                    f"row {row} has caption features of {size} bytes: no more than {about.max_tokens} tokens of "
                    f"{about.caption_channels} channels",
                    where=shard.name,
                )
            found.append(tokens)
        return found

    def _read_texts(
        self, texts: _Rows, tokens: Sequence[int], lengths: Sequence[int], captions: torch.Tensor
    ) -> list[int]:
        """Puts each caption's stored features in its place; returns the class labels."""
        places, stored, end = [], captions.numpy(), 0
        for length, count in zip(lengths, tokens, strict=self.captions):
            places.append(stored[end : end + count])
            stored[end + count : end + length] = 0  # where a caption has none: zero bytes are zeros in every codec
            end += length
        around, _ = texts.read(places if self.captions else [None] * len(texts.rows))
        return texts.numbers("class_label", around)

    def _read_latents(self, images: _Rows, moments: torch.Tensor) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Puts each mean and standard deviation in its place (2C, h, w); returns ids and (n, 2) sizes of the pictures."""
        shape, wanted = tuple(moments.shape[1:]), moments[0].nbytes
        for shard, row, size in zip(images.shards, images.rows, images.large_sizes, strict=True):
            if size != wanted:
                raise DataError(f"row {row} has latents of {size} bytes, its bucket {wanted}", where=shard.name)
        _, columns = images.read(moments.numpy())
        shapes = np.ascontiguousarray(columns["shape"]).view("<i4").tolist()
        for shard, row, stored in zip(images.shards, images.rows, shapes, strict=True):
            if tuple(stored) != shape:
                raise DataError(f"row {row} has latents of shape {tuple(stored)}, its bucket {shape}", where=shard.name)
        # of what was read, not of what was planned
        read = zip(images.sets, _ints(columns["part"]), _ints(columns["row"]), strict=True)
        ids = [self._first_id[number][part] + row for number, part, row in read]
        return ids, np.ascontiguousarray(columns["original_size"]).view("<i4").astype(np.float32)


def sample_digest(sample_id: int, visit: int, timestep: int, noise_key: int) -> int:
    """The audit's 64-bit hash of one delivered sample."""
    packed = struct.pack("<qqqQ", sample_id, visit, timestep, noise_key)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
