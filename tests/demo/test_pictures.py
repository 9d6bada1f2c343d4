"""The drawn world and its judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pixart_ds.demo import pictures
from pixart_ds.demo.judge import judge, read, score, score_class
from pixart_ds.demo.pictures import caption, class_name, draw, held_out_scenes, is_held_out, scenes, write_pictures
from pixart_ds.errors import DataError
from pixart_ds.plan.buckets import cut

SIZES = [(32, 32), (40, 40), (48, 48), (40, 56), (56, 40), (32, 48), (32, 64), (64, 64)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_judge_reads_what_was_drawn(size: tuple[int, int]) -> None:
    random, shown = np.random.default_rng(1), scenes(30, 2)
    assert min(score([draw(scene, random, *size) for scene in shown], shown).values()) >= 0.97


def test_the_judge_finds_faults() -> None:
    random, shown = np.random.default_rng(1), scenes(40, 2)
    drawn = [draw(scene, random, 32, 32) for scene in shown]
    rolled = [*drawn[1:], drawn[0]]
    assert score(rolled, shown)["all"] < 0.1
    noise = [random.integers(0, 255, (32, 32, 3), dtype=np.uint8) for _ in shown]
    assert score(noise, shown)["all"] == 0
    assert judge(np.full((32, 32, 3), 245, np.uint8), shown[0])["place"] == 0
    assert score_class(drawn, [class_name(scene) for scene in shown]) == {"colour": 1.0, "shape": 1.0}
    assert read(drawn[0]).ground == shown[0].ground


def test_a_square_cut_of_a_wide_picture_keeps_its_caption_true() -> None:
    random, shown = np.random.default_rng(1), scenes(30, 3)
    for size in ((48, 96), (90, 60)):
        cuts = []
        for scene in shown:
            place = cut(*size, (min(size), min(size)))
            cuts.append(
                draw(scene, random, *size)[place.top : place.top + min(size), place.left : place.left + min(size)]
            )
        assert score(cuts, shown)["all"] >= 0.9


def test_held_out_scenes_are_an_eighth_and_never_drawn(tmp_path: Path) -> None:
    held = held_out_scenes(50, 5)
    assert all(is_held_out(scene) for scene in held)
    shown = scenes(800, 5)
    assert not any(is_held_out(scene) for scene in shown)
    random = np.random.default_rng(0)
    share = np.mean([is_held_out(pictures.random_scene(random)) for _ in range(4000)])
    assert share == pytest.approx(1 / 8, abs=0.03)
    assert {thing.place for scene in shown for thing in scene.things} == set(pictures.PLACES)
    assert {len(scene.things) for scene in shown} == {1, 2}


def test_pictures_are_ordinary_files_and_the_same_every_time(tmp_path: Path) -> None:
    assert write_pictures(tmp_path / "a", 40, seed=3) == 40
    (tmp_path / "a" / "drawn.json").read_text()
    made = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in (tmp_path / "a").rglob("*.*")}
    assert {path.suffix for path in made} == {".png", ".jpg", ".txt", ".json"}
    first = scenes(40, 3)[0]
    assert (tmp_path / "a" / class_name(first) / "000000.txt").read_text() == caption(first) + "\n"
    assert (tmp_path / "a" / class_name(first) / "000000.short.txt").read_text() == f"picture {first.things[0].shape}\n"
    for path in list(made)[::3]:
        if path.suffix != ".json":
            (tmp_path / "a" / path).unlink()  # as if it had been stopped
    write_pictures(tmp_path / "a", 40, seed=3)
    for path in (tmp_path / "a").rglob("*.short.txt"):
        assert path.with_name(path.name.replace(".short", "")).exists() or path.relative_to(tmp_path / "a") in made
    write_pictures(tmp_path / "b", 40, seed=3)
    assert {path.relative_to(tmp_path / "b"): path.read_bytes() for path in (tmp_path / "b").rglob("*.*")} == made
    assert write_pictures(tmp_path / "b", 40, seed=3) == 0


def test_other_pictures_and_strangers_folders_are_left_alone(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a", 3, seed=3)
    with pytest.raises(DataError, match="holds other drawn pictures"):
        write_pictures(tmp_path / "a", 4, seed=3)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("…")
    with pytest.raises(DataError, match="is not empty and holds no drawn pictures"):
        write_pictures(tmp_path / "b", 3, seed=3)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["thesis.tex"]
