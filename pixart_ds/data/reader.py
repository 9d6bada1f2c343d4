"""From planned samples to a micro-batch: text and latents straight from the shards into reused memory, and what training draws."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pixart_ds.data.mds import OpenShard, int_of
from pixart_ds.data.shards import PreparedSet
from pixart_ds.diffusion.noise import draw_all
from pixart_ds.errors import DataError
from pixart_ds.plan.order import Order, StepPlan

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
        caption_embeds: (T, D) fp16, T = Σ caption_lengths; (0, D) where the net takes no captions.
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
class _Text:
    """Where one sample's caption lies."""

    shard: OpenShard
    row: int
    sizes: list[int]
    tokens: int


@dataclass(frozen=True)
class _Image:
    """Which sample it was that was read, and the height and width of its picture."""

    sample_id: int
    original_size: tuple[int, int]


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
        self._group_of_part = [{int(part): group for group, part in enumerate(prepared.parts)} for prepared in sets]
        self._columns = {name: sets[0].index(name).columns for name in ("captions", latents)}

    def needs(self, plan: StepPlan) -> list[ShardKey]:
        """The shards of a micro-batch, each once, in the sequence in which they are needed."""
        places = dict.fromkeys(zip(plan.set_index.tolist(), plan.group.tolist(), strict=True))
        return [(number, name, group) for number, group in places for name in ("captions", self.latents)]

    def read(self, plan: StepPlan, shards: Mapping[ShardKey, OpenShard], buffer: Buffer) -> MicroBatch:
        """The micro-batch of a plan of one bucket.

        Raises:
            DataError: A sample cannot be read, or is not the planned one; shard and sample.
        """
        about = self.sets[int(plan.set_index[0])].description
        info, bucket = about.latents[self.latents], int(plan.bucket[0])
        size = info.sizes[0 if info.square else bucket]
        count, shape = len(plan), (about.latent_channels, *size)
        texts = self._texts(plan, shards)
        lengths = tuple(max(1, text.tokens) for text in texts) if self.captions else ()
        captions, moments, latents, noise = buffer.take(
            (torch.float16, (sum(lengths), about.caption_channels)),
            (torch.float16, (count, 2 * shape[0], *size)),
            (torch.float32, (count, *shape)),
            (torch.float32, (count, *shape)),
        )
        labels = self._read_texts(texts, plan, captions)
        images = [
            self._read_latents(shards[key], row, key, place)
            for key, row, place in zip(_places(plan, self.latents), plan.row.tolist(), moments, strict=True)
        ]
        ids, visits = [image.sample_id for image in images], plan.visit.tolist()
        draws = draw_all(self.seed, self.stage, list(zip(ids, visits, strict=True)), shape, self.condition_dropout)  # type: ignore[arg-type]
        for number, drawn in enumerate(draws):
            latents[number] = torch.from_numpy(drawn.latent_noise)
            noise[number] = torch.from_numpy(drawn.noise)
        mean, std = moments.float().chunk(2, 1)
        latents.mul_(std).add_(mean).sub_(about.shift_factor).mul_(about.scaling_factor)
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
            original_sizes=torch.tensor([image.original_size for image in images], dtype=torch.float32),
            aspect_ratios=torch.full((count,), 1.0 if info.square else about.ratios[bucket]),
            digest=sum(digests) % 2**64,
        )

    def _texts(self, plan: StepPlan, shards: Mapping[ShardKey, OpenShard]) -> list[_Text]:
        """Where each sample's caption lies, and how long it is."""
        at = self._columns["captions"].index("caption_embeds")
        found = []
        for key, row in zip(_places(plan, "captions"), plan.row.tolist(), strict=True):
            about, sizes = self.sets[key[0]].description, shards[key].sizes(row)
            tokens, rest = divmod(sizes[at], 2 * about.caption_channels)
            if rest or tokens > about.max_tokens:
                raise DataError(
                    f"row {row} has caption features of {sizes[at]} bytes: no more than {about.max_tokens} tokens of "
                    f"{about.caption_channels} channels",
                    where=shards[key].name,
                )
            found.append(_Text(shards[key], row, sizes, tokens))
        return found

    def _read_texts(self, texts: Sequence[_Text], plan: StepPlan, captions: torch.Tensor) -> list[int]:
        """Puts each caption's features in its place; returns the class labels."""
        columns = self._columns["captions"]
        at, start, labels = columns.index("caption_embeds"), 0, []
        whole: Any = captions.view(torch.uint8).numpy().reshape(-1).data if self.captions else memoryview(b"")
        for number, text in enumerate(texts):
            mine = whole[start : start + text.sizes[at]] if self.captions else memoryview(bytearray(text.sizes[at]))
            places = [mine if n == at else memoryview(bytearray(size)) for n, size in enumerate(text.sizes)]
            if self.captions:
                start += text.sizes[at]
                if not text.tokens:
                    width = 2 * captions.shape[1]
                    whole[start : start + width] = bytes(width)
                    start += width
            text.shard.read_into(text.row, places)
            values = dict(zip(columns, places, strict=True))
            self._refuse_strangers(values, plan, number, text.shard)
            labels.append(int_of(values["class_label"]))
        return labels

    def _read_latents(self, shard: OpenShard, row: int, key: ShardKey, place: torch.Tensor) -> _Image:
        """Puts one sample's mean and standard deviation in their place (2C, h, w)."""
        columns, sizes = self._columns[self.latents], shard.sizes(row)
        at, wanted = columns.index("latents"), place.numel() * place.element_size()
        if sizes[at] != wanted:
            raise DataError(f"row {row} has latents of {sizes[at]} bytes, its bucket {wanted}", where=shard.name)
        mine: Any = place.view(torch.uint8).numpy().reshape(-1).data
        places = [mine if n == at else memoryview(bytearray(size)) for n, size in enumerate(sizes)]
        shard.read_into(row, places)
        values = dict(zip(columns, places, strict=True))
        stored = tuple(np.frombuffer(values["shape"], "<i4").tolist())
        if stored != tuple(place.shape):
            raise DataError(
                f"row {row} has latents of shape {stored}, its bucket {tuple(place.shape)}", where=shard.name
            )
        part, stored_row = int_of(values["part"]), int_of(values["row"])
        self._refuse_stranger(part, stored_row, key, row, shard)
        height, width = np.frombuffer(values["original_size"], "<i4").tolist()
        # of what was read, not of what was planned
        return _Image(self.order.sample_id(key[0], self._group_of_part[key[0]][part], stored_row), (height, width))

    def _refuse_strangers(self, values: Mapping[str, Any], plan: StepPlan, number: int, shard: OpenShard) -> None:
        key = (int(plan.set_index[number]), "captions", int(plan.group[number]))
        self._refuse_stranger(int_of(values["part"]), int_of(values["row"]), key, int(plan.row[number]), shard)

    def _refuse_stranger(self, part: int, stored_row: int, key: ShardKey, row: int, shard: OpenShard) -> None:
        """A sample's own part and row must be those of the plan."""
        planned = int(self.sets[key[0]].parts[key[2]])
        if (part, stored_row) != (planned, row):
            raise DataError(
                f"row {row} says that it is row {stored_row} of part {part} instead of row {row} of part {planned}",
                where=shard.name,
                remedy="prepare the set again into a new folder",
            )


def _places(plan: StepPlan, name: str) -> list[ShardKey]:
    return [(number, name, group) for number, group in zip(plan.set_index.tolist(), plan.group.tolist(), strict=True)]


def sample_digest(sample_id: int, visit: int, timestep: int, noise_key: int) -> int:
    """The audit's 64-bit hash of one delivered sample."""
    packed = struct.pack("<qqqQ", sample_id, visit, timestep, noise_key)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
