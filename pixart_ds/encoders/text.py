"""Captions to features, by a transformers T5 encoder in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pixart_ds.compat import hide_broken_torchvision
from pixart_ds.encoders.fingerprint import encoder_folder, fingerprint
from pixart_ds.errors import ConfigError, DataError

_FP16_MAX = 65504.0


class TextEncoder(Protocol):
    """What `prepare` and sampling need of a text encoder."""

    channels: int
    max_tokens: int
    fingerprint: str

    def encode(self, captions: Sequence[str]) -> list[npt.NDArray[np.float16]]:
        """For each caption (L, D): its real tokens' features, at most `max_tokens`."""
        ...

    def count_truncated(self, captions: Sequence[str]) -> int:
        """How many captions are longer than `max_tokens`."""
        ...


class T5Encoder:
    """A T5 encoder with its tokenizer from one folder, a pipeline's `text_encoder`, or the hub. Captions are taken as they are.

    Args:
        name: Folder or hub name.
        max_tokens: Longest caption; longer ones are cut (paper: 120).
        device: Where it computes.

    Raises:
        ConfigError: There is no such folder, or it holds no T5 encoder.
    """

    def __init__(self, name: str, max_tokens: int, device: str = "cpu") -> None:
        hide_broken_torchvision()
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        folder = encoder_folder(name, "text encoder")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(folder))
            self._model = T5EncoderModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        except (OSError, ValueError) as cause:
            raise ConfigError(
                f"no T5 encoder with tokenizer can be loaded from {name}: {cause}", remedy="give a folder with both"
            ) from cause
        self._device = device
        self.max_tokens = max_tokens
        self.channels: int = self._model.config.d_model
        self.fingerprint: str = fingerprint(name)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[npt.NDArray[np.float16]]:
        """See `TextEncoder`. Padding of a batch changes no feature.

        Raises:
            DataError: Features that fp16 cannot hold, with the caption.
        """
        tokens = self._tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        mask = tokens.attention_mask.to(self._device)
        features = self._model(
            tokens.input_ids.to(self._device), attention_mask=mask
        ).last_hidden_state.cpu()  # (B, L, D)
        lengths = mask.sum(1).tolist()
        made = []
        for caption, row, length in zip(captions, features, lengths, strict=True):
            real = row[:length]
            if not bool((real.abs() < _FP16_MAX).all()):
                raise DataError(
                    f"the text encoder gave features that are not finite in fp16 for the caption {caption[:80]!r}"
                )
            made.append(real.numpy().astype(np.float16))
        return made

    def count_truncated(self, captions: Sequence[str]) -> int:
        """See `TextEncoder`."""
        return sum(len(ids) > self.max_tokens for ids in self._tokenizer(list(captions)).input_ids)


def tokenizer_folder(folder: str) -> str:
    """The encoder's own folder or hub name; in a diffusers pipeline the tokenizer's folder lies beside the encoder's."""
    beside = Path(folder).parent / "tokenizer"
    inside = any((Path(folder) / name).exists() for name in ("tokenizer.json", "spiece.model", "tokenizer_config.json"))
    return str(beside) if beside.is_dir() and not inside else folder
