"""Weights from elsewhere: every layout of the published files, what is missing, and what is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pixart_ds.config.schema import ModelConfig
from pixart_ds.engine.foreign import NULL_CAPTION, read_foreign
from pixart_ds.errors import CheckpointError, ConfigError
from pixart_ds.export.diffusers import transformer_of
from pixart_ds.model import build
from pixart_ds.model.positions import position_embedding
from tests.model.test_nets import randomised, small, small_dit

State = dict[str, torch.Tensor]


def config(**changes: Any) -> ModelConfig:
    return small(hidden_size=144, num_heads=2, **changes)


def state_of(model: ModelConfig, seed: int = 0) -> State:
    return {name: tensor.clone() for name, tensor in randomised(build(model), seed).state_dict().items()}


def table(model: ModelConfig) -> torch.Tensor:
    side, scale = model.base_size, model.interpolation_scale
    return position_embedding(side, side, model.hidden_size, base_size=side, interpolation_scale=scale)[None]


def equal(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("size", [(16, 1.0), (32, 1.0), (64, 2.0), (6, 1.5)])
def test_a_stored_position_table_says_the_size(tmp_path: Path, size: tuple[int, float]) -> None:
    model = config(base_size=size[0], interpolation_scale=size[1])
    state = state_of(model)
    torch.save({"state_dict": {**state, "pos_embed": table(model)}}, tmp_path / "net.pth")
    found = read_foreign(tmp_path / "net.pth")
    assert found.model == model
    assert set(found.states) == {"raw"}
    assert equal(found.states["raw"], state)
    assert found.layout == "torch file with state_dict"


def test_without_a_table_the_size_is_asked_for_and_micro_conditions_imply_it(tmp_path: Path) -> None:
    torch.save(state_of(config(base_size=32)), tmp_path / "plain.pth")
    with pytest.raises(ConfigError, match="which size of picture") as caught:
        read_foreign(tmp_path / "plain.pth")
    assert "--image-size 256, 512, 1024" in str(caught.value)
    assert read_foreign(tmp_path / "plain.pth", image_size=512).model.base_size == 32
    torch.save(state_of(config(micro_conditions=True)), tmp_path / "ms.pth")
    found = read_foreign(tmp_path / "ms.pth").model
    assert (found.micro_conditions, found.base_size, found.interpolation_scale) == (True, 64, 2.0)


def test_without_a_null_caption_the_rest_is_read(tmp_path: Path) -> None:
    model = small(hidden_size=144, num_heads=2, max_tokens=120, base_size=16)
    state = state_of(model)
    del state[NULL_CAPTION]
    save_file(state, tmp_path / "net.safetensors")
    found = read_foreign(tmp_path / "net.safetensors", image_size=256)
    assert found.model == model
    assert equal(found.states["raw"], state)


def test_a_training_file_gives_raw_and_ema_and_the_emas_null_caption_is_not_trusted(tmp_path: Path) -> None:
    model = config(base_size=16)
    raw, ema = state_of(model, 0), state_of(model, 1)
    extra = {"optimizer": {"state": {0: torch.ones(2)}}, "epoch": 3, "scheduler": {"last_epoch": 5}}
    ddp = {f"module.{name}": tensor for name, tensor in raw.items()}  # as saved from DistributedDataParallel
    torch.save({"state_dict": ddp, "state_dict_ema": ema, **extra}, tmp_path / "epoch_3.pth")
    found = read_foreign(tmp_path / "epoch_3.pth", image_size=256)
    assert equal(found.states["raw"], raw)
    assert equal(found.states["ema"], {**ema, NULL_CAPTION: raw[NULL_CAPTION]})


def test_dit_bare_and_with_its_recorded_command_line(tmp_path: Path) -> None:
    model = small_dit(hidden_size=144, num_heads=2, base_size=16)
    state = state_of(model)
    torch.save({**state, "pos_embed": table(model)}, tmp_path / "DiT.pt")
    bare = read_foreign(tmp_path / "DiT.pt")
    assert bare.model == model
    assert equal(bare.states["raw"], state)
    half = {name: tensor.half() for name, tensor in state.items()}
    values = {"model": state, "ema": half, "opt": {}, "args": argparse.Namespace(model="DiT-XL/2", epochs=3)}
    torch.save(values, tmp_path / "0400000.pt")
    both = read_foreign(tmp_path / "0400000.pt", image_size=256)
    assert equal(both.states["raw"], state)
    assert all(tensor.dtype == torch.float32 for tensor in both.states["ema"].values())


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("micro", [False, True])
def test_a_diffusers_folder(tmp_path: Path, micro: bool, sharded: bool) -> None:
    model = config(micro_conditions=micro, base_size=64 if micro else 8, interpolation_scale=2.0 if micro else 1.0)
    model = model.model_copy(update={"max_tokens": 120})
    state = state_of(model)
    transformer_of(model, state).save_pretrained(
        tmp_path / "transformer", **({"max_shard_size": "300KB"} if sharded else {})
    )
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == sharded
    del state[NULL_CAPTION]
    for folder in (tmp_path, tmp_path / "transformer"):
        found = read_foreign(folder)
        assert found.model == model
        assert equal(found.states["raw"], state)


def test_a_published_diffusers_config_without_an_interpolation_scale(tmp_path: Path) -> None:
    model = config(micro_conditions=True, base_size=64, interpolation_scale=2.0)
    transformer_of(model, state_of(model)).save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**about, "interpolation_scale": None}))
    assert read_foreign(tmp_path).model.interpolation_scale == 2.0


class Trap:
    """Unpickling it runs code."""

    def __reduce__(self) -> Any:
        return (print, ("code was run",))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": state_of(config()), "args": Trap()}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="asks for code to be run when it is opened, which is refused") as caught:
        read_foreign(tmp_path / "net.pth", image_size=256)
    assert "safetensors" in str(caught.value)
    assert "code was run" not in capsys.readouterr().out


def test_what_is_no_weights_is_refused_and_every_wrong_key_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_foreign(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be read by torch|refused"):
        read_foreign(tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        read_foreign(tmp_path / "text.safetensors")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    with pytest.raises(CheckpointError, match="holds no state of a net"):
        read_foreign(tmp_path / "numbers.pth")
    torch.save({"conv_in.weight": torch.ones(2)}, tmp_path / "unet.pth")
    with pytest.raises(CheckpointError, match="no PixArt's and no DiT's"):
        read_foreign(tmp_path / "unet.pth")
    state = state_of(config(base_size=16))
    state["blocks.0.attn.q_norm.weight"] = state.pop("blocks.1.mlp.fc2.bias")
    torch.save(state, tmp_path / "sigma.pth")
    with pytest.raises(CheckpointError) as caught:
        read_foreign(tmp_path / "sigma.pth", image_size=256)
    assert "missing: blocks.1.mlp.fc2.bias" in str(caught.value)
    assert "extra: blocks.0.attn.q_norm.weight" in str(caught.value)
    state = state_of(config(base_size=16))
    state["blocks.0.mlp.fc1.weight"][0, 0] = torch.nan
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match="not finite: blocks.0.mlp.fc1.weight"):
        read_foreign(tmp_path / "broken.pth", image_size=256)


def test_a_position_table_of_another_size_than_said_is_refused(tmp_path: Path) -> None:
    model = config(base_size=16)
    torch.save({**state_of(model), "pos_embed": table(model)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="not the table of base size 64, interpolation scale 2"):
        read_foreign(tmp_path / "net.pth", image_size=1024)


def test_heads_of_another_width_must_be_said(tmp_path: Path) -> None:
    model = small(base_size=16)  # 12 channels a head
    torch.save(state_of(model), tmp_path / "net.pth")
    assert read_foreign(tmp_path / "net.pth", image_size=256, model={"num_heads": 4}).model == model
    with pytest.raises(ConfigError, match="say how many heads"):
        read_foreign(tmp_path / "net.pth", image_size=256)
