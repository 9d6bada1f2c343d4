"""What `pixart-ds sample` takes."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from pixart_ds.engine.weights import Weights
from pixart_ds.errors import ConfigError
from pixart_ds.evaluate.command import _text_encoder, parse_size
from tests.helpers.sets import tiny_set
from tests.model.test_nets import small

TEXT = str(Path(__file__).resolve().parents[2] / "pixart_ds/demo/encoders/text")


def test_sizes_are_height_by_width() -> None:
    assert parse_size("512x768") == (512, 768)
    with pytest.raises(ConfigError, match="not HxW"):
        parse_size("512")


@pytest.mark.parametrize(
    ("of_set", "of_folder", "settings"),
    [
        (True, None, "fp32, cleaned, up to 9 tokens"),
        (False, None, "fp32, as they are, up to 9 tokens"),
        (None, None, "fp32, cleaned, up to 40 tokens"),  # weights from elsewhere
        (None, True, "fp32, cleaned, up to 40 tokens"),
        (None, False, "fp32, as they are, up to 40 tokens"),
    ],
)
def test_prompts_are_treated_as_the_captions_were(
    tmp_path: Path, of_set: bool | None, of_folder: bool | None, settings: str
) -> None:
    prepared = None if of_set is None else tiny_set(tmp_path, clean_captions=of_set)
    weights = Weights(small(max_tokens=40), {}, "ema", {}, None, None, tmp_path, of_folder)
    encoder = _text_encoder(Namespace(text_encoder=TEXT, device="cpu"), weights, prepared)
    assert encoder.settings == settings
