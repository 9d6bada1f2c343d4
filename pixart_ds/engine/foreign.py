"""Weights from elsewhere under our names: official PixArt and DiT files, safetensors, diffusers folders."""

from __future__ import annotations

import argparse
import json
import math
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pixart_ds import files
from pixart_ds.config.load import validate
from pixart_ds.config.schema import ModelConfig
from pixart_ds.errors import CheckpointError, ConfigError
from pixart_ds.model import build
from pixart_ds.model.names import from_diffusers
from pixart_ds.model.positions import position_embedding

State = dict[str, torch.Tensor]

NULL_CAPTION = "y_embedder.y_embedding"
OUR_NOTE = "pixart_ds.json"
"""Our file in an exported diffusers folder: net, weights, lineage; it also marks the folder as ours to replace."""
OUR_NULL_CAPTION = "null_caption.safetensors"
"""In the same folder: what diffusers has no place for."""

_POSITIONS = "pos_embed"
_RAW, _EMA = ("state_dict", "model"), ("state_dict_ema", "ema")  # PixArt's training files, DiT's
_HEAD_CHANNELS = 72
_IMAGE_SIZES = {256: (16, 1.0), 512: (32, 1.0), 1024: (64, 2.0)}
"""Pixels of the published weights: base size and interpolation scale."""

DIT_LICENCE = "CC-BY-NC-4.0 (non-commercial), assumed: that of Meta's published DiT weights"
UNKNOWN_LICENCE = "not stated at import"


@dataclass
class Foreign:
    """What a file or folder holds.

    Attributes:
        states: `raw`, `ema`, or both: fp32 under the official names, without the position table.
        model: The net they belong to.
        layout: How they were stored, for the lineage.
        note: Our own note, if this package wrote the folder.
    """

    states: dict[str, State]
    model: ModelConfig
    layout: str
    note: dict[str, Any] = field(default_factory=dict)


def read_foreign(path: Path, *, image_size: int | None = None, model: dict[str, Any] | None = None) -> Foreign:
    """Reads a `.pth`, `.pt` or `.bin` (never running code in it), a `.safetensors`, or a diffusers folder.

    Args:
        path: The file, a pipeline's folder, or its `transformer` folder.
        image_size: 256, 512 or 1024: which position embedding, where the weights do not say it.
        model: Values of `model:` that the weights do not say or say wrongly, as `num_heads`.

    Raises:
        CheckpointError: It cannot be read, needs code to be run, or its tensors are no PixArt's and no DiT's; every such key.
        ConfigError: The weights leave something open that must be said.
    """
    hints: dict[str, Any] = {}
    note: dict[str, Any] = {}
    if path.is_dir():
        states, hints, note = _read_diffusers(path)
        layout = "diffusers folder"
    else:
        states, layout = _read_file(path)
    states = {which: _official(state, path) for which, state in states.items()}
    first = states.get("raw", next(iter(states.values())))
    found = _shape_of(first, path)
    found |= _position_of(first, found, image_size, hints, path)
    positions = {which: state.pop(_POSITIONS, None) for which, state in states.items()}
    values = {**found, **hints, **(model or {})}
    if "num_heads" not in values:
        raise ConfigError("the weights do not say how many heads they have", where=path, remedy="add --set num_heads=N")
    about = validate(ModelConfig, values, path)
    for which, state in states.items():
        _check(state, positions[which], about, path)
    if "ema" in states and "raw" in states and NULL_CAPTION in states["raw"]:
        # official training files hold another random buffer in the EMA's copy
        states["ema"][NULL_CAPTION] = states["raw"][NULL_CAPTION]
    return Foreign(states, about, layout, note)


