"""Multiplies two small matrices on every GPU that this process may use, and prints for how many the result is right."""

from __future__ import annotations

import json
import sys

from pixart_ds.errors import EXIT_DONE, EXIT_MACHINE

SIZE = 64


def is_right(device: str) -> bool:
    """Whether a product of small whole numbers, which is exact in fp16 whichever kernel is taken, is what it must be."""
    import torch

    numbers = torch.arange(SIZE * SIZE).reshape(SIZE, SIZE)
    a, b = numbers % 5 - 2, numbers % 3 - 1
    product = a.to(device, torch.float16) @ b.to(device, torch.float16)
    return bool(torch.equal(product.cpu().long(), a @ b))


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA GPU", file=sys.stderr)
        return EXIT_MACHINE
    right = [is_right(f"cuda:{number}") for number in range(torch.cuda.device_count())]
    print(json.dumps({"torch": torch.__version__, "right": right}))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
