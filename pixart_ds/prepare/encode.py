"""The pictures and captions of one part to rows: each picture is read once for all sizes, each caption is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pixart_ds import files
from pixart_ds.config.schema import PrepareConfig
from pixart_ds.data.format import Row, SetDescription
from pixart_ds.encoders.latents import LatentEncoder, LatentsOverflow
from pixart_ds.encoders.text import TextEncoder
from pixart_ds.errors import DataError
from pixart_ds.plan.buckets import Cut
from pixart_ds.prepare.items import BrokenPicture, Item, Rejected
from pixart_ds.prepare.parts import Plan
from pixart_ds.prepare.pictures import load_cut
from pixart_ds.prepare.repeated import RepeatedCaptions
from pixart_ds.prepare.sources import Source

Features = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Picture:
    """One picture, decoded.

    Attributes:
        item: What the source says of it.
        images: (H, W, 3) uint8 for each of the latents.
        cuts: How each was cut.
    """

    item: Item
    images: list[npt.NDArray[np.uint8]]
    cuts: list[Cut]


class PictureReader:
    """Reads and cuts the pictures of parts, in threads, one part ahead of what is asked for.

    Args:
        source: Where pictures lie.
        plan: The parts.
        sizes: For a picture of a partition the (height, width) in pixels that it is wanted in.
        max_pixels: Of a picture.
        threads: That read and decode.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        sizes: Callable[[int, Item], list[tuple[int, int]]],
        max_pixels: int,
        threads: int,
    ) -> None:
        self._source, self._plan, self._sizes, self._max_pixels = source, plan, sizes, max_pixels
        self._pool = ThreadPoolExecutor(threads, "pictures")

    def parts(self, numbers: Iterable[int]) -> Iterator[tuple[int, list[Picture], list[Rejected]]]:
        """For each part its number, its pictures, and those that cannot be decoded.

        Raises:
            StoreError, OSError: The source cannot be read; that is no fault of a picture.
        """
        ahead: list[tuple[int, list[Future[Picture | Rejected]]]] = []
        try:
            for number in numbers:
                partition = self._plan.partitions[number]
                ahead.append(
                    (number, [self._pool.submit(self._load, item, partition) for item in self._plan.items(number)])
                )
                if len(ahead) > 1:
                    yield self._result(*ahead.pop(0))
            while ahead:
                yield self._result(*ahead.pop(0))
        finally:
            for _, waiting in ahead:
                for future in waiting:
                    future.cancel()

    def _load(self, item: Item, partition: int) -> Picture | Rejected:
        sizes = self._sizes(partition, item)
        try:
            (height, width), images, cuts = load_cut(self._source.read(item.place), sizes, max_pixels=self._max_pixels)
        except BrokenPicture as error:
            return Rejected(item.name, "broken", str(error))
        if (height, width) != (item.height, item.width):
            changed = f"it has {width} x {height} pixels, and had {item.width} x {item.height} when it was listed"
            return Rejected(item.name, "broken", changed)
        return Picture(item, images, cuts)

    def _result(
        self, number: int, futures: list[Future[Picture | Rejected]]
    ) -> tuple[int, list[Picture], list[Rejected]]:
        loaded = [future.result() for future in futures]
        return (
            number,
            [each for each in loaded if isinstance(each, Picture)],
            [each for each in loaded if isinstance(each, Rejected)],
        )

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class CaptionFeatures:
    """Features of captions. They follow from the part and from the captions that several pictures share, not from what was encoded
    before: a batch's padding can change the last bit of a feature.

    Args:
        text: The encoder.
        repeated: The captions that several pictures share.
        batch_size: Captions encoded at once.
        folder: Where features of those are kept, for all processes.
    """

    def __init__(self, text: TextEncoder, repeated: RepeatedCaptions, batch_size: int, folder: Path) -> None:
        self._text, self._repeated, self._batch_size, self._folder = text, repeated, batch_size, folder

    def of(self, captions: Sequence[str]) -> tuple[list[Features], list[bool]]:
        """For each caption its features (L, D), and whether it had more tokens than these."""
        places = {text: self._repeated.places.get(text) for text in dict.fromkeys(captions)}
        own = [text for text, place in places.items() if place is None]
        lengths = dict(zip(own, self._text.num_tokens(own), strict=True)) if own else {}
        made: dict[str, Features] = {}
        by_length = sorted(own, key=lambda text: lengths[text])
        for start in range(0, len(by_length), self._batch_size):
            batch = by_length[start : start + self._batch_size]
            made.update(zip(batch, self._text.encode(batch), strict=True))
        shared = [text for text, place in places.items() if place is not None]
        for text in shared:
            made[text] = self._kept(*self._repeated.places[text])
        lengths.update(zip(shared, self._text.num_tokens(shared), strict=True) if shared else ())
        return [made[text] for text in captions], [lengths[text] > self._text.max_tokens for text in captions]

    def _kept(self, batch: int, place: int) -> Features:
        """The features of one caption of a batch that some process encodes, once for all."""
        from safetensors import safe_open
        from safetensors.numpy import save

        path = self._folder / self._repeated.key / f"batch-{batch:06d}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = self._repeated.batch(batch)
            starts = range(0, len(texts), self._batch_size)  # which may be smaller than when they were listed
            made = [each for start in starts for each in self._text.encode(texts[start : start + self._batch_size])]
            with suppress(FileExistsError):  # another process had the same thought
                files.write_new(path, [save({str(number): each for number, each in enumerate(made)})])
        with safe_open(path, "numpy") as stored:
            features: Features = stored.get_tensor(str(place))
        return features