def _read_file(path: Path) -> tuple[dict[str, State], str]:
    """States by kind, and the name of the layout."""
    if not path.exists():
        raise CheckpointError("there is no such file", where=path)
    if path.suffix == ".safetensors":
        return {"raw": _load_safetensors(path)}, "safetensors"
    value = _load_pickle(path)
    states = {
        which: value[key]
        for which, keys in (("raw", _RAW), ("ema", _EMA))
        for key in keys
        if isinstance(value, dict) and isinstance(value.get(key), dict)
    }
    if states:
        return states, f"torch file with {' and '.join(key for key in (*_RAW, *_EMA) if key in value)}"
    return {"raw": value}, "torch file, a bare state"


def _load_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except Exception as cause:  # safetensors raises its own error type, which is no subclass of anything useful
        raise CheckpointError(f"the file is no safetensors file: {cause}", where=path) from cause


def _load_pickle(path: Path) -> Any:
    """The file's value; only tensors, plain values and DiT's recorded command line (argparse.Namespace) are made of it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as cause:
        raise CheckpointError(
            f"the file asks for code to be run when it is opened, which is refused: {str(cause).splitlines()[0]}",
            where=path,
            remedy="save its tensors alone where it was made: safetensors.torch.save_file(state_dict, path)",
        ) from cause
    except Exception as cause:  # what torch's unpickler says of a file that is none depends on its bytes
        raise CheckpointError(
            f"the file cannot be read by torch: {type(cause).__name__}: {cause}", where=path
        ) from cause


def _read_diffusers(folder: Path) -> tuple[dict[str, State], dict[str, Any], dict[str, Any]]:
    """The transformer of a pipeline or its own folder: state, what its config says of the net, and our note."""
    inner = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = files.read_json(
        inner / "config.json", error=CheckpointError, remedy="name a diffusers folder or a weights file"
    )
    index = inner / "diffusion_pytorch_model.safetensors.index.json"
    names = ["diffusion_pytorch_model.safetensors"]
    if index.exists():
        names = sorted(set(files.read_json(index, error=CheckpointError)["weight_map"].values()))
    found = [name for name in names if (inner / name).exists()]
    state: State = {}
    if found == names:
        for name in names:
            state |= _load_safetensors(inner / name)
    elif (inner / "diffusion_pytorch_model.bin").exists():
        state = _load_pickle(inner / "diffusion_pytorch_model.bin")
    else:
        raise CheckpointError(f"the folder holds no {' and no '.join(n for n in names if n not in found)}", where=inner)
    note = files.read_json(folder / OUR_NOTE, error=CheckpointError) if (folder / OUR_NOTE).exists() else {}
    if (folder / OUR_NULL_CAPTION).exists():
        state |= _load_safetensors(folder / OUR_NULL_CAPTION)
    return {"raw": state}, note.get("model") or _hints(config, inner), note


def _hints(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a diffusers config says of the net that its tensors do not."""
    if config.get("_class_name") not in ("PixArtTransformer2DModel", "Transformer2DModel"):
        raise CheckpointError(
            f"the folder holds a {config.get('_class_name')}, not a PixArtTransformer2DModel",
            where=folder / "config.json",
        )
    side = config["sample_size"]
    return {
        "num_heads": config["num_attention_heads"],
        "base_size": side // config["patch_size"],
        "interpolation_scale": float(config.get("interpolation_scale") or max(side // 64, 1)),
    }


def _official(state: Any, path: Path) -> State:
    """fp32 tensors under the official names, whatever the names were."""
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError("the file holds no state of a net: a mapping of names to tensors is needed", where=path)
    state = {name.removeprefix("module."): value.float() for name, value in state.items()}
    if bad := [name for name, value in state.items() if not bool(value.isfinite().all())]:
        raise CheckpointError(f"the weights are not finite: {', '.join(bad[:5])}", where=path)
    if not any(name.startswith("transformer_blocks.") for name in state):
        return state
    null = {name: state.pop(name) for name in (NULL_CAPTION,) if name in state}
    return from_diffusers(state) | null


def _shape_of(state: State, path: Path) -> dict[str, Any]:
    """What the tensors' shapes say of the net."""
    pixart = "blocks.0.scale_shift_table" in state
    wanted = ["x_embedder.proj.weight", "blocks.0.mlp.fc1.weight"]
    wanted.append("y_embedder.y_proj.fc1.weight" if pixart else "y_embedder.embedding_table.weight")
    if missing := [name for name in wanted if name not in state]:
        raise CheckpointError(
            f"the weights are no PixArt's and no DiT's: they have no {' and no '.join(missing)}",
            where=path,
            remedy="PixArt-α (official or diffusers names) and DiT can be imported",
        )
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    found: dict[str, Any] = {
        "kind": "pixart" if pixart else "dit",
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "hidden_size": width,
        "in_channels": channels,
        "patch_size": patch,
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
    }
    if width % _HEAD_CHANNELS == 0:
        found["num_heads"] = width // _HEAD_CHANNELS  # 72 channels a head at every width of PixArt-XL and DiT-XL
    if not pixart:
        return found | {"num_classes": len(state["y_embedder.embedding_table.weight"]) - 1}
    null = state.get(NULL_CAPTION)
    return found | {
        "caption_channels": state["y_embedder.y_proj.fc1.weight"].shape[1],
        "max_tokens": 120 if null is None else len(null),
        "micro_conditions": any(name.startswith("csize_embedder.") for name in state),
    }


def _position_of(
    state: State, found: dict[str, Any], image_size: int | None, hints: dict[str, Any], path: Path
) -> dict[str, Any]:
    """Base size and interpolation scale: as said, as the stored table says, or as the net's kind implies."""
    if "base_size" in hints:
        return {}
    if image_size is None and (table := state.get(_POSITIONS)) is not None:
        base = math.isqrt(table.shape[-2])
        step = math.asin(
            min(1.0, float(table.reshape(-1, table.shape[-1])[1, 0]))
        )  # sin of the second column's coordinate
        return {"base_size": base, "interpolation_scale": round(1 / step, 3)}
    if image_size is None and found.get("micro_conditions"):
        image_size = 1024  # only those weights were published with them
    if image_size not in _IMAGE_SIZES:
        raise ConfigError(
            "the weights do not say for which size of picture they are",
            where=path,
            remedy=f"add --image-size {', '.join(str(size) for size in _IMAGE_SIZES)}",
        )
    base, scale = _IMAGE_SIZES[image_size]
    return {"base_size": base, "interpolation_scale": scale}


def _check(state: State, positions: torch.Tensor | None, model: ModelConfig, path: Path) -> None:
    """Raises CheckpointError with every tensor that is extra, missing (but for the null caption) or of another shape."""
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in build(model).state_dict().items()}
    lines = [f"missing: {name}" for name in wanted if name not in state and name != NULL_CAPTION]
    lines += [f"extra: {name}" for name in state if name not in wanted]
    lines += [
        f"shape of {name}: {tuple(value.shape)}, the net's is {wanted[name]}"
        for name, value in state.items()
        if name in wanted and tuple(value.shape) != wanted[name]
    ]
    if positions is not None and not _same_positions(positions, model):
        lines.append(
            f"{_POSITIONS}: it is not the table of base size {model.base_size}, interpolation scale {model.interpolation_scale:g}"
        )
    if lines:
        raise CheckpointError(
            f"the weights are not those of {json.dumps(model.model_dump(exclude_defaults=True))}:\n"
            + "\n".join(f"  - {line}" for line in lines),
            where=path,
        )


def _same_positions(stored: torch.Tensor, model: ModelConfig) -> bool:
    side = math.isqrt(stored.shape[-2])
    made = position_embedding(
        side, side, model.hidden_size, base_size=model.base_size, interpolation_scale=model.interpolation_scale
    )
    return stored.numel() == made.numel() and torch.allclose(stored.reshape(made.shape), made, atol=1e-3)
