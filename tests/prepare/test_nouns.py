"""`pixart-ds nouns`: counted by the command on real files, against a plain count of the same captions."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nltk
import pyarrow as pa
import pytest
from nltk.tag.perceptron import PerceptronTagger
from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer
from pyarrow import parquet

from pixart_ds.cli import main
from pixart_ds.errors import MachineError
from pixart_ds.prepare import caption_files, noun_counts, nouns
from pixart_ds.prepare.caption_files import open_captions
from pixart_ds.prepare.noun_counts import NounCounts, merge_counts
from pixart_ds.prepare.noun_table import PAPER_ROWS
from pixart_ds.prepare.nouns import NounTagger, count_nouns

NAME = "averaged_perceptron_tagger_eng"
NOUNS = ("dog", "cat", "horse", "bridge", "river", "table", "lamp", "boat", "garden", "street", "window", "tower")
PLURALS = ("dogs", "cats", "horses", "lamps", "boats", "towers")
NAMES = ("Paris", "London", "Vermeer", "Tokyo")
ADJECTIVES = ("red", "old", "quiet", "large", "wooden", "bright")
VERBS = ("sits", "stands", "waits", "sleeps")


def sentence(draw: random.Random) -> list[tuple[str, str]]:
    first, second = draw.choice(NOUNS), draw.choice(NOUNS)
    forms = (
        f"A/DT {draw.choice(ADJECTIVES)}/JJ {first}/NN {draw.choice(VERBS)}/VBZ near/IN the/DT {second}/NN ./.",
        f"{draw.choice(NAMES)}/NNP {draw.choice(VERBS)}/VBZ behind/IN two/CD {draw.choice(PLURALS)}/NNS ./.",
        f"The/DT {first}/NN of/IN {draw.choice(NAMES)}/NNP is/VBZ {draw.choice(ADJECTIVES)}/JJ ./.",
    )
    words = [word.rsplit("/", 1) for word in draw.choice(forms).split()]
    return [(word, tag) for word, tag in words]


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tagger's data that was trained on a few dozen sentences."""
    folder = tmp_path_factory.mktemp("data") / NAME
    folder.mkdir()
    draw = random.Random(3)
    random.seed(3)  # the trainer shuffles with it
    trained = PerceptronTagger(load=False)
    trained.train([sentence(draw) for _ in range(60)])
    for part, value in zip(("weights", "tagdict", "classes"), trained.encode_json_obj(), strict=True):
        (folder / f"{NAME}.{part}.json").write_text(json.dumps(value))
    return folder


