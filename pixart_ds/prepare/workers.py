"""The processes that write captions and parts: each holds its models, takes a few parts at a time, and says what it has done."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pixart_ds import files
from pixart_ds.config.schema import PrepareConfig
from pixart_ds.data.codecs import CODECS
from pixart_ds.data.format import CONDITIONS, MAX_SHARD_BYTES, LatentsInfo, SetDescription
from pixart_ds.data.writer import Conditions, SetWriter
from pixart_ds.encoders.captions import load_captioner, shrunk_size
from pixart_ds.encoders.latents import KLEncoder, LatentEncoder, vae_facts
from pixart_ds.encoders.text import T5Encoder, TextEncoder, text_facts
from pixart_ds.errors import ConfigError, DataError, MachineError
from pixart_ds.plan.buckets import paper_sizes
from pixart_ds.prepare.caption import CaptionFiles, caption_parts
from pixart_ds.prepare.encode import CaptionFeatures, Picture, PictureReader, encode_part, sizes_of, skipped_line
from pixart_ds.prepare.items import Rejected
from pixart_ds.prepare.parts import Plan
from pixart_ds.prepare.processes import end_with_parent
from pixart_ds.prepare.repeated import REPEATED, RepeatedCaptions
from pixart_ds.prepare.sources import open_source

_MOST_PARTS_AT_ONCE = 8
_MOST_THREADS = 8
_PATCH = 2  # latents are cut into patches of two
_PAPER_PIXELS = {"paper-256": 256, "paper-512": 512, "paper-1024": 1024}


@dataclass(frozen=True)
class Begin:
    """What a process needs to begin.

    Attributes:
        config: The recipe.
        work: Folder of lists, plan and captions.
        device: `cpu` or `cuda`.
        phase: Whether it writes captions or parts.
        processes: How many there are.
        label: Of the share of the work.
    """

    config: PrepareConfig
    work: Path
    device: str
    phase: Literal["caption", "encode"]
    processes: int
    label: str


@dataclass(frozen=True)
class Done:
    """One part is written.

    Attributes:
        part: Its number.
        pictures: How many it was planned with.
        first: False if another process had written it meanwhile; that one counts.
    """

    part: int
    pictures: int
    first: bool = True


def run(begin: Begin, parts: Sequence[int]) -> Iterator[Done]:
    """Writes parts, in this process or in several.

    Raises:
        MachineError: A process was killed.
    """
    processes = min(begin.processes, len(parts))
    if processes == 1:
        if begin.processes > 1:
            _alone(begin.device)  # as in several processes: the number of threads may change the last bit of a feature
        yield from _Worker(begin).write(parts)
        return
    at_once = max(1, min(_MOST_PARTS_AT_ONCE, len(parts) // (4 * processes)))
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(processes):
        numbers.put(number)
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start, initargs=(replace(begin, processes=processes), numbers)
    ) as pool:
        jobs = [pool.submit(_write, parts[start : start + at_once]) for start in range(0, len(parts), at_once)]
        try:
            for job in as_completed(jobs):
                yield from job.result()
        except BrokenProcessPool as cause:
            raise MachineError(
                "a process that encodes was killed",
                where=begin.config.output,
                remedy="if memory ran out, use fewer --processes or a smaller batch_size, then start again; whole parts are kept",
            ) from cause
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: _Worker | None = None


def _start(begin: Begin, numbers: Any) -> None:
    """In a new process: makes its worker, on the next device. Threads of several processes would only wait for each other."""
    import torch

    global _worker  # noqa: PLW0603 - a pool's processes have no other place for what they keep between calls
    end_with_parent()
    number = numbers.get()
    device = begin.device
    if device == "cuda":
        device = f"cuda:{number % max(1, torch.cuda.device_count())}"
    _alone(device)
    _worker = _Worker(replace(begin, device=device, label=f"{begin.label}-{number}"))


def _alone(device: str) -> None:
    import torch

    if device == "cpu":
        torch.set_num_threads(1)


def agree(begin: Begin) -> None:
    """Writes what all processes have in common, where it is not there: the work folder may have been lost with all parts whole."""
    if not all((begin.work / name).exists() for name in ("set.json", CONDITIONS)):
        _Worker(begin).agree()


def _write(parts: Sequence[int]) -> list[Done]:
    assert _worker is not None
    return list(_worker.write(parts))


class _Worker:
    """Writes parts, one after the other."""

    def __init__(self, begin: Begin) -> None:
        self._begin, self._config = begin, begin.config
        self._plan = Plan.open(begin.work / "plan")
        self._captions = CaptionFiles(begin.work / "captions")

    def write(self, parts: Sequence[int]) -> Iterator[Done]:
        """Writes parts; each counts as soon as it is yielded."""
        yield from self._write_captions(parts) if self._begin.phase == "caption" else self._encode(parts)

    def agree(self) -> None:
        """Notes captioner, set and conditions."""
        if self._config.captions.captioner != "source":
            _ = self._captioner
            del self._captioner  # so that it is never in memory beside the encoders
        _ = self._encoders

    # ---- captions --------------------------------------------------------------------------------------------------------

    @cached_property
    def _captioner(self) -> Any:
        captioner = load_captioner(self._config.captions, self._begin.device)
        agreed(self._begin.work / "captioner.json", {"captioner": captioner.identity if captioner else "source"})
        return captioner

    def _write_captions(self, parts: Sequence[int]) -> Iterator[Done]:
        config, captioner = self._config, self._captioner
        reader = self._reader(lambda partition, item: [shrunk_size(item.height, item.width)])
        for part in caption_parts(captioner, reader, parts, self._captions, config.captions.batch_size, config.seed):
            yield Done(part, self._plan.counts[part])
        reader.close()

    # ---- parts -----------------------------------------------------------------------------------------------------------

    @cached_property
    def _encoders(self) -> tuple[LatentEncoder, TextEncoder, SetDescription]:
        vae, text = encoders(self._config, self._begin.device)
        description = describe(self._config, self._plan, self._begin.work, vae, text)
        self._writer(description).check()  # the work folder that knew of the encoders may have been lost
        agreed(self._begin.work / "set.json", description.model_dump(mode="json"))
        self._write_conditions(text)
        return vae, text, description

    def _write_conditions(self, text: TextEncoder) -> None:
        """Keeps what the set holds beside its rows, so that nobody needs the encoder again to finish it."""
        path = self._begin.work / CONDITIONS
        if not path.exists():
            prompts = self._config.prompts
            held = list(zip(prompts, text.encode(prompts), strict=True)) if prompts else []
            with suppress(FileExistsError):  # another process was faster
                files.write_new(path, [Conditions(*text.null(), held).to_bytes()])

    @cached_property
    def _features(self) -> CaptionFeatures:
        work = self._begin.work
        repeated = RepeatedCaptions(work / REPEATED)
        return CaptionFeatures(self._encoders[1], repeated, self._config.batch_size, work / "features")

    def _encode(self, parts: Sequence[int]) -> Iterator[Done]:
        vae, _, description = self._encoders
        sizes = sizes_of(description)
        reader = self._reader(lambda partition, item: sizes[partition])
        writer = self._writer(description)
        for part, pictures, rejected in reader.parts(parts):
            told, captions, silent = self._told(part, pictures)
            rows = encode_part(self._config, description, told, captions, self._plan.labels, vae, self._features)
            left_out = [skipped_line(each) for each in (*rejected, *silent)]
            first = writer.write_part(part, self._plan.partitions[part], rows, left_out)
            yield Done(part, self._plan.counts[part], first)
        reader.close()

    def _writer(self, description: SetDescription) -> SetWriter:
        plan = self._plan.key(self._config)
        return SetWriter(self._config.output, description, plan=plan, label=self._begin.label)

    def _told(self, part: int, pictures: list[Picture]) -> tuple[list[Picture], list[str], list[Rejected]]:
        """The pictures that have a caption, their captions, and those without."""
        if self._config.captions.captioner == "source":
            return pictures, [picture.item.caption or "" for picture in pictures], []
        captions, rejected = self._captions.read(part)
        told = [picture for picture in pictures if picture.item.name in captions]
        known = {each.name: each for each in rejected if each.kind == "caption"}
        silent = [
            known.get(
                picture.item.name,
                Rejected(picture.item.name, "caption", "it could not be read when captions were written"),
            )
            for picture in pictures
            if picture.item.name not in captions
        ]
        return told, [captions[picture.item.name] for picture in told], silent

    def _reader(self, sizes: Any) -> PictureReader:
        threads = max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // self._begin.processes))
        source = open_source(self._config.source)
        return PictureReader(source, self._plan, sizes, self._config.filter.max_pixels, threads)


def encoders(config: PrepareConfig, device: str) -> tuple[LatentEncoder, TextEncoder]:
    """Both encoders of a recipe."""
    precision, clean = config.text_precision, config.captions.clean
    return (
        KLEncoder(config.vae, device, precision=config.vae_precision),
        T5Encoder(config.text_encoder, config.max_tokens, device, precision=precision, clean=clean),
    )


def agreed(path: Path, about: dict[str, Any]) -> None:
    """Notes what all processes must have in common, or raises DataError if another one noted something else."""
    try:
        files.write_new(path, [files.json_bytes(about)])
    except FileExistsError:
        before = files.read_json(path)
        if changed := [key for key in about if before.get(key) != about[key]]:
            raise DataError(
                "other parts of this set were made with other encoders: "
                + ", ".join(f"{key} was {before.get(key)!r} and is {about[key]!r}" for key in changed),
                where=path,
                remedy="take the same encoders, or choose another output; nothing was changed in this one",
            ) from None


# ---- what the set is ----------------------------------------------------------------------------------------------------


def check(config: PrepareConfig) -> None:
    """Looks at the recipe and the encoders' config files before anything is read or written.

    Raises:
        ConfigError: There is no such encoder, or its sizes do not fit the recipe's.
    """
    factor, channels = vae_facts(config.vae)
    width = text_facts(config.text_encoder)
    CODECS[config.caption_codec].bytes_per_token(width)
    problems = []
    for name, sizes in _sizes(config).items():
        odd = [size for size in sizes if any(side % (factor * _PATCH) for side in size)]
        if odd:
            problems.append(f"latents {name}: {odd} are no multiples of {factor * _PATCH} pixels")
    if problems:
        raise ConfigError(
            "sizes do not fit the VAE:\n" + "\n".join(f"  - {line}" for line in problems),
            remedy=f"the VAE makes latents {factor} times smaller, and the net cuts them into patches of {_PATCH}",
        )
    row_bytes = {
        f"latents {name}": max(height * width for height, width in sizes) // factor**2 * channels * 4
        for name, sizes in _sizes(config).items()
    }
    row_bytes["captions"] = config.max_tokens * CODECS[config.caption_codec].bytes_per_token(width) + 4096
    for name, size in row_bytes.items():
        if size * config.rows_per_group > MAX_SHARD_BYTES * 0.95:
            raise ConfigError(
                f"{config.rows_per_group} rows of {name} do not fit one shard of 4 GiB: a row has up to {size} bytes",
                where="rows_per_group",
                remedy=f"set it to {int(MAX_SHARD_BYTES * 0.95 // size)} at most",
            )


def _sizes(config: PrepareConfig) -> dict[str, tuple[tuple[int, int], ...]]:
    """(height, width) in pixels of each of the latents: one for a square, else one for each ratio."""
    made: dict[str, tuple[tuple[int, int], ...]] = {}
    for item in config.latents:
        if item.square is not None:
            made[item.name] = ((item.square, item.square),)
        elif isinstance(item.sizes, str):
            made[item.name] = paper_sizes(_PAPER_PIXELS[item.sizes])  # type: ignore[arg-type]
        else:
            made[item.name] = item.sizes or ()
    return made


def describe(config: PrepareConfig, plan: Plan, work: Path, vae: LatentEncoder, text: TextEncoder) -> SetDescription:
    """What the set's rows are made of."""
    factor = vae.downsampling_factor
    square = {item.name: item.square is not None for item in config.latents}
    captioner = "source"
    if config.captions.captioner != "source":
        captioner = files.read_json(work / "captioner.json")["captioner"]
    return SetDescription(
        ratios=tuple(plan.about["ratios"]),
        latents={
            name: LatentsInfo(square=square[name], sizes=tuple((h // factor, w // factor) for h, w in sizes))
            for name, sizes in _sizes(config).items()
        },
        latent_channels=vae.channels,
        downsampling_factor=factor,
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor,
        caption_channels=text.channels,
        max_tokens=config.max_tokens,
        classes=tuple(plan.about["classes"]),
        vae=config.vae,
        text_encoder=config.text_encoder,
        vae_fingerprint=vae.fingerprint,
        text_fingerprint=text.fingerprint,
        source=config.source.path,
        caption_codec=config.caption_codec,
        clean_captions=config.captions.clean,
        captioner=captioner,
        vae_precision=config.vae_precision,
        text_precision=config.text_precision,
    )
