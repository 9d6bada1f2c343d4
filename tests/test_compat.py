"""A torchvision that does not load must not take diffusers down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def use_diffusers(folder: Path, first: str) -> subprocess.CompletedProcess[str]:
    """Imports what we use of diffusers beside a torchvision as plain pip leaves it: installed, and broken."""
    package = folder / "torchvision"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    for name in ("io", "transforms"):
        (package / f"{name}.py").write_text("")
    info = folder / "torchvision-0.28.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    wanted = "from diffusers import AutoencoderKL, PixArtAlphaPipeline\nfrom transformers import T5EncoderModel\n"
    code = f"{first}\n{wanted}print('fine')"
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{root}"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_a_broken_torchvision_is_hidden_and_still_needs_to_be(tmp_path: Path) -> None:
    hidden = use_diffusers(tmp_path, "from pixart_ds.compat import hide_broken_torchvision; hide_broken_torchvision()")
    assert hidden.stdout == "fine\n", hidden.stderr[-2000:]
    bare = use_diffusers(tmp_path, "")
    assert bare.returncode != 0, "diffusers loads beside a broken torchvision: pixart_ds/compat.py is needless"
