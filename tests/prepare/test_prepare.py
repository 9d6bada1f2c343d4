"""From a folder of pictures to a prepared set: what is in it, what is left out, and what a killed run keeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixart_ds.config.load import load_prepare
from pixart_ds.config.schema import PrepareConfig
from pixart_ds.data.shards import PreparedSet
from pixart_ds.demo.pictures import caption, draw, scenes, write_pictures
from pixart_ds.encoders.latents import KLEncoder
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.prepare.pipeline import plan_of, prepare
from pixart_ds.prepare.sources import load_cut, size_of

ENCODERS = Path(__file__).resolve().parents[2] / "pixart_ds/demo/encoders"


def overrides(source: Path, output: Path, *more: str) -> list[str]:
    return [
        f"source={source}",
        f"output={output}",
        f"vae={ENCODERS / 'vae'}",
        f"text_encoder={ENCODERS / 'text'}",
        *more,
    ]


def config_of(source: Path, output: Path, *more: str) -> PrepareConfig:
    return load_prepare("smoke/prepare", overrides(source, output, "prompts=[a red circle]", *more))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "pictures", 30, seed=2)
    return tmp_path / "pictures"


def test_everything_that_a_picture_has_is_in_the_set(source: Path, tmp_path: Path) -> None:
    report = prepare(config_of(source, tmp_path / "set"))
    made = PreparedSet.open(tmp_path / "set")
    assert (report.samples, made.num_samples, report.skipped) == (30, 30, 0)
    assert made.description.classes == tuple(sorted({path.parent.name for path in source.rglob("*.txt")}))
    vae = KLEncoder(str(ENCODERS / "vae"))
    seen = set()
    for group, (partition, count) in enumerate(zip(made.partitions, made.counts, strict=True)):
        text, image = made.source("captions", None).open(group), made.source("48-buckets", None).open(group)
        for place in range(count):
            said = text.read(place)
            name = bytes(said["name"]).decode()
            seen.add(name)
            assert bytes(said["caption"]).decode() == (source / name).with_suffix(".txt").read_text().strip()
            assert (
                made.description.classes[int.from_bytes(said["class_label"], "little", signed=True)]
                == name.split("/")[0]
            )
            shown = image.read(place)
            height, width = np.frombuffer(shown["original_size"], "<i4").tolist()
            assert (height, width) == size_of(source / name)
            ratios = np.abs(np.array(made.description.ratios) - height / width)
            assert ratios.argmin() == partition
            size = made.description.latents["48-buckets"].sizes[partition]
            (pixels,) = load_cut(source / name, [(size[0] * 4, size[1] * 4)])
            wanted = vae.encode(pixels[None])[0]
            stored = np.frombuffer(shown["latents"], "<f2").reshape(8, *size)
            assert np.abs(stored.astype(np.float32) - wanted).max() < 0.01
    assert len(seen) == 30
    assert made.prompts[0][0] == "a red circle"
    assert made.null_embeds.shape == (1, 64)


def test_broken_pictures_are_listed_and_left_out_and_nothing_takes_their_place(source: Path, tmp_path: Path) -> None:
    jpeg = min(source.rglob("*.jpg"))
    jpeg.write_bytes(jpeg.read_bytes()[:-200])  # its header is fine
    png = min(source.rglob("*.png"))
    png.write_text("this is no picture")
    report = prepare(config_of(source, tmp_path / "set"))
    listed = [json.loads(line) for line in (tmp_path / "set/skipped.jsonl").read_text().splitlines()]
    assert {line["picture"] for line in listed} == {str(path.relative_to(source)) for path in (jpeg, png)}
    assert all(line["reason"] for line in listed)
    assert (report.samples, report.skipped, PreparedSet.open(tmp_path / "set").num_samples) == (28, 2, 28)
    assert "2 broken pictures were left out" in str(report)


def test_a_source_of_broken_pictures_only_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_text("no")
    (tmp_path / "pictures/a.txt").write_text("a caption")
    with pytest.raises(DataError, match="no part of the set holds a row"):
        prepare(config_of(tmp_path / "pictures", tmp_path / "set"))


def test_pictures_are_turned_as_they_are_shown(tmp_path: Path) -> None:
    (scene,) = scenes(1, 4)
    upright = draw(scene, np.random.default_rng(0), 40, 80)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "a.png", exif=exif)
    assert size_of(tmp_path / "a.png") == (40, 80)
    (made,) = load_cut(tmp_path / "a.png", [(40, 80)])
    assert np.abs(made.astype(int) - upright).mean() < 1


def test_what_is_said_before_anything_is_encoded(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    with pytest.raises(DataError, match="there is no folder of pictures"):
        prepare(config_of(tmp_path / "none", output))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no picture"):
        prepare(config_of(tmp_path / "empty", output))
    captions = sorted(path for path in source.rglob("*.txt") if not path.name.endswith(".short.txt"))
    for path in captions[:4]:
        path.unlink()
    with pytest.raises(DataError, match=r"4 of 30 pictures have no caption: .*, …"):
        prepare(config_of(source, output))
    for path in captions[:4]:
        path.write_text("a red circle")
    picture = (
        captions[0].with_suffix(".png") if captions[0].with_suffix(".png").exists() else captions[0].with_suffix(".jpg")
    )
    double = picture.with_suffix(".webp")
    double.write_bytes(picture.read_bytes())
    with pytest.raises(DataError, match="two pictures share one caption"):
        prepare(config_of(source, output))
    double.unlink()
    with pytest.raises(ConfigError, match=r"latents 32-square: \[\(36, 36\)\] are no multiples of 8 pixels"):
        prepare(config_of(source, output, "latents.0.square=36"))
    assert not output.exists()


def test_a_plan_counts_without_encoding(source: Path, tmp_path: Path) -> None:
    plan = plan_of(config_of(source, tmp_path / "set"))
    about = plan.summary()
    assert (about["pictures"], about["broken"], sum(about["pictures_by_ratio"].values())) == (30, 0, 30)
    assert about["parts"] == sum(-(-count // 8) for count in about["pictures_by_ratio"].values() if count)
    assert "30 pictures of" in str(plan)
    assert not (tmp_path / "set").exists()


def test_once_more_changes_nothing_and_other_settings_are_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    first = prepare(config_of(source, output))
    stamp = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    again = prepare(config_of(source, output))
    assert (again.parts_written, again.parts_kept) == (0, first.parts_written)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == stamp
    for more, changed in (("seed=5", "parts"), ("latents.0.square=40", "set"), ("prompts=[a blue circle]", "prompts")):
        with pytest.raises(DataError, match=rf"prepared from other pictures or settings \(changed: {changed}\)"):
            prepare(config_of(source, output, more))
    next(path for path in source.rglob("*.txt") if not path.name.endswith(".short.txt")).write_text("another caption")
    with pytest.raises(DataError, match="changed: pictures"):
        prepare(config_of(source, output))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == stamp
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("…")
    with pytest.raises(DataError, match="is not empty and holds no prepared set"):
        prepare(config_of(source, tmp_path / "mine"))


def test_a_killed_run_keeps_its_parts_and_two_processes_make_the_same_set(source: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    prepare(config_of(source, whole))
    killed = tmp_path / "killed"
    sets = [word for each in overrides(source, killed, "prompts=[a red circle]") for word in ("--set", each)]
    command = [sys.executable, "-m", "pixart_ds", "prepare", "smoke/prepare", *sets]
    process = subprocess.Popen(
        command, cwd=ENCODERS.parents[2], env={**os.environ, "PYTHONPATH": str(ENCODERS.parents[2])}
    )
    while not list(killed.glob("parts/part-*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "manifest.json").exists()
    report = prepare(config_of(source, killed), processes=2)
    assert report.parts_kept >= 1
    one, two = PreparedSet.open(whole), PreparedSet.open(killed)
    assert one.partitions.tolist() == two.partitions.tolist()
    assert one.counts.tolist() == two.counts.tolist()
    for name in ("captions", "32-square", "40-buckets", "48-buckets"):
        assert one.index(name).hashes == two.index(name).hashes


def test_captions_follow_the_suffix(source: Path, tmp_path: Path) -> None:
    prepare(config_of(source, tmp_path / "set", "caption_suffix=.short.txt"))
    said = PreparedSet.open(tmp_path / "set").source("captions", None).open(0).read(0)
    assert bytes(said["caption"]).decode().startswith("picture ")
    assert caption(scenes(1, 2)[0]).startswith("a ")