def sizes_of(description: SetDescription) -> list[list[tuple[int, int]]]:
    """For each partition the (height, width) in pixels of each of the latents."""
    factor = description.downsampling_factor
    return [
        [
            (height * factor, width * factor)
            for info in description.latents.values()
            for height, width in [info.sizes[0 if info.square else partition]]
        ]
        for partition in range(len(description.ratios))
    ]


def encode_part(
    config: PrepareConfig,
    description: SetDescription,
    pictures: Sequence[Picture],
    captions: Sequence[str],
    labels: dict[str, int],
    vae: LatentEncoder,
    features: CaptionFeatures,
) -> list[Row]:
    """The rows of one part.

    Args:
        captions: One for each picture.
        labels: Numbers of the classes by key.

    Raises:
        DataError: An encoder gives numbers that fp16 cannot hold.
    """
    embeds, truncated = features.of(captions)
    names = list(description.latents)
    latents: dict[str, list[npt.NDArray[np.float16]]] = {name: [] for name in names}
    for number, name in enumerate(names):
        images = [picture.images[number] for picture in pictures]
        pixels = images[0].shape[0] * images[0].shape[1] if images else 1
        at_once = max(1, min(config.batch_size, config.batch_pixels // pixels))
        for start in range(0, len(images), at_once):
            try:
                moments = vae.encode(np.stack(images[start : start + at_once]))
            except LatentsOverflow as error:
                name_of = pictures[start + error.pictures[0]].item.name
                raise DataError(f"{error.what}: {name_of}", where=config.source.path, remedy=error.remedy) from error
            latents[name] += list(moments.astype(np.float16))
    rows = []
    for number, picture in enumerate(pictures):
        item = picture.item
        crops = {name: (*cut.resized, cut.top, cut.left) for name, cut in zip(names, picture.cuts, strict=True)}
        rows.append(
            Row(
                name=item.name,
                caption=captions[number],
                caption_embeds=embeds[number],
                class_label=-1 if item.class_key is None else labels[item.class_key],
                original_height=item.height,
                original_width=item.width,
                latents={name: latents[name][number] for name in names},
                crops=crops,
                truncated=truncated[number],
                numbers=item.numbers,
            )
        )
    return rows


def skipped_line(rejected: Rejected) -> dict[str, str]:
    """A line of skipped.jsonl."""
    about = asdict(rejected)
    return {"picture": about.pop("name"), **about}
