"""What `pixart-ds sample` takes."""

from __future__ import annotations

import pytest

from pixart_ds.errors import ConfigError
from pixart_ds.evaluate.command import parse_size


def test_sizes_are_height_by_width() -> None:
    assert parse_size("512x768") == (512, 768)
    with pytest.raises(ConfigError, match="not HxW"):
        parse_size("512")
