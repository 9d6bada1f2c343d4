"""What a net costs, counted by formula: parameters, FLOPs, bytes that backward needs. Held against torch by tests.

N image tokens, L text tokens, D width, H hidden width of the MLP. One multiply-add is two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from pixart_ds.config.schema import ModelConfig

FREQUENCIES = 256
"""Channels of the sinusoid of a timestep, a side or a ratio."""

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
"""Of one number, by precision."""

ELEMENTWISE_PASSES = {"pixart": (25, 85), "dit": (22, 79)}
"""(N, D) tensors that one block's operations other than products and attention read or write: forward, backward."""
MLP_PASSES = (8, 12)
"""Of them, GELU and its gradient on (N, 4D)."""
SCALED_QUERY_PASSES = 2
"""More in fp16 for each attention, forward and again backward: the scale is laid on q before the product."""

_LOSS_BYTES = 54
"""For each number of the latents: 13½ fp32 tensors of their size, which the loss saves."""
_LOSS_WORKSPACE = 60
"""For each number of the latents: 15 more such tensors at the moment when the loss is made."""
_BLOCK_WORKSPACE = 3
"""(N, D) tensors beside the saved ones at the worst moment of a block's backward."""


@dataclass(frozen=True)
class Net:
    """A net's sizes, and the tokens of one picture.

    Attributes:
        patch_in: Numbers of a patch of the latents; the output has twice as many.
        classes: Labels with the null class; 0 for PixArt.
        channels: Width of the caption features; 0 for DiT.
        tokens: Image tokens.
        text: Text tokens, padded; 0 for DiT.
    """

    kind: str
    depth: int
    width: int
    heads: int
    hidden: int
    patch_in: int
    classes: int
    channels: int
    micro_conditions: bool
    tokens: int
    text: int

    @classmethod
    def of(cls, model: ModelConfig) -> Net:
        """The net of a recipe at its largest picture: buckets have at most base_size² tokens."""
        return cls(
            kind=model.kind,
            depth=model.depth,
            width=model.hidden_size,
            heads=model.num_heads,
            hidden=int(model.hidden_size * model.mlp_ratio),
            patch_in=model.in_channels * model.patch_size**2,
            classes=0 if model.num_classes is None else model.num_classes + 1,
            channels=model.caption_channels or 0,
            micro_conditions=model.micro_conditions,
            tokens=model.base_size**2,
            text=model.max_tokens or 0,
        )

    @property
    def has_text(self) -> bool:
        return self.kind == "pixart"


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _embedder(width: int) -> int:
    return _linear(FREQUENCIES, width) + _linear(width, width)


