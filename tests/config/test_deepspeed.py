"""The merge of DeepSpeed's JSON with the recipe: what is filled, and the text of every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pixart_ds.config import deepspeed
from pixart_ds.config.deepspeed import load_deepspeed, merge
from pixart_ds.config.load import RECIPES, load_stage
from pixart_ds.config.schema import StageConfig
from pixart_ds.errors import ConfigError

SHIPPED = ("zero2_v100_16gb", "zero2_v100_32gb", "zero2_a100", "zero2_h100", "zero2_cpu")
BF16 = ("zero2_a100", "zero2_h100", "zero2_cpu")


def _stage(precision: str = "fp16", **optimizer: Any) -> StageConfig:
    return StageConfig.model_validate(
        {
            "name": "stage9",
            "length": {"steps": 2000},
            "global_batch_size": 64,
            "precision": precision,
            "model": {"kind": "dit", "num_classes": 10},
            "init": {},
            "data": {"sets": [{"path": "none"}], "latents": "none"},
            "optimizer": optimizer,
            "checkpoint": {"every": {"steps": 5}},
        }
    )


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, precision) for name in SHIPPED for precision in ("fp32", "fp16")), *((name, "bf16") for name in BF16)],
)
def test_shipped_files_are_filled(name: str, precision: str) -> None:
    merged = merge(_stage(precision, gradient_clipping=0.5), load_deepspeed(name))
    assert "auto" not in json.dumps(merged)
    assert merged["train_micro_batch_size_per_gpu"] == merged["gradient_accumulation_steps"] == 1
    assert merged["gradient_clipping"] == 0.5
    assert merged["fp16"]["enabled"] is (precision == "fp16")
    assert merged["bf16"]["enabled"] is (precision == "bf16")
    assert merged["zero_optimization"]["stage"] == 2
    assert merged["zero_optimization"]["round_robin_gradients"] is False
    assert merged["gradient_allreduce_op"] == "sum"
    assert merged["data_types"] == {"grad_accum_dtype": "fp32"}
    assert merged["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("name", sorted({*SHIPPED} - {*BF16}))
def test_a_v100_has_no_bf16(name: str) -> None:
    with pytest.raises(ConfigError, match="bf16.enabled: the file says false, but true is due") as error:
        merge(_stage("bf16"), load_deepspeed(name))
    assert 'write "auto" or take another file' in str(error.value)


def test_devices_differ_in_bf16_alone_and_the_docs_explain_every_value() -> None:
    """Equal files are one file with two names, so that no difference is claimed where there is none."""
    files = {name: load_deepspeed(name) for name in SHIPPED}
    assert files["zero2_v100_16gb"] == files["zero2_v100_32gb"]
    assert files["zero2_a100"] == files["zero2_h100"]
    assert {**files["zero2_a100"], "bf16": {"enabled": False}} == files["zero2_v100_32gb"]
    text = (Path(__file__).parents[2] / "docs" / "deepspeed.md").read_text()
    for key in deepspeed._leaves(files["zero2_a100"]):
        assert f"`{key}`" in text, key
    for key in deepspeed._NOT_OURS:
        assert f"`{key.removeprefix('zero_optimization.')}" in text, key


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("**/stage*.yaml")), ids=lambda path: str(path.relative_to(RECIPES))
)
def test_every_recipe_fits_its_file(path: Path) -> None:
    stage = load_stage(str(path))
    merge(stage, load_deepspeed(stage.execution.deepspeed))


def test_a_merged_file_merges_to_itself_and_the_given_one_is_left_alone() -> None:
    raw = load_deepspeed("zero2_a100")
    before = json.dumps(raw)
    merged = merge(_stage(), raw)
    assert json.dumps(raw) == before
    assert merge(_stage(), merged) == merged


def _refused(raw: dict[str, Any], **stage: Any) -> str:
    with pytest.raises(ConfigError) as error:
        merge(_stage(**stage), raw, where="mine.json")
    return str(error.value)


def test_all_disagreements_come_at_once_with_both_sides() -> None:
    text = _refused(
        {
            "train_micro_batch_size_per_gpu": 8,
            "gradient_clipping": 1.0,
            "fp16": {"enabled": True},
            "bf16": {"enabled": False},
            "zero_optimization": {"stage": 3, "round_robin_gradients": True},
        },
        precision="bf16",
    )
    assert text.startswith("6 problems between the DeepSpeed file and the recipe stage9:")
    for line in (
        "train_micro_batch_size_per_gpu: the file says 8, but 1 is due (the engine, which runs micro-batches itself",
        '(execution.micro_batch_size)); write "auto"',
        "gradient_clipping: the file says 1.0, but 0.01 is due (the recipe's optimizer.gradient_clipping)",
        "fp16.enabled: the file says true, but false is due (the recipe's precision bf16)",
        "bf16.enabled: the file says false, but true is due (the recipe's precision bf16)",
        "zero_optimization.stage: the file says 3, but 2 is due (the engine, which is written for ZeRO-2)",
        "zero_optimization.round_robin_gradients: the file says true, but false is due (the checkpoints,",
    ):
        assert line in text
    assert "where: mine.json" in text


def test_the_place_is_the_recipes_key_unless_told() -> None:
    with pytest.raises(ConfigError, match="execution.deepspeed: zero2_v100_32gb"):
        merge(_stage(), {})


@pytest.mark.parametrize("key", deepspeed._NOT_OURS)
def test_what_must_not_be_there_is_refused_with_a_reason(key: str) -> None:
    raw: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    *sections, last = key.split(".")
    holder = raw
    for section in sections:
        holder = holder.setdefault(section, {})
    holder[last] = {"type": "auto"}
    text = _refused(raw)
    assert text.startswith("1 problem ")
    assert f"{key}: remove it; {deepspeed._NOT_OURS[key]}" in text


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "zero_optimization.stage: it is missing; write 2"),
        (
            {"zero_optimization": {"stage": 2}, "train_batch_size": 64},
            "train_batch_size: remove it; it follows from the number of ranks",
        ),
        ({"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}, "train_batch_size: remove it"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            "zero_optimization.reduce_bucket_size: remove it; it has no effect: the engine sums and reduces the gradients itself",
        ),
        ({"zero_optimization": {"stage": 2}, "tags": ["a", "auto"]}, "tags: nothing reads this key; remove it"),
        (
            {"zero_optimization": {"stage": 2}, "fp16": {"los_scale_window": 100}},
            "fp16.los_scale_window: nothing reads this key; did you mean fp16.loss_scale_window?",
        ),
        (
            {"zero_optimization": {"stage": 2}, "wall_clock_breakdown": True},
            "wall_clock_breakdown: nothing reads this key",
        ),
        (
            {"zero_optimization": {"stage": 2}, "fp16": {"loss_scale_window": 0}},
            "fp16.loss_scale_window: a whole number from 1 on is due, the file says 0",
        ),
        (
            {"zero_optimization": {"stage": 2}, "fp16": {"initial_scale_power": 65536}},
            "fp16.initial_scale_power: a whole number 0 to 32 is due, the file says 65536",
        ),
        (
            {"zero_optimization": {"stage": 2}, "fp16": {"hysteresis": "auto"}},
            "fp16.hysteresis: a whole number from 1 on is due, the file says 'auto'",
        ),
        (
            {"zero_optimization": {"stage": 2}, "fp16": {"consecutive_hysteresis": 1}},
            "fp16.consecutive_hysteresis: true or false is due, the file says 1",
        ),
        ({"zero_optimization": {"stage": 2}, "fp16": True}, "fp16: a section is due, the file says true"),
        (
            {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": 1},
            "zero_allow_untested_optimizer: the file says 1, but true is due",
        ),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: the file says true, but 2 is due"),
    ],
)
def test_refusals(raw: dict[str, Any], message: str) -> None:
    text = _refused(raw)
    assert text.startswith("1 problem ")
    assert message in text


def test_files_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    assert load_deepspeed(str(path)) == {"zero_optimization": {"stage": 2}}
    with pytest.raises(ConfigError, match="no DeepSpeed file called 'zero3'") as error:
        load_deepspeed("zero3")
    for name in SHIPPED:
        assert name in str(error.value)
    with pytest.raises(ConfigError, match="there is no DeepSpeed file gone.json"):
        load_deepspeed(str(tmp_path / "gone.json"))
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="is a JSON object, not a list"):
        load_deepspeed(str(path))
    path.write_text("{,}")
    with pytest.raises(ConfigError, match="mine.json is not JSON"):
        load_deepspeed(str(path))


def test_an_installed_package_finds_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "pixart_ds" / "ds_configs"
    inside.mkdir(parents=True)
    (inside / "zero2_own.json").write_text("{}")
    monkeypatch.setattr(deepspeed, "FOLDERS", (tmp_path / "ds_configs", inside))
    assert load_deepspeed("zero2_own") == {}
