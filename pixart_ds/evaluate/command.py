"""The verb `sample`: prompts or the set's own, at any size, from a stage's handover."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from pixart_ds.config.freeze import open_run, read_stage
from pixart_ds.config.schema import StageConfig
from pixart_ds.data.shards import PreparedSet
from pixart_ds.encoders.latents import KLEncoder
from pixart_ds.encoders.text import T5Encoder
from pixart_ds.errors import ConfigError
from pixart_ds.evaluate.generate import Wish, generate, load_net
from pixart_ds.evaluate.grid import save_grid
from pixart_ds.layout import last_done


def sample_run(options: Namespace) -> dict[str, Any]:
    """Samples pictures and writes them as one sheet; returns what was made."""
    run = open_run(options.run)
    name = options.stage or last_done(run)
    stage = read_stage(run, name)
    prepared = PreparedSet.open(Path(stage.data.sets[0].path))
    about = prepared.description
    vae = KLEncoder(options.vae or about.vae)
    size = parse_size(options.size) if options.size else _square_of(stage, vae.downsampling_factor)
    wishes, captions = _wishes(options, stage, prepared, size)
    previews = stage.previews
    pictures = generate(
        load_net(stage, run.stage(name).handover, options.weights),
        vae,
        wishes,
        null_embeds=prepared.null_embeds,
        guidance_scale=previews.guidance_scale if options.guidance_scale is None else options.guidance_scale,
        num_inference_steps=options.steps or previews.num_inference_steps,
        scheduler=previews.scheduler,
    )
    save_grid(
        pictures,
        captions,
        options.out,
        title=f"{run.root.name}, {name}, {options.weights}",
        columns=min(6, len(pictures)),
    )
    return {
        "stage": name,
        "weights": options.weights,
        "pictures": len(pictures),
        "size": list(size),
        "out": str(options.out),
    }


def _wishes(
    options: Namespace, stage: StageConfig, prepared: PreparedSet, size: tuple[int, int]
) -> tuple[list[Wish], list[str]]:
    about = prepared.description
    seed = stage.previews.seed if options.seed is None else options.seed
    if stage.model.kind == "dit":
        captions = options.prompt or list(about.classes)
        if unknown := [prompt for prompt in captions if prompt not in about.classes]:
            raise ConfigError(f"there is no class {unknown[0]!r}", remedy=f"choose from: {', '.join(about.classes)}")
        return [Wish(about.classes.index(prompt), size, seed + n) for n, prompt in enumerate(captions)], captions
    if options.prompt:
        features = T5Encoder(options.text_encoder or about.text_encoder, about.max_tokens).encode(options.prompt)
        return [Wish(each, size, seed + n) for n, each in enumerate(features)], options.prompt
    if not prepared.prompts:
        raise ConfigError("the set has no held prompts", remedy="give --prompt")
    held = prepared.prompts[: stage.previews.count]
    return [Wish(each, size, seed + n) for n, (_, each) in enumerate(held)], [text for text, _ in held]


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of `HxW`."""
    found = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if not found:
        raise ConfigError(f"the size {text!r} is not HxW", remedy="write for example 512x768: height, then width")
    return int(found[1]), int(found[2])


def _square_of(stage: StageConfig, factor: int) -> tuple[int, int]:
    """The square whose patches span the net's base size."""
    side = stage.model.base_size * stage.model.patch_size * factor
    return side, side
