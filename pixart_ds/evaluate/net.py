"""A net from weights, wherever they lay."""

from __future__ import annotations

from pixart_ds.engine.foreign import NULL_CAPTION
from pixart_ds.engine.weights import Weights
from pixart_ds.model import DiT, PixArt, build


def load_net(weights: Weights, device: str = "cpu") -> PixArt | DiT:
    """The net with these weights, ready to sample; a null caption that they lack is zero."""
    fp32_attention = weights.model.fp32_attention if weights.stage is None else weights.stage.fp32_attention
    net = build(weights.model, fp32_attention=fp32_attention)
    state = dict(weights.state)
    if isinstance(net, PixArt):
        state.setdefault(NULL_CAPTION, net.y_embedder.y_embedding)
    net.load_state_dict(state)
    return net.to(device).eval()
