"""The demo's pictures: a sheet and a score for each stage, and one picture through diffusers from the export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pixart_ds.config.freeze import read_stage
from pixart_ds.config.schema import StageConfig
from pixart_ds.data.shards import PreparedSet
from pixart_ds.demo import judge
from pixart_ds.demo.pictures import Scene
from pixart_ds.encoders.latents import KLEncoder
from pixart_ds.engine.weights import open_weights
from pixart_ds.evaluate.net import load_net
from pixart_ds.export.diffusers import sample_export
from pixart_ds.layout import RunLayout
from pixart_ds.sampling.generate import generate
from pixart_ds.sampling.grid import save_grid
from pixart_ds.train.previews import held_wishes


@dataclass(frozen=True)
class Sheet:
    """Pictures of one stage, and what the judge says of them (None outside the drawn world)."""

    path: Path
    score: dict[str, float] | None


def draw_sheet(
    run: RunLayout, name: str, data: Path, folder: Path, scenes: Sequence[Scene] | None, device: str
) -> Sheet:
    """Samples a stage's EMA with the set's held prompts (or classes), writes the sheet, and scores all pictures.

    Args:
        run, name: The stage.
        data: The prepared set.
        folder: Where the sheet goes.
        scenes: What the held prompts describe, in their sequence.
    """
    stage = read_stage(run, name)
    prepared = PreparedSet.open(data)
    vae = KLEncoder(prepared.description.vae, device)
    wishes, captions = held_wishes(stage, prepared)
    previews = stage.previews
    pictures = generate(
        load_net(open_weights(run.stage(name).handover), device),
        vae,
        wishes,
        null_embeds=prepared.null_embeds[: prepared.null_length],
        guidance_scale=previews.guidance_scale,
        num_inference_steps=previews.num_inference_steps,
        scheduler=previews.scheduler,
        null_caption=previews.null_caption,
    )
    score, right = _judged(stage, pictures, captions, scenes)
    path = folder / f"{name}.png"
    count = previews.count
    shown = None if right is None else right[:count]
    save_grid(pictures[:count], captions[:count], path, title=f"{name}: {stage.description}", right=shown)
    return Sheet(path, score)


def _judged(
    stage: StageConfig,
    pictures: Sequence[npt.NDArray[np.uint8]],
    captions: Sequence[str],
    scenes: Sequence[Scene] | None,
) -> tuple[dict[str, float] | None, list[bool] | None]:
    if scenes is None:
        return None, None
    if stage.model.kind == "dit":
        each = [judge.score_class([picture], [name]) for picture, name in zip(pictures, captions, strict=True)]
        return judge.score_class(pictures, captions), [all(value == 1 for value in one.values()) for one in each]
    right = [judge.judge(picture, scene)["all"] == 1 for picture, scene in zip(pictures, scenes, strict=True)]
    return judge.score(pictures, scenes), right


def draw_from_export(folder: Path, stage: StageConfig, prompt: str, side: int, path: Path) -> None:
    """A sheet with one picture that was made from an exported folder through diffusers alone."""
    previews = stage.previews
    picture = sample_export(
        folder,
        prompt,
        (side, side),
        guidance_scale=previews.guidance_scale,
        num_inference_steps=previews.num_inference_steps,
    )
    save_grid([picture], [prompt], path, columns=1, cell=256)
