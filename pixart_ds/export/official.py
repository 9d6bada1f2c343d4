"""One file of weights under the official names, for the released PixArt and DiT code and for converters of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from pixart_ds import files
from pixart_ds.config.schema import ModelConfig
from pixart_ds.errors import ConfigError
from pixart_ds.model.positions import position_embedding


def write_official(path: Path, model: ModelConfig, state: dict[str, torch.Tensor], *, about: dict[str, Any]) -> None:
    """Writes `.safetensors`, or `.pth` with the state under `state_dict` (DiT: bare, as published), with `pos_embed` as the
    released code and its converters expect it.

    Raises:
        ConfigError: Another suffix, or a file of that name is there.
    """
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ConfigError(
            f"the official format is one file, not {path.name}", remedy="end --out in .safetensors or .pth"
        )
    if path.exists():
        raise ConfigError("there is a file of that name", where=path.absolute(), remedy="name a new one")
    base, width = model.base_size, model.hidden_size
    positions = position_embedding(base, base, width, base_size=base, interpolation_scale=model.interpolation_scale)
    whole = {**{name: tensor.contiguous() for name, tensor in state.items()}, "pos_embed": positions[None]}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        files.write_durable(path, [save(whole, metadata={"pixart_ds": json.dumps(about)})])
        return
    buffer = io.BytesIO()
    torch.save(whole if model.kind == "dit" else {"state_dict": whole}, buffer)
    files.write_durable(path, [buffer.getbuffer()])
