"""The nets, plain torch: PixArt (text), DiT (class labels), their initialisation and the way from one to the other."""

from __future__ import annotations

from typing import Literal

from pixart_ds.config.schema import AttentionBackend, ModelConfig
from pixart_ds.model.attention import AttentionOptions, require_backend
from pixart_ds.model.dit import DiT
from pixart_ds.model.initialise import SIZE_EMBEDDERS, initialise, zero_size_embedders
from pixart_ds.model.pixart import PixArt
from pixart_ds.model.reparameterise import reparameterise

__all__ = [
    "SIZE_EMBEDDERS",
    "DiT",
    "PixArt",
    "build",
    "initialise",
    "reparameterise",
    "require_backend",
    "zero_size_embedders",
]


def build(
    config: ModelConfig,
    *,
    fp32_attention: bool = False,
    attention_backend: AttentionBackend = "auto",
    packed_text: bool = False,
    checkpointed_blocks: int | Literal["all", "none"] = "none",
) -> PixArt | DiT:
    """The net of a recipe, uninitialised beyond torch's own defaults; works under `torch.device("meta")`.

    Args:
        config: Kind and shape.
        fp32_attention: Self-attention in fp32.
        attention_backend: The kernel that attention must use.
        packed_text: Cross-attention without padded tokens.
        checkpointed_blocks: Blocks whose activations are recomputed in backward: all, none, or the first k.
    """
    count = {"all": config.depth, "none": 0}.get(str(checkpointed_blocks))
    count = int(checkpointed_blocks) if count is None else count
    kind = PixArt if config.kind == "pixart" else DiT
    options = AttentionOptions(fp32=fp32_attention, backend=attention_backend, packed_text=packed_text)
    return kind(config, options, count)
