"""From planned samples to a micro-batch: text and latents straight from the shards into reused memory, and what training draws."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence
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
        starts = list(accumulate((-(-size // 64) * 64 for size in sizes), initial=0))
        if len(self._whole) < starts[-1]:
            self._whole = torch.empty(starts[-1] * 5 // 4, dtype=torch.uint8, pin_memory=self._pinned)
        return [
            self._whole[start : start + size].view(dtype).view(shape)
            for start, size, (dtype, shape) in zip(starts, sizes, wanted, strict=False)
        ]


def _bytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True)
class _Rows:
    """Where the captions, or the latents, of planned samples lie: an entry of each list for a sample.

    Attributes:
        index: Of their shards.
        sets: Which set.
        shards: Which shard.
        rows: Which row of it.
        parts: The part that this row group is.
    """

    index: ShardIndex
    sets: list[int]
    shards: list[OpenShard]
    rows: list[int]
    parts: list[int]

    def numbers(self, column: str, extents: Sequence[Extent], around: Sequence[bytearray]) -> list[int]:
        """A column of one integer, somewhere behind the large one, of what was read."""
        sizes, large, at = self.index.column_sizes, self.index.large, self.index.columns.index(column)
        fixed = sum(size or 0 for size in sizes[large + 1 : at])
        varying = slice(sizes[: large + 1].count(None), sizes[:at].count(None))
        return [
            _INTEGER.unpack_from(each, extent.before + fixed + sum(extent.varying[varying]))[0]
            for each, extent in zip(around, extents, strict=True)
        ]

    def checked(self, around: Sequence[bytearray]) -> dict[str, npt.NDArray[np.uint8]]:
        """Of what was read the columns behind the last one of variable size, (n, bytes) each.

        Raises:
            DataError: A row is another one than planned.
        """
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
        return fixed


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
        images = self._rows(plan, self.latents, shards)
        room, moments, latents, noise = buffer.take(
            (torch.uint8, (self._room(texts),)),
            (torch.float16, (count, 2 * shape[0], *size)),
            (torch.float32, (count, *shape)),
            (torch.float32, (count, *shape)),
        )
        captions, lengths, labels = self._read_texts(texts, room)
        ids, original_sizes = self._read_latents(images, moments)
        visits = plan.visit.tolist()
        samples: list[tuple[int, int]] = list(zip(ids, visits, strict=True))
        draws = draw_all(self.seed, self.stage, samples, shape, self.condition_dropout, (latents, noise))
        mean, std = moments.chunk(2, 1)  # fp16, computed in fp32 where the latents' noise is, without a copy of all
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

    def _rows(self, plan: StepPlan, name: str, shards: Mapping[ShardKey, OpenShard]) -> _Rows:
        """Where the plan's samples lie."""
        sets, groups = plan.set_index.tolist(), plan.group.tolist()
        mine = [shards[number, name, group] for number, group in zip(sets, groups, strict=True)]
        parts = [self._parts[number][group] for number, group in zip(sets, groups, strict=True)]
        return _Rows(self.sets[0].index(name), sets, mine, plan.row.tolist(), parts)

    def _room(self, texts: _Rows) -> int:
        """Bytes that captions may need, with what is read behind the last one."""
        if not self.captions:
            return 0
        return sum(max(shard.room(row), self._token_bytes) for shard, row in zip(texts.shards, texts.rows, strict=True))

    def _read_texts(self, texts: _Rows, room: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], list[int]]:
        """Puts the captions' stored features into the room, one behind the other.

        Returns:
            The features (T, bytes), how many of them each caption has, and the class labels.
        """
        extents, around, lengths, end = [], [], [], 0
        view = room.numpy().data
        for number, shard, row in zip(texts.sets, texts.shards, texts.rows, strict=True):
            if self.captions:
                extent, other = shard.read_first(row, view[end:])
            else:
                extent = shard.extent(row)
                other = shard.read_into(extent, None)
            extents.append(extent)
            around.append(other)
            tokens = self._tokens(number, shard, extent)
            if not self.captions:
                continue
            if not tokens:
                view[end : end + self._token_bytes] = bytes(self._token_bytes)  # zeros in every codec
            lengths.append(max(1, tokens))
            end += lengths[-1] * self._token_bytes
        texts.checked(around)
        captions = room[:end].view(-1, self._token_bytes)
        return captions, tuple(lengths), texts.numbers("class_label", extents, around)

    def _tokens(self, number: int, shard: OpenShard, extent: Extent) -> int:
        """How long a caption is."""
        tokens, rest = divmod(extent.size, self._token_bytes)
        about = self.sets[number].description
        if rest or tokens > about.max_tokens:
            raise DataError(
                f"row {extent.row} has caption features of {extent.size} bytes: no more than {about.max_tokens} tokens of "
                f"{about.caption_channels} channels",
                where=shard.name,
            )
        return tokens

    def _read_latents(self, images: _Rows, moments: torch.Tensor) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Puts each mean and standard deviation in its place (2C, h, w); returns ids and (n, 2) sizes of the pictures."""
        shape, wanted = tuple(moments.shape[1:]), moments[0].nbytes
        around = []
        for shard, row, place in zip(images.shards, images.rows, moments.numpy(), strict=True):
            extent = shard.extent(row, wanted)
            if extent.size != wanted:
                raise DataError(f"row {row} has latents of {extent.size} bytes, its bucket {wanted}", where=shard.name)
            around.append(shard.read_into(extent, place))
        columns = images.checked(around)
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
