"""From a folder of pictures to a prepared set: what is in it, what is left out, what is kept, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pixart_ds import files
from pixart_ds.config.load import load_prepare
from pixart_ds.config.schema import PrepareConfig
from pixart_ds.data.shards import PreparedSet
from pixart_ds.demo.pictures import write_pictures
from pixart_ds.encoders.clean import clean_caption
from pixart_ds.encoders.latents import KLEncoder
from pixart_ds.encoders.text import T5Encoder
from pixart_ds.errors import ConfigError, DataError, MachineError
from pixart_ds.prepare import parts, pipeline
from pixart_ds.prepare.encode import CaptionFeatures
from pixart_ds.prepare.parts import Plan, decisions
from pixart_ds.prepare.pictures import load_cut
from pixart_ds.prepare.pipeline import Task, dry_run, plan_of, prepare, words_of, work_folder
from pixart_ds.prepare.repeated import REPEATED, RepeatedCaptions, write_repeated
from tests.helpers.disk import small_disk

ENCODERS = Path(__file__).resolve().parents[2] / "pixart_ds/demo/encoders"


def overrides(source: Path, output: Path | str, *more: str) -> list[str]:
    return [
        f"source.path={source}",
        f"output={output}",
        f"vae={ENCODERS / 'vae'}",
        f"text_encoder={ENCODERS / 'text'}",
        "prompts=[a red circle]",
        *more,
    ]


def config_of(source: Path, output: Path | str, *more: str) -> PrepareConfig:
    return load_prepare("smoke/prepare", overrides(source, output, *more))


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a set that others may see, but the page, which says how long it took."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    shown = (path for path in paths if not any(part.startswith(".") for part in path.parts))
    return {str(path): (folder / path).read_bytes() for path in shown if path.name != "summary.html"}


def own_captioners(folder: Path) -> str:
    """Writes a module of captioners, and says how the override that takes one begins.

    `Sizes` says of pictures with a circle how large they are, of others nothing; `Few` says the same of many.
    """
    (folder / "mine.py").write_text(
        "class Sizes:\n"
        "    identity = 'mine 1'\n"
        "    def __init__(self, config, device): pass\n"
        "    def caption(self, pictures, originals, seed):\n"
        "        return [f'{each.shape[0]} by {each.shape[1]}' if old.count('circle') else '  ' \n"
        "                for each, old in zip(pictures, originals)]\n"
        "class Few(Sizes):\n"
        "    def caption(self, pictures, originals, seed):\n"
        "        return ['a picture ' * (len(old) % 9) for old in originals]\n"
    )
    return "captions.captioner=mine"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "pictures"
    write_pictures(folder, 30, seed=2)
    return folder


@pytest.fixture(scope="module")
def made(pictures: Path) -> Path:
    prepare(config_of(pictures, pictures.parent / "set"))
    return pictures.parent / "set"


@pytest.fixture
def source(pictures: Path, tmp_path: Path) -> Path:
    """Pictures that a test may spoil."""
    subprocess.run(["cp", "-r", str(pictures), str(tmp_path / "pictures")], check=True)
    return tmp_path / "pictures"


def captions_of(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*.txt") if not path.name.endswith(".short.txt"))


# ---- what is in a set ---------------------------------------------------------------------------------------------------


def test_everything_that_a_picture_has_is_in_the_set(pictures: Path, made: Path) -> None:
    opened = PreparedSet.open(made)
    about = opened.description
    assert about.classes == tuple(sorted({path.parent.name for path in pictures.rglob("*.txt")}))
    vae, text = KLEncoder(str(ENCODERS / "vae")), T5Encoder(str(ENCODERS / "text"), 40)
    seen = []
    for group, (partition, count) in enumerate(zip(opened.partitions, opened.counts, strict=True)):
        texts, images = opened.source("captions", None).open(group), opened.source("48-buckets", None).open(group)
        for place in range(count):
            said, shown = texts.read(place), images.read(place)
            name, words = bytes(said["name"]).decode(), bytes(said["caption_text"]).decode()
            seen.append(name)
            assert words == (pictures / name).with_suffix(".txt").read_text().strip()
            label = int.from_bytes(said["class_label"], "little", signed=True)
            assert about.classes[label] == name.split("/")[0]
            size = about.latents["48-buckets"].sizes[partition]
            data = (pictures / name).read_bytes()
            original, (pixels,), (cut,) = load_cut(data, [(size[0] * 4, size[1] * 4)])
            assert tuple(np.frombuffer(shown["original_size"], "<i4").tolist()) == original
            assert np.frombuffer(shown["crop"], "<i4").tolist() == [*cut.resized, cut.top, cut.left]
            assert np.abs(np.array(about.ratios) - original[0] / original[1]).argmin() == partition
            stored = np.frombuffer(shown["latents"], "<f2").reshape(8, *size)
            assert np.abs(stored.astype(np.float32) - vae.encode(pixels[None])[0]).max() < 0.01
            features = np.frombuffer(said["caption_embeds"], "<f2").reshape(-1, 64)
            (wanted,) = text.encode([clean_caption(words)])
            assert np.abs(features.astype(np.float32) - wanted).max() < 0.01
    assert len(set(seen)) == len(seen) == 30
    assert [text for text, _ in opened.prompts] == ["a red circle"]
    null, mask = text.null()
    assert opened.null_embeds.tobytes() == null.tobytes()
    assert opened.null_embeds.shape == (40, 64)
    assert opened.null_length == mask.sum() == 1


def test_the_table_has_a_line_for_each_row(made: Path) -> None:
    opened, table = PreparedSet.open(made), pq.read_table(made / "rows.parquet").to_pylist()
    assert [row["id"] for row in table] == list(range(30))
    for row in table:
        text = opened.source("captions", None).open(row["shard"]).read(row["row"])
        assert (bytes(text["name"]).decode(), bytes(text["caption_text"]).decode()) == (row["name"], row["caption"])
        assert len(text["caption_embeds"]) == 2 * 64 * row["num_tokens"]
        assert (row["part"], row["partition"]) == (opened.parts[row["shard"]], opened.partitions[row["shard"]])
        image = opened.source("40-buckets", None).open(row["shard"]).read(row["row"])
        assert np.frombuffer(image["crop"], "<i4").tolist() == row["crop.40-buckets"]
        assert np.frombuffer(image["original_size"], "<i4").tolist() == [row["height"], row["width"]]


def test_int8_halves_the_captions_and_says_its_error(pictures: Path, made: Path, tmp_path: Path) -> None:
    prepare(config_of(pictures, tmp_path / "set", "caption_codec=int8"))
    whole, half = PreparedSet.open(made), PreparedSet.open(tmp_path / "set")
    manifest = files.read_json(tmp_path / "set/manifest.json")
    assert 0 < manifest["totals"]["caption_error"] < 0.02
    assert files.read_json(made / "manifest.json")["totals"]["caption_error"] is None
    assert half.index("48-buckets").hashes == whole.index("48-buckets").hashes
    row = half.source("captions", None).open(0).read(0)
    assert len(row["caption_embeds"]) % (64 + 2) == 0


def test_numbers_of_a_list_can_be_filtered_on(pictures: Path, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*") if path.suffix in (".png", ".jpg"))
    lines = [
        {"path": name, "prompt": f"picture {number}", "aesthetic_score": number / 10}
        for number, name in enumerate(names)
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ("source.kind=list", f"source.root={pictures}", "filter.minimum={aesthetic_score: 1}")
    report = prepare(config_of(tmp_path / "list.jsonl", tmp_path / "set", *more))
    assert (report.samples, report.skipped) == (20, {"filtered": 10})
    scores = PreparedSet.open(tmp_path / "set").rows("number.aesthetic_score")["number.aesthetic_score"]
    assert sorted(scores.tolist()) == [number / 10 for number in range(10, 30)]


def features_of(path: Path) -> dict[str, set[bytes]]:
    """All features that a set has for each caption."""
    opened = PreparedSet.open(path)
    found: dict[str, set[bytes]] = {}
    for group, count in enumerate(opened.counts):
        for row in range(count):
            said = opened.source("captions", None).open(group).read(row)
            found.setdefault(bytes(said["caption_text"]).decode(), set()).add(bytes(said["caption_embeds"]))
    return found


def test_captions_that_many_share_are_encoded_once_and_alike(pictures: Path, tmp_path: Path) -> None:
    """However parts are shared out: a batch's padding must not show in a feature."""
    more = ("source.caption_suffix=.short.txt", "rows_per_group=4")
    source = tmp_path / "pictures"
    subprocess.run(["cp", "-r", str(pictures), str(source)], check=True)
    for number, path in enumerate(sorted(source.rglob("*.short.txt"))):
        path.write_text(f"a red circle {number}")
    config = config_of(source, tmp_path / "one", *more)
    prepare(config)
    assert RepeatedCaptions(work_folder(config) / REPEATED).places == {}
    for path in sorted(source.rglob("*.short.txt"))[:20]:
        path.write_text("a red circle")
    for path in sorted(source.rglob("*.short.txt"))[20:22]:
        path.write_text("a large blue square")
    config = config_of(source, tmp_path / "two", *more)
    prepare(config, only="scan")
    found = RepeatedCaptions(work_folder(config) / REPEATED)
    assert found.places == {"a red circle": (0, 0), "a large blue square": (0, 1)}
    for number in range(3):
        prepare(config, task=Task(number, 3), only="encode")
    assert len(list((work_folder(config) / "features").iterdir())) == 1
    prepare(config)
    assert not (work_folder(config) / "features").exists()
    assert len(features_of(tmp_path / "two")["a red circle"]) == 1


