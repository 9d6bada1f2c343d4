"""What a step computed, and how much of what the GPUs could have done that is: MFU and HFU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from pixart_ds.plan.counts import BYTES, Net, training_flops
from pixart_ds.plan.fit import known_gpu
from pixart_ds.rates import rate_table


@dataclass(frozen=True)
class Work:
    """What was computed for some pictures, forward and backward.

    Attributes:
        images: Pictures.
        image_tokens: Patches, as many as each picture's bucket has.
        text_tokens: Real tokens of the captions; padding is not counted.
        model_flops: FLOPs that the net requires.
        hardware_flops: With the blocks that are run forward once more.
    """

    images: float
    image_tokens: float = 0
    text_tokens: float = 0
    model_flops: float = 0
    hardware_flops: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(one + more for one, more in zip(vars(self).values(), vars(other).values(), strict=True)))


def work_of(net: Net, checkpointed: int, *, images: int, tokens: int, text_tokens: int) -> Work:
    """The work of a micro-batch.

    Args:
        net: Its tokens and text do not matter.
        checkpointed: Blocks whose activations are computed again.
        images: Pictures of one bucket.
        tokens: Patches of each.
        text_tokens: Real tokens of all captions together.
    """
    model, hardware = (_flops(net, blocks, images, tokens, text_tokens) for blocks in (0, checkpointed))
    return Work(images, images * tokens, text_tokens, model, hardware)


def _flops(net: Net, checkpointed: int, images: int, tokens: int, text_tokens: int) -> int:
    """Every text token costs the same: the sum over captions of any lengths is exact."""
    bare = _flops_of_one(net, checkpointed, tokens, 0)
    return images * bare + (text_tokens * (_flops_of_one(net, checkpointed, tokens, 1) - bare) if text_tokens else 0)


@lru_cache(maxsize=512)
def _flops_of_one(net: Net, checkpointed: int, tokens: int, text: int) -> int:
    return training_flops(replace(net, tokens=tokens, text=text), checkpointed)


@dataclass(frozen=True)
class Peak:
    """What a GPU could do at most.

    Attributes:
        gpu: Name in the table.
        flops: A second, dense, in a precision.
        precision: Which.
    """

    gpu: str
    flops: float
    precision: str


def peak_of(cuda_name: str, memory_bytes: int, precision: str) -> Peak | None:
    """The peak of a GPU by the table of rates; None for one that it does not have, or a slice of one.

    In 16 bit that of the tensor cores, in fp32 that without them.
    """
    name = known_gpu(cuda_name, memory_bytes)
    if name is None:
        return None
    table = rate_table()
    if BYTES[precision] == 4:
        return Peak(name, 1e12 * table.estimate.gpus[name].peak_tflops_fp32, precision)
    return Peak(name, 1e12 * table.devices[_device_of(name, cuda_name)].peak_tflops_fp16, precision)


def device_kind(cuda_name: str, memory_bytes: int) -> str | None:
    """What the table of devices calls a GPU: its power, price and peak; None for one that it does not have, or a slice of one."""
    name = known_gpu(cuda_name, memory_bytes)
    return None if name is None else _device_of(name, cuda_name)


def _device_of(name: str, cuda_name: str) -> str:
    pcie = f"{name.partition('-')[0]}-pcie"
    if "pcie" in cuda_name.lower() and pcie in rate_table().devices:
        return pcie
    return rate_table().estimate.gpus[name].device


def rates(work: Work, seconds: float, world_size: int, peak_flops: float | None) -> dict[str, float | None]:
    """Figures of a step by name.

    Args:
        work: Of all ranks.
        seconds: That it took.
        world_size: Ranks.
        peak_flops: What all ranks' GPUs could do in a second; None where that is not known.
    """
    images, possible = work.images / seconds, None if peak_flops is None else peak_flops * seconds
    return {
        "images_per_second": images,
        "images_per_second_per_rank": images / world_size,
        "image_tokens_per_second": work.image_tokens / seconds,
        "text_tokens_per_second": work.text_tokens / seconds,
        "model_tflops_per_rank": work.model_flops / seconds / world_size / 1e12,
        "mfu": None if possible is None else work.model_flops / possible,
        "hfu": None if possible is None else work.hardware_flops / possible,
    }
