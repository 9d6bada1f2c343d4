"""From a folder of captioned pictures to a prepared set, in parts that a killed run does not lose."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixart_ds import files
from pixart_ds.config.load import fingerprint
from pixart_ds.config.schema import PrepareConfig
from pixart_ds.data.shards import LatentsInfo, PreparedSet, Row, SetDescription, SetWriter
from pixart_ds.encoders.latents import KLEncoder
from pixart_ds.encoders.text import T5Encoder
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.log import duration
from pixart_ds.plan.buckets import PAPER_RATIOS, nearest, paper_sizes
from pixart_ds.plan.random import key_of, permutation, raw_words
from pixart_ds.prepare.sources import BrokenPicture, Picture, Source, load_cut, scan, size_of

_PATCH = 2  # latents must be cut into patches of two


@dataclass(frozen=True)
class Part:
    """Pictures of one partition that make one row group; fixed before any of them is decoded."""

    number: int
    partition: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Which picture goes into which part, and what is broken already by its header."""

    source: Source
    ratios: tuple[float, ...]
    parts: tuple[Part, ...]
    broken: tuple[tuple[str, str], ...]

    def summary(self) -> dict[str, Any]:
        """Counts, for programs."""
        partitions = {str(ratio): 0 for ratio in self.ratios}
        for part in self.parts:
            partitions[str(self.ratios[part.partition])] += len(part.names)
        return {
            "pictures": len(self.source.pictures),
            "broken": len(self.broken),
            "classes": len(self.source.classes),
            "parts": len(self.parts),
            "pictures_by_ratio": partitions,
        }

    def __str__(self) -> str:
        about = self.summary()
        ratios = ", ".join(f"{ratio}: {count}" for ratio, count in about["pictures_by_ratio"].items() if count)
        return (
            f"{about['pictures']} pictures of {about['classes']} classes in {self.source.root}, {about['broken']} of them broken; "
            f"{about['parts']} parts; by ratio {ratios}"
        )


@dataclass(frozen=True)
class Report:
    """What `prepare` did."""

    path: Path
    samples: int
    parts_written: int
    parts_kept: int
    skipped: int
    truncated: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}

    def __str__(self) -> str:
        lines = [
            f"{self.samples} samples in {self.path}: {self.parts_written} parts written, {self.parts_kept} kept, "
            f"in {duration(self.seconds)}"
        ]
        if self.skipped:
            lines.append(
                f"{self.skipped} broken pictures were left out; they are listed in {self.path / 'skipped.jsonl'}"
            )
        if self.truncated:
            lines.append(f"{self.truncated} captions were longer than the recipe's max_tokens and were cut")
        return "\n".join(lines)


def plan_of(config: PrepareConfig) -> Plan:
    """Scans the source and assigns every picture to a part, by its ratio and a seeded shuffle.

    Raises:
        DataError: Nothing to prepare, or captions are missing.
    """
    source = scan(Path(config.source), config.caption_suffix)
    ratios = PAPER_RATIOS if config.ratios == "paper" else config.ratios
    by_partition: dict[int, list[str]] = {}
    broken = []
    shuffled = permutation(raw_words(key_of("prepare", config.seed), (0, 0, 0), len(source.pictures)))
    for index in shuffled:
        picture = source.pictures[index]
        try:
            by_partition.setdefault(nearest(ratios, *size_of(picture.path)), []).append(picture.name)
        except BrokenPicture as error:
            broken.append((picture.name, str(error)))
    groups = [
        (partition, names[start : start + config.rows_per_group])
        for partition, names in sorted(by_partition.items())
        for start in range(0, len(names), config.rows_per_group)
    ]
    parts = tuple(Part(number, partition, tuple(names)) for number, (partition, names) in enumerate(groups))
    return Plan(source, tuple(ratios), parts, tuple(sorted(broken)))