# ---- what is left out ---------------------------------------------------------------------------------------------------


def test_broken_pictures_are_listed_and_left_out_and_nothing_takes_their_place(source: Path, tmp_path: Path) -> None:
    jpeg = min(source.rglob("*.jpg"))
    jpeg.write_bytes(jpeg.read_bytes()[:-200])  # its header is fine
    png = min(source.rglob("*.png"))
    png.write_text("this is no picture")
    report = prepare(config_of(source, tmp_path / "set"))
    listed = files.read_json_lines(tmp_path / "set/skipped.jsonl")
    assert {(line["picture"], line["kind"]) for line in listed} == {
        (str(path.relative_to(source)), "broken") for path in (jpeg, png)
    }
    assert (report.samples, report.skipped, PreparedSet.open(tmp_path / "set").num_samples) == (28, {"broken": 2}, 28)
    assert "2 broken pictures were left out" in str(report)


def test_a_source_of_broken_pictures_only_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_text("no")
    (tmp_path / "pictures/a.txt").write_text("a caption")
    with pytest.raises(DataError, match=r"nothing to prepare: all 1 pictures are left out: a.png \(it is no picture\)"):
        prepare(config_of(tmp_path / "pictures", tmp_path / "set"))


def test_a_picture_that_changed_after_it_was_listed_is_not_taken_for_another(source: Path, tmp_path: Path) -> None:
    config = config_of(source, tmp_path / "set")
    prepare(config, only="scan")
    gone, other = sorted(source.rglob("*.png"))[:2]
    gone.unlink()
    other.write_bytes(other.read_bytes() + b"more")
    report = prepare(config, only="encode")
    assert report.parts_left == 0
    assert prepare(config, only="finish").skipped == {"broken": 2}


