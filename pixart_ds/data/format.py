"""The format of a prepared set: its files, what one row holds, and what the set says of itself.

    captions/index.json, part-00000-HASH.mds, …             caption features of row group 0, …
    latents-NAME/index.json, part-00000-HASH.mds, …         the same rows' latents at one resolution
    parts/part-00000.json                                   a part that is whole: its shards, its rows, what it left out
    conditions.safetensors, prompts.json                    features of the empty caption and of the held prompts
    rows.parquet                                            a line for each row: for filters, audits and people
    skipped.jsonl, summary.html                             what was left out and why; a page that shows the set
    manifest.json                                           written last

A row group is one shard in every folder, so that text is stored once for all resolutions. Rows of a group share a partition, the
nearest aspect ratio. Everything is plain MDS: a stock `StreamingDataset` reads each folder with an index.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

FORMAT = 3
ALIGNMENT = 64
"""Bytes: the large column of each sample begins at a multiple of this in its file. The kernel copies from there to memory that is
aligned likewise 1.4 times as fast."""
PADDING = "align"
"""The column of zero bytes that sees to it; by its name it is the first of a sample. In front of the large one no other varies in
size, so that readers know where that begins."""
LARGE_COLUMNS = ("caption_embeds", "latents")
CAPTION_COLUMNS = {
    PADDING: "bytes",
    "caption_embeds": "bytes",
    "caption_text": "str",
    "class_label": "int",
    "name": "str",
    "part": "int",
    "row": "int",
}
LATENT_COLUMNS = {
    PADDING: "bytes",
    "crop": "ndarray:int32:4",
    "latents": "bytes",
    "original_size": "ndarray:int32:2",
    "part": "int",
    "row": "int",
    "shape": "ndarray:int32:3",
}
MAX_SHARD_BYTES = (1 << 32) - 1
"""MDS offsets are 32 bits."""
CAPTIONS = "captions"
MANIFEST, ROWS, CONDITIONS, PROMPTS = "manifest.json", "rows.parquet", "conditions.safetensors", "prompts.json"
SKIPPED, SUMMARY = "skipped.jsonl", "summary.html"


class LatentsInfo(BaseModel):
    """One resolution of a set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    square: bool
    """All rows have one size and are read as one bucket."""
    sizes: tuple[tuple[int, int], ...]
    """(height, width) of the latents: one for a square, else one for each ratio."""


class SetDescription(BaseModel):
    """What a set's rows are made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratios: tuple[float, ...]
    """Aspect ratios (height / width) of the partitions."""
    latents: dict[str, LatentsInfo]
    latent_channels: int
    downsampling_factor: int
    scaling_factor: float
    """Latents are multiplied by this in training, after `shift_factor` was subtracted."""
    shift_factor: float = 0.0
    caption_channels: int
    max_tokens: int
    classes: tuple[str, ...]
    """Class names; a row's label is an index into them."""
    vae: str
    """How the VAE was named when the set was prepared."""
    text_encoder: str
    vae_fingerprint: str
    text_fingerprint: str
    source: str
    """Where the pictures came from."""
    caption_codec: Literal["fp16", "int8"] = "fp16"
    """How caption features are stored: see `pixart_ds.data.codecs`."""
    clean_captions: bool = False
    """Captions were cleaned before they were encoded; prompts are to be, too."""
    captioner: str = "source"
    """What wrote the captions."""
    vae_precision: str = "fp32"
    text_precision: str = "fp32"

    @property
    def encoders(self) -> dict[str, str]:
        """Which weights made the rows: what every part's marker says."""
        names = ("vae_fingerprint", "text_fingerprint", "captioner")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Row:
    """One picture.

    Attributes:
        name: Its file's path within the source.
        caption: Its text.
        caption_embeds: (L, D) float16, real tokens only.
        class_label: Index of its class, or -1.
        original_height, original_width: Of the file, in pixels.
        latents: For each resolution (2C, h, w) float16: mean and standard deviation of the VAE's posterior, unscaled.
        crops: For each resolution how the picture was cut: height and width after resizing, then top and left of the cut in that.
        truncated: The caption has more tokens than the set holds.
        numbers: What else the source says of it, such as aesthetic_score.
    """

    name: str
    caption: str
    caption_embeds: npt.NDArray[np.float16]
    class_label: int
    original_height: int
    original_width: int
    latents: Mapping[str, npt.NDArray[np.float16]]
    crops: Mapping[str, tuple[int, int, int, int]]
    truncated: bool = False
    numbers: Mapping[str, float] = field(default_factory=dict)


def part_name(number: int) -> str:
    return f"part-{number:05d}"


def marker_name(number: int) -> str:
    """The file that says that a part is whole."""
    return f"parts/{part_name(number)}.json"


def latents_folder(name: str) -> str:
    return f"latents-{name}"