def prepare(config: PrepareConfig, *, processes: int = 1, device: str = "cpu") -> Report:
    """Encodes what is not encoded yet and finishes the set.

    A second call with the same pictures and settings keeps whole parts. A broken picture is listed in skipped.jsonl and left out.

    Args:
        config: The recipe.
        processes: Encoding processes, each with one thread.
        device: Where the encoders compute.

    Raises:
        DataError: The source is empty or incomplete, every picture is broken, or the output holds another set.
        ConfigError: An encoder is missing, or a size does not fit the VAE.
    """
    began = time.monotonic()
    plan = plan_of(config)
    output = Path(config.output)
    vae, text = KLEncoder(config.vae, device), T5Encoder(config.text_encoder, config.max_tokens, device)
    description = describe(config, plan, vae, text)
    _same_plan(output, config, plan, description)
    writer = SetWriter(output, description)
    done = writer.parts_done()
    todo = [part for part in plan.parts if part.number not in done]
    if not todo and (output / "manifest.json").exists():
        kept = PreparedSet.open(output)
        skipped = sum(1 for _ in files.read_json_lines(output / "skipped.jsonl"))
        return Report(output, kept.num_samples, 0, len(done), skipped, 0, time.monotonic() - began)
    shares = [todo[number::processes] for number in range(processes)]
    if processes == 1 or len(todo) < 2:
        truncated = _write_parts(config, plan, todo, description, vae, text)
    else:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(_in_own_process, config, plan, share, description, device) for share in shares if share]
            truncated = sum(job.result() for job in jobs)
    skipped = _list_skipped(output, plan)
    prompts = list(config.prompts)
    null, *features = text.encode(["", *prompts]) if prompts else text.encode([""])
    writer.finish(null, list(zip(prompts, features, strict=True)))
    made = PreparedSet.open(output)
    return Report(output, made.num_samples, len(todo), len(done), skipped, truncated, time.monotonic() - began)