# ---- before anything is encoded -----------------------------------------------------------------------------------------


def test_what_is_said_before_anything_is_encoded(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    with pytest.raises(ConfigError, match=r"latents 32-square: \[\(36, 36\)\] are no multiples of 8 pixels"):
        prepare(config_of(source, output, "latents.0.square=36"))
    with pytest.raises(ConfigError, match="there is no VAE folder nowhere/vae/at/all"):
        prepare(config_of(source, output, "vae=nowhere/vae/at/all"))
    with pytest.raises(ConfigError, match=r"9000000 rows of .* do not fit one shard of 4 GiB"):
        prepare(config_of(source, output, "rows_per_group=9000000"))
    assert not output.exists()
    with pytest.raises(DataError, match="there is no folder of pictures"):
        prepare(config_of(tmp_path / "none", output))
    captions = captions_of(source)
    for path in captions[:4]:
        path.unlink()
    with pytest.raises(DataError, match=r"4 of 30 pictures have no caption: .*, …"):
        prepare(config_of(source, output))
    report = prepare(config_of(source, output, "captions.missing=skip"))  # a recipe may change until there are parts
    assert (report.samples, report.skipped) == (26, {"caption": 4})


def test_a_plan_counts_without_encoding(pictures: Path, tmp_path: Path) -> None:
    about = dry_run(config_of(pictures, tmp_path / "set"))
    assert (about["pictures"], sum(about["skipped"].values()), sum(about["pictures_by_ratio"].values())) == (30, 0, 30)
    assert about["parts"] == sum(-(-count // 8) for count in about["pictures_by_ratio"].values() if count)
    assert words_of(about).startswith("30 pictures of 11 classes in ")
    assert not (tmp_path / "set").exists()


# ---- going on -----------------------------------------------------------------------------------------------------------


def test_once_more_changes_nothing_and_other_settings_are_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    first = prepare(config_of(source, output))
    stamp = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    again = prepare(config_of(source, output, "batch_size=7", "captions.batch_size=3"))  # how fast, not what
    assert (again.parts_written, again.parts_kept, again.samples) == (0, first.parts_written, 30)
    locks = output / ".work/locks"

    def now() -> dict[Path, int]:
        paths = (path for path in output.rglob("*") if path.is_file() and path.parent != locks)
        return {path: path.stat().st_mtime_ns for path in paths}

    stamp = {path: time for path, time in stamp.items() if path.parent != locks}
    assert now() == stamp
    for more, words in (
        ("seed=5", "seed was 0 and is 5"),
        ("latents.0.square=40", r"latents was .* and is "),
        ("prompts=[a blue circle]", r'prompts was \["a red circle"\] and is \["a blue circle"\]'),
        ("captions.clean=false", "captions.clean was true and is false"),
    ):
        with pytest.raises(DataError, match=f"begun with another recipe: {words}"):
            prepare(config_of(source, output, more))
    captions_of(source)[0].write_text("another caption")
    with pytest.raises(DataError, match="the source is not what was scanned"):
        prepare(config_of(source, output))
    assert now() == stamp
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("…")
    with pytest.raises(DataError, match="is not empty and holds no set of this recipe"):
        prepare(config_of(source, tmp_path / "mine"))


def test_a_start_that_was_killed_while_it_noted_the_recipe_goes_on(pictures: Path, tmp_path: Path) -> None:
    work = tmp_path / "set/.work"
    work.mkdir(parents=True)
    (work / ".recipe.json.0123abcd.tmp").write_text('{"sou')
    assert prepare(config_of(pictures, tmp_path / "set"), only="scan").parts == 6


def test_a_work_folder_with_other_things_is_refused(pictures: Path, tmp_path: Path) -> None:
    for name in ("scan/mine.txt", "features/mine.txt", "plan/mine.txt"):
        kept = tmp_path / name.replace("/", "-") / name
        kept.parent.mkdir(parents=True)
        kept.write_text("hours of work")
        config = config_of(pictures, tmp_path / "set", f"work={kept.parents[1]}")
        with pytest.raises(DataError, match=f"holds other things: {kept.parent.name}") as caught:
            prepare(config)
        assert "as `work`" in str(caught.value)
        assert kept.read_text() == "hours of work"
    with pytest.raises(ConfigError, match="is where the set itself is written"):
        config_of(pictures, tmp_path / "set", f"work={tmp_path / 'set'}")
    with pytest.raises(ConfigError, match="is where the set itself is written"):
        config_of(pictures, tmp_path / "set", f"work={tmp_path / 'set/latents-40/work'}")


def test_a_dry_run_with_another_recipe_tells_no_counts_of_the_first(pictures: Path, tmp_path: Path) -> None:
    config = config_of(pictures, tmp_path / "set")
    prepare(config, only="scan")
    assert dry_run(config)["pictures"] == 30
    with pytest.raises(DataError, match="begun with another recipe: filter.min_side") as caught:
        dry_run(config_of(pictures, tmp_path / "set", "filter.min_side=5000"))
    assert str(work_folder(config) / "recipe.json") in str(caught.value)


def test_the_page_tells_how_long_it_took_only_if_one_call_wrote_all(pictures: Path, made: Path, tmp_path: Path) -> None:
    assert "prepared in" in (made / "summary.html").read_text()
    config = config_of(pictures, tmp_path / "set")
    prepare(config, only="scan")
    prepare(config, only="encode")
    report = prepare(config, only="finish")
    assert "prepared in" not in (tmp_path / "set/summary.html").read_text() + report.page
    assert "30 samples in" in report.page


def test_nothing_that_is_in_an_output_already_is_taken_or_overwritten(
    made: Path, pictures: Path, tmp_path: Path
) -> None:
    work = f"work={tmp_path / 'work'}"
    prepare(config_of(pictures, tmp_path / "set", work))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/rows.parquet").write_bytes(b"mine")
    subprocess.run(["cp", "-r", str(made), str(tmp_path / "other")], check=True)
    subprocess.run(["rm", "-r", str(tmp_path / "other/parts"), str(tmp_path / "other/.work")], check=True)
    for output in (tmp_path / "mine", tmp_path / "other"):
        before = content(output)
        with pytest.raises(DataError, match=r"is not empty and holds no set of this recipe that could go on, but \w+"):
            prepare(config_of(pictures, output, work))
        assert content(output) == before


def test_a_beginning_that_was_killed_at_once_does_not_bar_the_output(
    pictures: Path, made: Path, tmp_path: Path
) -> None:
    with files.held(tmp_path / "set/.work/locks/scan", "it"):
        pass
    config = config_of(pictures, tmp_path / "set")
    prepare(config, only="scan")
    left = tmp_path / "set/captions" / next((made / "captions").glob("*.mds")).name
    left.parent.mkdir()
    left.write_bytes(b"half")
    prepare(config)
    assert content(tmp_path / "set") == content(made)


def test_of_two_recipes_at_once_one_is_refused(pictures: Path, tmp_path: Path) -> None:
    config = config_of(pictures, tmp_path / "set")
    other = config_of(pictures, tmp_path / "set", "rows_per_group=3")
    work = work_folder(config)
    work.mkdir(parents=True)
    files.write_json(work / "recipe.json", decisions(other))  # in the moment before the plan
    with pytest.raises(DataError, match="another process has begun this set with another recipe"):
        plan_of(config, work)


def test_what_was_lost_of_the_work_when_all_parts_were_whole_is_made_again(
    pictures: Path, made: Path, tmp_path: Path
) -> None:
    config = config_of(pictures, tmp_path / "set")
    prepare(config, only="scan")
    prepare(config, only="encode")
    (tmp_path / "set/parts/readme.txt").write_text("a stranger's")
    for name in ("set.json", "conditions.safetensors"):
        (work_folder(config) / name).unlink()
    prepare(config)
    (tmp_path / "set/parts/readme.txt").unlink()
    assert content(tmp_path / "set") == content(made)
    (work_folder(config) / "features").mkdir()  # killed just before they were removed
    prepare(config)
    assert not (work_folder(config) / "features").exists()


def test_what_killed_processes_left_under_temporary_names_goes_with_the_end(pictures: Path, tmp_path: Path) -> None:
    config = config_of(pictures, tmp_path / "set", "rows_per_group=2", f"work={tmp_path / 'work'}")
    prepare(config, only="scan")
    prepare(config, task=Task(0, 2))
    left = [tmp_path / name for name in ("work/recipe.json", "work/scan/chunk-00000.parquet", "set/manifest.json")]
    left += [tmp_path / "set/parts/part-00001.json"]
    for path in left:
        files.temporary_name(path).write_bytes(b"half of it")
    assert len(list(tmp_path.rglob("*.tmp"))) == len(left)
    prepare(config)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_task_leaves_the_end_to_another_that_has_it_in_hand(pictures: Path, tmp_path: Path) -> None:
    config = config_of(pictures, tmp_path / "set")
    prepare(config, only="scan")
    with files.held(work_folder(config) / "locks/finish", "it"):
        report = prepare(config, task=Task(0, 1))
        assert (report.finished, report.parts_left) == (False, 0)
        assert "another process has the end" in str(report)
        with pytest.raises(MachineError, match="has the end of this set in hand"):
            prepare(config, only="finish")
    assert prepare(config, task=Task(0, 1)).finished


def test_other_encoders_do_not_go_on_with_a_set(pictures: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "text"
    subprocess.run(["cp", "-r", str(ENCODERS / "text"), str(encoder)], check=True)
    config = config_of(pictures, tmp_path / "set", f"text_encoder={encoder}")
    prepare(config, only="scan")
    prepare(config, task=Task(0, 2))
    settings = (encoder / "tokenizer_config.json").read_text()
    (encoder / "tokenizer_config.json").write_text(json.dumps({**json.loads(settings), "model_max_length": 99}))
    for _ in range(2):
        with pytest.raises(DataError, match="made with other encoders: text_fingerprint was"):
            prepare(config, task=Task(1, 2))
        shutil.rmtree(work_folder(config))  # and with it what was noted there: the parts themselves tell
        prepare(config, only="scan")
    (encoder / "tokenizer_config.json").write_text(settings)
    assert prepare(config).finished
    half = tmp_path / "half"  # parts that came without a look at the others, as where two clusters write to one store
    subprocess.run(["cp", "-r", str(tmp_path / "set"), str(half)], check=True)
    marker = sorted((half / "parts").iterdir())[-1]
    told = files.read_json(marker)
    files.write_json(marker, {**told, "encoders": {**told["encoders"], "vae_fingerprint": "another"}})
    (half / "manifest.json").unlink()
    again = config.model_copy(update={"output": str(half), "work": str(work_folder(config))})
    with pytest.raises(
        DataError, match=f"part {told['part']} was made with other encoders: vae_fingerprint was 'another'"
    ):
        prepare(again, only="finish")
    assert not (half / "manifest.json").exists()


def test_tasks_share_the_work_and_the_last_one_finishes(pictures: Path, made: Path, tmp_path: Path) -> None:
    config = config_of(pictures, tmp_path / "set")
    with pytest.raises(DataError, match="there is no plan yet") as caught:
        prepare(config, task=Task(0, 3))
    assert "--only scan" in str(caught.value)
    assert prepare(config, only="scan").parts_written == 0
    reports = [prepare(config, task=Task(number, 3)) for number in (2, 0)]
    assert [report.finished for report in reports] == [False, False]
    assert "parts are left to do" in str(reports[1])
    with pytest.raises(DataError, match=rf"{reports[1].parts_left} of {reports[1].parts} parts are not written yet"):
        prepare(config, only="finish")
    last = prepare(config, task=Task(1, 3))
    assert last.finished
    assert sum(report.parts_written for report in (*reports, last)) == last.parts
    assert content(tmp_path / "set") == content(made)


def test_two_processes_make_the_same_set(pictures: Path, made: Path, tmp_path: Path) -> None:
    prepare(config_of(pictures, tmp_path / "set"), processes=2)
    assert content(tmp_path / "set") == content(made)


def test_one_part_alone_is_encoded_as_it_was_among_many(pictures: Path, tmp_path: Path) -> None:
    """On cores that torch may use all: another number of threads changes last bits."""
    sets = [word for each in overrides(pictures, tmp_path / "set") for word in ("--set", each)]
    command = [sys.executable, "-m", "pixart_ds", "prepare", "smoke/prepare", "--processes", "2", *sets]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run(command, cwd=ENCODERS.parents[2], env=environment, check=True)
    wanted = content(tmp_path / "set")
    for path in (*(tmp_path / "set").rglob("part-00001*"), tmp_path / "set/manifest.json"):
        path.unlink()
    subprocess.run(command, cwd=ENCODERS.parents[2], env=environment, check=True)
    assert content(tmp_path / "set") == wanted


def test_a_share_that_another_process_has_in_hand_is_refused(pictures: Path, tmp_path: Path) -> None:
    config = config_of(pictures, tmp_path / "set")
    prepare(config, only="scan")
    with (
        files.held(work_folder(config) / "locks/encode-task-0-of-2", "it"),
        pytest.raises(
            MachineError, match=rf"has the parts of share 0/2 of this set in hand: process {os.getpid()} on "
        ),
    ):
        prepare(config, task=Task(0, 2))
    prepare(config, task=Task(0, 2))


def test_a_part_that_another_worker_was_faster_with_counts_once(pictures: Path, made: Path, tmp_path: Path) -> None:
    """Two tasks that do not know of each other, as where locks do not reach: what one wrote stays, and nothing is lost."""
    config = config_of(pictures, tmp_path / "set")
    prepare(config, only="scan")
    sets = [word for each in overrides(pictures, tmp_path / "set") for word in ("--set", each)]
    command = [sys.executable, "-m", "pixart_ds", "prepare", "smoke/prepare", "--only", "encode", *sets]
    both = [
        subprocess.Popen([*command, "--task", f"{number}/{count}"], cwd=ENCODERS.parents[2])
        for number, count in ((0, 1), (0, 2))
    ]
    assert [process.wait() for process in both] == [0, 0]
    prepare(config)
    assert content(tmp_path / "set") == content(made)


def test_a_full_disk_is_said_and_what_was_written_is_kept(pictures: Path, made: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=1200k") as disk:
        config = config_of(pictures, disk / "set", f"work={tmp_path / 'work'}")
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(1000 << 10))
        command = [
            word for each in overrides(pictures, disk / "set", f"work={tmp_path / 'work'}") for word in ("--set", each)
        ]
        answer = subprocess.run(
            [sys.executable, "-m", "pixart_ds", "prepare", "smoke/prepare", *command],
            cwd=ENCODERS.parents[2], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert answer.returncode == 3, answer.stderr
        assert "No space left on device" in answer.stderr
        assert "Traceback" not in answer.stderr
        kept = len(list((disk / "set/parts").glob("part-*.json")))
        ballast.unlink()
        report = prepare(config)
        assert report.parts_kept == kept
        assert content(disk / "set") == content(made)


def test_a_model_writes_the_captions(pictures: Path, tmp_path: Path) -> None:
    """By the command: captions once for each picture, kept when the set is made; a killed caption phase goes on."""
    tool = ENCODERS.parents[2] / "tools/make_tiny_llava.py"
    subprocess.run([sys.executable, str(tool), "--out", str(tmp_path / "llava")], check=True)
    more = (
        "captions.captioner=llava", f"captions.model={tmp_path / 'llava'}", "captions.precision=fp32",
        "captions.max_new_tokens=6", "captions.with_original=true",
    )  # fmt: skip
    config = config_of(pictures, tmp_path / "set", *more)
    prepare(config, only="scan")
    with pytest.raises(DataError, match="parts have no captions yet, the first is part 0") as caught:
        prepare(config, only="encode")
    assert "--only caption" in str(caught.value)
    prepare(config, only="caption", task=Task(0, 2))
    written = {path: path.read_bytes() for path in (tmp_path / "set/.work/captions").glob("part-*.json")}
    assert written
    report = prepare(config)
    assert all(path.read_bytes() == content for path, content in written.items())
    opened = PreparedSet.open(tmp_path / "set")
    captions = pq.read_table(tmp_path / "set/rows.parquet")["caption"].to_pylist()
    assert report.samples + report.skipped.get("caption", 0) == 30
    assert all(captions)
    few = config_of(pictures, tmp_path / "few", *more, "captions.batch_size=3")
    prepare(few)
    assert pq.read_table(tmp_path / "few/rows.parquet")["caption"].to_pylist() == captions
    assert "llava" in opened.description.captioner
    assert not set(captions) & {path.read_text().strip() for path in captions_of(pictures)}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(tmp_path)
    return own_captioners(tmp_path)


def test_own_captioners_are_called(pictures: Path, tmp_path: Path, mine: str) -> None:
    report = prepare(config_of(pictures, tmp_path / "set", f"{mine}:Sizes"))
    rows = pq.read_table(tmp_path / "set/rows.parquet").to_pylist()
    assert {row["caption"] for row in rows} == {f"{row['height']} by {row['width']}" for row in rows}
    assert report.samples + report.skipped["caption"] == 30
    assert report.samples == sum("circle" in path.read_text() for path in captions_of(pictures))
    assert PreparedSet.open(tmp_path / "set").description.captioner == "mine 1"


def test_what_a_captioner_says_of_pictures_of_several_parts_is_encoded_once(
    tmp_path: Path, mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = T5Encoder.encode
    monkeypatch.setattr(T5Encoder, "encode", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    write_pictures(tmp_path / "more", 60, seed=5)
    more = (f"{mine}:Few", "rows_per_group=2", "prompts=[]", "captions.clean=false")
    config = config_of(tmp_path / "more", tmp_path / "set", *more)
    prepare(config, only="scan")
    with pytest.raises(DataError, match="have no captions yet") as caught:
        prepare(config, task=Task(0, 3))
    assert "--only caption first, all tasks" in str(caught.value)
    for number in (2, 0, 1):
        assert not (work_folder(config) / REPEATED).exists()
        prepare(config, only="caption", task=Task(number, 3))
    found = RepeatedCaptions(work_folder(config) / REPEATED)
    assert [prepare(config, task=Task(number, 3)).finished for number in (1, 2, 0)] == [False, False, True]
    table = pq.read_table(tmp_path / "set/rows.parquet", columns=["caption", "part"]).to_pydict()
    captions, parts = table["caption"], table["part"]
    assert {*found.places} == {text for text in captions if captions.count(text) > 1}
    assert len({*zip(captions, parts, strict=True)}) > len({*captions}), "some come in several parts"
    assert sorted(encoded) == sorted({*captions}), "each once, whatever part it is in"
    assert {len(features) for features in features_of(tmp_path / "set").values()} == {1}
    prepare(config_of(tmp_path / "more", tmp_path / "whole", *more))
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_the_list_of_repeated_captions_is_made_once_and_waited_for(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tasks of an array begin at once."""
    config = config_of(pictures, tmp_path / "set")
    prepare(config, only="scan")
    listed = work_folder(config) / REPEATED
    before = listed.read_bytes()
    listed.unlink()
    calls: list[Path] = []
    write = pipeline.write_repeated
    monkeypatch.setattr(pipeline, "write_repeated", lambda path, *more: calls.append(path) or write(path, *more))
    said, until = "", time.monotonic() + 30
    with ThreadPoolExecutor(2) as pool:
        with files.held(work_folder(config) / "locks/repeated", "it"):
            tasks = [pool.submit(prepare, config, task=Task(number, 2)) for number in range(2)]
            while (
                said.count(f"waiting: another process has the list of repeated captions in hand: process {os.getpid()}")
                < 2
            ):
                assert time.monotonic() < until, said
                time.sleep(0.02)
                said += capsys.readouterr().err
            assert not listed.exists()
        assert sum(task.result().parts_written for task in tasks) == Plan.open(work_folder(config) / "plan").num_parts
    assert calls == [listed]
    assert listed.read_bytes() == before


def test_features_belong_to_the_list_that_they_were_made_by(tmp_path: Path) -> None:
    """Where no lock reaches, tasks may see one list after the other."""

    class Words:
        max_tokens = 9

        def encode(self, captions: Sequence[str]) -> list[np.ndarray[Any, Any]]:
            return [np.full((1, 2), ord(caption[0]), np.float16) for caption in captions]

        def num_tokens(self, captions: Sequence[str]) -> list[int]:
            return [1 for _ in captions]

    for number, batch in enumerate((4, 2, 3)):
        listed = tmp_path / f"{number}"
        write_repeated(listed, lambda _: list("abcdefg"), 2, batch, lambda: None)
        write_repeated(listed, lambda _: list("xyz"), 2, 1, lambda: None)  # another process, later
        features = CaptionFeatures(Words(), RepeatedCaptions(listed), 8, tmp_path / "features")  # type: ignore[arg-type]
        made, truncated = features.of(list("gxabdec"))
        assert [chr(int(each[0, 0])) for each in made] == list("gxabdec")
        assert not any(truncated)
    assert len(list((tmp_path / "features").iterdir())) == 3


def test_parts_of_another_version_are_not_gone_on_with(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(pictures, tmp_path / "set")
    prepare(config, only="scan")
    prepare(config, task=Task(0, 2))
    monkeypatch.setattr(parts, "FORMAT", 99)
    with pytest.raises(DataError, match="or of another version of this program"):
        prepare(config)


def test_a_share_that_is_done_needs_no_captions(pictures: Path, tmp_path: Path, mine: str) -> None:
    """The work folder was lost when others had still to write."""
    config = config_of(pictures, tmp_path / "set", f"{mine}:Few", f"work={tmp_path / 'work'}")
    prepare(config, only="scan")
    prepare(config, only="caption")
    prepare(config, task=Task(0, 2))
    subprocess.run(["rm", "-r", str(tmp_path / "work")], check=True)
    prepare(config, only="scan")
    assert prepare(config, task=Task(0, 2)).parts_written == 0
    with pytest.raises(DataError, match="have no captions yet"):
        prepare(config, task=Task(1, 2))
    for number in range(2):
        prepare(config, only="caption", task=Task(number, 2))
    assert prepare(config, task=Task(1, 2)).finished
