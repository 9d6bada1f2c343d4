"""A stage changes under way only as a person has said by name; what has changed since a checkpoint is accounted for, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pixart_ds import files
from pixart_ds.config.change import change_stage, changes_since, kind_of, read_changes
from pixart_ds.config.freeze import create_run, read_stage
from pixart_ds.config.load import identity, load_chain
from pixart_ds.errors import CheckpointError, ConfigError
from pixart_ds.layout import RunLayout

DATA = {"order": "0123", "sets": {"a": "60 samples, ff"}}


@pytest.fixture
def run(tmp_path: Path) -> RunLayout:
    return create_run(tmp_path / "run", load_chain("smoke/chain"), "smoke/chain")


def saved(run: RunLayout) -> dict[str, Any]:
    """What a checkpoint of today says of the recipe."""
    return identity(read_stage(run, "stage2"))


def since(
    run: RunLayout,
    recipe: dict[str, Any],
    data: dict[str, Any] | None = None,
    lineage: dict[str, Any] | None = None,
) -> list[tuple[str, ...]]:
    now = identity(read_stage(run, "stage2"))
    found = changes_since(run.stage("stage2"), recipe, now, DATA, data or DATA, "img-1", lineage)
    return [change.allowed for change in found]


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("optimizer.learning_rate", "recipe"),
        ("length.steps", "recipe"),
        ("precision", "precision"),
        ("data.sets", "dataset"),
        ("order.window", "dataset"),
        ("model.depth", None),
        ("init.source", None),
        ("global_batch_size", None),
        ("seed", None),
    ],
)
def test_each_key_has_a_name_by_which_it_is_allowed(key: str, kind: str | None) -> None:
    assert kind_of(key) == kind


def test_what_is_not_allowed_is_told_at_once_and_nothing_changes(run: RunLayout) -> None:
    before = run.stage("stage2").config.read_bytes()
    words = ["optimizer.learning_rate=3e-5", "precision=bf16", "seed=7", "order.window=9"]
    with pytest.raises(ConfigError) as error:
        change_stage(run, "stage2", words, ["recipe"])
    for text in (
        "3 of 4 differences",
        "precision: 'fp32' → 'bf16' (--allow precision)",
        "seed: 43 → 7 (never",
        "(--allow dataset)",
    ):
        assert text in str(error.value)
    assert "learning_rate" not in str(error.value)
    assert run.stage("stage2").config.read_bytes() == before
    assert read_changes(run.stage("stage2")) == []


def test_a_change_is_frozen_and_recorded_and_accounts_for_older_checkpoints(run: RunLayout) -> None:
    first = saved(run)
    assert since(run, first) == []
    change_stage(run, "stage2", ["optimizer.learning_rate=3e-5"], ["recipe"])
    second = saved(run)
    change_stage(run, "stage2", ["precision=bf16", "min_snr_gamma=5"], ["precision", "recipe"])
    assert read_stage(run, "stage2").precision == "bf16"
    assert files.read_json(run.stage("stage2").deepspeed)["bf16"]["enabled"] is True
    assert since(run, first) == [("recipe",), ("precision", "recipe")]
    assert since(run, second) == [("precision", "recipe")]
    assert since(run, saved(run)) == []
    (one, two) = read_changes(run.stage("stage2"))
    assert [line.split(":")[0] for line in one.differences] == ["optimizer.learning_rate"]
    assert sorted(line.split(":")[0] for line in two.told()["differences"]) == ["min_snr_gamma", "precision"]
    assert identity(two.stage_before) == second


def test_a_recipe_that_was_edited_by_hand_is_refused_with_a_diff(run: RunLayout) -> None:
    first = saved(run)
    change_stage(run, "stage2", ["optimizer.learning_rate=3e-5"], ["recipe"])
    config = run.stage("stage2").config
    config.write_text(config.read_text().replace("weight_decay: 0.03", "weight_decay: 0.5"))
    assert read_stage(run, "stage2").optimizer.weight_decay == 0.5
    for recipe in (identity(read_changes(run.stage("stage2"))[0].stage_before),):
        assert since(run, recipe) == [("recipe",)], "from before a recorded change, all that follows is accounted for"
    with pytest.raises(CheckpointError, match=r"optimizer.weight_decay: 0\.03 → 0\.5") as error:
        since(run, {**first, "optimizer": {**first["optimizer"], "learning_rate": 3e-5}})
    assert "pixart-ds change RUN stage2 --allow recipe" in str(error.value)


def test_other_content_of_a_set_must_be_allowed_by_name(run: RunLayout) -> None:
    other = {"order": "4567", "sets": {"a": "80 samples, 00"}}
    recipe = saved(run)
    with pytest.raises(CheckpointError) as error:
        since(run, recipe, other)
    assert "sets.a: '60 samples, ff' → '80 samples, 00'" in str(error.value)
    assert "--allow dataset" in str(error.value)
    change_stage(run, "stage2", ["optimizer.learning_rate=3e-5"], ["recipe"])
    with pytest.raises(CheckpointError, match="80 samples"):
        since(run, recipe, other)
    assert change_stage(run, "stage2", [], ["dataset"]) == []
    assert since(run, recipe, other) == [("recipe",), ("dataset",)]


def test_a_change_of_content_is_allowed_once(run: RunLayout) -> None:
    """A checkpoint from after it tells of it in its lineage; yet another content is another matter."""
    other = {"order": "4567", "sets": {"a": "80 samples, 00"}}
    recipe = saved(run)
    change_stage(run, "stage2", [], ["dataset"])
    before: dict[str, Any] = {"changes": [{"allowed": ["dataset"], "differences": [], "when": "of an earlier stage"}]}
    assert since(run, recipe, other, before) == [("dataset",)]
    told = [{**change.told(), "images_seen": 64} for change in read_changes(run.stage("stage2"))]
    after = {"changes": [*before["changes"], *told]}
    with pytest.raises(CheckpointError, match="--allow dataset"):
        since(run, recipe, other, after)
    change_stage(run, "stage2", [], ["dataset"])
    assert since(run, recipe, other, after) == [("dataset",)]


def test_what_a_person_has_edited_in_the_runs_deepspeed_file_stays(run: RunLayout) -> None:
    path = run.stage("stage2").deepspeed
    values = files.read_json(path)
    values.setdefault("fp16", {})["initial_scale_power"] = 7
    files.write_json(path, values)
    change_stage(run, "stage2", ["precision=fp16", "optimizer.gradient_clipping=0.5"], ["precision", "recipe"])
    changed = files.read_json(path)
    assert changed["fp16"]["initial_scale_power"] == 7
    assert (changed["fp16"]["enabled"], changed["gradient_clipping"]) == (True, 0.5)
    files.write_json(path, {**changed, "gradient_clipping": 3.0})
    with pytest.raises(ConfigError, match=r"gradient_clipping: the file says 3\.0, but 0\.5 is due"):
        change_stage(run, "stage2", ["optimizer.learning_rate=3e-5"], ["recipe"])
    words = ["optimizer.learning_rate=3e-5", "execution.deepspeed=zero2_v100_32gb"]
    if read_stage(run, "stage2").execution.deepspeed == "zero2_v100_32gb":
        words[1] = "execution.deepspeed=zero2_cpu"
    change_stage(run, "stage2", words, ["recipe"])
    assert files.read_json(path)["gradient_clipping"] == 0.5
    assert files.read_json(path)["fp16"].get("initial_scale_power") != 7


def test_keys_that_an_older_version_did_not_know_do_not_count(run: RunLayout) -> None:
    recipe = saved(run)
    del recipe["min_snr_gamma"]
    del recipe["optimizer"]["ema_warmup"]
    assert since(run, recipe) == []
    assert since(run, {}) == []


def test_a_change_that_changes_nothing_or_comes_too_late(run: RunLayout) -> None:
    with pytest.raises(ConfigError, match="nothing would change"):
        change_stage(run, "stage2", [], ["recipe"])
    files.write_json(run.stage("stage2").done, {})
    with pytest.raises(ConfigError, match="stage2 is done"):
        change_stage(run, "stage2", ["optimizer.learning_rate=3e-5"], ["recipe"])
