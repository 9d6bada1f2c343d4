"""What the encoders have in common: where they lie, which ones they are, and their precision."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch

from pixart_ds.errors import ConfigError

Precision = Literal["fp16", "bf16", "fp32"]
PRECISIONS: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FP16_MAX = 65504.0
"""Sets hold fp16, so an encoder in any precision must stay below."""
_PIECE_BYTES = 1 << 20
_PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")


def encoder_folder(name: str, kind: str) -> str:
    """What to hand to `from_pretrained`: an existing folder, or a hub name.

    Raises:
        ConfigError: It looks like a path, and there is no such folder.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ConfigError(
                f"the {kind} folder has no config.json", where=path.resolve(), remedy="give the folder of one model"
            )
        return str(path)
    looks_like_a_hub_name = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not looks_like_a_hub_name:
        raise ConfigError(
            f"there is no {kind} folder {name}", where=path.resolve(), remedy="give a folder, or a hub name owner/model"
        )
    return name


def fingerprint(name: str, commit: str | None = None) -> str:
    """A hash of a folder's files; of a hub name `hub:name@commit`, or `hub:name` where nothing tells the commit.

    Args:
        name: Folder or hub name of an encoder that was loaded.
        commit: The one that was loaded, if the library that loaded it says so; else that of the hub's cache on this machine.
    """
    path = Path(name)
    if not path.is_dir():
        commit = commit or _cached_commit(name)
        return f"hub:{name}@{commit}" if commit else f"hub:{name}"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted({file for pattern in _PATTERNS for file in path.glob(pattern)}):
        digest.update(file.name.encode())
        with open(file, "rb") as content:  # in pieces: there are files of tens of GB
            while piece := content.read(_PIECE_BYTES):
                digest.update(piece)
    return digest.hexdigest()


def _cached_commit(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")  # …/snapshots/COMMIT/config.json
    return Path(found).parent.name if isinstance(found, str) else None
