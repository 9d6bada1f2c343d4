"""The geometry of the flat shards, for many worlds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pixart_ds.engine.shards import FlatLayout, Place


def _layout(counts: list[int], world_size: int) -> FlatLayout:
    places, at = [], 0
    for number, count in enumerate(counts):
        places.append(Place(f"p{number}", at, (count,)))
        at += count
    align = 2 * world_size
    return FlatLayout(tuple(places), -(-at // align) * align // world_size, world_size)


LAYOUTS = st.builds(_layout, st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 70))


@given(LAYOUTS)
def test_the_ranks_own_every_element_once(layout: FlatLayout) -> None:
    assert [i for rank in range(layout.world_size) for i in layout.own(rank)] == list(range(layout.count))
    assert layout.problems() == []


@given(LAYOUTS, st.data())
def test_pieces_cover_a_range_and_stay_with_their_owner(layout: FlatLayout, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, layout.count))
    end = data.draw(st.integers(start, layout.count))
    pieces = list(layout.pieces(start, end))
    assert [i for _, a, b in pieces for i in range(a, b)] == list(range(start, end))
    assert all(set(range(a, b)) <= set(layout.own(rank)) for rank, a, b in pieces)


def test_a_layout_that_cannot_be_is_told() -> None:
    gap = FlatLayout((Place("a", 0, (2, 3)), Place("b", 7, (1,))), 4, 2)
    assert gap.problems() == ["b begins at 7 instead of 6"]
    assert FlatLayout((Place("a", 0, (9,)),), 4, 2).problems() == ["2 partitions of 4 do not hold 9 elements"]


def test_a_scalar_counts_one() -> None:
    assert Place("scale", 3, ()).end == 4
