"""Pictures from bytes: how large they are as they are shown, and cut to sizes."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from functools import cache
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pixart_ds.errors import PixArtError
from pixart_ds.plan.buckets import Cut, cut
from pixart_ds.prepare.items import BrokenPicture

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 400_000_000
"""As of `FilterConfig.max_pixels`."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""What is recognised, whatever a file is called: Pillow knows dozens more, which open files of their own or run programs."""
_ORIENTATION = 0x0112
_TAIL_BYTES = 1 << 16


def is_picture(name: str) -> bool:
    """Whether a file is called like a picture."""
    return name.lower().endswith(SUFFIXES)


def size_of(data: bytes | IO[bytes], *, max_pixels: int | None = None) -> tuple[int, int]:
    """(height, width) from the header, as the picture is shown (turned by its EXIF orientation). Pixels are not decoded.

    Args:
        data: The whole file, or one that is read where it is needed.
        max_pixels: A larger picture is refused.

    Raises:
        BrokenPicture: There is no readable header, or it is larger than that.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        with _open(file) as image:
            width, height = _stored_size(image)
            turned = _orientation(image, file) >= 5
    except (PixArtError, MemoryError):
        raise
    except (
        Exception
    ) as cause:  # decoders raise nearly anything over damaged bytes; errors of a disk or store are PixArtError
        raise _broken(cause) from cause
    _check_pixels(height, width, max_pixels)
    return (width, height) if turned else (height, width)


def load_cut(
    data: bytes, sizes: Sequence[tuple[int, int]], *, max_pixels: int = MAX_PIXELS
) -> tuple[tuple[int, int], list[npt.NDArray[np.uint8]], list[Cut]]:
    """Decodes a picture once and cuts it to each size: resized by Lanczos, keeping its ratio, then cut in the centre.

    The first frame is taken, turned by its EXIF orientation; what is transparent becomes white.

    Args:
        data: The whole file.
        sizes: (height, width) of each cut, in pixels.
        max_pixels: A larger picture is refused before it is decoded, and so is one of such a ratio that resizing makes it larger.

    Returns:
        (height, width) of the whole picture as it is shown, an (H, W, 3) uint8 array for each size, and how each was cut.

    Raises:
        BrokenPicture: It cannot be decoded to its last row, or is too large.
    """
    try:
        with _open(io.BytesIO(data)) as file:
            _check_pixels(file.height, file.width, max_pixels)
            file.load()
            image = _rgb(_upright(file))
    except (BrokenPicture, MemoryError):
        raise
    except Exception as cause:
        raise _broken(cause) from cause
    cuts = [cut(image.height, image.width, size) for size in sizes]
    return (image.height, image.width), [_cut_out(image, place, max_pixels) for place in cuts], cuts


def _open(file: IO[bytes]) -> Image.Image:
    _set_up_pillow()
    from PIL import Image

    return Image.open(file, formats=_FORMATS)


@cache
def _set_up_pillow() -> None:
    from PIL import Image

    Image.init()  # `formats` may name plug-ins that are not loaded yet
    Image.MAX_IMAGE_PIXELS = None  # ours is checked before anything is decoded, and may be larger
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # a line for each picture with odd EXIF


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) before it is turned; Pillow says of a TIFF how it is after that."""
    tags: Any = getattr(image, "tag_v2", None) if image.format == "TIFF" else None
    return image.size if tags is None else (int(tags[256]), int(tags[257]))


def _broken(cause: Exception) -> BrokenPicture:
    words = "it is no picture" if type(cause).__name__ == "UnidentifiedImageError" else str(cause)
    return BrokenPicture(words.splitlines()[0][:200] if words.strip() else type(cause).__name__)


def _check_pixels(height: int, width: int, max_pixels: int | None) -> None:
    if height < 1 or width < 1:
        raise BrokenPicture(f"it has {width} × {height} pixels")
    if max_pixels is not None and height * width > max_pixels:
        raise BrokenPicture(f"it has {width} × {height} pixels, more than {max_pixels}")


def _orientation(image: Image.Image, file: IO[bytes] | None = None) -> int:
    """The EXIF orientation, 1 to 8; 1 where it is absent or unreadable, as viewers take it.

    Args:
        image: Opened; if `file` is None, also decoded.
        file: Of the picture; a PNG may tell its orientation behind its pixels.
    """
    from PIL import Image as Pillow

    try:
        if image.format == "PNG" and file is not None and "exif" not in image.info and (found := _exif_at_end(file)):
            image.info["exif"] = found
        value: Any = Pillow.Image.getexif(image).get(_ORIENTATION, 1)  # a PNG's own getexif decodes all pixels
    except (PixArtError, MemoryError):
        raise
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _exif_at_end(file: IO[bytes]) -> bytes | None:
    """The eXIf chunk in the last bytes of a PNG."""
    length = file.seek(0, io.SEEK_END)
    file.seek(max(0, length - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    place = tail.rfind(b"eXIf")
    if place < 4:
        return None
    (size,) = struct.unpack(">I", tail[place - 4 : place])
    chunk, check = tail[place : place + 4 + size], tail[place + 4 + size : place + 8 + size]
    if len(check) < 4 or zlib.crc32(chunk) != struct.unpack(">I", check)[0]:
        return None
    return b"Exif\0\0" + chunk[4:]


def _upright(image: Image.Image) -> Image.Image:
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    if "transparency" in image.info:
        turned.info["transparency"] = image.info["transparency"]
    return turned


def _rgb(image: Image.Image) -> Image.Image:
    """In RGB, 8 bits; on white where it is transparent."""
    from PIL import Image

    if image.mode.startswith("I"):  # grey of 16 bits; where Pillow calls it I, nothing else says how many there are
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BrokenPicture("its pixels have 32 bits")
        return Image.fromarray((values.astype(np.int64) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BrokenPicture("its pixels have 32 bits")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        # Pillow turns some of these modes into RGBA only by way of another
        layered = image.convert("LA") if image.mode == "La" else image
        layered = layered.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        white.alpha_composite(layered)
        return white.convert("RGB")
    return image.convert("RGB")


def _cut_out(image: Image.Image, place: Cut, max_pixels: int) -> npt.NDArray[np.uint8]:
    from PIL import Image

    height, width = place.resized
    if height * width > max_pixels:
        raise BrokenPicture(
            f"its sides, {image.width} and {image.height} pixels, are too unequal to be cut to {place.size[1]} × {place.size[0]}"
        )
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    box = (place.left, place.top, place.left + place.size[1], place.top + place.size[0])
    return np.array(resized.crop(box))
