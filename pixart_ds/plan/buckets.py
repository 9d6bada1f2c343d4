"""Aspect-ratio buckets: the paper's forty ratios and sizes, the nearest one, and how a picture is cut to fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

_PAPER: tuple[
    tuple[float, int, int], ...
] = (  # ratio h/w, height and width at 1024 px (paper appendix A.5, released code)
    (0.25, 512, 2048),
    (0.26, 512, 1984),
    (0.27, 512, 1920),
    (0.28, 512, 1856),
    (0.32, 576, 1792),
    (0.33, 576, 1728),
    (0.35, 576, 1664),
    (0.4, 640, 1600),
    (0.42, 640, 1536),
    (0.48, 704, 1472),
    (0.5, 704, 1408),
    (0.52, 704, 1344),
    (0.57, 768, 1344),
    (0.6, 768, 1280),
    (0.68, 832, 1216),
    (0.72, 832, 1152),
    (0.78, 896, 1152),
    (0.82, 896, 1088),
    (0.88, 960, 1088),
    (0.94, 960, 1024),
    (1.0, 1024, 1024),
    (1.07, 1024, 960),
    (1.13, 1088, 960),
    (1.21, 1088, 896),
    (1.29, 1152, 896),
    (1.38, 1152, 832),
    (1.46, 1216, 832),
    (1.67, 1280, 768),
    (1.75, 1344, 768),
    (2.0, 1408, 704),
    (2.09, 1472, 704),
    (2.4, 1536, 640),
    (2.5, 1600, 640),
    (2.89, 1664, 576),
    (3.0, 1728, 576),
    (3.11, 1792, 576),
    (3.62, 1856, 512),
    (3.75, 1920, 512),
    (3.88, 1984, 512),
    (4.0, 2048, 512),
)

PAPER_RATIOS: tuple[float, ...] = tuple(ratio for ratio, _, _ in _PAPER)
"""Height / width of the paper's forty buckets, rising."""


def paper_sizes(pixels: Literal[256, 512, 1024]) -> tuple[tuple[int, int], ...]:
    """(height, width) in pixels of each of the paper's buckets; those at 512 and 256 px are halves and quarters."""
    factor = 1024 // pixels
    return tuple((height // factor, width // factor) for _, height, width in _PAPER)


def nearest(ratios: tuple[float, ...], height: int, width: int) -> int:
    """The bucket whose ratio is nearest to height / width, in linear distance as in the released code; ties go to the lower."""
    return int(nearest_of(ratios, np.array([height]), np.array([width]))[0])


def nearest_of(
    ratios: tuple[float, ...], heights: npt.NDArray[np.integer], widths: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    """`nearest` for many pictures at once: (n,) heights and widths to (n,) buckets."""
    distance = np.abs(np.asarray(ratios)[None, :] - (heights / widths)[:, None])
    return distance.argmin(1).astype(np.int64)


@dataclass(frozen=True)
class Cut:
    """How a picture becomes one of a given size: resized, keeping its ratio, then cut in the centre.

    Attributes:
        resized: (height, width) after resizing.
        top, left: Where the cut begins in the resized picture.
        size: (height, width) of the cut.
    """

    resized: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]


def cut(height: int, width: int, size: tuple[int, int]) -> Cut:
    """The smallest resize that covers `size`, and the central cut; a square `size` resizes the shorter side to it."""
    target_height, target_width = size
    if target_height * width >= target_width * height:  # the height decides: the picture is relatively wider
        resized = (target_height, max(target_width, round(width * target_height / height)))
    else:
        resized = (max(target_height, round(height * target_width / width)), target_width)
    return Cut(resized, (resized[0] - target_height) // 2, (resized[1] - target_width) // 2, size)
