"""Captioned pictures in folders: found, listed, and held to be complete before anything is encoded."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pixart_ds.errors import DataError
from pixart_ds.plan.buckets import cut

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class BrokenPicture(Exception):
    """A picture that cannot be decoded; it is listed and skipped."""


@dataclass(frozen=True)
class Picture:
    """One picture of a source.

    Attributes:
        name: Path within the source.
        path: Its file.
        caption_path: Its caption's file.
        class_label: Index of its folder's name among the classes.
    """

    name: str
    path: Path
    caption_path: Path
    class_label: int

    def caption(self) -> str:
        return self.caption_path.read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class Source:
    """All pictures of a folder, by name, and the names of their classes."""

    root: Path
    pictures: tuple[Picture, ...]
    classes: tuple[str, ...]

    def fingerprint(self) -> str:
        """A hash of names, sizes and captions; not of the pixels."""
        digest = hashlib.blake2b(digest_size=16)
        for picture in self.pictures:
            digest.update(f"{picture.name}\0{picture.path.stat().st_size}\0{picture.caption()}\0".encode())
        return digest.hexdigest()


def scan(root: Path, caption_suffix: str) -> Source:
    """Lists a folder's pictures with their captions.

    Raises:
        DataError: No such folder, no picture in it, or pictures without a caption (all are counted, the first are named).
    """
    if not root.is_dir():
        raise DataError(
            "there is no folder of pictures", where=root.resolve(), remedy="correct `source` in the prepare recipe"
        )
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise DataError(
            "the folder holds no picture", where=root.resolve(), remedy=f"put pictures there ({', '.join(SUFFIXES)})"
        )
    missing = [path for path in paths if not _caption_path(path, caption_suffix).exists()]
    if missing:
        names = ", ".join(str(path.relative_to(root)) for path in missing[:3]) + (", …" if len(missing) > 3 else "")
        raise DataError(
            f"{len(missing)} of {len(paths)} pictures have no caption: {names}",
            where=root.resolve(),
            remedy=f"write NAME{caption_suffix} beside each picture, or move these away",
        )
    stems = Counter(path.with_suffix("") for path in paths)
    doubles = [str(stem.relative_to(root)) for stem, count in stems.items() if count > 1]
    if doubles:
        raise DataError(
            f"two pictures share one caption: {doubles[0]}.*",
            where=root.resolve(),
            remedy="rename one of them, with a caption of its own",
        )
    classes = tuple(sorted({path.parent.name for path in paths}))
    numbers = {name: number for number, name in enumerate(classes)}
    pictures = tuple(
        Picture(str(path.relative_to(root)), path, _caption_path(path, caption_suffix), numbers[path.parent.name])
        for path in paths
    )
    return Source(root, pictures, classes)


def _caption_path(path: Path, suffix: str) -> Path:
    return path.with_name(path.stem + suffix)


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) from the file's header, as it is shown (turned by its EXIF orientation).

    Raises:
        BrokenPicture: There is no readable header.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5
    except (OSError, ValueError, SyntaxError) as cause:
        raise BrokenPicture(str(cause)) from cause
    return (width, height) if turned else (height, width)


def load_cut(path: Path, sizes: list[tuple[int, int]]) -> list[npt.NDArray[np.uint8]]:
    """The picture cut to each (height, width): resized by Lanczos, keeping its ratio, then cut in the centre; (H, W, 3) uint8.

    Raises:
        BrokenPicture: It cannot be decoded to its last row.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as cause:
        raise BrokenPicture(str(cause)) from cause
    made = []
    for size in sizes:
        place = cut(image.height, image.width, size)
        resized = image.resize(place.resized[::-1], Image.Resampling.LANCZOS)
        box = (place.left, place.top, place.left + size[1], place.top + size[0])
        made.append(np.array(resized.crop(box)))
    return made