def parameters(net: Net) -> dict[str, int]:
    """Trained parameters by part."""
    d = net.width
    block = _linear(d, 3 * d) + _linear(d, d) + _linear(d, net.hidden) + _linear(net.hidden, d)
    embedders = _linear(net.patch_in, d) + _embedder(d)
    final = _linear(d, 2 * net.patch_in)
    if net.has_text:
        block += 6 * d + _linear(d, d) + _linear(d, 2 * d) + _linear(d, d)  # table; cross-attention
        embedders += _linear(d, 6 * d) + _linear(net.channels, d) + _linear(d, d)  # shared modulation; captions
        embedders += 2 * _embedder(d // 3) if net.micro_conditions else 0
        final += 2 * d
    else:
        block += _linear(d, 6 * d)
        embedders += net.classes * d
        final += _linear(d, 2 * d)
    return {"embedders": embedders, "blocks": net.depth * block, "final": final}


def buffer_bytes(net: Net) -> int:
    """The null caption, fp32 in any precision; DiT has no buffer."""
    return 4 * net.text * net.channels


def largest_parameter(net: Net) -> int:
    """Elements of the largest weight: its fresh gradient lies beside the sum for a moment."""
    d = net.width
    others = (net.channels * d, 6 * d * d) if net.has_text else (net.classes * d, 6 * d * d)
    return max(d * net.hidden, 3 * d * d, *others)


# ---- FLOPs of one picture ---------------------------------------------------------------------------------------------


def forward_flops(net: Net) -> dict[str, int]:
    """FLOPs of one picture's forward pass, by part."""
    blocks = {part: net.depth * value for part, value in block_flops(net).items()}
    n, d, third = net.tokens, net.width, net.width // 3
    blocks["linear"] += 2 * n * (net.patch_in * d + d * 2 * net.patch_in)
    modulation = FREQUENCIES * d + d * d
    if net.has_text:
        modulation += 6 * d * d + (3 * (FREQUENCIES * third + third * third) if net.micro_conditions else 0)
    else:
        modulation += 2 * d * d
    blocks["modulation"] += 2 * modulation
    blocks["caption_mlp"] = 2 * net.text * (net.channels * d + d * d)
    return blocks


def block_flops(net: Net) -> dict[str, int]:
    """FLOPs of one picture through one block, forward, by part."""
    n, d = net.tokens, net.width
    cross = 2 * d * d if net.has_text else 0  # query and output of the cross-attention
    return {
        "linear": 2 * n * (4 * d * d + 2 * d * net.hidden + cross),
        "text_kv": 2 * net.text * 2 * d * d,
        "self_attention": 2 * 2 * n * n * d,  # scores, and values by scores
        "cross_attention": 2 * 2 * n * net.text * d,
        "modulation": 0 if net.has_text else 2 * 6 * d * d,
    }


def training_flops(net: Net, checkpointed: int = 0) -> int:
    """Forward, backward, and one more forward of each checkpointed block.

    A product's backward is two products; what enters the net (patches, captions, sinusoids) needs no gradient. The scores
    that attention kernels compute a second time in backward are no work of the model, and are not counted.
    """
    d = net.width
    entering = net.tokens * net.patch_in * d + net.text * net.channels * d + FREQUENCIES * d
    if net.micro_conditions:
        entering += 3 * FREQUENCIES * (d // 3)
    forward = sum(forward_flops(net).values())
    return 3 * forward - 2 * entering + checkpointed * sum(block_flops(net).values())


# ---- bytes that one picture's forward pass saves for backward -------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """Bytes of one picture that stay until backward.

    Attributes:
        outside: Embedders, final layer and loss.
        block: One block that is not checkpointed.
        boundary: One block that is: its input.
    """

    outside: int
    block: int
    boundary: int

    def total(self, depth: int, checkpointed: int) -> int:
        """At the end of forward."""
        return self.outside + checkpointed * self.boundary + (depth - checkpointed) * self.block

    def peak(self, depth: int, checkpointed: int) -> int:
        """At the worst moment of backward: with all blocks checkpointed, one is alive again beside the boundaries."""
        return self.total(depth, checkpointed) + (self.block if checkpointed == depth else 0)


def saved(net: Net, precision: str, *, fp32_attention: bool = False) -> Saved:
    """What autograd must keep of one picture; statistics of norms and attention are fp32."""
    n, d, size = net.tokens, net.width, BYTES[precision]
    return Saved(
        outside=_saved_outside(net, size),
        block=sum(_saved_in_block(net, precision, fp32_attention).values()),
        boundary=n * d * size,
    )


def _saved_in_block(net: Net, precision: str, fp32_attention: bool) -> dict[str, int]:
    """Bytes by tensor. The output of one operation is the input of the next: each stands once."""
    n, d, size = net.tokens, net.width, BYTES[precision]
    fp16 = precision == "fp16"
    wide = 4 if fp32_attention else size
    scaled = n * d * size if fp16 and not fp32_attention else 0
    tensors = {
        "input of the norms": 2 * n * d * size,
        "normed": 2 * n * d * size,
        "mean and deviation": 2 * 2 * n * 4,
        "modulated": 2 * n * d * size,
        "modulation and 1 + scale": 8 * d * size,
        "q, k, v": 3 * n * d * wide,
        "scaled q": scaled,  # in fp16 beside the q in qkv
        "attended": n * d * wide + (n * d * size if fp32_attention and size == 2 else 0),
        "log-sum-exp": net.heads * n * 4,
        "projected": n * d * size,
        "hidden, before and after GELU": 2 * n * net.hidden * size,
        "output of the MLP": n * d * size,
    }
    if net.has_text:
        tensors |= {
            "input of the cross-attention": n * d * size,
            "text k, v": 2 * net.text * d * size,
            "text q": n * d * size,
            "text attended": n * d * size,
            "text log-sum-exp": net.heads * n * 4,
        }
    else:
        tensors["active condition"] = d * size
    return tensors


def _saved_outside(net: Net, size: int) -> int:
    """Bytes outside the blocks: patches, sinusoids, embedders, captions, final layer, loss."""
    n, d = net.tokens, net.width
    numbers = n * net.patch_in + FREQUENCIES + 4 * d
    numbers += net.text * (net.channels + 3 * d)  # captions, before and after GELU, out
    numbers += 3 * (FREQUENCIES + 2 * (d // 3)) if net.micro_conditions else 0
    numbers += 3 * n * d + 3 * d  # the final norm's input and output, modulated; its shift, scale and 1 + scale
    return numbers * size + 2 * n * 4 + _LOSS_BYTES * n * net.patch_in


def workspace(net: Net, precision: str) -> int:
    """Bytes of one picture that live for a moment only: in the loss, or in a block's backward, whichever is more."""
    block = _BLOCK_WORKSPACE * net.width * BYTES[precision]
    return net.tokens * max(_LOSS_WORKSPACE * net.patch_in, block)
