"""How the ranks come to one decision: a small all-gather after each step, and words that all ranks hear together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pixart_ds import errors
from pixart_ds.engine.world import World
from pixart_ds.errors import PixArtError

Result = TypeVar("Result")

_HALF = 2**32


@dataclass(frozen=True)
class Votes:
    """What one rank says after a step.

    Attributes:
        stop: It was asked to stop.
        save: It wants a checkpoint.
        saved: It has done its part of the save that is under way.
        digest: Sum modulo 2⁶⁴ over what was delivered to it.
        samples: Samples of its share.
        sums: Sums over its samples, by name; every rank gives the same names.
        each: Figures of this rank alone, by name; every rank gives the same names.
    """

    stop: bool = False
    save: bool = False
    saved: bool = False
    digest: int = 0
    samples: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    each: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Agreement:
    """What all ranks hear, each the same.

    Attributes:
        stop: Any rank was asked to stop.
        save: Any rank wants a checkpoint.
        saved: How many ranks have done their part of the save that is under way.
        digest: Sum modulo 2⁶⁴ of the ranks' digests, exact.
        samples: Samples of the step.
        sums: Sums over all ranks, by name.
        each: What each rank gave, by name and rank.
    """

    stop: bool
    save: bool
    saved: int
    digest: int
    samples: int
    sums: dict[str, float]
    each: dict[str, list[float]] = field(default_factory=dict)


def agree(world: World, votes: Votes) -> Agreement:
    """Brings the votes of all ranks together, in one all-gather of a few numbers, so that all take the same branch.

    Every rank adds them up itself, in the sequence of the ranks: all come to the same bits.
    """
    names, own = sorted(votes.sums), sorted(votes.each)
    alone = torch.tensor([votes.each[name] for name in own], dtype=torch.float64)
    mine = torch.cat([pack(votes, names), alone]).to(world.device)
    gathered = mine.new_empty(world.size * len(mine))
    dist.all_gather_into_tensor(gathered, mine)
    columns = gathered.view(world.size, -1).T.tolist()  # one for each number, by rank
    added = len(columns) - len(own)
    total = torch.tensor([sum(column) for column in columns[:added]], dtype=torch.float64)
    return replace(unpack(total, names), each=dict(zip(own, columns[added:], strict=True)))


def pack(votes: Votes, names: list[str]) -> torch.Tensor:
    """The votes as float64; the digest in two halves of 32 bits, whose sums stay exact for up to 2²¹ ranks."""
    digest = votes.digest % 2**64
    counts = [votes.stop, votes.save, votes.saved, votes.samples, digest % _HALF, digest // _HALF]
    return torch.tensor([float(each) for each in counts] + [votes.sums[name] for name in names], dtype=torch.float64)


def unpack(numbers: torch.Tensor, names: list[str]) -> Agreement:
    """The agreement from the sum of the ranks' `pack`s."""
    stop, save, saved, samples, low, high, *sums = numbers.tolist()
    digest = (int(low) + int(high) * _HALF) % 2**64
    return Agreement(stop > 0, save > 0, int(saved), digest, int(samples), dict(zip(names, sums, strict=True)))


def gather(world: World, value: Any) -> list[Any]:
    """Every rank's JSON value, on every rank, by rank. A collective. No pickle."""
    if world.size == 1:
        return [json.loads(json.dumps(value))]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(world.device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=world.device) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64, device=world.device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=world.device)
    padded[: len(data)] = data
    texts = [torch.zeros_like(padded) for _ in range(world.size)]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(texts, sizes, strict=True)]


def together(world: World, action: Callable[[], Result], *, ranks: range | None = None) -> list[Result]:
    """Runs `action` on each rank (or on `ranks` only) and gives every rank all JSON results; a failure anywhere is
    raised everywhere, so that no rank waits for one that left.

    Raises:
        PixArtError: Of the lowest rank that raised one; its class, text, place and remedy are kept.
        Exception: This rank's own, if it raised something else; on the other ranks a PixArtError that quotes it.
    """
    own: BaseException | None = None
    said: dict[str, Any] = {"result": None}
    if ranks is None or world.rank in ranks:
        try:
            said = {"result": action()}
        except Exception as error:
            own = error
            what = (
                error.what if isinstance(error, PixArtError) else f"rank {world.rank}: {type(error).__name__}: {error}"
            )
            known = isinstance(error, PixArtError)
            said = {
                "error": type(error).__name__ if known else "PixArtError",
                "what": what,
                "where": error.where if isinstance(error, PixArtError) else None,
                "remedy": error.remedy if isinstance(error, PixArtError) else None,
            }
    answers = gather(world, said)
    failures = [answer for answer in answers if "error" in answer]
    if failures:
        if own is not None and not isinstance(own, PixArtError):
            raise own
        first = failures[0]
        kind = getattr(errors, first["error"], PixArtError)
        raise kind(first["what"], where=first["where"], remedy=first["remedy"]) from own
    return [answer["result"] for answer in answers]


def on_first(world: World, action: Callable[[], Result]) -> Result:
    """Runs `action` on rank 0 and gives every rank its JSON result, or its error (see `together`)."""
    return together(world, action, ranks=range(1))[0]
