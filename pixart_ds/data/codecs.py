"""How caption features lie in a shard: as fp16, or in 8 bits with a scale for each 64 channels.

A row-wise scale would do for Gaussian features, but T5 has channels that are many times larger than the others, and one of them
would leave its whole row with few levels. With a scale of its own, each group of 64 channels keeps to its own size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pixart_ds.errors import ConfigError, DataError

_GROUP = 64
"""Channels with one scale."""
_MOST = 127
_LARGEST_SCALE = np.float16(515.5)
"""127 times the next larger one would round to infinity."""


class Codec(Protocol):
    """Features to bytes and back; a token's bytes follow from its own features alone, and zeros are zero bytes."""

    def bytes_per_token(self, channels: int) -> int:
        """Bytes of one token's features.

        Raises:
            ConfigError: It cannot hold so many channels.
        """
        ...

    def encode(self, features: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
        """(L, D) float16 to (L, bytes_per_token).

        Raises:
            DataError: A feature is not finite, which the codec cannot hold.
        """
        ...

    def decode(self, raw: torch.Tensor, channels: int) -> torch.Tensor:
        """(T, bytes_per_token) uint8 to (T, D) fp16 on the same device, without a word to the host; it may share memory."""
        ...

    def flaw(self, raw: npt.NDArray[np.uint8], channels: int) -> str | None:
        """What (T, bytes_per_token) holds that `encode` never writes, such as infinite features; None if nothing."""
        ...


class Fp16:
    """The features themselves."""

    def bytes_per_token(self, channels: int) -> int:
        """See `Codec`."""
        return 2 * channels

    def encode(self, features: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
        """See `Codec`."""
        return np.ascontiguousarray(features, "<f2").view(np.uint8)

    def decode(self, raw: torch.Tensor, channels: int) -> torch.Tensor:
        """See `Codec`."""
        return raw.view(torch.float16)

    def flaw(self, raw: npt.NDArray[np.uint8], channels: int) -> str | None:
        """See `Codec`."""
        return None if _finite(raw.view("<u2")) else "features that are no finite numbers"


class Int8:
    """D signed bytes, then D / 64 fp16 scales: x ≈ byte · scale of its group. The error is at most half a scale, and a rounding."""

    def bytes_per_token(self, channels: int) -> int:
        """See `Codec`."""
        if channels % _GROUP:
            raise ConfigError(
                f"captions of {channels} channels cannot be stored in int8: its groups have {_GROUP}",
                where="caption_codec",
                remedy="set it to fp16",
            )
        return channels + channels // _GROUP * 2

    def encode(self, features: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
        """See `Codec`."""
        tokens, channels = features.shape
        raw = np.empty((tokens, self.bytes_per_token(channels)), np.uint8)
        groups = features.astype(np.float32, order="C").reshape(tokens, channels // _GROUP, _GROUP)
        peaks = np.abs(groups).max(2)  # (L, D / 64)
        if not np.isfinite(peaks).all():
            raise DataError("caption features are not finite, which int8 cannot hold")
        scales = _scales(peaks)
        steps = np.where(scales > 0, scales, 1).astype(np.float32)[..., None]
        codes = np.rint(groups / steps).clip(-_MOST, _MOST).astype(np.int8)
        raw[:, :channels] = codes.reshape(tokens, channels).view(np.uint8)
        raw[:, channels:] = scales.view(np.uint8)
        return raw

    def decode(self, raw: torch.Tensor, channels: int) -> torch.Tensor:
        """See `Codec`."""
        if not len(raw):  # torch cannot view such an array of numpy's as another dtype
            return raw.new_empty(0, channels, dtype=torch.float16)
        codes, scales = raw[:, :channels].view(torch.int8), raw[:, channels:].view(torch.float16)
        groups = codes.to(torch.float16).unflatten(1, (-1, _GROUP))  # (T, D / 64, 64)
        return groups.mul_(scales[..., None]).flatten(1)

    def flaw(self, raw: npt.NDArray[np.uint8], channels: int) -> str | None:
        """See `Codec`."""
        scales = np.ascontiguousarray(raw[:, channels:]).view("<f2")
        if not _finite(scales.view("<u2")):
            return "scales that are no finite numbers"
        if scales.min() < 0 or scales.max() > _LARGEST_SCALE:
            return f"scales from {scales.min()} to {scales.max()}, which must lie between 0 and {_LARGEST_SCALE}"
        if raw[:, :channels].view(np.int8).min() < -_MOST:
            return f"the byte -128, though they lie between -{_MOST} and {_MOST}"
        return None


def _finite(bits: npt.NDArray[np.uint16]) -> bool:
    """Whether fp16 numbers, given by their bits, are all finite; numpy's own `isfinite` takes ten times as long."""
    return not len(bits) or bool((bits & 0x7FFF).max() < 0x7C00)


def _scales(peaks: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """The least fp16 numbers whose 127-fold reaches the peaks: rounded up, lest the largest features be cut."""
    wanted = peaks / np.float32(_MOST)
    scales = wanted.astype("<f2")
    scales = np.where(scales < wanted, np.nextafter(scales, np.float16(np.inf)), scales)
    return np.minimum(scales, _LARGEST_SCALE).astype("<f2")


CODECS: Mapping[str, Codec] = {"fp16": Fp16(), "int8": Int8()}
