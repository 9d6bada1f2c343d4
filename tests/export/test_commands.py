"""`import`, `export` and `sample` as a person types them: round trips, licences, every kind of source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pixart_ds.cli import main
from pixart_ds.config.schema import ModelConfig
from pixart_ds.engine.foreign import NULL_CAPTION, OUR_NOTE
from pixart_ds.engine.weights import open_weights
from pixart_ds.model import build
from pixart_ds.model.positions import position_embedding
from tests.model.test_nets import randomised, small, small_dit

ENCODERS = Path(__file__).resolve().parents[2] / "pixart_ds/demo/encoders"
BOTH = ("--vae", str(ENCODERS / "vae"), "--text-encoder", str(ENCODERS / "text"))


def answer(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    """The JSON of a command that works; what it complains of where another exit code is expected."""
    found = main([str(argument) for argument in arguments] + (["--json"] if code == 0 else []))
    printed = capsys.readouterr()
    assert found == code, printed.err
    return json.loads(printed.out) if code == 0 else printed.err


def official(path: Path, model: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A file as the released code writes it; returns its tensors without the position table."""
    state = {name: tensor.clone() for name, tensor in randomised(build(model), seed).state_dict().items()}
    side, scale = model.base_size, model.interpolation_scale
    table = position_embedding(side, side, model.hidden_size, base_size=side, interpolation_scale=scale)
    torch.save({"state_dict": {**state, "pos_embed": table[None]}}, path)
    return state


def net(**changes: Any) -> ModelConfig:
    return small(hidden_size=144, num_heads=2, caption_channels=64, max_tokens=40, base_size=6, **changes)


