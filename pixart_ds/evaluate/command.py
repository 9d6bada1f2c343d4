"""The verb `sample`: prompts or the set's own, at any size, from a run, a checkpoint, a handover or an exported folder."""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pixart_ds.config.schema import PreviewConfig
from pixart_ds.data.shards import PreparedSet, first_set
from pixart_ds.encoders.latents import KLEncoder
from pixart_ds.encoders.text import T5Encoder
from pixart_ds.engine.weights import Weights, open_weights
from pixart_ds.errors import ConfigError
from pixart_ds.evaluate.net import load_net
from pixart_ds.plan.buckets import PAPER_RATIOS, nearest, paper_sizes
from pixart_ds.sampling.generate import Wish, generate
from pixart_ds.sampling.grid import save_grid


@dataclass(frozen=True)
class Asked:
    """What is to be drawn.

    Attributes:
        wishes: One for each picture.
        captions: Beneath them.
        null_embeds: (L, D) features of the empty caption, its real tokens'; None for a class-conditional net.
    """

    wishes: list[Wish]
    captions: list[str]
    null_embeds: npt.NDArray[np.float16] | None


def sample_weights(options: Namespace) -> dict[str, Any]:
    """Samples pictures and writes them as one sheet; returns what was made."""
    weights = open_weights(options.source, stage=options.stage, kind=options.weights)
    prepared = first_set(weights.stage)
    vae = KLEncoder(weights.encoder("vae", options.vae, prepared.description.vae if prepared else None), options.device)
    size = _size_of(options, weights, vae.downsampling_factor)
    previews = weights.stage.previews if weights.stage else PreviewConfig()
    asked = _asked(options, weights, prepared, size, previews)
    null_caption = options.null_caption or previews.null_caption
    pictures = generate(
        load_net(weights, options.device),
        vae,
        asked.wishes,
        null_embeds=asked.null_embeds,
        guidance_scale=previews.guidance_scale if options.guidance_scale is None else options.guidance_scale,
        num_inference_steps=options.steps or previews.num_inference_steps,
        scheduler=options.scheduler or previews.scheduler,
        null_caption=null_caption,
    )
    title = f"{weights.where}, {weights.kind}"
    save_grid(pictures, asked.captions, options.out, title=title, columns=min(6, len(pictures)))
    return {
        "stage": weights.stage.name if weights.stage else None,
        "source": str(weights.where),
        "weights": weights.kind,
        "pictures": len(pictures),
        "size": list(size),
        "out": str(options.out),
    }


def _asked(
    options: Namespace, weights: Weights, prepared: PreparedSet | None, size: tuple[int, int], previews: PreviewConfig
) -> Asked:
    seed = previews.seed if options.seed is None else options.seed
    if weights.model.kind == "dit":
        return _classes(options.prompt, weights, prepared, size, seed)
    if not options.prompt:
        if prepared is None or not prepared.prompts:
            raise ConfigError("there are no held prompts to draw", remedy="give --prompt")
        held = prepared.prompts[: previews.count]
        wishes = [Wish(embeds, size, seed + number) for number, (_, embeds) in enumerate(held)]
        return Asked(wishes, [text for text, _ in held], prepared.null_embeds[: prepared.null_length])
    encoder = _text_encoder(options, weights, prepared)
    if encoder.channels != weights.model.caption_channels:
        raise ConfigError(
            f"the text encoder gives {encoder.channels} channels, the net takes {weights.model.caption_channels}",
            where=encoder.name,
            remedy="name the encoder that the net was trained with: --text-encoder",
        )
    *embeds, null = encoder.encode([*options.prompt, ""])
    return Asked([Wish(each, size, seed + number) for number, each in enumerate(embeds)], options.prompt, null)


def _text_encoder(options: Namespace, weights: Weights, prepared: PreparedSet | None) -> T5Encoder:
    """Treats prompts as the set's captions were; where nothing says how, it cleans them, as the released code and diffusers do."""
    about = prepared.description if prepared else None
    max_tokens = about.max_tokens if about else weights.model.max_tokens
    assert max_tokens is not None
    return T5Encoder(
        weights.encoder("text_encoder", options.text_encoder, about.text_encoder if about else None),
        max_tokens,
        options.device,
        clean=about.clean_captions if about else weights.clean_captions is not False,
    )


def _classes(
    prompts: list[str], weights: Weights, prepared: PreparedSet | None, size: tuple[int, int], seed: int
) -> Asked:
    """Labels by their names in the set, or by number where there is none; without any asked for, the first ones."""
    assert weights.model.num_classes is not None
    names = list(prepared.description.classes) if prepared else [str(n) for n in range(weights.model.num_classes)]
    captions = prompts or names[:24]
    if unknown := [prompt for prompt in captions if prompt not in names]:
        raise ConfigError(f"there is no class {unknown[0]!r}", remedy=f"choose from: {', '.join(names[:40])}")
    return Asked([Wish(names.index(text), size, seed + n) for n, text in enumerate(captions)], captions, None)


def _size_of(options: Namespace, weights: Weights, factor: int) -> tuple[int, int]:
    """(height, width) in pixels: as given, the bucket nearest to a ratio, or the square that the net's base size spans."""
    side = weights.model.base_size * weights.model.patch_size * factor
    if options.size:
        return parse_size(options.size)
    if options.ratio is None:
        return side, side
    if side not in (256, 512, 1024):
        raise ConfigError(f"there are no buckets for a net of {side} px", remedy="give --size HxW instead of --ratio")
    height, width = paper_sizes(side)[nearest(PAPER_RATIOS, round(1000 * options.ratio), 1000)]  # type: ignore[arg-type]
    return height, width


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of `HxW`."""
    found = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if not found:
        raise ConfigError(f"the size {text!r} is not HxW", remedy="write for example 512x768: height, then width")
    return int(found[1]), int(found[2])
