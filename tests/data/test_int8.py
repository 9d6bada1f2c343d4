"""A set in 8 bits is the same set: only its captions differ, and by no more than the codec says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pixart_ds.config.schema import SetConfig
from pixart_ds.data.codecs import CODECS
from pixart_ds.data.loader import Loader
from pixart_ds.data.reader import MicroBatch
from pixart_ds.data.shards import PreparedSet
from pixart_ds.errors import DataError
from pixart_ds.plan.order import Order
from tests.helpers.sets import GROUPS, row, tiny_set

CHANNELS = 128


def open_set(folder: Path, codec: str, tokens: int | None = None) -> PreparedSet:
    return tiny_set(folder / codec, tokens=tokens, caption_codec=codec, caption_channels=CHANNELS)


def batches(made: PreparedSet, world: int = 1, readers: int = 1, captions: bool = True) -> list[MicroBatch]:
    """All micro-batches of four steps of all ranks."""
    # an order of the counts alone: the two sets have different fingerprints, which would give different orders
    rows = made.rows_for("48-buckets", SetConfig(path="x"))
    order = Order([type(rows)("same", rows.counts, rows.buckets, None)], seed=3, lanes=4, strip_length=4, window=2)
    found = []
    for rank in range(world):
        with Loader(
            [made], order, latents="48-buckets", stage="s", seed=8, condition_dropout=0.3, micro_batch_size=5,
            global_batch_size=12, rank=rank, world_size=world, readers=readers, captions=captions,
        ) as loader:  # fmt: skip
            for at in loader.steps(0, 48):
                found += [batch.kept() for batch in loader.micro_batches(at)]
    return found


@pytest.mark.parametrize(("world", "readers"), [(1, 1), (3, 2)])
def test_both_codecs_give_the_same_samples_and_nearly_the_same_captions(
    tmp_path: Path, world: int, readers: int
) -> None:
    partitions = [partition for partition, count in GROUPS for _ in range(count)]
    plain, small = (batches(open_set(tmp_path, codec), world, readers) for codec in ("fp16", "int8"))
    for one, two in zip(plain, small, strict=True):
        assert np.array_equal(one.sample_ids, two.sample_ids)
        assert one.digest == two.digest
        assert one.caption_lengths == two.caption_lengths
        for name, tensor in vars(one).items():
            if isinstance(tensor, torch.Tensor) and name != "caption_embeds":
                assert torch.equal(tensor, getattr(two, name)), name
        assert two.caption_embeds.dtype == torch.float16
        off = (one.caption_embeds.float() - two.caption_embeds.float()).norm() / one.caption_embeds.float().norm()
        assert 0 < off < 0.01
        for sample, features in zip(
            two.sample_ids.tolist(), two.caption_embeds.split(two.caption_lengths), strict=True
        ):
            wanted = row(sample, partitions[sample], channels=CHANNELS).caption_embeds
            stored = torch.from_numpy(CODECS["int8"].encode(wanted))
            assert torch.equal(features, CODECS["int8"].decode(stored, CHANNELS))


def test_shards_hold_about_half(tmp_path: Path) -> None:
    sizes = [int(open_set(tmp_path, codec, tokens=9).index("captions").sizes.sum()) for codec in ("fp16", "int8")]
    count = sum(rows for _, rows in GROUPS)
    features = count * 9 * (2 * CHANNELS - CODECS["int8"].bytes_per_token(CHANNELS))
    assert abs(sizes[0] - sizes[1] - features) < 64 * count  # but for padding


def test_captions_without_tokens_and_nets_without_captions(tmp_path: Path) -> None:
    made = open_set(tmp_path, "int8", tokens=0)
    for batch in batches(made):
        assert set(batch.caption_lengths) == {1}
        assert batch.caption_embeds.shape == (len(batch.sample_ids), CHANNELS)
        assert not batch.caption_embeds.any()
    assert all(batch.caption_embeds.shape == (0, CHANNELS) for batch in batches(made, captions=False))


def test_features_that_are_no_whole_tokens_are_refused(tmp_path: Path) -> None:
    made = open_set(tmp_path, "fp16", tokens=9)
    about = made.description.model_copy(update={"caption_codec": "int8"})
    object.__setattr__(made, "description", about)
    with pytest.raises(DataError, match=r"row \d has caption features of 2304 bytes: no more than 9 tokens of 128"):
        batches(made)
