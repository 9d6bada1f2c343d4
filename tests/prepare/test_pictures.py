"""One picture from its bytes: its size as shown, its cuts, and what is refused with which words."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixart_ds.prepare.items import BrokenPicture
from pixart_ds.prepare.pictures import load_cut, size_of
from tests.helpers.sources import encoded

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def whole(data: bytes) -> np.ndarray:
    size = size_of(data)
    shown, (array,), _ = load_cut(data, [size])
    assert shown == size == array.shape[:2]
    return array.astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_it_is_shown(kind: str, orientation: int) -> None:
    upright = np.zeros((8, 24, 3), np.uint8)
    upright[:, :8] = (255, 0, 0)
    upright[:4, 16:] = (0, 0, 255)
    undone = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 3),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    data = saved(Image.fromarray(undone[orientation](upright).copy()), kind, exif=exif, **options)
    assert np.abs(whole(data) - upright).mean() < 20
    assert size_of(data) == (8, 24)


def test_an_orientation_behind_the_pixels_of_a_png_counts_and_a_damaged_one_does_not() -> None:
    plain = encoded(8, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    words = exif.tobytes().removeprefix(b"Exif\0\0")
    end = plain[-12:]
    assert size_of(plain[:-12] + chunk(b"eXIf", words) + end) == (24, 8)
    assert whole(plain[:-12] + chunk(b"eXIf", words) + end).shape == (24, 8, 3)
    assert whole(plain[:33] + chunk(b"eXIf", b"MM\0*rubbish") + plain[33:]).shape == (8, 24, 3)


def test_what_is_transparent_becomes_white() -> None:
    values = np.zeros((4, 6, 4), np.uint8)
    values[:, 3:] = (200, 100, 0, 255)
    rgba = Image.fromarray(values)
    palette = rgba.convert("P")
    grey = Image.fromarray(np.stack([values[..., 0], values[..., 3]], -1), "LA")
    for data in (saved(rgba), saved(rgba, "WEBP", lossless=True), saved(rgba, "TIFF")):
        array = whole(data)
        assert (array[:, :3] == 255).all()
        assert (array[:, 3:] == (200, 100, 0)).all()
    assert (whole(saved(grey))[:, :3] == 255).all()
    index = palette.getpixel((0, 0))
    assert (whole(saved(palette, transparency=index))[:, :3] == 255).all()
    black = Image.new("RGB", (6, 4))
    assert (whole(saved(black, transparency=(0, 0, 0))) == 255).all()


def test_all_kinds_of_pixels_become_rgb_of_8_bits() -> None:
    ramp = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)
    for kind in ("PNG", "TIFF"):
        array = whole(saved(Image.fromarray(ramp), kind))
        assert (array[..., 0] == ramp >> 8).all()
        assert (array[..., 0] == array[..., 2]).all()
    red = Image.new("RGB", (6, 4), (250, 5, 5))
    assert np.abs(whole(saved(red.convert("CMYK"), "JPEG", quality=100)) - (250, 5, 5)).max() < 8
    for mode in ("1", "L", "P", "LAB", "YCbCr"):
        image = Image.new("RGB", (6, 4), (255, 255, 255))
        made = image.convert(mode) if mode != "LAB" else Image.new("LAB", (6, 4), (255, 128, 128))
        assert whole(saved(made, "JPEG" if mode == "YCbCr" else "TIFF")).min() > 250
    with pytest.raises(BrokenPicture, match="its pixels have 32 bits"):
        load_cut(saved(Image.fromarray(np.full((4, 6), 1e6, np.float32)), "TIFF"), [(4, 4)])
    with pytest.raises(BrokenPicture, match="its pixels have 32 bits"):
        load_cut(saved(Image.fromarray(np.full((4, 6), 1 << 20, np.int32)), "TIFF"), [(4, 4)])


def test_of_a_moving_picture_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((255, 255, 255), (0, 0, 0))]
    for kind in ("WEBP", "PNG", "TIFF", "GIF"):
        assert whole(saved(frames[0], kind, save_all=True, append_images=frames[1:])).min() > 250


def test_cuts_are_central_and_told() -> None:
    values = np.zeros((20, 60, 3), np.uint8)
    values[:, 20:40] = 255
    shown, (square, same), (first, _) = load_cut(saved(Image.fromarray(values)), [(10, 10), (20, 60)])
    assert (shown, square.shape, square.dtype) == ((20, 60), (10, 10, 3), np.uint8)
    assert square[:, 1:-1].min() > 200
    assert (first.resized, first.top, first.left, first.size) == ((10, 30), 0, 10, (10, 10))
    assert (same == values).all()


def test_damaged_pictures_are_told_apart_from_whole_ones() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        data = encoded(40, 60, kind)
        cut_off = data[: len(data) * 2 // 3]
        with pytest.raises(BrokenPicture):
            load_cut(cut_off, [(8, 8)])
    for data in (b"", b"<html>no picture</html>", b"\x89PNG\r\n\x1a\n", encoded(8, 8)[:20]):
        with pytest.raises(BrokenPicture) as caught:
            size_of(data)
        assert str(caught.value)


def test_random_damage_is_never_more_than_a_broken_picture() -> None:
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"):
        data = np.frombuffer(encoded(16, 24, kind), np.uint8)
        for _ in range(60):
            spoiled = data.copy()
            spoiled[random.integers(0, min(len(data), 200), 4)] = random.integers(0, 256, 4)
            try:
                size_of(spoiled.tobytes(), max_pixels=10_000)
                load_cut(spoiled.tobytes(), [(8, 8)], max_pixels=10_000)
            except BrokenPicture:
                pass


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    rows = zlib.compress(b"")  # never looked at
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert size_of(bomb) == (100_000, 100_000)
    with pytest.raises(BrokenPicture, match="100000 × 100000 pixels, more than 5000"):
        size_of(bomb, max_pixels=5000)
    with pytest.raises(BrokenPicture, match="more than 400000000"):
        load_cut(bomb, [(8, 8)])
    with pytest.raises(BrokenPicture, match="its sides, 3000 and 1 pixels, are too unequal to be cut to 512 × 512"):
        load_cut(encoded(1, 3000), [(512, 512)])


def test_other_files_are_no_pictures_even_if_pillow_could_open_them() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with pytest.raises(BrokenPicture, match="it is no picture"):
        size_of(postscript)
