"""A drawn world: one or two coloured shapes in the quarters of a picture, with a dense caption, a poor one, and a class."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pixart_ds import files
from pixart_ds.errors import DataError

Image = npt.NDArray[np.uint8]

COLOURS = {"red": (215, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220), "yellow": (240, 210, 50)}
GROUNDS = {"black": (15, 15, 20), "grey": (125, 125, 130), "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
SIZES = {"small": 0.62, "large": 0.92}
"""Radius as a share of a quarter of the picture's shorter side."""

WORDS = (
    "a",
    "and",
    "at",
    "the",
    "on",
    "background",
    "top",
    "bottom",
    "left",
    "right",
    "picture",
    *SIZES,
    *COLOURS,
    *SHAPES,
    *GROUNDS,
)
"""Every word that a caption can have."""

_OVERSAMPLING = 3
_ONE_THING = 0.35
_RATIOS = (0.5, 0.57, 0.71, 0.83, 1.0, 1.2, 1.4, 1.75, 2.0)
_RATIO_WEIGHTS = (1, 2, 6, 6, 10, 6, 6, 2, 1)


@dataclass(frozen=True)
class Thing:
    """One shape: its size, colour, shape and place, by name."""

    size: str
    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    ground: str
    things: tuple[Thing, ...]


def random_scene(random: np.random.Generator, most_things: int = 2) -> Scene:
    """One thing, or two to `most_things` in different places."""

    def pick(names: Iterable[str]) -> str:
        options = list(names)
        return str(options[random.integers(len(options))])

    count = 1 if random.random() < _ONE_THING else int(random.integers(2, most_things + 1))
    places = [PLACES[index] for index in random.permutation(len(PLACES))[:count]]
    return Scene(pick(GROUNDS), tuple(Thing(pick(SIZES), pick(COLOURS), pick(SHAPES), place) for place in places))


def is_held_out(scene: Scene) -> bool:
    """One scene in eight is never drawn for training, whatever its ground and the sequence of its things."""
    text = json.dumps(sorted([thing.size, thing.colour, thing.shape, thing.place] for thing in scene.things))
    return hashlib.md5(text.encode(), usedforsecurity=False).digest()[0] % 8 == 0


