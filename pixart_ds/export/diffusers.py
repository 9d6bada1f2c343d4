"""A folder that diffusers' `PixArtAlphaPipeline.from_pretrained` loads: transformer, VAE, text encoder, tokenizer, scheduler."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from pixart_ds import files
from pixart_ds.compat import hide_broken_torchvision
from pixart_ds.config.schema import ModelConfig
from pixart_ds.encoders.text import tokenizer_folder
from pixart_ds.engine.foreign import NULL_CAPTION, OUR_NOTE, OUR_NULL_CAPTION
from pixart_ds.errors import ConfigError
from pixart_ds.model.names import to_diffusers
from pixart_ds.sampling.schedulers import make_scheduler

_MICRO_SAMPLE_SIZE = 128


def transformer_of(config: ModelConfig, state: dict[str, torch.Tensor]) -> Any:
    """diffusers' transformer with our weights, in fp32.

    Its position embedding spans (sample_size / patch_size) / interpolation_scale, as ours spans base_size / interpolation_scale, so
    that coordinates agree for any size of picture. diffusers' pipeline passes micro-conditions on only if sample_size is 128, as at
    1024 px; a smaller net with them takes that size and a scale that makes up for it.
    """
    hide_broken_torchvision()
    from diffusers import PixArtTransformer2DModel

    sample_size = _MICRO_SAMPLE_SIZE if config.micro_conditions else config.base_size * config.patch_size
    span = config.base_size / config.interpolation_scale

    transformer = PixArtTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=2 * config.in_channels,
        num_layers=config.depth,
        norm_num_groups=config.in_channels,
        cross_attention_dim=config.hidden_size,
        sample_size=sample_size,
        patch_size=config.patch_size,
        caption_channels=config.caption_channels,
        interpolation_scale=sample_size / config.patch_size / span,
        use_additional_conditions=config.micro_conditions,
    )
    transformer.load_state_dict(to_diffusers(state))
    return transformer.eval()


def pipeline_of(config: ModelConfig, state: dict[str, torch.Tensor], vae: str, text_encoder: str) -> Any:
    """The whole pipeline in memory, in fp32."""
    hide_broken_torchvision()
    from diffusers import AutoencoderKL, PixArtAlphaPipeline
    from transformers import AutoTokenizer, T5EncoderModel

    return PixArtAlphaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(tokenizer_folder(text_encoder)),
        text_encoder=T5EncoderModel.from_pretrained(text_encoder, dtype=torch.float32).eval(),
        vae=AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32).eval(),
        transformer=transformer_of(config, state),
        scheduler=make_scheduler("DPMSolverMultistepScheduler"),
    )


def export_pipeline(
    folder: Path,
    config: ModelConfig,
    state: dict[str, torch.Tensor],
    *,
    vae: str,
    text_encoder: str,
    about: dict[str, Any],
) -> None:
    """Writes the pipeline's folder, with `about` as our note in it; an earlier export is replaced once the new one is whole.

    Raises:
        ConfigError: The net is no PixArt, or something else lies in the folder.
    """
    if config.kind != "pixart":
        raise ConfigError("only PixArt nets can be exported; this stage trains a DiT", remedy="export a later stage")
    if folder.exists() and any(folder.iterdir()) and not (folder / OUR_NOTE).exists():
        raise ConfigError(
            "the folder is not empty and no earlier export", where=folder.resolve(), remedy="name a new folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = files.temporary_name(folder)
    if temporary.exists():
        shutil.rmtree(temporary)
    pipeline_of(config, state, vae, text_encoder).save_pretrained(temporary)
    if NULL_CAPTION in state:
        save_file({NULL_CAPTION: state[NULL_CAPTION].contiguous()}, temporary / OUR_NULL_CAPTION)
    files.write_json(temporary / OUR_NOTE, about)
    if folder.exists():
        old = files.temporary_name(folder.with_name(folder.name + ".old"))
        os.rename(folder, old)
        os.rename(temporary, folder)
        shutil.rmtree(old)
    else:
        os.rename(temporary, folder)
    files.sync_folder(folder.parent)


def sample_export(
    folder: Path,
    prompt: str,
    size: tuple[int, int],
    *,
    guidance_scale: float,
    num_inference_steps: int,
    seed: int = 0,
    scheduler: str = "DPMSolverMultistepScheduler",
) -> npt.NDArray[np.uint8]:
    """One picture (H, W, 3) through diffusers alone, from an exported folder; `size` is (height, width) in pixels."""
    hide_broken_torchvision()
    from diffusers import PixArtAlphaPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipeline = PixArtAlphaPipeline.from_pretrained(folder)
    if scheduler != type(pipeline.scheduler).__name__:
        pipeline.scheduler = make_scheduler(scheduler)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        prompt,
        height=size[0],
        width=size[1],
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        clean_caption=False,  # needs beautifulsoup and ftfy
        use_resolution_binning=False,  # its bins are those of 256 to 1024 px
        max_sequence_length=min(120, pipeline.tokenizer.model_max_length),
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]
    return (made * 255).round().astype(np.uint8)
