"""Captions to features, by a transformers T5 encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pixart_ds.compat import hide_broken_torchvision
from pixart_ds.encoders.fingerprint import FP16_MAX, PRECISIONS, Precision, encoder_folder, fingerprint
from pixart_ds.encoders.loading import load_whole
from pixart_ds.errors import ConfigError, DataError

_REMEMBERED_CAPTIONS = 1 << 14
"""Cleaned texts: a caller counts tokens of the captions that it encodes a moment later, and cleaning is slower than both."""


_MODEL_TYPES = ("t5", "mt5")
"""Not umt5, whose layers each have position biases of their own."""


class TextEncoder(Protocol):
    """What `prepare` and sampling need of a text encoder."""

    channels: int
    max_tokens: int
    fingerprint: str

    @property
    def settings(self) -> str:
        """How it was asked to encode, in words."""
        ...

    def encode(self, captions: Sequence[str]) -> list[npt.NDArray[np.float16]]:
        """For each caption (L, D): its real tokens' features, at most `max_tokens`."""
        ...

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption before it is cut."""
        ...

    def null(self) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
        """Features (max_tokens, D) of the empty caption, of its padding too, and the mask (max_tokens,): 1 for its real tokens."""
        ...


class T5Encoder:
    """A T5 encoder with its tokenizer from one folder, a pipeline's `text_encoder`, or the hub.

    Args:
        name: Folder or hub name.
        max_tokens: Longest caption; longer ones are cut (paper: 120).
        device: Where it computes.
        precision: fp16 keeps the second layers of the MLPs, whose outputs overflow in it, and what they are added to in fp32.
        clean: Captions are cleaned first, as PixArt's released code does; else they are taken as they are.

    Raises:
        ConfigError: There is no such folder, or it holds no T5 encoder.
    """

    def __init__(
        self, name: str, max_tokens: int, device: str = "cpu", *, precision: Precision = "fp32", clean: bool = False
    ) -> None:
        hide_broken_torchvision()
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        folder = encoder_folder(name, "text encoder")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(folder), padding_side="right")
            model = load_whole(T5EncoderModel.from_pretrained, folder, own="encoder.", dtype=PRECISIONS[precision])
        except (OSError, ValueError) as cause:
            raise ConfigError(
                f"no T5 encoder with tokenizer can be loaded from {name}: {cause}", remedy="give a folder with both"
            ) from cause
        if precision == "fp16":
            keep_in_fp32(model)
        self._model = model.to(device).eval()
        self._device = device
        self._clean = _cleaner() if clean else None
        self.name = name
        self.precision = precision
        self.max_tokens = max_tokens
        self.channels: int = model.config.d_model
        self.fingerprint: str = fingerprint(name, getattr(model.config, "_commit_hash", None))

    @property
    def settings(self) -> str:
        """See `TextEncoder`."""
        return f"{self.precision}, {'cleaned' if self._clean else 'as they are'}, up to {self.max_tokens} tokens"

    def encode(self, captions: Sequence[str]) -> list[npt.NDArray[np.float16]]:
        """See `TextEncoder`. Padding of a batch changes no feature but by rounding.

        Raises:
            DataError: Features that fp16 cannot hold, with the caption.
        """
        tokens = self._tokenizer(
            self._texts(captions), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        features, fits = self._features(tokens)
        lengths = tokens.attention_mask.sum(1).tolist()
        for caption, fine, length in zip(captions, fits, lengths, strict=True):
            if not fine[:length].all():
                raise self._overflow(f"the caption {caption[:80]!r}")
        return [row[:length].copy() for row, length in zip(features, lengths, strict=True)]

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        """See `TextEncoder`."""
        return [len(ids) for ids in self._tokenizer(self._texts(captions)).input_ids]

    def null(self) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
        """See `TextEncoder`. It is what diffusers' pipeline hands to the net, with this mask, for the negative prompt "".

        Raises:
            DataError: Features that fp16 cannot hold.
        """
        tokens = self._tokenizer([""], padding="max_length", max_length=self.max_tokens, return_tensors="pt")
        features, fits = self._features(tokens)
        if not fits.all():
            raise self._overflow("the empty caption")
        return features[0], tokens.attention_mask[0].numpy().astype(np.uint8)

    @torch.no_grad()
    def _features(self, tokens: Any) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
        """(B, L, D), and for each token (B, L) whether fp16 holds its features."""
        ids, mask = tokens.input_ids.to(self._device), tokens.attention_mask.to(self._device)
        features = self._model(ids, attention_mask=mask).last_hidden_state
        fits = (features.abs() < FP16_MAX).all(-1)
        return features.to(torch.float16).cpu().numpy(), fits.cpu().numpy()

    def _texts(self, captions: Sequence[str]) -> list[str]:
        return [self._clean(caption) for caption in captions] if self._clean else list(captions)

    def _overflow(self, what: str) -> DataError:
        remedy = "set text_precision to bf16 or fp32" if self.precision == "fp16" else "look at the encoder's weights"
        return DataError(f"the text encoder gave features that are not finite in fp16 for {what}", remedy=remedy)


def text_facts(name: str) -> int:
    """Channels of a T5 encoder, from its config file alone.

    Raises:
        ConfigError: There is no such encoder.
    """
    hide_broken_torchvision()
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(encoder_folder(name, "text encoder"))
        if config.model_type not in _MODEL_TYPES:
            raise ValueError(f"it is a {config.model_type}")
        return int(config.d_model)
    except (OSError, ValueError, AttributeError) as cause:
        raise ConfigError(
            f"{name} is no T5 encoder: {cause}", where="text_encoder", remedy="give a folder with encoder and tokenizer"
        ) from cause


def keep_in_fp32(model: torch.nn.Module) -> None:
    """Makes the layers `wo` of a T5 fp32, as transformers does where it is asked for fp16; T5's code brings what they take to their
    dtype, and what they give makes the sum over the layers fp32 too.
    """
    for module in model.modules():
        layer = getattr(module, "wo", None)
        if isinstance(layer, torch.nn.Linear):
            layer.float()


def _cleaner() -> Callable[[str], str]:
    from pixart_ds.encoders.clean import clean_caption

    return lru_cache(_REMEMBERED_CAPTIONS)(clean_caption)


def tokenizer_folder(folder: str) -> str:
    """The encoder's own folder or hub name; in a diffusers pipeline the tokenizer's folder lies beside the encoder's."""
    beside = Path(folder).parent / "tokenizer"
    inside = any((Path(folder) / name).exists() for name in ("tokenizer.json", "spiece.model", "tokenizer_config.json"))
    return str(beside) if beside.is_dir() and not inside else folder
