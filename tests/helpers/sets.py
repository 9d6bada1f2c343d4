"""Small prepared sets without encoders: random latents and caption features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pixart_ds.data.format import LatentsInfo, Row, SetDescription
from pixart_ds.data.shards import PreparedSet
from pixart_ds.data.writer import Conditions, SetWriter
from pixart_ds.plan.buckets import cut

RATIOS = (0.5, 1.0, 2.0)
BUCKET_SIZES = ((4, 8), (6, 6), (8, 4))


def description(**changes: Any) -> SetDescription:
    values: dict[str, Any] = {
        "ratios": RATIOS,
        "latents": {
            "32-square": LatentsInfo(square=True, sizes=((4, 4),)),
            "48-buckets": LatentsInfo(square=False, sizes=BUCKET_SIZES),
        },
        "latent_channels": 4,
        "downsampling_factor": 8,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
        "caption_channels": 6,
        "max_tokens": 9,
        "classes": ("cat", "dog"),
        "vae": "v",
        "text_encoder": "t",
        "vae_fingerprint": "v1",
        "text_fingerprint": "t1",
        "source": "here",
    }
    return SetDescription(**{**values, **changes})


def row(number: int, partition: int, *, tokens: int | None = None, channels: int = 6) -> Row:
    """Row `number` of the world: everything in it follows from its number."""
    random = np.random.default_rng(number)
    length = int(random.integers(1, 10)) if tokens is None else tokens
    height, width = BUCKET_SIZES[partition]
    original = (10 * height + number % 20, 10 * width)  # the partition's ratio remains the nearest
    std = {"32-square": (4, 4), "48-buckets": (height, width)}
    cuts = {name: cut(*original, (8 * size[0], 8 * size[1])) for name, size in std.items()}
    return Row(
        name=f"pictures/{number}.png",
        caption=f"picture {number}",
        caption_embeds=random.standard_normal((length, channels)).astype(np.float16),
        class_label=number % 3 - 1,
        original_height=original[0],
        original_width=original[1],
        latents={
            name: np.concatenate([random.standard_normal((4, *size)), random.uniform(0.1, 0.5, (4, *size))]).astype(
                np.float16
            )
            for name, size in std.items()
        },
        crops={name: (*each.resized, each.top, each.left) for name, each in cuts.items()},
        numbers={} if number % 5 == 0 else {"aesthetic_score": number / 10},
    )


def write_parts(writer: SetWriter, groups: Sequence[tuple[int, int]], *, tokens: int | None = None) -> None:
    """Writes the parts that are missing; `groups` holds (partition, rows) of each."""
    first, channels = 0, writer.description.caption_channels
    done = writer.parts_done()
    for part, (partition, count) in enumerate(groups):
        if part not in done:
            writer.write_part(
                part, partition, [row(first + n, partition, tokens=tokens, channels=channels) for n in range(count)]
            )
        first += count


def finish(writer: SetWriter) -> None:
    """Writes null caption, a prompt and the manifest."""
    about = writer.description
    null = np.full((about.max_tokens, about.caption_channels), 0.5, np.float16)
    mask = (np.arange(about.max_tokens) < 1).astype(np.uint8)
    writer.finish(Conditions(null, mask, [("a cat", np.ones((3, about.caption_channels), np.float16))]))


GROUPS = ((1, 8), (0, 8), (1, 8), (2, 5), (1, 1), (0, 3))


def tiny_set(
    folder: Path, groups: Sequence[tuple[int, int]] = GROUPS, *, tokens: int | None = None, **changes: Any
) -> PreparedSet:
    """A finished set of (partition, rows) groups."""
    writer = SetWriter(folder, description(**changes))
    write_parts(writer, groups, tokens=tokens)
    finish(writer)
    return PreparedSet.open(folder)


def shard_file(prepared: str | Path, folder: str, part: int) -> Path:
    """The file of one row group."""
    (path,) = (Path(prepared) / folder).glob(f"part-{part:05d}-*.mds")
    return path


def spoil(prepared: Path, latents: str, shard: int = 0, row: int = 0) -> None:
    """Makes the latents of one sample of a finished set numbers no more, as a broken encoder would; its hash is right again."""
    folder = prepared / f"latents-{latents}"
    index = json.loads((folder / "index.json").read_text())
    entry = index["shards"][shard]
    path = folder / entry["raw_data"]["basename"]
    content = bytearray(path.read_bytes())
    at = int.from_bytes(content[4 + 4 * row : 8 + 4 * row], "little")
    variable = [size is None for size in entry["column_sizes"]]
    heads = np.frombuffer(content, "<u4", sum(variable), at).tolist()
    sizes = [heads.pop(0) if size is None else size for size in entry["column_sizes"]]
    place = entry["column_names"].index("latents")
    begin = at + 4 * sum(variable) + sum(sizes[:place])
    content[begin : begin + sizes[place]] = np.full(sizes[place] // 2, np.nan, np.float16).tobytes()
    path.write_bytes(content)
    entry["raw_data"]["hashes"]["xxh3_64"] = xxhash.xxh3_64_hexdigest(bytes(content))
    (folder / "index.json").write_text(json.dumps(index))
