"""Captioners, on a LLaVA of random weights: its words are noise, but they depend on picture, prompt and seed as a real one's do."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pixart_ds.config.schema import CaptionsConfig
from pixart_ds.encoders.captions import Captioner, LlavaCaptioner, _Draw, load_captioner, shrunk
from pixart_ds.errors import ConfigError, DataError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from make_tiny_llava import make_tiny_llava

SIZES = ((40, 60), (1, 1), (3000, 200), (200, 3000), (3, 50), (64, 64), (33, 17))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llava")
    make_tiny_llava(made)
    return made


@pytest.fixture(scope="session")
def pictures() -> list[npt.NDArray[np.uint8]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def llava(folder: Path, **settings: object) -> LlavaCaptioner:
    defaults = {"temperature": 0.0, "precision": "fp32", "max_new_tokens": 16}
    return LlavaCaptioner(
        CaptionsConfig.model_validate({"captioner": "llava", "model": str(folder), **defaults, **settings})
    )


def test_pictures_of_any_size_are_described_alike_in_batches_and_alone(
    folder: Path, pictures: list[npt.NDArray[np.uint8]]
) -> None:
    originals = [None, "a", "a much longer caption of it", None, "b c", None, ""]  # prompts of many lengths: padding
    made = llava(folder, with_original=True).caption(pictures, originals, 0)
    alone = llava(folder, with_original=True, batch_size=1).caption(pictures, originals, 0)
    threes = llava(folder, with_original=True, batch_size=3).caption(pictures, originals, 0)
    assert all(made)
    assert len(set(made)) > 4
    for other in (alone, threes):  # padding changes the last bit of a sum, and that may decide between two words
        assert sum(one == two for one, two in zip(made, other, strict=True)) >= len(made) - 1


def test_each_picture_has_random_numbers_of_its_own(folder: Path, pictures: list[npt.NDArray[np.uint8]]) -> None:
    nothing = [None] * len(pictures)
    captioner = llava(folder, temperature=0.2)
    made = captioner.caption(pictures, nothing, 5)
    assert made == captioner.caption(pictures, nothing, 5)
    assert made == captioner.caption(pictures[:4], nothing[:4], 5) + made[4:]
    assert made != captioner.caption(pictures, nothing, 6)
    in_twos = llava(folder, temperature=0.2, batch_size=2).caption(pictures, nothing, 5)
    assert sum(one == two for one, two in zip(made, in_twos, strict=True)) >= len(made) - 1
    twice = captioner.caption([pictures[0]] * 2, [None] * 2, 5)
    assert twice[0] != twice[1]


def test_words_are_drawn_with_the_probabilities_of_the_temperature() -> None:
    logits, temperature, number = torch.tensor([[0.0, 0.3, -0.2, 0.5, -torch.inf]]), 0.5, 4000
    draw = _Draw(temperature, [11], torch.device("cpu"))
    drawn = torch.stack([draw(torch.zeros(1, 1), logits).argmax() for _ in range(number)])
    shares = torch.bincount(drawn, minlength=5) / number
    expected = (logits[0] / temperature).softmax(0)
    assert shares[4] == 0
    assert torch.allclose(shares, expected, atol=4 * 0.5 / number**0.5)  # four standard deviations at most


def test_the_seed_of_others_is_left_alone(folder: Path, pictures: list[npt.NDArray[np.uint8]]) -> None:
    captioner = llava(folder, temperature=1.0)
    torch.manual_seed(3)
    np.random.seed(3)
    before, before_numpy = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    made = captioner.caption(pictures[:2], [None] * 2, 5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (before_numpy == np.random.get_state()[1]).all()  # type: ignore[index]
    torch.manual_seed(4)
    assert captioner.caption(pictures[:2], [None] * 2, 5) == made


def test_prompt_and_original_reach_the_model(folder: Path, pictures: list[npt.NDArray[np.uint8]]) -> None:
    plain = llava(folder)
    assert plain.caption(pictures[:1], ["a cat"], 0) == plain.caption(pictures[:1], [None], 0)
    assert plain.caption(pictures[:1], [None], 0) != llava(folder, prompt="What is it?").caption(
        pictures[:1], [None], 0
    )
    told = llava(folder, with_original=True)
    texts = [told.caption(pictures[:1], [original], 0)[0] for original in (None, "a cat", "a dog")]
    assert len(set(texts)) == 3
    assert texts[0] == plain.caption(pictures[:1], [None], 0)[0]
    prompt = told._prompt("a cat")
    assert prompt == (
        'USER: <image>\nGiven the caption of this image "a cat", '
        "describe this image and its style in a very detailed manner ASSISTANT:"
    )


def test_an_original_cannot_place_pictures_nor_fill_the_context(
    folder: Path, pictures: list[npt.NDArray[np.uint8]]
) -> None:
    captioner = llava(folder, with_original=True)
    assert captioner._prompt("an <image> of</s> a {cat}").count("<image>") == 1
    assert "</s>" not in captioner._prompt("an <image> of</s> a {cat}")
    assert len(captioner._prompt("x" * 100_000)) < 2500
    (made,) = captioner.caption(pictures[:1], ["<image> <image>"], 0)
    assert made


def test_nothing_is_said_of_no_pictures(folder: Path) -> None:
    assert llava(folder).caption([], [], 0) == []


def test_an_answer_that_ends_at_once_is_empty(folder: Path, pictures: list[npt.NDArray[np.uint8]]) -> None:
    captioner = llava(folder)
    captioner._model.generation_config.suppress_tokens = list(range(2)) + list(range(3, 260))
    assert captioner.caption(pictures[:2], [None] * 2, 0) == ["", ""]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_works_on_a_cpu(folder: Path, pictures: list[npt.NDArray[np.uint8]], precision: str) -> None:
    assert all(llava(folder, precision=precision).caption(pictures[:2], [None] * 2, 0))


def test_a_model_without_template_gets_the_form_of_v15(folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template*"))
    prompt = "USER: <image>\nDescribe this image and its style in a very detailed manner ASSISTANT:"
    assert llava(bare)._prompt(None) == prompt
    (bare / "chat_template.jinja").write_text("Q: {{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(ConfigError, match="has 0 places for the picture"):
        llava(bare)


def test_the_identity_tells_what_changes_a_word_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    identity = llava(folder).identity
    assert llava(folder, batch_size=7, missing="skip", clean=False).identity == identity
    changes = (
        {"prompt": "What is it?"},
        {"with_original": True},
        {"precision": "bf16"},
        {"max_new_tokens": 17},
        {"temperature": 0.1},
    )
    assert len({identity, *(llava(folder, **change).identity for change in changes)}) == 1 + len(changes)
    make_tiny_llava(tmp_path, seed=1)
    assert llava(tmp_path).identity != identity
    again = tmp_path / "again"
    make_tiny_llava(again)
    assert llava(again).identity == identity  # the same seed, the same files


def test_pictures_shrink_as_in_the_released_script() -> None:
    def size(height: int, width: int) -> tuple[int, int]:
        image = shrunk(np.zeros((height, width, 3), np.uint8))
        return image.height, image.width

    assert size(1000, 1000) == (400, 400)
    assert size(1000, 3000) == (267, 800)
    assert size(900, 450) == (800, 400)
    assert size(300, 390) == (300, 390)
    assert size(2, 4000) == (4, 800)


def test_what_is_said_of_folders_that_hold_no_llava(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no captioning model's folder"):
        llava(tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(
        ConfigError, match="no model that describes pictures can be loaded from .*: Unrecognized"
    ) as caught:
        llava(tmp_path)
    assert caught.value.where == "captions.model"
    assert len(caught.value.what) < 500
    assert "llava-hf/llava-1.5-7b-hf" in str(caught.value.remedy)
    text_only = shutil.copytree(folder, tmp_path / "text", ignore=shutil.ignore_patterns("*processor_config.json"))
    with pytest.raises(ConfigError, match="no model that describes pictures can be loaded"):
        llava(text_only)


# ---- by name ------------------------------------------------------------------------------------------------------------

OWN = """
class Sizes:
    def __init__(self, config, device):
        self.identity = f"sizes on {device}, {config.prompt}"

    def caption(self, pictures, originals, seed):
        return [f"{len(picture)} x {picture.shape[1]}" for picture in pictures]

