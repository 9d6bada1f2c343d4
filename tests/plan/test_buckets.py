"""The paper's buckets, and how pictures are cut."""

from __future__ import annotations

import pytest

from pixart_ds.plan.buckets import PAPER_RATIOS, cut, nearest, paper_sizes


def test_the_papers_table() -> None:
    sizes = paper_sizes(1024)
    assert len(sizes) == len(PAPER_RATIOS) == 40
    assert list(PAPER_RATIOS) == sorted(PAPER_RATIOS)
    for ratio, (height, width) in zip(PAPER_RATIOS, sizes, strict=True):
        assert height % 64 == width % 64 == 0
        assert 3696 <= height * width // 256 <= 4096  # tokens at patch 2 of latents 8 times smaller
        assert abs(height / width - ratio) < 0.008
        assert nearest(PAPER_RATIOS, height, width) == PAPER_RATIOS.index(ratio) or ratio in (0.26, 0.27, 0.28)
    assert paper_sizes(512) == tuple((h // 2, w // 2) for h, w in sizes)
    assert paper_sizes(256) == tuple((h // 4, w // 4) for h, w in sizes)
    # rows of the released tables, by hand
    assert dict(zip(PAPER_RATIOS, sizes, strict=True))[0.52] == (704, 1344)
    assert dict(zip(PAPER_RATIOS, paper_sizes(512), strict=True))[1.46] == (608, 416)
    assert dict(zip(PAPER_RATIOS, paper_sizes(256), strict=True))[3.88] == (496, 128)


@pytest.mark.parametrize(
    ("height", "width", "ratio"),
    [(100, 100, 1.0), (10, 1000, 0.25), (1000, 10, 4.0), (1069, 1000, 1.07), (97, 100, 0.94), (75, 100, 0.72)],
)
def test_nearest_is_linear_in_height_over_width(height: int, width: int, ratio: float) -> None:
    assert PAPER_RATIOS[nearest(PAPER_RATIOS, height, width)] == ratio


def test_a_tie_goes_to_the_lower_ratio() -> None:
    assert nearest((0.5, 1.0, 1.5), 3, 4) == 0


def test_cut_covers_the_size_keeps_the_ratio_and_is_central() -> None:
    for height in (5, 33, 480, 1000, 4001):
        for width in (7, 32, 640, 999):
            for size in ((32, 32), (24, 48), (704, 1408), (2048, 512)):
                made = cut(height, width, size)
                assert made.resized[0] >= size[0]
                assert made.resized[1] >= size[1]
                assert size[0] == made.resized[0] or size[1] == made.resized[1]
                assert abs(made.resized[0] / made.resized[1] - height / width) <= (1 / made.resized[1]) * (
                    1 + height / width
                )
                for extra, offset in ((made.resized[0] - size[0], made.top), (made.resized[1] - size[1], made.left)):
                    assert extra - 2 * offset in (0, 1)


def test_cut_to_a_square_resizes_the_shorter_side() -> None:
    assert (cut(480, 640, (256, 256)).resized, cut(640, 480, (256, 256)).resized) == ((256, 341), (341, 256))
