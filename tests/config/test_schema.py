"""Recipes: closed, typed, and told apart from mistakes with one message for all of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pixart_ds.config import load
from pixart_ds.config.schema import ChainConfig, Duration, ExecutionConfig, OptimizerConfig, StageConfig
from pixart_ds.errors import ConfigError

RECIPE = """
name: s
length: {steps: 10}
global_batch_size: 4
model: {kind: pixart, caption_channels: 64, max_tokens: 20}
init: {}
data: {sets: [{path: a}], latents: '32'}
checkpoint: {every: {steps: 5}}
optimizer: {warmup_steps: 5}
"""


def values() -> dict[str, Any]:
    return dict(load.parse_yaml(RECIPE, "recipe"))


def complaint(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load.validate(StageConfig, load.apply_overrides(values(), overrides), "recipe.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_all_mistakes_come_at_once_with_key_value_and_remedy() -> None:
    text = complaint("model.hiden_size=3", "model.depth=x", "data.sets.0.cont=1", "seed=-1", "length=null")
    assert text.startswith("5 mistakes in the recipe")
    assert "model.hiden_size: there is no such key (value 3); did you mean hidden_size?" in text
    assert "model.depth: input should be a valid integer, not 'x'" in text
    assert "data.sets.0.cont: there is no such key (value 1); did you mean count?" in text
    assert "seed: " in text
    assert "not -1" in text
    assert "where: recipe.yaml" in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_heads=7", "hidden_size 1152 is not a multiple of num_heads 7"),
        ("model.num_classes=10", "kind pixart has no num_classes"),
        ("model.kind=dit", "kind dit needs num_classes; kind dit has no caption_channels"),
        ("model.depth=2.0", "valid integer"),
        ("model.depth=true", "valid integer"),
        ("optimizer.learning_rate=.nan", "finite number"),
        ("optimizer.learning_rate=0", "greater than 0"),
        ("optimizer.warmup_steps=11", "warmup_steps 11 exceeds the stage's 10 steps"),
        ("execution.checkpointed_blocks=29", "exceeds model.depth 28"),
        ("execution.checkpointed_blocks=most", "'all', 'none' or 'auto'"),
        ("execution.checkpointed_blocks=-1", "greater than or equal to 0"),
        ("execution.micro_batch_size=0", "greater than or equal to 1"),
        ("execution.micro_batch_size=many", "'auto'"),
        ("length={steps: 3, images: 4}", "exactly one of steps and images"),
        (
            "init.source=handover",
            "needs weights (raw or ema) and either stage (of this chain) or path (a handover's folder), not none",
        ),
        ("init={source: handover, stage: s, weights: raw}", "init.stage is the stage itself"),
        ("init.stage=x", "source scratch takes no stage, path or weights"),
        ("init={source: handover, stage: s, path: p, weights: raw}", "not stage and path"),
        ("init={source: reparameterise, path: p, weights: raw, shared_modulation: 28}", "28 is no block of 28"),
        ("execution.attention_backend=fast", "'auto', 'memory_efficient'"),
        ("min_snr_gamma=0", "greater than 0"),
        ("data.sets=[]", "at least 1"),
        ("name=a/b", "pattern"),
    ],
)
def test_impossible_values_are_refused(override: str, words: str) -> None:
    assert words in complaint(override)


def test_micro_conditions_need_a_width_that_divides_by_three() -> None:
    assert "divides by 3, not 128" in complaint(
        "model.hidden_size=128", "model.num_heads=4", "model.micro_conditions=true"
    )


def test_numbers_of_execution_may_be_left_open() -> None:
    def execution(*overrides: str) -> ExecutionConfig:
        return load.validate(StageConfig, load.apply_overrides(values(), overrides), "r").execution

    assert not execution().is_auto
    for key in ("micro_batch_size", "checkpointed_blocks"):
        left = execution(f"execution.{key}=auto")
        assert left.is_auto
        assert ExecutionConfig.model_validate_json(left.model_dump_json()) == left
    assert not execution("execution.micro_batch_size=3", "execution.checkpointed_blocks=none").is_auto


def test_config_is_frozen() -> None:
    stage = load.validate(StageConfig, values(), "r")
    with pytest.raises(Exception, match="frozen"):
        stage.seed = 3


def test_yaml_numbers_duplicates_and_errors_have_places() -> None:
    assert load.parse_yaml("a: 1e-4\nb: 2E5\nc: 1e-4x\nd: -1.5e+3", "x") == {
        "a": 1e-4,
        "b": 2e5,
        "c": "1e-4x",
        "d": -1500.0,
    }
    with pytest.raises(ConfigError, match="the key 'a' stands twice") as caught:
        load.parse_yaml("a: 1\nb: 2\na: 3\n", "r.yaml")
    assert "r.yaml, line 3, column 1" in str(caught.value)
    with pytest.raises(ConfigError, match=r"line 2"):
        load.parse_yaml("a: 1\n  b: [", "r.yaml")


def test_base_files_are_laid_under_in_order_and_a_circle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("a: {x: 1, y: 1}\nlength: {steps: 5}\n")
    (tmp_path / "two.yaml").write_text("a: {y: 2}\n")
    (tmp_path / "top.yaml").write_text("base: [one.yaml, two.yaml]\na: {z: 3}\nlength: {images: 7}\n")
    assert load.read_layers(tmp_path / "top.yaml") == {"a": {"x": 1, "y": 2, "z": 3}, "length": {"images": 7}}
    (tmp_path / "two.yaml").write_text("base: top.yaml\n")
    with pytest.raises(ConfigError, match=r"circle: top\.yaml → two\.yaml"):
        load.read_layers(tmp_path / "top.yaml")


def test_a_missing_recipe_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe file stage9") as caught:
        load.load_stage("stage9")
    assert "stage3_1024" in str(caught.value)


@pytest.mark.parametrize("text", ["a", "=3", "name.x=1", "data.sets.7.path=x", "data.sets.7=x"])
def test_overrides_that_lead_nowhere_are_errors(text: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load.apply_overrides(values(), [text])


def test_overriding_a_duration_replaces_its_unit() -> None:
    stage = load.validate(StageConfig, load.apply_overrides(values(), ["length.images=39"]), "r")
    assert (stage.total_steps, stage.total_images) == (10, 40)


def test_durations_round_up_to_whole_steps() -> None:
    assert Duration(images=11_393).in_steps(11_392) == 2
    assert Duration(images=11_393).in_images(11_392) == 2 * 11_392
    assert Duration(steps=3).in_images(7) == 21


def test_square_root_rule_gives_the_released_rates() -> None:
    # paper.md's last column of the stage table: 4.0e-5, 1.33e-4, 6.3e-5, 2.4e-5
    rule = OptimizerConfig(learning_rate_rule="sqrt")
    rates = [rule.effective_learning_rate(batch) for batch in (1024, 11_392, 2560, 384)]
    assert rates == pytest.approx([4.0e-5, 1.334e-4, 6.32e-5, 2.449e-5], rel=1e-3)
    assert OptimizerConfig().effective_learning_rate(11_392) == 2e-5


def test_dumped_config_reads_back_equal() -> None:
    stage = load.validate(StageConfig, values(), "r")
    assert load.validate(StageConfig, load.parse_yaml(load.dump_yaml(stage), "dump"), "dump") == stage


def test_chain_overrides_and_their_mistakes_name_the_stage() -> None:
    chain = load.load_chain("chain", ["*.seed=7", "stage2.length.steps=2000"])
    assert {stage.seed for stage in chain.stages} == {7}
    assert [stage.total_steps for stage in chain.stages][:2] == [300_000, 2000]
    with pytest.raises(ConfigError, match=r"stage2\.length\.stps: there is no such key"):
        load.load_chain("chain", ["stage2.length.stps=3"])
    with pytest.raises(ConfigError, match="names no stage of the chain"):
        load.load_chain("chain", ["stage9.seed=3"])


def test_chain_refuses_handovers_that_cannot_be() -> None:
    with pytest.raises(ConfigError) as caught:
        load.load_chain(
            "chain",
            ["stage2.model.depth=12", "stage3_256.init.stage=stage3_512", "stage3_512.init.source=reparameterise"],
        )
    text = str(caught.value)
    assert "stage2.model.depth 12 differs from stage1.model.depth 28" in text
    assert "stage3_256.init.stage 'stage3_512' is not an earlier stage (stage1, stage2)" in text
    assert "stage3_512.init.source reparameterise needs a dit net from stage3_256, which trains a pixart" in text


def test_differences_list_every_leaf() -> None:
    assert load.differences({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"x": 1, "y": 5}, "c": 4}) == [
        "a.y: 2 → 5",
        "b: 3 → None",
        "c: None → 4",
    ]


PAPER = {  # Table 4: steps, batch, V100s, V100-days
    "stage1": (300_000, 1024, 8, 88),
    "stage2": (150_000, 11_392, 64, 672),
    "stage3_256": (90_000, 11_392, 64, 416),
    "stage3_512": (100_000, 2560, 64, 320),
    "stage3_1024": (16_000, 384, 32, 160),
}


def test_full_size_recipes_are_the_papers() -> None:
    chain = load.load_chain("chain")
    assert {s.name: (s.total_steps, s.global_batch_size, s.paper_gpus, s.paper_gpu_days) for s in chain.stages} == PAPER
    for stage in chain.stages:
        net, adam = stage.model, stage.optimizer
        assert (net.depth, net.hidden_size, net.num_heads, net.patch_size, net.mlp_ratio) == (28, 1152, 16, 2, 4.0)
        assert (adam.learning_rate, adam.learning_rate_rule, adam.weight_decay, adam.eps) == (2e-5, "none", 0.03, 1e-10)
        assert (adam.gradient_clipping, adam.ema_decay, adam.betas, adam.warmup_steps) == (
            0.01,
            0.9999,
            (0.9, 0.999),
            1000,
        )
        assert (stage.precision, stage.fp32_attention, stage.execution.checkpointed_blocks) == ("fp16", False, "all")
        assert stage.global_batch_size == int(stage.execution.micro_batch_size) * (stage.paper_gpus or 0)
        assert stage.model_copy(update={"paper": True}).fp32_attention
        if net.kind == "pixart":
            assert (net.caption_channels, net.max_tokens, stage.init.weights) == (4096, 120, "raw")
    inits = [(s.init.source, s.init.stage) for s in chain.stages]
    assert inits == [
        ("scratch", None),
        ("reparameterise", "stage1"),
        ("handover", "stage2"),
        ("handover", "stage3_256"),
        ("handover", "stage3_512"),
    ]
    shapes = [
        (s.model.kind, s.model.base_size, s.model.interpolation_scale, s.model.micro_conditions) for s in chain.stages
    ]
    assert shapes == [
        ("dit", 16, 1, False),
        ("pixart", 16, 1, False),
        ("pixart", 16, 1, False),
        ("pixart", 32, 1, False),
        ("pixart", 64, 2, True),
    ]
    assert sum(stage.paper_gpu_days or 0 for stage in chain.stages) == 1656
    assert math.isclose(sum(s.total_images for s in chain.stages), 3.303e9, rel_tol=1e-3)


@pytest.mark.parametrize("path", sorted(load.RECIPES.glob("**/*.yaml")), ids=lambda p: str(p.relative_to(load.RECIPES)))
def test_every_recipe_loads(path: Path) -> None:
    if path.stem == "common":
        assert load.read_layers(path)
    elif path.stem == "chain":
        assert len(load.load_chain(str(path)).stages) == 5
    elif path.stem == "prepare":
        assert load.load_prepare(str(path)).latents
    else:
        assert load.load_stage(str(path)).name == path.stem


def test_demo_recipes_are_short_overlays_on_the_full_ones() -> None:
    demo: ChainConfig = load.load_chain("demo/chain")
    full = load.load_chain("chain")
    assert [s.name for s in demo.stages] == [s.name for s in full.stages]
    assert [s.init.source for s in demo.stages] == [s.init.source for s in full.stages]
    for path in (load.RECIPES / "demo").glob("stage*.yaml"):
        assert len(path.read_text().splitlines()) <= 12