class Nameless(Sizes):
    def __init__(self, config, device):
        self.identity = None

class Mute:
    identity = "mute"
    def __init__(self, config, device): ...

class Short(Sizes):
    def caption(self, pictures, originals, seed):
        return ["one"]

class Numbers(Sizes):
    def caption(self, pictures, originals, seed):
        return [1 for _ in pictures]

class Greedy(Sizes):
    def __init__(self, config): ...

nothing = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_captions.py").write_text(OWN)
    (tmp_path / "broken_captions.py").write_text("import a_library_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_captions", "broken_captions"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def load(name: str, **settings: object) -> Captioner | None:
    return load_captioner(CaptionsConfig.model_validate({"captioner": name, **settings}), "cpu")


@pytest.mark.usefixtures("own")
def test_your_own_class_writes_captions(pictures: list[npt.NDArray[np.uint8]]) -> None:
    captioner = load("own_captions:Sizes", prompt="How large?")
    assert captioner is not None
    assert captioner.identity == "sizes on cpu, How large?"
    assert captioner.caption(pictures[:2], [None] * 2, 0) == ["40 x 60", "1 x 1"]
    assert captioner.caption([], [], 0) == []


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message", "remedy"),
    [
        ("lava", "there is no captioner 'lava'", "give one of source, llava, or your own class as package.module:Name"),
        ("own_captions:", "there is no captioner 'own_captions:'", "package.module:Name"),
        (".own_captions:Sizes", "there is no captioner '.own_captions:Sizes'", "package.module:Name"),
        ("my.captions:Sizes", "my.captions of 'my.captions:Sizes' cannot be imported: No module named 'my'", "PYTHONPATH"),
        ("broken_captions:Sizes", "cannot be imported: No module named 'a_library_that_nobody_has'", "PYTHONPATH"),
        ("own_captions:Sices", "own_captions.py) has no class Sices", "(config, device)"),
        ("own_captions:nothing", "own_captions.py) has no class nothing", "(config, device)"),
        ("own_captions:Greedy", "cannot be called with (config, device): too many positional arguments", "take both"),
        ("own_captions:Mute", "own_captions:Mute has no method caption", "caption(pictures, originals, seed)"),
        ("own_captions:Nameless", "own_captions:Nameless has no text `identity`, but None", "stored with it"),
    ],
)  # fmt: skip
def test_what_is_said_of_what_is_no_captioner(name: str, message: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(name)
    assert message in caught.value.what
    assert caught.value.where == "captions.captioner"
    assert remedy in str(caught.value.remedy)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [("Short", "own_captions:Short gave 1 captions for 2 pictures"), ("Numbers", "own_captions:Numbers gave 1 where")],
)
def test_what_your_own_class_gives_is_looked_at(name: str, message: str, pictures: list[npt.NDArray[np.uint8]]) -> None:
    captioner = load(f"own_captions:{name}")
    assert captioner is not None
    with pytest.raises(DataError, match=message):
        captioner.caption(pictures[:2], [None] * 2, 0)


def test_captions_of_the_source_need_no_captioner(folder: Path) -> None:
    assert load("source") is None
    assert isinstance(load("llava", model=str(folder)), LlavaCaptioner)