@pytest.mark.parametrize("micro", [False, True])
def test_official_to_ours_to_diffusers_to_ours_bit_by_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], micro: bool
) -> None:
    model = net(micro_conditions=micro, interpolation_scale=1.5)
    state = official(tmp_path / "official.pth", model)
    licence = ("--licence", "openrail++")
    made = answer(capsys, "import", tmp_path / "official.pth", "--out", tmp_path / "ours", *licence)
    assert made["weights"] == ["raw"]
    assert ModelConfig(**made["model"]) == model
    told = answer(capsys, "export", tmp_path / "ours", "--out", tmp_path / "pipeline", *BOTH)
    assert told["licences"] == ["openrail++"]
    again = answer(capsys, "import", tmp_path / "pipeline", "--out", tmp_path / "again")
    assert again["licence"] == "openrail++"
    assert again["model"] == made["model"]
    for folder in ("ours", "again"):
        found = load_file(tmp_path / folder / "raw.safetensors")
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
    answer(capsys, "export", tmp_path / "again", "--format", "official", "--out", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    first = torch.load(tmp_path / "official.pth", weights_only=True)["state_dict"]
    assert back.keys() == first.keys()
    assert all(torch.equal(back[name], first[name]) for name in first)


def test_a_dits_licence_follows_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_dit(hidden_size=144, num_heads=2, base_size=16)
    torch.save(randomised(build(model)).state_dict(), tmp_path / "dit.pt")
    command = ("import", tmp_path / "dit.pt", "--image-size", "256")
    made = answer(capsys, *command, "--out", tmp_path / "ours")
    assert made["licence"].startswith("CC-BY-NC-4.0 (non-commercial)")
    assert main([*map(str, command), "--out", str(tmp_path / "x"), "--dry-run"]) == 0
    assert "licence: CC-BY-NC-4.0" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()
    out = tmp_path / "dit.safetensors"
    assert main(["export", str(tmp_path / "ours"), "--format", "official", "--out", str(out)]) == 0
    assert "licence of weights that they come from: CC-BY-NC-4.0" in capsys.readouterr().out
    assert set(load_file(out)) == set(build(model).state_dict()) | {"pos_embed"}
    assert "only PixArt nets" in answer(capsys, "export", tmp_path / "ours", "--out", tmp_path / "p", *BOTH, code=2)
    lineage = json.loads((tmp_path / "ours/lineage.json").read_text())["lineage"]
    assert len(lineage["sha256"]) == 64
    assert answer(capsys, "sample", tmp_path / "ours", "--vae", BOTH[1], "--prompt", "7", "--out", out, code=2)


def test_where_nothing_may_be_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official(tmp_path / "official.pth", net())
    answer(capsys, "import", tmp_path / "official.pth", "--out", tmp_path / "ours")
    told = answer(capsys, "import", tmp_path / "official.pth", "--out", tmp_path / "ours", code=2)
    assert "not empty" in told
    (tmp_path / "ours/lineage.json").unlink()  # as after a kill: the next try takes the place
    answer(capsys, "import", tmp_path / "official.pth", "--out", tmp_path / "ours")
    told = answer(
        capsys, "export", tmp_path / "ours", "--format", "official", "--out", tmp_path / "official.pth", code=2
    )
    assert "a file of that name" in told
    assert "add --out" in answer(capsys, "export", tmp_path / "ours", *BOTH, code=2)
    assert "add --vae" in answer(capsys, "export", tmp_path / "ours", "--out", tmp_path / "p", code=2)
    told = answer(capsys, "sample", tmp_path / "official.pth", "--out", tmp_path / "x.png", code=2)
    assert f"pixart-ds import {tmp_path / 'official.pth'}" in told


def picture(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB"))


def test_sources_make_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official(tmp_path / "official.pth", net(micro_conditions=True, interpolation_scale=1.5))
    answer(capsys, "import", tmp_path / "official.pth", "--out", tmp_path / "ours")
    answer(capsys, "export", tmp_path / "ours", "--weights", "raw", "--out", tmp_path / "pipeline", *BOTH)
    asked = ("--prompt", "a red circle", "--prompt", "two blue squares", "--steps", 3, "--seed", 5, "--weights", "raw")
    sizes = []
    for source, encoders in (("ours", BOTH), ("pipeline", ())):  # a pipeline brings its own encoders
        out = tmp_path / f"{source}.png"
        sizes.append(answer(capsys, "sample", tmp_path / source, *asked, *encoders, "--out", out)["size"])
    assert sizes == [[48, 48]] * 2
    rows = slice(44, None)  # beneath the title, which names the folder
    assert (picture(tmp_path / "ours.png")[rows] == picture(tmp_path / "pipeline.png")[rows]).all()
    answer(capsys, "export", tmp_path / "pipeline", "--weights", "raw", "--out", tmp_path / "again")
    assert (tmp_path / "again/tokenizer/tokenizer.json").exists()
    told = answer(capsys, "sample", tmp_path / "pipeline", "--prompt", "x", "--out", tmp_path / "x.png", code=5)
    assert "holds raw weights, not ema" in told
    assert "--weights raw" in told


def test_an_export_says_whether_captions_were_cleaned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official(tmp_path / "official.pth", net())
    answer(capsys, "import", tmp_path / "official.pth", "--out", tmp_path / "ours")
    answer(capsys, "export", tmp_path / "ours", "--weights", "raw", "--out", tmp_path / "pipeline", *BOTH)
    assert open_weights(tmp_path / "pipeline", kind="raw").clean_captions is None
    note = json.loads((tmp_path / "pipeline" / OUR_NOTE).read_text())
    (tmp_path / "pipeline" / OUR_NOTE).write_text(json.dumps({**note, "clean_captions": False}))  # as of a run's set
    answer(capsys, "export", tmp_path / "pipeline", "--weights", "raw", "--out", tmp_path / "again")
    assert open_weights(tmp_path / "again", kind="raw").clean_captions is False


def test_every_option_of_sampling_changes_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official(tmp_path / "official.pth", net())
    answer(capsys, "import", tmp_path / "official.pth", "--out", tmp_path / "ours")
    pictures = []
    for number, more in enumerate(
        (
            (),
            ("--seed", 1),
            ("--steps", 3),
            ("--guidance-scale", 2.0),
            ("--scheduler", "DDIMScheduler"),
            ("--scheduler", "DDPMScheduler"),
            ("--null-caption", "weights"),
        )
    ):
        out = tmp_path / f"{number}.png"
        options = {"--steps": 4, "--prompt": "a red circle", "--out": out}
        given = [part for pair in options.items() if pair[0] not in more for part in pair]
        answer(capsys, "sample", tmp_path / "ours", *given, *more, *BOTH)
        pictures.append(picture(out))
    for number, one in enumerate(pictures):
        for other in pictures[:number]:
            assert (one != other).mean() > 0.05
    told = answer(capsys, "sample", tmp_path / "ours", "--prompt", "x", "--ratio", 0.5, *BOTH, "--out", "x", code=2)
    assert "no buckets for a net of 48 px" in told


def test_a_stored_null_caption_is_needed_to_lead_away_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = official(tmp_path / "official.pth", net())
    del state[NULL_CAPTION]
    torch.save(state, tmp_path / "bare.pth")
    sets = ("--set", "base_size=6", "--set", "interpolation_scale=1.0", "--set", "max_tokens=40")
    answer(capsys, "import", tmp_path / "bare.pth", "--out", tmp_path / "ours", "--image-size", 256, *sets)
    told = answer(
        capsys, "sample", tmp_path / "ours", "--prompt", "x", "--null-caption", "weights", *BOTH, "--out", "x", code=2
    )
    assert "hold no null caption" in told


def test_buckets_by_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official(tmp_path / "official.pth", net().model_copy(update={"base_size": 16}))
    answer(capsys, "import", tmp_path / "official.pth", "--out", tmp_path / "ours")
    # the toy VAE shrinks by 4: a base of 16 patches of 2 is 128 px, no size of the paper's
    told = answer(capsys, "sample", tmp_path / "ours", "--prompt", "x", "--ratio", 0.5, *BOTH, "--out", "x", code=2)
    assert "no buckets for a net of 128 px" in told
    official(tmp_path / "large.pth", net().model_copy(update={"base_size": 32}))
    answer(capsys, "import", tmp_path / "large.pth", "--out", tmp_path / "large")
    asked = ("--prompt", "x", "--ratio", 0.5, "--steps", 1, "--out", tmp_path / "x.png")
    assert answer(capsys, "sample", tmp_path / "large", *asked, *BOTH)["size"] == [176, 352]