def scenes(count: int, seed: int, *, held_out: bool = False) -> list[Scene]:
    """`count` random scenes, of those for training or of those held out."""
    random = np.random.default_rng(seed)
    found: list[Scene] = []
    while len(found) < count:
        scene = random_scene(random)
        if is_held_out(scene) == held_out:
            found.append(scene)
    return found


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes that no training picture shows, for prompts."""
    return scenes(count, seed, held_out=True)


def caption(scene: Scene) -> str:
    """The dense caption: everything that the picture shows."""
    things = " and ".join(f"a {thing.size} {thing.colour} {thing.shape} at the {thing.place}" for thing in scene.things)
    return f"{things} on a {scene.ground} background"


def short_caption(scene: Scene) -> str:
    """A poor caption, as scraped alternative texts are: one noun."""
    return f"picture {scene.things[0].shape}"


def class_name(scene: Scene) -> str:
    """The class: colour and shape of the first thing."""
    return f"{scene.things[0].colour} {scene.things[0].shape}"


def covers(
    shape: str, dy: npt.NDArray[np.float32], dx: npt.NDArray[np.float32], radius: float
) -> npt.NDArray[np.bool_]:
    """Where a shape of this radius covers points at these distances from its centre."""
    if shape == "circle":
        return dx * dx + dy * dy < radius * radius
    if shape == "square":
        return (abs(dx) < radius * 0.9) & (abs(dy) < radius * 0.9)
    return (dy < radius * 0.9) & (abs(dx) < (dy + radius) * 0.53)


def draw(scene: Scene, random: np.random.Generator, height: int, width: int) -> Image:
    """The picture (height, width, 3), anti-aliased; places and sizes vary a little.

    A thing lies as far towards its quarter's centre as the central square crop leaves it whole, so that a square cut of a wide
    picture keeps its caption true.
    """
    fine_height, fine_width = height * _OVERSAMPLING, width * _OVERSAMPLING
    shorter = min(fine_height, fine_width)
    quarter = shorter / 4
    picture = np.empty((fine_height, fine_width, 3), np.float32)
    picture[:] = GROUNDS[scene.ground]
    rows, columns = np.mgrid[:fine_height, :fine_width].astype(np.float32) + 0.5
    for thing in scene.things:
        radius = quarter * (SIZES[thing.size] + random.uniform(-0.04, 0.04))
        vertical, horizontal = random.uniform(-0.06, 0.06, 2) * quarter
        down = min(fine_height / 4, shorter / 2 - radius) * (-1 if "top" in thing.place else 1)
        right = min(fine_width / 4, shorter / 2 - radius) * (-1 if "left" in thing.place else 1)
        dy = rows - (fine_height / 2 + down + vertical)
        dx = columns - (fine_width / 2 + right + horizontal)
        picture[covers(thing.shape, dy, dx, radius)] = COLOURS[thing.colour]
    blocks = picture.reshape(height, _OVERSAMPLING, width, _OVERSAMPLING, 3)
    return blocks.mean((1, 3)).round().astype(np.uint8)


def write_pictures(folder: Path, count: int, seed: int) -> int:
    """Draws a data set as ordinary files: CLASS/NAME.png or .jpg, NAME.txt (dense caption), NAME.short.txt (poor one).

    Sizes and aspect ratios vary. Existing files of an earlier, stopped call are left as they are; picture k is the same whatever
    was there.

    Returns:
        Files that were written now.

    Raises:
        DataError: The folder holds pictures of another count or seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {"world": 1, "count": count, "seed": seed}
    note = folder / "drawn.json"
    if note.exists():
        if files.read_json(note) != about:
            raise DataError(
                f"the folder holds other drawn pictures ({files.read_json(note)}) than asked for ({about})",
                where=folder,
                remedy="name another folder, or remove this one",
            )
    elif any(folder.iterdir()):
        raise DataError("the folder is not empty and holds no drawn pictures", where=folder, remedy="name a new folder")
    else:
        files.write_json(note, about)
    written = 0
    for number, scene in enumerate(scenes(count, seed)):
        place = folder / class_name(scene) / f"{number:06d}"
        short = place.with_name(place.name + ".short.txt")
        if short.exists():  # the last of a picture's files
            continue
        place.parent.mkdir(exist_ok=True)
        suffix, picture = _encoded(scene, number, seed)
        place.with_suffix(suffix).write_bytes(picture)
        place.with_suffix(".txt").write_text(caption(scene) + "\n", encoding="utf-8")
        short.write_text(short_caption(scene) + "\n", encoding="utf-8")
        written += 1
    return written


def _encoded(scene: Scene, number: int, seed: int) -> tuple[str, bytes]:
    """File suffix and bytes of a picture: PNG, or JPEG for one in four."""
    from PIL import Image as Pillow

    random = np.random.default_rng([seed, number])
    height, width = _size(random)
    buffer = io.BytesIO()
    picture = Pillow.fromarray(draw(scene, random, height, width))
    if random.random() < 0.25:
        picture.save(buffer, "JPEG", quality=95, subsampling=0)
        return ".jpg", buffer.getvalue()
    picture.save(buffer, "PNG")
    return ".png", buffer.getvalue()


def _size(random: np.random.Generator) -> tuple[int, int]:
    """A size whose ratio lies near one of nine, square ones most often, with a shorter side of 48 to 80 pixels."""
    weights = np.array(_RATIO_WEIGHTS) / sum(_RATIO_WEIGHTS)
    ratio = float(_RATIOS[random.choice(len(_RATIOS), p=weights)]) * random.uniform(0.97, 1.03)
    shorter = int(random.integers(48, 81))
    longer = round(shorter * max(ratio, 1 / ratio))
    return (longer, shorter) if ratio > 1 else (shorter, longer)
