"""Attention through torch's scaled dot-product: self-attention of the picture, and its cross-attention to text.

In shape comments: B samples, N image tokens, L text tokens of the longest caption, T of all captions, D hidden size,
H heads, E = D / H.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixart_ds.config.schema import AttentionBackend
from pixart_ds.errors import MachineError

_KERNELS: dict[AttentionBackend, SDPBackend] = {
    "memory_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class AttentionOptions:
    """How attention is computed; nothing here changes a result but for rounding.

    Attributes:
        fp32: Self-attention in fp32, whatever the net's dtype.
        backend: The kernel that must be used; `auto` leaves the choice to torch.
        packed_text: Cross-attention over the real text tokens alone, without padding.
    """

    fp32: bool = False
    backend: AttentionBackend = "auto"
    packed_text: bool = False


@dataclass(frozen=True)
class Text:
    """The captions of a micro-batch as all blocks attend to them.

    Attributes:
        tokens: (B, L, D), or packed end to end (T, D).
        mask: (B, 1, 1, L) bool, True where a token may be attended; None if packed.
        lengths: Tokens of each caption if packed.
        offsets: (B + 1,) int64, where each caption begins if packed.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None = None
    lengths: tuple[int, ...] = ()
    offsets: torch.Tensor | None = None


def packing(mask: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Where the real tokens lie in the flattened (B · L) ones, and how many each caption has.

    Its one look at the mask waits for the device unless the mask lies on the CPU.
    """
    mask = mask.cpu()
    return mask.flatten().nonzero()[:, 0], tuple(mask.sum(1).tolist())


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, options: AttentionOptions
) -> torch.Tensor:
    """Scaled dot-product attention: (B, H, N, E) from q of that shape and k, v (B, H, L, E).

    In fp16 the scale is laid on q before the product: q·k of trained nets can exceed 65,504, scaled ones do not.

    Args:
        mask: (B, 1, 1, L) bool, True where a key may be attended.

    Raises:
        MachineError: The backend that the options force cannot run here.
    """
    q, scale = _scaled(q)
    with _forced(options.backend):
        try:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        except RuntimeError as cause:
            raise _no_kernel(q, options.backend, cause) from cause


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: Text, options: AttentionOptions
) -> torch.Tensor:
    """Attention of each sample's (N, H, E) queries to its own text tokens: (B, N, H, E) from q of that shape and k, v (T, H, E).

    On a GPU one variable-length kernel runs for all samples; on a CPU one product for each sample.

    Raises:
        MachineError: The backend that the options force cannot run here.
    """
    q, scale = _scaled(q)
    with _forced(options.backend):
        try:
            if q.is_cuda:
                return jagged_attention(q, k, v, text, scale)
            return _looped_attention(q, k, v, text, scale)
        except RuntimeError as cause:
            raise _no_kernel(q, options.backend, cause) from cause


def _looped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: Text, scale: float) -> torch.Tensor:
    made = []
    for query, key, value in zip(q.split(1), k.split(text.lengths), v.split(text.lengths), strict=True):
        own = (query.transpose(1, 2), key.transpose(0, 1)[None], value.transpose(0, 1)[None])
        # in the kernel's memory heads lie behind tokens: seen this way, neither this nor the projection copies
        made.append(F.scaled_dot_product_attention(*own, scale=scale).transpose(1, 2))  # (1, N, H, E)
    return torch.cat(made)


def jagged_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: Text, scale: float) -> torch.Tensor:
    """`packed_attention` as one product of nested tensors; their lengths are known, so that no kernel waits for the host."""
    count, queries = q.shape[:2]
    rows = torch.arange(0, (count + 1) * queries, queries, device=q.device)
    assert text.offsets is not None
    shortest, longest = min(text.lengths), max(text.lengths)
    nested = torch.nested.nested_tensor_from_jagged
    own = nested(q.flatten(0, 1).contiguous(), rows, min_seqlen=queries, max_seqlen=queries).transpose(1, 2)
    key, value = (
        nested(x.contiguous(), text.offsets, min_seqlen=shortest, max_seqlen=longest).transpose(1, 2) for x in (k, v)
    )
    made = F.scaled_dot_product_attention(own, key, value, scale=scale)
    return made.transpose(1, 2).values().unflatten(0, (count, queries))


def _scaled(q: torch.Tensor) -> tuple[torch.Tensor, float]:
    """q and the scale that is left for the product."""
    scale = q.shape[-1] ** -0.5
    return (q * scale, 1.0) if q.dtype == torch.float16 else (q, scale)


def _forced(backend: AttentionBackend) -> AbstractContextManager[None]:
    return nullcontext() if backend == "auto" else sdpa_kernel(_KERNELS[backend])


def _no_kernel(q: torch.Tensor, backend: AttentionBackend, cause: RuntimeError) -> Exception:
    """MachineError if torch found no kernel, else the error itself."""
    if not any(text in str(cause) for text in ("No viable backend", "No available kernel")):
        return cause
    return MachineError(
        f"the attention backend {backend} cannot run here: {q.device.type}, {str(q.dtype).removeprefix('torch.')}, "
        f"{q.shape[-1]} channels a head",
        where="execution.attention_backend",
        remedy="set it to auto (or math, which needs memory for every pair of tokens)",
    )


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases and one matrix for q, k and v."""

    def __init__(self, width: int, heads: int, options: AttentionOptions) -> None:
        super().__init__()
        self.heads, self.options = heads, options
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)  # (B, N, 3D)
        if self.options.fp32:
            qkv = qkv.float()
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, E)
        y = attention(q, k, v, None, self.options).to(x.dtype)  # (B, H, N, E)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, N, D)


class CrossAttention(nn.Module):
    """Image tokens attend to text tokens; padded ones never."""

    def __init__(self, width: int, heads: int, options: AttentionOptions) -> None:
        super().__init__()
        self.heads, self.options = heads, options
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, text: Text) -> torch.Tensor:
        q = self.q_linear(x).unflatten(-1, (self.heads, -1))  # (B, N, H, E)
        k, v = (
            self.kv_linear(text.tokens).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        )  # each (B, L, H, E) or (T, H, E)
        if text.mask is None:
            y = packed_attention(q, k, v, text, self.options)  # (B, N, H, E)
        else:
            y = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), text.mask, self.options).transpose(
                1, 2
            )
        return self.proj(y.flatten(2))  # (B, N, D)


def require_backend(options: AttentionOptions, head_channels: int, dtype: torch.dtype, device: torch.device) -> None:
    """Runs attention once as a net will, with and without a mask and backward, so that a missing kernel is known at once.

    Raises:
        MachineError: The backend that the options force cannot run here.
    """
    if options.backend == "auto":
        return
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool, device=device)
    own = torch.float32 if options.fp32 else dtype
    wanted: list[tuple[torch.dtype, torch.Tensor | None]] = [(own, None)]
    if not options.packed_text:
        wanted.append((dtype, mask))
    for each, masked in wanted:
        q = torch.zeros(1, 1, 8, head_channels, dtype=each, device=device, requires_grad=True)
        attention(q, q, q, masked, options).sum().backward()
    if options.packed_text:
        q = torch.zeros(1, 8, 1, head_channels, dtype=dtype, device=device, requires_grad=True)
        text = Text(q[0], lengths=(8,), offsets=torch.tensor([0, 8], device=device))
        packed_attention(q, q[0], q[0], text, options).sum().backward()
