"""A sheet of pictures with their prompts beneath."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pixart_ds import files

_BACKGROUND = (250, 250, 248)
_TEXT = (40, 40, 44)
_RIGHT = (32, 132, 68)
_WRONG = (190, 60, 50)
_MARGIN = 14
_FONT = 13
_LINE = 16


def save_grid(
    pictures: Sequence[npt.NDArray[np.uint8]],
    captions: Sequence[str],
    path: Path,
    *,
    title: str = "",
    columns: int = 6,
    cell: int = 176,
    right: Sequence[bool | None] | None = None,
) -> npt.NDArray[np.uint8]:
    """Writes a PNG, and returns it as (H, W, 3): pictures of any aspect ratio enlarged into equal cells, captions wrapped beneath.

    Args:
        pictures: (H, W, 3) uint8; small ones are enlarged without smoothing.
        captions: One for each.
        path: The PNG.
        title: A line above all.
        columns: Pictures in a row.
        cell: Side of a picture's cell, in pixels.
        right: Colours each caption: True green, False red, None neither.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT)
    wrapped = [textwrap.wrap(caption, width=int(cell / (_FONT * 0.47)))[:4] or [""] for caption in captions]
    text_height = _LINE * max(len(lines) for lines in wrapped) + 6
    rows = -(-len(pictures) // columns)
    top = _MARGIN + (30 if title else 0)
    width = _MARGIN + min(columns, len(pictures)) * (cell + _MARGIN)
    sheet = Image.new("RGB", (width, top + rows * (cell + text_height + _MARGIN)), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN - 2), title, fill=_TEXT, font=ImageFont.load_default(17))
    for number, picture in enumerate(pictures):
        x = _MARGIN + number % columns * (cell + _MARGIN)
        y = top + number // columns * (cell + text_height + _MARGIN)
        image = Image.fromarray(picture)
        scale = cell / max(image.size)
        how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        image = image.resize((round(image.width * scale), round(image.height * scale)), how)
        sheet.paste(image, (x + (cell - image.width) // 2, y + cell - image.height))
        verdict = None if right is None else right[number]
        colour = _TEXT if verdict is None else (_RIGHT if verdict else _WRONG)
        for line, text in enumerate(wrapped[number]):
            draw.text((x, y + cell + 5 + line * _LINE), text, fill=colour, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_durable(path, [buffer.getvalue()])
    return np.asarray(sheet)
