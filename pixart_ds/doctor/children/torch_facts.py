"""Prints what torch says of itself, of the GPUs, and of its attention kernels, as JSON. Takes what to try as its argument."""

from __future__ import annotations

import json
import sys
from typing import Any

BACKENDS = ("memory_efficient", "flash", "math")


def facts(wanted: dict[str, Any]) -> dict[str, Any]:
    """All that the probes of the GPU ask.

    Args:
        wanted: device, and of attention: channels of a head, dtype, fp32 (self-attention), packed (captions).
    """
    import torch

    there = wanted["device"] == "cuda" and torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "architectures": _architectures(torch),
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()) if there else None,
        "finds_gpu": torch.cuda.is_available(),
        "capabilities": [list(torch.cuda.get_device_capability(n)) for n in range(torch.cuda.device_count())]
        if there
        else [],
        # emulated bf16 counts for torch unless it is told not to
        "bf16": bool(torch.cuda.is_bf16_supported(including_emulation=False)) if there else None,
        "attention": _attention(wanted) if there or wanted["device"] == "cpu" else None,
    }


def _architectures(torch: Any) -> list[str]:
    """What the binaries were compiled for; torch's own `get_arch_list` is empty where there is no GPU, as on a login node."""
    flags = getattr(torch._C, "_cuda_getArchFlags", None)
    return (flags() or "").split() if flags is not None else []


def _attention(wanted: dict[str, Any]) -> dict[str, str | None]:
    """For each kernel None if it runs, forward and backward, as the stage's net will call it; else what torch says."""
    import torch

    from pixart_ds.errors import PixArtError
    from pixart_ds.model.attention import AttentionOptions, require_backend

    dtype, device = getattr(torch, wanted["dtype"]), torch.device(wanted["device"])
    found: dict[str, str | None] = {}
    for backend in BACKENDS:
        options = AttentionOptions(wanted["fp32"], backend, wanted["packed"])  # type: ignore[arg-type]
        try:
            require_backend(options, wanted["channels"], dtype, device)
            found[backend] = None
        except PixArtError as error:
            found[backend] = error.what
        except RuntimeError as error:  # of a kernel that is found, and does not run: no kernel image, out of memory
            found[backend] = str(error).splitlines()[0]
    return found


if __name__ == "__main__":
    print(json.dumps(facts(json.loads(sys.argv[1]))))
