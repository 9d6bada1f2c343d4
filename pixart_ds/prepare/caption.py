"""Captions that a model writes: a file for each part, so that no picture is described twice."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from pixart_ds import files
from pixart_ds.encoders.captions import Captioner
from pixart_ds.plan.random import key_of
from pixart_ds.prepare.encode import PictureReader
from pixart_ds.prepare.items import Rejected

_LOOKED_AFTER = 64
"""So few files that seem to be missing are looked for by name: a network file system's listing may be a minute old."""


class CaptionFiles:
    """What a model has written, by part.

    Args:
        folder: Of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.json"

    def missing(self, parts: Iterable[int]) -> list[int]:
        """Those of the parts whose captions are not written yet."""
        names = set(os.listdir(self.folder)) if self.folder.exists() else set()
        missing = [part for part in parts if self._path(part).name not in names]
        if len(missing) > _LOOKED_AFTER:
            return missing
        return [part for part in missing if not self._path(part).exists()]

    def read(self, part: int) -> tuple[dict[str, str], list[Rejected]]:
        """The captions of a part by picture, and the pictures that have none."""
        about = files.read_json(self._path(part), remedy="run `pixart-ds prepare RECIPE --only caption` first")
        return about["captions"], [Rejected(**each) for each in about["rejected"]]

    def write(self, part: int, captions: dict[str, str], rejected: list[Rejected]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        left_out = [{"name": each.name, "kind": each.kind, "reason": each.reason} for each in rejected]
        with suppress(FileExistsError):  # where locks do not reach: the first counts
            files.write_new(self._path(part), [files.json_bytes({"captions": captions, "rejected": left_out})])


def caption_parts(
    captioner: Captioner,
    reader: PictureReader,
    parts: Iterable[int],
    files_of: CaptionFiles,
    batch_size: int,
    seed: int,
) -> Iterator[int]:
    """Describes the pictures of parts; yields each part's number once its captions are written.

    Args:
        reader: Gives each picture in one size.
        batch_size: Pictures described at once.
        seed: A picture's answer follows from this, its part's number and its place there.
    """
    for number, pictures, rejected in reader.parts(parts):
        captions: dict[str, str] = {}
        first = (
            key_of("captions", seed, number)[0] >> 21 << 20
        )  # below 2⁶³, as generators want it; a part has fewer rows
        for start in range(0, len(pictures), batch_size):
            batch = pictures[start : start + batch_size]
            images, originals = [each.images[0] for each in batch], [each.item.caption for each in batch]
            answers = captioner.caption(images, originals, first + start)
            for picture, answer in zip(batch, answers, strict=True):
                if told := answer.strip():
                    captions[picture.item.name] = told
                else:
                    rejected.append(Rejected(picture.item.name, "caption", "the model wrote nothing"))
        files_of.write(number, captions, rejected)
        yield number
