"""The summary of a prepared set: its figures are right however many rows there are, and names and captions are text alone."""

from __future__ import annotations

import base64
import io
import itertools
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from pixart_ds.data.format import LatentsInfo, SetDescription
from pixart_ds.demo.pictures import caption, draw, scenes
from pixart_ds.errors import DataError
from pixart_ds.page.charts import block_chart
from pixart_ds.plan.buckets import PAPER_RATIOS, nearest_of, paper_sizes
from pixart_ds.prepare.figures import Bin, bins, row_figures
from pixart_ds.prepare.items import Rejected
from pixart_ds.prepare.summary import Example, Facts, Skipped, grouped, html, text
from tests.report.test_html import Page

_SECTIONS = ["tiles", "examples", "buckets", "captions", "pictures", "bytes", "skipped", "numbers", "made"]


def description(ratios: tuple[float, ...] = PAPER_RATIOS, **more: Any) -> SetDescription:
    sizes = paper_sizes(256) if ratios == PAPER_RATIOS else ((256, 256),) * len(ratios)
    latents = {
        "256": LatentsInfo(square=True, sizes=((32, 32),)),
        "256-buckets": LatentsInfo(square=False, sizes=tuple((high // 8, wide // 8) for high, wide in sizes)),
    }
    about: dict[str, Any] = {
        "ratios": ratios,
        "latents": latents,
        "latent_channels": 4,
        "downsampling_factor": 8,
        "scaling_factor": 0.18215,
        "caption_channels": 4096,
        "max_tokens": 120,
        "classes": ("red circle", "blue square"),
        "vae": "stabilityai/sd-vae-ft-ema",
        "text_encoder": "DeepFloyd/t5-v1_1-xxl",
        "vae_fingerprint": "1f2e3d4c",
        "text_fingerprint": "5a6b7c8d",
        "source": "s3://pictures/internal",
        "caption_codec": "int8",
        "clean_captions": True,
        **more,
    }
    return SetDescription.model_validate(about)


def columns_of(count: int, about: SetDescription, seed: int = 0) -> dict[str, Any]:
    """Rows as a large set's are: many near-square pictures, long captions of which some are cut, scores that some lack."""
    random = np.random.default_rng(seed)
    width = np.clip(random.lognormal(6.8, 0.5, count), 64, 9000).astype(np.int32)
    shape = np.where(random.random(count) < 0.3, 0.02, 0.45) * random.normal(0, 1, count)
    height = np.clip(width * np.exp(shape), 64, 9000).astype(np.int32)
    partition = nearest_of(about.ratios, height, width).astype(np.int16)
    words = np.clip(random.normal(75, 30, count), 3, 180).astype(np.int32)
    found: dict[str, Any] = {
        "id": np.arange(count),
        "partition": partition,
        "num_tokens": np.minimum(words, about.max_tokens),
        "truncated": words > about.max_tokens,
        "height": height,
        "width": width,
        "class_label": random.integers(-1, len(about.classes), count).astype(np.int32),
    }
    for name, info in about.latents.items():
        high, wide = np.array(info.sizes)[np.zeros(count, int) if info.square else partition].T * 8
        scale = np.maximum(high / height, wide / width)
        resized = np.round(height * scale).astype(int), np.round(width * scale).astype(int)
        resized = np.maximum(resized[0], high), np.maximum(resized[1], wide)
        crops = np.stack([*resized, (resized[0] - high) // 2, (resized[1] - wide) // 2], 1).astype(np.int32)
        found[f"crop.{name}"] = pa.FixedSizeListArray.from_arrays(crops.reshape(-1), 4)
    scores = random.normal(5.5, 1, count)
    found["number.aesthetic_score"] = pa.array(scores, mask=random.random(count) < 0.25)
    found["number.clip.similarity"] = pa.array(random.random(count))
    return found


def write_rows(path: Path, columns: dict[str, Any], group: int = 1000) -> Path:
    parquet.write_table(pa.table(columns), path, row_group_size=group)
    return path


def examples(count: int, about: SetDescription) -> list[Example]:
    """Drawn scenes of each ratio in turn, as if they had been decoded."""
    made = []
    for number, scene in enumerate(scenes(count, seed=3)):
        ratio = (0.5, 1.0, 1.46, 0.72)[number % 4]
        high, wide = paper_sizes(256)[about.ratios.index(ratio)]
        picture = draw(scene, np.random.default_rng(number), high, wide)
        crop = (high, wide + 40, 0, 20) if number % 2 else (high + 30, wide, 15, 0)
        original = 4 * crop[0], 4 * crop[1]
        words = f"{caption(scene)}. " * (1 + 3 * (number % 3))
        made.append(Example(picture, words, f"red circle/{number:06d}.png", original, crop, "256-buckets", ratio))
    return made


_REJECTED = {
    ("broken", "cannot be decoded: image file is truncated (N bytes not processed)"): Skipped(
        1342, ("a/000017.jpg", "a/000219.jpg", "b/001.jpg", "b/002.jpg", "c.jpg")
    ),
    ("filtered", "the shorter side has N pixels, fewer than N"): Skipped(48_211, ("t/1.jpg", "t/2.jpg")),
    ("caption", "there is no caption"): Skipped(3, ("x.png", "y.png", "z.png")),
}


def facts_of(folder: Path, count: int = 5000, **more: Any) -> Facts:
    about = more.pop("description", None) or description()
    rows = write_rows(folder / "rows.parquet", more.pop("columns", None) or columns_of(count, about))
    sizes = {"captions": 331_000 * count, "latents-256": 16_500 * count, "latents-256-buckets": 16_300 * count}
    facts = Facts(
        path="/data/internal/v1",
        description=about,
        rows=rows,
        parts=max(1, count // 128),
        folder_bytes=sizes,
        seconds=7321.0,
        skipped=_REJECTED,
        codec_error=0.0071,
        examples=examples(8, about) if len(about.ratios) == 40 else (),
    )
    return replace(facts, **more)


@pytest.mark.parametrize("group", [64, 100_000])
def test_figures_are_those_of_all_rows_over_several_row_groups(
    tmp_path: Path, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixart_ds.prepare.figures._BATCH", 77)
    about = description()
    columns = columns_of(1000, about)
    found = row_figures(write_rows(tmp_path / "rows.parquet", columns, group), about)
    assert found.samples == 1000
    assert found.per_bucket.tolist() == np.bincount(columns["partition"], minlength=40).tolist()
    assert found.per_tokens.tolist() == np.bincount(columns["num_tokens"], minlength=121).tolist()
    assert found.mean_tokens == pytest.approx(columns["num_tokens"].mean())
    assert found.most_tokens == columns["num_tokens"].max()
    shorter = np.minimum(columns["height"], columns["width"])
    assert found.per_side.tolist() == np.bincount(shorter).tolist()
    assert found.truncated == columns["truncated"].sum()
    assert found.labelled == (columns["class_label"] >= 0).sum()
    scores = columns["number.aesthetic_score"].drop_null().to_numpy()
    number = found.numbers["aesthetic_score"]
    assert (number.count, number.low, number.high) == (len(scores), scores.min(), scores.max())
    assert number.mean == pytest.approx(scores.mean())
    assert found.numbers["clip.similarity"].count == 1000
    square = found.cuts["256"]
    assert square.enlarged == (shorter < 256).sum()
    crops = columns["crop.256"].flatten().to_numpy().reshape(-1, 4)
    assert square.kept == pytest.approx((256 * 256 / crops[:, :2].astype(float).prod(1)).mean())
    assert square.kept < found.cuts["256-buckets"].kept <= 1


def test_rows_may_come_from_memory_and_what_they_lack_is_said(tmp_path: Path) -> None:
    about = description()
    columns = columns_of(10, about)
    held = io.BytesIO()
    parquet.write_table(pa.table(columns), held)
    assert row_figures(io.BytesIO(held.getvalue()), about).samples == 10
    del columns["crop.256"], columns["truncated"]
    with pytest.raises(DataError, match=r"the table of rows lacks crop\.256, truncated"):
        row_figures(write_rows(tmp_path / "rows.parquet", columns), about)


def test_numbers_that_are_not_finite_do_not_count(tmp_path: Path) -> None:
    about = description()
    columns = columns_of(4, about)
    columns["number.score"] = pa.array([1.0, None, float("nan"), float("inf")])
    columns["number.none"] = pa.array([None] * 4, pa.float64())
    facts = facts_of(tmp_path, 4, columns=columns)
    assert (facts.figures.numbers["score"].count, facts.figures.numbers["score"].mean) == (1, 1.0)
    assert facts.figures.numbers["none"].count == 0
    for made in (text(facts), html(facts)):
        assert not re.search(r"\b(nan|inf)\b", made)


def test_the_page_is_whole_and_says_what_the_set_is_like(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    made = html(facts)
    page = Page(made)
    assert [each for each in page.ids if each in _SECTIONS] == _SECTIONS
    assert "default-src 'none'" in made
    assert page.tags.count("script") == 1
    for tag, target in page.links:
        assert tag == "img"
        assert target.startswith("data:image/")
    assert page.tags.count("img") == 8
    for words in ("Prepared set v1", "5,000", "983,040", "1,966,080", "331,000", "49,556", "90.8%", "0.71%", "t/1.jpg"):
        assert words in made, words
    counts = facts.figures.per_bucket
    assert f"height / width 1.00: {counts[20]:,} samples" in "".join(page.titles)
    assert sum(title.startswith("height / width") for title in page.titles) == (counts > 0).sum()
    for ratio in PAPER_RATIOS:
        assert f">{ratio:.2f}</text>" in made
    uri = re.search(r'src="data:image/jpeg;base64,([^"]+)"', made)
    assert uri is not None
    with Image.open(io.BytesIO(base64.b64decode(uri[1]))) as picture:
        assert max(picture.size) <= 320


def test_the_text_says_the_same_in_at_most_60_lines(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    made = text(facts)
    lines = made.splitlines()
    assert len(lines) <= 60
    assert max(len(line) for line in lines) <= 130
    for words in ("5,000 samples in 39 parts", "49,556 left out (90.8%)", "983,040 in fp16, 1,966,080 in fp32"):
        assert words in made, words
    assert "48,211 filtered: the shorter side has N pixels, fewer than N (t/1.jpg, t/2.jpg, …)" in made
    assert "stored as int8, relative L2 error 0.71%" in made
    most = int(facts.figures.per_bucket.argmax())
    assert f"most samples at {PAPER_RATIOS[most]:.2f} ({facts.figures.per_bucket[most]:,})" in made


def test_the_text_of_much_of_everything_has_at_most_60_lines_and_the_page_all_of_it(tmp_path: Path) -> None:
    about = description(latents={f"{n}-buckets": description().latents["256-buckets"] for n in range(12)})
    columns = columns_of(300, about)
    columns |= {f"number.score{n}": pa.array(np.arange(300.0)) for n in range(40)}
    skipped = {("broken", f"reason {chr(97 + n)}" * 40): Skipped(n + 1, ("n" * 300,)) for n in range(26)}
    sizes = {f"latents-{name}": 1000 for name in about.latents}
    facts = facts_of(tmp_path, 300, description=about, columns=columns, skipped=skipped, folder_bytes=sizes)
    lines = text(facts).splitlines()
    assert len(lines) <= 60
    assert max(len(line) for line in lines) <= 130
    assert "  and 18 more" in lines
    made = html(facts)
    Page(made)
    assert all(f"score{n}<" in made for n in range(40))
    assert "reason z" in made


def test_what_a_source_says_is_text_and_nothing_else(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\" onload='x\x1b[2J"
    about = description(source=evil, vae=evil, text_encoder=evil, captioner=evil)
    columns = columns_of(20, about)
    columns[f"number.{evil}"] = pa.array(np.ones(20))
    shown = [replace(each, caption=evil * 50, name=evil) for each in examples(2, about)]
    skipped = {("broken", evil): Skipped(1, (evil,))}
    facts = facts_of(
        tmp_path, 20, description=about, columns=columns, examples=shown, skipped=skipped, path=f"/data/{evil}"
    )
    made = html(facts)
    page = Page(made)
    assert page.tags.count("script") == 1
    assert "<script>alert" not in made
    assert "\x1b" not in text(facts)
    assert "<script>alert(1)" in text(facts)


@pytest.mark.parametrize("cleaned", [False, True])
def test_captions_of_which_nothing_is_left_are_counted(tmp_path: Path, cleaned: bool) -> None:
    about = description(clean_captions=cleaned)
    columns = columns_of(50, about)
    words = "3 captions without a word: empty" + (
        ", or written in signs that captions.clean removes" if cleaned else ""
    )
    told = facts_of(tmp_path, 50, description=about, columns=columns)
    assert "without a word" not in text(told) + html(told)
    columns["num_tokens"][:3] = 1
    told = facts_of(tmp_path, 50, description=about, columns=columns)
    assert f"{words}\n" in text(told)
    assert f"{words}." in html(told)


def test_a_set_of_one_bucket_from_which_nothing_was_left_out(tmp_path: Path) -> None:
    about = description(ratios=(1.0,), classes=(), caption_codec="fp16", caption_channels=64, max_tokens=20)
    columns = columns_of(50, about)
    columns = {name: values for name, values in columns.items() if not name.startswith("number.")}
    facts = facts_of(tmp_path, 50, description=about, columns=columns, skipped={}, codec_error=None, seconds=0.0)
    made, lines = html(facts), text(facts)
    page = Page(made)
    assert [each for each in _SECTIONS if each not in page.ids] == ["examples", "numbers"]
    assert "Nothing was left out" in made
    assert "2,560" in made  # 20 tokens of 64 channels in fp16
    assert "Buckets: one, height / width 1.00" in lines
    assert "Left out" not in lines
    assert "Numbers of the source" not in lines
    assert "stored as fp16\n" in lines


def test_a_set_of_no_samples(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, 0, folder_bytes={}, examples=())
    Page(html(facts))
    assert "0 samples" in text(facts)
    assert "Buckets: all empty" in text(facts)


def test_reasons_that_differ_in_numbers_alone_are_one() -> None:
    rejected = [Rejected(f"{side}.jpg", "filtered", f"shorter side {side}, less than 1,024.5") for side in range(9)]
    rejected += [Rejected("a", "broken", "shorter side 3, less than 4"), Rejected("b", "caption", "there is none")]
    assert grouped(rejected) == {
        ("filtered", "shorter side N, less than N"): Skipped(9, tuple(f"{side}.jpg" for side in range(5))),
        ("broken", "shorter side N, less than N"): Skipped(1, ("a",)),
        ("caption", "there is none"): Skipped(1, ("b",)),
    }


@given(st.lists(st.integers(0, 30), max_size=300), st.integers(3, 40), st.sampled_from([0.0, 0.01, 0.3]))
def test_bins_hold_every_value_once_in_round_steps(counts: list[int], most: int, outliers: float) -> None:
    made = bins(np.array(counts, np.int64), most, outliers=outliers)
    assert sum(each.count for each in made) == sum(counts)
    assert len(made) <= most
    for each, after in itertools.pairwise(made):
        assert each.high is not None
        assert after.low == each.high + 1
    for each in made:
        assert each.count == sum(counts[each.low : None if each.high is None else each.high + 1])


def test_outliers_do_not_flatten_a_histogram() -> None:
    counts = np.zeros(9001, np.int64)
    counts[[300, 350, 420, 499]] = 250
    counts[9000] = 1
    made = bins(counts, 20, outliers=0.005)
    assert made[-1] == Bin(500, None, 1)
    assert made[0] == Bin(300, 319, 250)
    assert len(bins(counts, 20)) <= 20


def test_blocks_show_what_is_not_zero() -> None:
    assert block_chart([]) == block_chart([0, 0]) == []
    assert block_chart([0, 1, 8], height=1, width=3) == [" ▁█"]
    assert block_chart([0, 1e-9, 16], height=2, width=3) == ["  █", " ▁█"]
    lines = block_chart(list(range(40)))
    assert (len(lines), max(map(len, lines))) == (3, 80)


def test_the_summary_needs_no_torch() -> None:
    code = (
        "import sys, pixart_ds.prepare.summary; assert not {'torch', 'pyarrow', 'PIL', 'streaming'} & set(sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
