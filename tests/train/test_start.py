"""Where a stage's first weights come from: scratch, an imported file, the stage before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pixart_ds.config.schema import ModelConfig, StageConfig
from pixart_ds.engine.foreign import NULL_CAPTION
from pixart_ds.engine.handover import save_handover
from pixart_ds.errors import CheckpointError, ConfigError
from pixart_ds.layout import RunLayout
from pixart_ds.model import PixArt, build, reparameterise
from pixart_ds.train.preflight import check_origin
from pixart_ds.train.start import initial_weights, net_of
from tests.helpers.sets import tiny_set
from tests.model.test_nets import randomised

PIXART: dict[str, Any] = {"kind": "pixart", "caption_channels": 6, "max_tokens": 9}
SHAPE: dict[str, Any] = {"depth": 2, "hidden_size": 48, "num_heads": 4, "base_size": 2}


def stage_of(data: Path, init: dict[str, Any], **model: Any) -> StageConfig:
    return StageConfig(
        name="s", length={"steps": 4}, global_batch_size=4, precision="fp32", model={**PIXART, **SHAPE, **model}, init=init,
        data={"latents": "32-square", "sets": [{"path": str(data)}]}, checkpoint={"every": {"steps": 2}},
        optimizer={"warmup_steps": 0},
    )  # type: ignore[arg-type]  # fmt: skip


def started(tmp_path: Path, init: dict[str, Any], **model: Any) -> tuple[PixArt, Any, Any]:
    prepared = tiny_set(tmp_path / "data")
    stage = stage_of(tmp_path / "data", init, **model)
    net = net_of(stage)
    assert isinstance(net, PixArt)
    return net, initial_weights(RunLayout(tmp_path / "run"), stage, net, [prepared]), prepared


def imported(folder: Path, model: dict[str, Any], **lineage: Any) -> dict[str, torch.Tensor]:
    """A handover as `pixart-ds import` makes it; returns its weights."""
    config = ModelConfig(**{**SHAPE, **model})
    state = {name: tensor.clone() for name, tensor in randomised(build(config), 3).state_dict().items()}
    save_handover(folder, {"raw": state}, {"source": "import", **lineage}, config)
    return state


def null_of(prepared: Any, tokens: int = 9) -> torch.Tensor:
    embeds = torch.from_numpy(np.asarray(prepared.null_embeds)).float()
    assert len(embeds) == 9  # those of the padding too
    return torch.nn.functional.pad(embeds, (0, 0, 0, tokens - len(embeds)))


def test_scratch_takes_the_sets_empty_caption(tmp_path: Path) -> None:
    _, start, prepared = started(tmp_path, {"source": "scratch"})
    assert torch.equal(start.state[NULL_CAPTION], null_of(prepared))
    assert start.lineage == {"source": "scratch", "seed": 43}


def test_a_net_for_longer_captions_has_zeros_behind_it_and_one_for_shorter_ones_is_refused(tmp_path: Path) -> None:
    _, start, prepared = started(tmp_path / "long", {"source": "scratch"}, max_tokens=12)
    assert torch.equal(start.state[NULL_CAPTION], null_of(prepared, 12))
    with pytest.raises(ConfigError, match=r"features of shape \(9, 6\); the net takes up to \(5, 6\)"):
        started(tmp_path / "short", {"source": "scratch"}, max_tokens=5)


def test_the_longest_of_the_sets_empty_captions_is_taken(tmp_path: Path) -> None:
    sets = [tiny_set(tmp_path / str(tokens), ((1, 4),), tokens=4, max_tokens=tokens) for tokens in (4, 9)]
    stage = stage_of(tmp_path / "4", {"source": "scratch"})
    start = initial_weights(RunLayout(tmp_path / "run"), stage, net_of(stage), sets)
    assert torch.equal(start.state[NULL_CAPTION], null_of(sets[1]))


@pytest.mark.parametrize("with_null", [True, False])
def test_imported_weights_keep_their_null_caption_if_they_have_one(tmp_path: Path, with_null: bool) -> None:
    state = imported(tmp_path / "theirs", PIXART, licence="openrail++")
    if not with_null:
        del state[NULL_CAPTION]
        save_handover(tmp_path / "bare", {"ema": state}, {"source": "import"}, ModelConfig(**SHAPE, **PIXART))
    path = str(tmp_path / ("theirs" if with_null else "bare"))
    _, start, prepared = started(tmp_path, {"source": "handover", "path": path, "weights": "ema"})
    wanted = state[NULL_CAPTION] if with_null else null_of(prepared)
    assert torch.equal(start.state[NULL_CAPTION], wanted)
    assert torch.equal(start.state["blocks.1.mlp.fc2.weight"], state["blocks.1.mlp.fc2.weight"])
    assert start.lineage["path"] == path
    assert start.lineage["from"]["source"] == "import"


def test_an_imported_dit_is_reparameterised_with_the_chosen_shared_modulation(tmp_path: Path) -> None:
    dit = imported(tmp_path / "dit", {"kind": "dit", "num_classes": 5}, licence="CC-BY-NC-4.0")
    init = {"source": "reparameterise", "path": str(tmp_path / "dit"), "weights": "raw", "shared_modulation": "mean"}
    net, start, prepared = started(tmp_path, init)
    wanted = reparameterise(dit, net.state_dict(), shared_modulation="mean")
    for name in ("t_block.1.weight", "blocks.1.scale_shift_table", "final_layer.scale_shift_table"):
        assert torch.allclose(start.state[name], wanted[name], atol=1e-6)
    assert torch.equal(start.state[NULL_CAPTION], null_of(prepared))
    assert start.lineage["shared_modulation"] == "mean"
    assert start.lineage["from"]["licence"] == "CC-BY-NC-4.0"


def test_what_is_not_there_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    init = {"source": "handover", "path": str(tmp_path / "absent"), "weights": "raw"}
    stage = stage_of(tmp_path / "data", init)
    with pytest.raises(CheckpointError, match="s starts from the handover .*absent, which is not there") as caught:
        check_origin(RunLayout(tmp_path / "run"), stage)
    assert "pixart-ds import" in str(caught.value)
    imported(tmp_path / "wide", {**PIXART, "hidden_size": 96})
    with pytest.raises(CheckpointError, match="wide does not fit the net of s") as caught:
        started(tmp_path, {"source": "handover", "path": str(tmp_path / "wide"), "weights": "raw"})
    assert "shape of blocks.0.attn.qkv.weight: (288, 96) instead of (144, 48)" in str(caught.value)
