"""The votes' arithmetic, for worlds that nobody here owns."""

from __future__ import annotations

import random

import pytest
import torch

from pixart_ds.engine.agree import Agreement, Votes, on_first, pack, together, unpack
from pixart_ds.engine.world import World
from pixart_ds.errors import DataError

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("size", [1, 2, 7, 64, 4096])
def test_digests_add_exactly(size: int) -> None:
    luck = random.Random(size)
    digests = [luck.choice([2**64 - 1, 2**32 - 1, 2**32, luck.getrandbits(64)]) for _ in range(size)]
    total = torch.stack([pack(Votes(digest=digest, samples=3, sums={}), []) for digest in digests]).sum(0)
    assert unpack(total, []) == Agreement(False, False, 0, sum(digests) % 2**64, 3 * size, {})


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_one_voice_is_enough(stop: bool, save: bool) -> None:
    votes = [Votes()] * 40 + [Votes(stop=stop, save=save)] + [Votes()] * 23
    agreed = unpack(torch.stack([pack(vote, []) for vote in votes]).sum(0), [])
    assert (agreed.stop, agreed.save) == (stop, save)


def test_a_sum_that_is_no_number_spoils_no_other() -> None:
    names = ["loss", "mse"]
    votes = [
        Votes(stop=True, digest=5, samples=2, sums={"loss": float("nan"), "mse": 1.5}),
        Votes(sums={"loss": 1.0, "mse": 2.0}),
    ]
    agreed = unpack(torch.stack([pack(vote, names) for vote in votes]).sum(0), names)
    assert agreed.sums["mse"] == 3.5
    assert agreed.sums["loss"] != agreed.sums["loss"]
    assert (agreed.stop, agreed.digest, agreed.samples) == (True, 5, 2)


def test_a_rank_alone_needs_no_group() -> None:
    assert together(ALONE, lambda: [1, "é"]) == [[1, "é"]]
    assert on_first(ALONE, lambda: {"a": None}) == {"a": None}

    def fail() -> None:
        raise DataError("torn", where="there", remedy="mend it")

    with pytest.raises(DataError, match="torn") as error:
        on_first(ALONE, fail)
    assert (error.value.where, error.value.remedy) == ("there", "mend it")
