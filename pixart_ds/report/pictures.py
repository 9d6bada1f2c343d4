"""What a stage's samples look like: its sheet or its newest preview, small enough to lie inside a page."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pixart_ds import files
from pixart_ds.errors import DataError
from pixart_ds.layout import RunLayout
from pixart_ds.log import si

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDEST = 900
_MOST_BYTES = 200_000
_QUALITIES = (88, 80, 70, 60)


@dataclass(frozen=True)
class Embedded:
    """A picture as a page holds it."""

    uri: str
    """`data:image/…;base64,…`"""
    width: int
    height: int


def pictures_of(run: RunLayout) -> dict[str, list[Path]]:
    """For each stage its sheet, else its newest preview, else nothing.

    Raises:
        DataError: There is no run.
    """
    found = {}
    for name in files.read_json(run.manifest)["stages"]:
        stage = run.stage(name)
        previews = sorted(stage.previews.glob("img-*.png"))
        found[name] = [stage.sheet] if stage.sheet.exists() else previews[-1:]
    return found


def caption(path: Path) -> str:
    """What a picture of `pictures_of` shows, by its name."""
    clock = re.fullmatch(r"img-(\d{12})\.png", path.name)
    return f"preview at {si(int(clock[1]))} images" if clock else "samples of what the stage handed over"


def embed(path: Path) -> Embedded:
    """The picture as a data: URI, at most 900 pixels wide and about 200 kB.

    Raises:
        DataError: It cannot be read, or is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            picture = _on_white(opened)
    except UnidentifiedImageError as cause:
        raise DataError("no picture that Pillow knows", where=path) from cause
    except OSError as cause:
        raise DataError(f"the picture cannot be read: {cause.strerror or cause}", where=path) from cause
    except (ValueError, SyntaxError, Image.DecompressionBombError) as cause:  # what Pillow's decoders raise
        raise DataError(f"the picture cannot be read: {cause}", where=path) from cause
    picture = _at_most(picture, _WIDEST)
    kind, content = _small(picture)
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Embedded(uri, picture.width, picture.height)


def _on_white(picture: Image) -> Image:
    from PIL import Image

    if "A" in picture.getbands() or "transparency" in picture.info:
        coloured = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return picture.convert("RGB")


def _at_most(picture: Image, width: int) -> Image:
    if picture.width <= width:
        return picture
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), reducing_gap=3.0)


def _small(picture: Image) -> tuple[str, bytes]:
    """The picture without loss if it is small so, else as JPEG."""
    content = _coded(picture, "png", optimize=True)
    if len(content) <= _MOST_BYTES:
        return "png", content
    while True:
        for quality in _QUALITIES:
            content = _coded(picture, "jpeg", quality=quality, optimize=True)
            if len(content) <= _MOST_BYTES:
                return "jpeg", content
        picture = picture.resize((max(1, picture.width * 3 // 4), max(1, picture.height * 3 // 4)))


def _coded(picture: Image, kind: str, **choices: object) -> bytes:
    held = io.BytesIO()
    picture.save(held, kind, **choices)
    return held.getvalue()
