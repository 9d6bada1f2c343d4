"""The one place that imports MosaicML Streaming, and what it takes to import it."""

from __future__ import annotations

import sys
import types
from typing import Any


def mds_writer() -> Any:
    """Streaming's `MDSWriter` class.

    `import streaming` imports `streaming.vision`, which imports torchvision, whose PyPI build does not load beside a CPU build of
    torch; nothing here reads pictures through Streaming, so an empty module takes its place.
    """
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    from streaming import MDSWriter

    return MDSWriter
