"""Sets that do not fit each other, and what a node reads, as the log says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixart_ds.config.schema import SetConfig
from pixart_ds.errors import ConfigError
from pixart_ds.train.sets import open_sets, order_of, reading_of
from tests.helpers.sets import tiny_set
from tests.train.test_start import stage_of


def test_the_log_says_what_a_node_reads_and_what_its_cache_must_hold(tmp_path: Path) -> None:
    prepared = tiny_set(tmp_path, tuple((number % 3, 8) for number in range(64)))
    stage = stage_of(tmp_path, {"source": "scratch"})
    stage = stage.model_copy(update={"order": stage.order.model_copy(update={"lanes": 8, "window": 2})})
    order = order_of(stage, [prepared])
    size = int(prepared.index("captions").sizes.sum() + prepared.index("32-square").sizes.sum()) / 64
    text = reading_of(stage, [prepared], order, 0, 4, 8)
    assert text.startswith("this node reads 4 of 8 lanes: the same shards in every pass; up to 20 row groups, ")
    assert f"{20 * size / 1e9:.1g}"[:1] in text
    assert "lies in lanes that other nodes read too" in reading_of(stage, [prepared], order, 0, 1, 3)
    execution = stage.execution.model_copy(
        update={"cache": stage.execution.cache.model_copy(update={"limit_gb": 1e-6})}
    )
    small = reading_of(stage.model_copy(update={"execution": execution}), [prepared], order, 0, 4, 8)
    assert "execution.cache.limit_gb 1e-06 is too small for that" in small


def test_sets_of_one_stage_store_captions_alike(tmp_path: Path) -> None:
    for codec in ("fp16", "int8"):
        tiny_set(tmp_path / codec, caption_codec=codec, caption_channels=64)
    stage = stage_of(tmp_path / "fp16", {"source": "scratch"}, caption_channels=64)
    both = (SetConfig(path=str(tmp_path / "fp16")), SetConfig(path=str(tmp_path / "int8")))
    stage = stage.model_copy(update={"data": stage.data.model_copy(update={"sets": both})})
    with pytest.raises(ConfigError, match="int8: caption_codec int8 differs from that of .*fp16, fp16"):
        open_sets(stage)