def describe(config: PrepareConfig, plan: Plan, vae: KLEncoder, text: T5Encoder) -> SetDescription:
    """The set's description.

    Raises:
        ConfigError: A size is no multiple of what the VAE and the patches need.
    """
    factor = vae.downsampling_factor
    latents, problems = {}, []
    for item in config.latents:
        if item.square is not None:
            sizes: tuple[tuple[int, int], ...] = ((item.square, item.square),)
        elif isinstance(item.sizes, str):
            sizes = paper_sizes({"paper-256": 256, "paper-512": 512, "paper-1024": 1024}[item.sizes])  # type: ignore[arg-type]
        else:
            sizes = item.sizes or ()
        odd = [size for size in sizes if any(side % (factor * _PATCH) for side in size)]
        if odd:
            problems.append(f"latents {item.name}: {odd} are no multiples of {factor * _PATCH} pixels")
        latents[item.name] = LatentsInfo(
            square=item.square is not None, sizes=tuple((h // factor, w // factor) for h, w in sizes)
        )
    if problems:
        raise ConfigError(
            "sizes do not fit the VAE:\n" + "\n".join(f"  - {line}" for line in problems),
            remedy=f"the VAE makes latents {factor} times smaller, and the net cuts them into patches of {_PATCH}",
        )
    return SetDescription(
        ratios=plan.ratios,
        latents=latents,
        latent_channels=vae.channels,
        downsampling_factor=factor,
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor,
        caption_channels=text.channels,
        max_tokens=config.max_tokens,
        classes=plan.source.classes,
        vae=config.vae,
        text_encoder=config.text_encoder,
        vae_fingerprint=vae.fingerprint,
        text_fingerprint=text.fingerprint,
        source=str(plan.source.root),
    )


def _same_plan(output: Path, config: PrepareConfig, plan: Plan, description: SetDescription) -> None:
    """Writes down what the output is made of, or refuses one that is made of something else."""
    about = {
        "pictures": plan.source.fingerprint(),
        "parts": fingerprint([[part.partition, *part.names] for part in plan.parts]),
        "set": fingerprint(description.model_dump(mode="json", exclude={"source", "vae", "text_encoder"})),
        "prompts": fingerprint(list(config.prompts)),
        "captions": config.caption_suffix,
    }
    note = output / "plan.json"
    if note.exists():
        before = files.read_json(note)
        if changed := [name for name in about if before.get(name) != about[name]]:
            raise DataError(
                f"the output was prepared from other pictures or settings (changed: {', '.join(changed)})",
                where=output.resolve(),
                remedy="choose another output; nothing was changed in this one",
            )
        return
    if output.is_dir() and any(output.iterdir()):
        raise DataError(
            "the output folder is not empty and holds no prepared set",
            where=output.resolve(),
            remedy="choose another output",
        )
    output.mkdir(parents=True, exist_ok=True)
    files.write_json(note, about)


def _in_own_process(
    config: PrepareConfig, plan: Plan, parts: Sequence[Part], description: SetDescription, device: str
) -> int:
    import torch

    torch.set_num_threads(1)
    vae, text = KLEncoder(config.vae, device), T5Encoder(config.text_encoder, config.max_tokens, device)
    return _write_parts(config, plan, parts, description, vae, text)


def _write_parts(
    config: PrepareConfig,
    plan: Plan,
    parts: Sequence[Part],
    description: SetDescription,
    vae: KLEncoder,
    text: T5Encoder,
) -> int:
    """Encodes and writes parts; returns how many captions were cut."""
    writer = SetWriter(Path(config.output), description)
    pictures = {picture.name: picture for picture in plan.source.pictures}
    truncated = 0
    for part in parts:
        rows, broken, cut_captions = _encode(
            config, part, [pictures[name] for name in part.names], description, vae, text
        )
        truncated += cut_captions
        if broken:
            files.write_json(Path(config.output) / "parts" / f"skipped-{part.number:05d}.json", broken)
        writer.write_group(part.number, part.partition, rows)
    return truncated


def _encode(
    config: PrepareConfig,
    part: Part,
    pictures: Sequence[Picture],
    description: SetDescription,
    vae: KLEncoder,
    text: T5Encoder,
) -> tuple[list[Row], list[tuple[str, str]], int]:
    """Rows of one part, its broken pictures with the reason, and how many captions were cut."""
    factor = description.downsampling_factor
    names = list(description.latents)
    sizes = []
    for name in names:
        info = description.latents[name]
        height, width = info.sizes[0 if info.square else part.partition]
        sizes.append((height * factor, width * factor))
    whole: list[Picture] = []
    images: list[list[npt.NDArray[np.uint8]]] = []
    broken = []
    for picture in pictures:
        try:
            images.append(load_cut(picture.path, sizes))
            whole.append(picture)
        except BrokenPicture as error:
            broken.append((picture.name, str(error)))
    captions = [picture.caption() for picture in whole]
    embeds: list[npt.NDArray[np.float16]] = []
    latents: dict[str, list[npt.NDArray[np.float16]]] = {name: [] for name in names}
    for start in range(0, len(whole), config.batch_size):
        batch = slice(start, start + config.batch_size)
        embeds += text.encode(captions[batch])
        for number, name in enumerate(names):
            moments = vae.encode(np.stack([cuts[number] for cuts in images[batch]]))
            latents[name] += list(moments.astype(np.float16))
    rows = []
    for number, picture in enumerate(whole):
        height, width = size_of(picture.path)
        rows.append(
            Row(
                name=picture.name,
                caption=captions[number],
                caption_embeds=embeds[number],
                class_label=picture.class_label,
                original_height=height,
                original_width=width,
                latents={name: latents[name][number] for name in names},
            )
        )
    return rows, broken, text.count_truncated(captions) if captions else 0


def _list_skipped(output: Path, plan: Plan) -> int:
    """Gathers what every part left out into skipped.jsonl; returns how many."""
    skipped = list(plan.broken)
    for path in sorted((output / "parts").glob("skipped-*.json")):
        skipped += [(name, reason) for name, reason in files.read_json(path)]
    lines = (json.dumps({"picture": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in skipped)
    files.write_text(output / "skipped.jsonl", "".join(lines))
    return len(skipped)
