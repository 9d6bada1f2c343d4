"""What several adapters need to get past a library's fault; faults of DeepSpeed and Streaming have modules of their own."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any


def hide_broken_torchvision() -> None:
    """Makes a torchvision that cannot be imported look absent; call it before importing diffusers or transformers.

    mosaicml-streaming asks for torchvision, and plain pip installs its CUDA build, which does not load beside a CPU build of torch
    ("operator torchvision::nms does not exist"). transformers sees that it is installed, tries it, and takes diffusers down
    with it, although nothing here needs it.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    blocker: Any = None
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = blocker  # Python's own sign that a module is not to be imported
