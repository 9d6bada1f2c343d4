"""Which encoder made something: a hash of its files, and its folder or its name on the hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pixart_ds.errors import ConfigError

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


def fingerprint(name: str) -> str:
    """A hash of a folder's files; a hub name stands for itself."""
    path = Path(name)
    if not path.is_dir():
        return f"hub:{name}"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted({file for pattern in _PATTERNS for file in path.glob(pattern)}):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
