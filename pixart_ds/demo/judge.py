"""A judge who reads a picture of the drawn world: which colour, shape and size in which quarter, on which ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixart_ds.demo.pictures import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, Image, Scene, Thing, covers

MEASURES = ("place", "colour", "shape", "size", "ground", "all")
SHAPE_OVERLAP = 0.6
"""A shape counts if it overlaps a true one of its area by this intersection over union."""

_COLOUR_NAMES, _GROUND_NAMES = tuple(COLOURS), tuple(GROUNDS)
_COLOUR_VALUES = np.array([*COLOURS.values()], np.float32)
_GROUND_VALUES = np.array([*GROUNDS.values()], np.float32)
_AREA = {"circle": np.pi, "square": 3.24, "triangle": 1.913}  # of radius 1
_SIZE_LIMIT = sum(SIZES.values()) / 2


@dataclass(frozen=True)
class Reading:
    """What a picture shows: its ground, and the things with the overlap of each one's shape."""

    ground: str
    things: dict[str, tuple[Thing, float]]


def read(picture: Image) -> Reading:
    """Reads a picture (h, w, 3)."""
    pixels = picture.astype(np.float32)
    far = np.square(pixels[:, :, None] - _GROUND_VALUES).sum(-1)  # (h, w, grounds)
    nearest = np.bincount(far.argmin(-1).ravel(), minlength=len(GROUNDS)).argmax()
    apart = pixels - _GROUND_VALUES[nearest]  # (h, w, 3)
    things = {}
    height, width = picture.shape[:2]
    for place in PLACES:
        rows = slice(0, height // 2) if "top" in place else slice(height // 2, height)
        columns = slice(0, width // 2) if "left" in place else slice(width // 2, width)
        found = _thing(apart[rows, columns], _COLOUR_VALUES - _GROUND_VALUES[nearest], min(height, width) / 4, place)
        if found is not None:
            things[place] = found
    return Reading(_GROUND_NAMES[nearest], things)


def _thing(
    apart: npt.NDArray[np.float32], colours: npt.NDArray[np.float32], quarter: float, place: str
) -> tuple[Thing, float] | None:
    """The thing in one quarter, from its pixels' distance to the ground (h, w, 3); None for an empty quarter."""
    strength = np.sqrt(np.square(apart).sum(-1))
    strong = strength > 60
    if strong.sum() < 0.125 * (1.2 * quarter) ** 2:
        return None
    # how much of each colour covers a pixel: its projection on the line from ground to colour
    cover = ((apart @ colours.T) / np.square(colours).sum(-1)).clip(0, 1)  # (h, w, colours)
    misfit = np.square(apart[:, :, None] - cover[..., None] * colours).sum(-1)
    colour = misfit[strong].sum(0).argmin()
    mass = cover[..., colour] * (strength > 40)
    if (mass > 0.5).sum() < 4:
        return None
    shape, radius, overlap = _shape(mass)
    size = "small" if radius < quarter * _SIZE_LIMIT else "large"
    return Thing(size, _COLOUR_NAMES[colour], shape, place), overlap


def _shape(mass: npt.NDArray[np.float32]) -> tuple[str, float, float]:
    """The shape of the same area that overlaps best, its radius in pixels, and the overlap (soft, over small shifts)."""
    area = float(mass.sum())
    centre_y = float((mass.sum(1) * (np.arange(mass.shape[0]) + 0.5)).sum() / area)
    centre_x = float((mass.sum(0) * (np.arange(mass.shape[1]) + 0.5)).sum() / area)
    rows, columns = (np.mgrid[: mass.shape[0] * 2, : mass.shape[1] * 2] / 2 + 0.25).astype(np.float32)
    best = ("circle", 0.0, -1.0)
    for shape in SHAPES:
        radius = float(np.sqrt(area / _AREA[shape]))
        lift = radius * 0.2667 if shape == "triangle" else 0.0  # its centre of mass lies below its centre
        for shift in (-0.35, 0.0, 0.35):
            whole = covers(shape, rows - (centre_y - lift + shift), columns - centre_x, radius)
            ideal = whole.reshape(mass.shape[0], 2, mass.shape[1], 2).mean((1, 3))
            overlap = float(np.minimum(mass, ideal).sum() / np.maximum(mass, ideal).sum())
            if overlap > best[2]:
                best = (shape, radius, overlap)
    return best


def judge(picture: Image, scene: Scene) -> dict[str, float]:
    """Shares from 0 to 1 of what a picture shows rightly; `all` is 1 if places, colours, shapes and ground are all right."""
    reading = read(picture)
    seen = [(thing, reading.things.get(thing.place)) for thing in scene.things]
    count = len(scene.things)
    place = float(set(reading.things) == {thing.place for thing in scene.things})
    colour = sum(found is not None and found[0].colour == thing.colour for thing, found in seen) / count
    size = sum(found is not None and found[0].size == thing.size for thing, found in seen) / count
    shape = (
        sum(found is not None and found[0].shape == thing.shape and found[1] > SHAPE_OVERLAP for thing, found in seen)
        / count
    )
    ground = float(reading.ground == scene.ground)
    everything = float(place == colour == shape == ground == 1)
    return {"place": place, "colour": colour, "shape": shape, "size": size, "ground": ground, "all": everything}


def score(pictures: Sequence[Image], scenes: Sequence[Scene]) -> dict[str, float]:
    """Means of `judge` over pictures and their scenes."""
    rows = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return {name: float(np.mean([row[name] for row in rows])) for name in MEASURES}


def score_class(pictures: Sequence[Image], classes: Sequence[str]) -> dict[str, float]:
    """Shares of pictures in which some thing has the colour, and some thing the shape, of the class `red circle`."""
    colour, shape = [], []
    for picture, name in zip(pictures, classes, strict=True):
        wanted_colour, wanted_shape = name.split()
        found = read(picture).things.values()
        colour.append(any(thing.colour == wanted_colour for thing, _ in found))
        shape.append(any(thing.shape == wanted_shape and overlap > SHAPE_OVERLAP for thing, overlap in found))
    return {"colour": float(np.mean(colour)), "shape": float(np.mean(shape))}
