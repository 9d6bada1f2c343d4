"""A small disk of its own, to be filled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, options: str = "size=400k") -> Iterator[Path]:
    """Mounts a tmpfs on a new folder; skips where that is not allowed: nothing else refuses writes as a full disk does."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a disk of its own can only be mounted as root, in a container that may")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