def captions(count: int, seed: int) -> list[str]:
    """Of one to four sentences, some with words that the tagger has never seen."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        words = [" ".join(word for word, _ in sentence(draw)[:-1]) + "." for _ in range(draw.randrange(1, 5))]
        words += [
            f"The thing{draw.randrange(40)} is {draw.choice(('red', 'Ünïcode', 'x|y', '«old»'))}"
        ] * draw.randrange(2)
        made.append(" ".join(words))
    return made


def plain_count(texts: list[str], folder: Path) -> dict[str, Any]:
    """The same without lots, processes or files."""
    parts = [json.loads((folder / f"{NAME}.{part}.json").read_text()) for part in ("weights", "tagdict", "classes")]
    tag = PerceptronTagger.decode_json_obj(tuple(parts)).tag
    punkt, treebank = PunktSentenceTokenizer(), NLTKWordTokenizer()
    found: Counter[str] = Counter()
    for text in texts:
        words = [word for part in punkt.tokenize(text) for word in treebank.tokenize(part)]
        found.update(word.lower() for word, kind in tag(words) if kind.startswith("NN"))
    valid = [noun for noun, count in found.items() if count > 10]
    return {
        "captions": len(texts),
        "valid_nouns": len(valid),
        "distinct_nouns": len(found),
        "valid_ratio": len(valid) / len(found),
        "total_nouns": sum(found.values()),
        "nouns_per_image": sum(found.values()) / len(texts),
    }


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["nouns", *map(str, words), "--json"]) == 0
    shown = capsys.readouterr()
    assert "count: done" in shown.err
    found: dict[str, Any] = json.loads(shown.out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    assert main(["nouns", *map(str, words)]) == code
    return capsys.readouterr().err


def prepared_set(folder: Path, texts: list[str | None]) -> Path:
    """Of a prepared set, what holds its captions."""
    folder.mkdir()
    rows = {"id": range(len(texts)), "caption": texts}
    parquet.write_table(pa.table(rows), folder / "rows.parquet", row_group_size=100)
    (folder / "manifest.json").write_text("{}")
    return folder


def test_the_tagger_finds_nouns_of_every_sentence_in_lower_case(tagger: Path) -> None:
    found = NounTagger(tagger).nouns("A red dog sits near the bridge. Paris stands behind two boats. The lamp is old")
    assert found == ["dog", "bridge", "paris", "boats", "lamp"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv", "tsv", "txt", "set"])
def test_every_kind_of_input_is_counted_as_a_plain_count_does(
    kind: str, tagger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = captions(150, seed=1)
    place, column = tmp_path / f"captions.{kind}", "prompt"
    if kind == "parquet":
        parquet.write_table(pa.table({"prompt": texts, "text": ["x"] * 150}), place)
    elif kind == "jsonl":
        place.write_text("".join(json.dumps({"id": 1, "prompt": text}) + "\n\n" for text in texts))
    elif kind == "json":
        place.write_text(json.dumps([{"prompt": text, "path": "a.png"} for text in texts], indent=1))
    elif kind in ("csv", "tsv"):
        with open(place, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerows([("name", "prompt"), *(("a,\tb", text) for text in texts)])
    elif kind == "txt":
        place.write_text("\n".join(texts))
    else:
        prepared_set(place, list(texts))
    expected = plain_count(texts, tagger)
    assert 0 < expected["valid_nouns"] < expected["distinct_nouns"]
    found = answer(capsys, place, "--tagger", tagger)
    assert found["sets"] == [{"where": str(place), "without_caption": 0, **expected}]
    assert found["together"] is None
    if kind not in ("txt", "set"):
        assert answer(capsys, place, "--tagger", tagger, "--column", column) == found


def test_several_places_are_counted_each_and_together(
    tagger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [captions(80, seed) for seed in (5, 6, 7)]
    places = [tmp_path / f"{number}.txt" for number in range(3)]
    for place, part in zip(places, texts, strict=True):
        place.write_text("\n".join(part))
    found = answer(capsys, *places, "--tagger", tagger)
    for row, part in zip(found["sets"], texts, strict=True):
        assert plain_count(part, tagger).items() <= row.items()
    assert plain_count([text for part in texts for text in part], tagger).items() <= found["together"].items()


def test_entries_without_a_caption_are_told_and_not_counted(
    tagger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = captions(20, seed=8)
    folder = prepared_set(tmp_path / "set", [None, "", " \n", *texts])
    found = answer(capsys, folder, "--tagger", tagger)["sets"][0]
    assert (found["captions"], found["without_caption"]) == (20, 3)
    assert plain_count(texts, tagger).items() <= found.items()
    assert main(["nouns", str(folder), "--tagger", str(tagger)]) == 0
    assert "3 entries have no caption" in capsys.readouterr().out
    (tmp_path / "none.txt").write_text("")
    empty = answer(capsys, tmp_path / "none.txt", "--tagger", tagger)["sets"][0]
    assert (empty["captions"], empty["valid_ratio"], empty["nouns_per_image"]) == (0, None, None)


def test_neither_processes_nor_spilling_change_the_answer(
    tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nouns, "_BATCH_CAPTIONS", 20)
    places = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    for seed, place in enumerate(places):
        Path(place).write_text("\n".join(captions(220, seed)))
    one = count_nouns(places, tagger=tagger)
    assert count_nouns(places, tagger=tagger, processes=2) == one
    assert count_nouns(places, tagger=tagger, max_held=7) == one


def test_counts_on_disk_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noun_counts, "_MAX_RUNS", 5)
    draw, whole = random.Random(0), Counter[str]()
    spilled, held = NounCounts(tmp_path, max_held=20), NounCounts(tmp_path / "unused")
    for _ in range(300):
        lot = Counter(f"noun{draw.randrange(400)}\ud83d«|»" for _ in range(30))
        for counts in (whole, spilled, held):
            counts.update(lot) if isinstance(counts, Counter) else counts.add(lot)
    assert list(spilled.items()) == list(held.items()) == sorted(whole.items())
    assert len(list(tmp_path.iterdir())) < 5
    both = {noun: 2 * count for noun, count in whole.items()}
    assert dict(merge_counts([spilled.items(), held.items()])) == both


def test_nothing_is_left_in_the_temporary_folder(
    tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    torn = tmp_path / "torn.jsonl"
    torn.write_text("".join(json.dumps({"text": text}) + "\n" for text in captions(520, seed=2)) + '{"text": "a')
    assert "line 521 is not JSON" in refusal(capsys, 4, torn, "--tagger", tagger)
    assert not list(scratch.iterdir())
    with pytest.raises(MachineError, match="counts cannot be written"):
        noun_counts._write_run(Path("/dev/full"), [("dog", 1)])


def test_the_command_shows_our_rows_beside_the_papers(tagger: Path, tmp_path: Path) -> None:
    home = tmp_path / "nltk_data"
    shutil.copytree(tagger, home / "taggers" / NAME)
    for path in (home, *home.rglob("*")):
        path.chmod(0o700)  # NLTK takes no data that others could have written
    texts = captions(200, seed=4)
    (tmp_path / "mine.txt").write_text("\n".join(texts))
    command = [sys.executable, "-m", "pixart_ds", "nouns", "mine.txt", "--processes", "2"]
    environment = {**os.environ, "NLTK_DATA": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    expected = plain_count(texts, tagger)
    assert lines[0].split() == ["VN", "DN", "VN/DN", "nouns", "nouns/image", "captions"]
    shown = f"mine.txt {expected['valid_nouns']} {expected['distinct_nouns']} {expected['valid_ratio']:.1%}"
    shown += f" {expected['total_nouns']:,} {expected['nouns_per_image']:.1f} 200"
    assert lines[1].replace(" %", "%").split() == shown.split()
    assert [" ".join(line.split()) for line in lines[2:6]] == [
        "paper: LAION 210 K 2,461 K 8.5 % 72.0 M 6.4",
        "paper: LAION-LLaVA 85 K 646 K 13.3 % 233.9 M 20.9",
        "paper: SAM-LLaVA 23 K 124 K 18.6 % 327.9 M 29.3",
        "paper: Internal 152 K 582 K 26.1 % 136.6 M 12.2",
    ]
    assert "more than 10 times" in lines[6]


def test_the_papers_ratios_are_those_of_its_counts() -> None:
    for row in PAPER_ROWS:
        valid, distinct, ratio = (
            float(text.rstrip(" K%").replace(",", "")) for text in (row.valid, row.distinct, row.ratio)
        )
        assert 100 * valid / distinct == pytest.approx(ratio, abs=0.2), "counts are printed in thousands"


def test_without_the_taggers_data_it_says_how_to_get_it(
    tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "a.txt"
    texts.write_text("a dog")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    said = refusal(capsys, 3, texts)
    assert f"python -m nltk.downloader {NAME}" in said
    assert "--tagger" in said
    assert f"{NAME}.weights.json, {NAME}.tagdict.json" in refusal(capsys, 2, texts, "--tagger", tmp_path)
    broken = shutil.copytree(tagger, tmp_path / "broken")
    (broken / f"{NAME}.classes.json").write_text("{}")
    assert "another form" in refusal(capsys, 4, texts, "--tagger", broken)


def test_what_is_no_source_of_captions_is_refused(
    tagger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(name: str, content: str | None, code: int, *more: str) -> str:
        if content is not None:
            (tmp_path / name).write_text(content)
        return refusal(capsys, code, tmp_path / name, "--tagger", tagger, *more)

    assert "there is no such file" in said("none.txt", None, 2)
    assert "ends with .docx" in said("a.docx", "", 2)
    assert "no columns" in said("a.txt", "a dog", 2, "--column", "prompt")
    assert "none of the columns caption, prompt, text; it has a, b" in said("a.csv", "a,b\n1,2\n", 2)
    assert "no column headline; it has text" in said("a.jsonl", '{"text": "a"}\n', 2, "--column", "headline")
    assert "text is 7, not a text" in said("b.jsonl", '{"text": 7}\n', 4)
    assert "neither an object nor a caption" in said("c.jsonl", "[1]\n", 4)
    assert "not a JSON list" in said("a.json", '{"text": "a"}', 4)
    assert "breaks off" in said("b.json", '[{"text": "a"}, {"te', 4)
    assert "not UTF-8" in refusal(capsys, 4, latin(tmp_path / "l.txt"), "--tagger", tagger)
    assert "cannot be read" in said("a.parquet", "PAR", 4)
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "n.parquet")
    assert "holds int64, not text" in said("n.parquet", None, 2)
    (tmp_path / "folder").mkdir()
    assert "no finished set" in said("folder", None, 4)
    (tmp_path / "folder/manifest.json").write_text("{}")
    assert "an earlier version prepared it" in said("folder", None, 4)


def latin(path: Path) -> Path:
    path.write_bytes("un café\n".encode("latin-1"))
    return path


def test_a_json_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_files, "_CHUNK_CHARS", 7)
    records: Iterator[str] = iter(captions(50, seed=9))
    items: list[Any] = [text if number % 2 else {"n": [{"]": 1}], "text": text} for number, text in enumerate(records)]
    path = tmp_path / "a.json"
    path.write_text(" \n" + json.dumps(items, indent=2), encoding="utf-8")
    assert list(open_captions(str(path)).read()) == captions(50, seed=9)
