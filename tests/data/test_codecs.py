"""Codecs of caption features: what they lose, and what they never lose."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pixart_ds.data.codecs import CODECS
from pixart_ds.errors import ConfigError, DataError

INT8 = CODECS["int8"]
Features = npt.NDArray[np.float16]


def relative_error(features: npt.NDArray[np.float16], codec: str) -> float:
    """‖stored − features‖ / ‖features‖ over all of (L, D); 0 where there is nothing but zeros."""
    wanted = features.astype(np.float32)
    size = float(np.linalg.norm(wanted))
    if not size:
        return 0.0
    kind = CODECS[codec]
    stored = kind.decode(torch.from_numpy(kind.encode(features)), features.shape[1]).numpy()
    return float(np.linalg.norm(stored.astype(np.float32) - wanted)) / size


def decoded(features: Features, codec: str = "int8") -> Features:
    kind = CODECS[codec]
    return kind.decode(torch.from_numpy(kind.encode(features)), features.shape[1]).numpy()  # type: ignore[no-any-return]


def made(kind: str, tokens: int = 60, channels: int = 4096) -> Features:
    """Features of one distribution."""
    random = np.random.default_rng(5)
    values = 0.2 * random.standard_normal((tokens, channels))
    if kind == "outlier channels":
        values *= random.lognormal(0, 0.5, channels)
        values[:, random.choice(channels, 20, replace=False)] *= 30
    elif kind == "heavy tails":
        values = 0.1 * random.standard_t(3, (tokens, channels))
    return values.astype(np.float16)


def row_wise_error(features: Features) -> float:
    """Of int8 with one scale for each token."""
    wanted = features.astype(np.float32)
    scale = np.abs(wanted).max(1, keepdims=True) / 127
    return float(np.linalg.norm(np.rint(wanted / scale) * scale - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("kind", "bound", "gain"), [("Gaussian", 0.007, 1), ("outlier channels", 0.02, 3), ("heavy tails", 0.02, 2)]
)
def test_groups_keep_the_error_small_where_one_scale_for_a_token_does_not(kind: str, bound: float, gain: float) -> None:
    features = made(kind)
    assert relative_error(features, "int8") < bound
    assert row_wise_error(features) > gain * relative_error(features, "int8")
    assert relative_error(features, "fp16") == 0


def test_int8_takes_about_half_the_space() -> None:
    assert CODECS["fp16"].bytes_per_token(4096) == 8192
    assert INT8.bytes_per_token(4096) == 4224
    with pytest.raises(ConfigError, match="captions of 100 channels cannot be stored in int8"):
        INT8.bytes_per_token(100)


@pytest.mark.parametrize("seed", range(30))
def test_no_feature_is_further_off_than_half_a_step_of_its_group(seed: int) -> None:
    """Of any size that fp16 has, in one group beside another of any other size."""
    random = np.random.default_rng(seed)
    tokens, groups = int(random.integers(1, 9)), int(random.integers(1, 5))
    sizes = np.exp2(random.uniform(-26, 16, (tokens, groups, 1)))
    values = np.clip(random.uniform(-1, 1, (tokens, groups, 64)) * sizes, -65504, 65504).astype(np.float16)
    features = values.reshape(tokens, -1)
    stored = INT8.encode(features)
    assert stored.shape == (tokens, INT8.bytes_per_token(64 * groups))
    scales = stored[:, 64 * groups :].view(np.float16).astype(np.float32)  # (tokens, groups)
    back = decoded(features).reshape(values.shape).astype(np.float32)
    assert np.isfinite(back).all()
    off = np.abs(back - values.astype(np.float32))
    rounding = np.abs(back) * 2**-11 + 2**-25  # of the product, to fp16
    assert (off <= scales[..., None] / 2 + rounding).all()
    peaks = np.abs(values.astype(np.float32)).max(2)
    assert (scales <= peaks / 127 * (1 + 2**-9) + 2**-24).all()


def test_zeros_tiny_and_huge_features_survive() -> None:
    zeros = np.zeros((2, 128), np.float16)
    assert not INT8.encode(zeros).any()
    assert not decoded(zeros).any()
    assert relative_error(zeros, "int8") == 0
    assert decoded(zeros[:0]).shape == decoded(zeros[:0], "fp16").shape == (0, 128)
    tiny = (np.arange(-64, 64) * 2.0**-24).astype(np.float16)[None]  # fp16's smallest steps: nothing is lost
    assert np.array_equal(decoded(tiny), tiny)
    huge = np.array([[65504, -65504, *[0] * 62]], np.float16)
    assert np.isfinite(decoded(huge)).all()
    assert relative_error(huge, "int8") < 1e-3
    with pytest.raises(DataError, match="not finite"):
        INT8.encode(np.full((1, 64), np.inf, np.float16))


def test_a_token_and_a_group_are_stored_alone() -> None:
    features = made("outlier channels", 7, 256)
    whole = decoded(features)
    for token in range(7):
        assert np.array_equal(INT8.encode(features)[token], INT8.encode(features[token : token + 1])[0])
    for group in range(4):
        part = slice(64 * group, 64 * (group + 1))
        assert np.array_equal(decoded(features[:, part]), whole[:, part])
    assert np.array_equal(decoded(np.asfortranarray(features)), whole)


def test_what_torch_decodes_is_what_the_layout_says() -> None:
    features = made("heavy tails", 9, 320)
    stored = INT8.encode(features)
    codes, scales = stored[:, :320].view(np.int8), stored[:, 320:].view("<f2")
    by_hand = codes.astype(np.float32) * np.repeat(scales.astype(np.float32), 64, 1)
    assert np.array_equal(decoded(features), by_hand.astype(np.float16))
    assert np.array_equal(decoded(features, "fp16"), features)
    rows = torch.zeros(11, INT8.bytes_per_token(320), dtype=torch.uint8)  # as it lies in a buffer
    rows[1:10] = torch.from_numpy(stored)
    assert np.array_equal(INT8.decode(rows[1:10], 320).numpy(), decoded(features))
    assert INT8.decode(rows[:0], 320).shape == (0, 320)


def test_the_bytes_stay_what_they_are() -> None:
    features = np.zeros((1, 64), np.float16)
    features[0, :4] = (1, -0.5, 0.25, -1)
    scale = np.float16(1 / 127)
    assert float(scale) < 1 / 127  # so it is rounded up
    above = np.nextafter(scale, np.float16(1)).tobytes()
    assert INT8.encode(features)[0].tobytes() == bytes([127, 256 - 63, 32, 256 - 127]) + bytes(60) + above
    assert above.hex() == "0920"
    assert CODECS["fp16"].encode(features)[0, :4].tobytes().hex() == "003c00b8"


@pytest.mark.gpu
def test_a_gpu_decodes_the_same_bits() -> None:
    stored = torch.from_numpy(INT8.encode(made("outlier channels")))
    assert torch.equal(INT8.decode(stored.cuda(), 4096).cpu(), INT8.decode(stored, 4096))
