"""The choice of what a recipe leaves to auto: it fits, it is estimate's, it keeps what is given; GPUs by CUDA's names."""

from __future__ import annotations

import pytest

from pixart_ds.config.load import load_chain, load_stage
from pixart_ds.config.schema import StageConfig
from pixart_ds.errors import ConfigError, MachineError
from pixart_ds.plan.counts import Net
from pixart_ds.plan.estimate import Machines, estimate, estimate_stage
from pixart_ds.plan.estimate_report import report
from pixart_ds.plan.fit import GIB, Choice, choose, cluster_of, gpu_named, memory_bytes, option, usable_bytes
from pixart_ds.plan.step_time import Way
from pixart_ds.rates import rate_table

CHAIN = ["stage1", "stage2", "stage3_256", "stage3_512", "stage3_1024"]
GPUS = ["v100-16gb", "v100-32gb", "a100-40gb", "a100-80gb", "h100", "h200"]
WORLDS = [(1, 2), (1, 8), (8, 8), (3, 1), (6, 8)]
BOTH = ("execution.micro_batch_size=auto", "execution.checkpointed_blocks=auto")


def auto(recipe: str, *overrides: str) -> StageConfig:
    return load_stage(recipe, [*BOTH, *overrides])


def chosen(stage: StageConfig, gpu: str, nodes: int, each: int) -> tuple[int, int, Choice]:
    choice = choose(stage, gpu, nodes, each)
    size, blocks = choice.execution.micro_batch_size, choice.execution.checkpointed_blocks
    assert isinstance(size, int)
    assert isinstance(blocks, int | str)
    return size, {"all": 28, "none": 0}[blocks] if isinstance(blocks, str) else blocks, choice


@pytest.mark.parametrize(("nodes", "each"), WORLDS)
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("recipe", CHAIN)
def test_the_choice_fits_and_is_what_estimate_chooses(recipe: str, gpu: str, nodes: int, each: int) -> None:
    stage = auto(recipe)
    size, blocks, choice = chosen(stage, gpu, nodes, each)
    cluster, net = cluster_of(stage, gpu, nodes, each), Net.of(stage.model)
    way = Way(stage.precision, blocks, fp32_attention=stage.fp32_attention)
    assert choice.memory_bytes == memory_bytes(net, way, size, nodes * each)["total"]
    assert choice.memory_bytes <= choice.usable_bytes == usable_bytes(cluster)
    assert not choice.execution.is_auto
    answer = estimate_stage(stage, Machines(gpu=gpu, nodes=nodes, gpus_per_node=each))
    assert (size, blocks) == (answer["chosen"]["micro_batch_size"], answer["chosen"]["checkpointed_blocks"])
    assert answer["options"]["recipe"] == answer["chosen"]
    assert (
        estimate_stage(load_stage(recipe), Machines(gpu=gpu, nodes=nodes, gpus_per_node=each))["chosen"]
        == answer["chosen"]
    )


@pytest.mark.parametrize("gpu", ["v100-16gb", "a100-80gb"])
@pytest.mark.parametrize("recipe", CHAIN)
def test_what_is_given_is_kept_and_the_rest_is_the_fastest(recipe: str, gpu: str) -> None:
    cluster = cluster_of(auto(recipe), gpu, 8, 8)
    net = Net.of(auto(recipe).model)
    for given in (1, 2, 5):
        size, blocks, choice = chosen(auto(recipe, f"execution.micro_batch_size={given}"), gpu, 8, 8)
        assert size == given
        assert choice.memory_bytes <= choice.usable_bytes
        ways = [option(auto(recipe), net, each, cluster, given) for each in range(net.depth + 1)]
        best = min(way["step_seconds"]["total"] for way in ways if way["fits"])
        assert ways[blocks]["step_seconds"]["total"] == best
    for given in (0, 7, 28):
        size, blocks, choice = chosen(auto(recipe, f"execution.checkpointed_blocks={given}"), gpu, 8, 8)
        assert blocks == given
        assert choice.memory_bytes <= choice.usable_bytes
        assert size == option(auto(recipe), net, given, cluster)["micro_batch_size"]
    assert chosen(auto(recipe, "execution.checkpointed_blocks=all"), gpu, 8, 8)[2].execution.checkpointed_blocks == 28


def test_the_choice_as_the_log_has_it() -> None:
    choice = choose(auto("stage2"), "v100-32gb", 8, 8)
    assert str(choice) == (
        "micro-batches of 60, 0 of 28 blocks checkpointed, chosen by estimate for v100-32gb: 28.2 of 29.2 GiB"
    )


def test_what_does_not_fit_says_what_would_be_needed() -> None:
    huge = ("model.hidden_size=4608", "model.num_heads=64")
    with pytest.raises(MachineError) as error:
        choose(auto("stage3_1024", *huge), "v100-16gb", 4, 8)
    assert "does not fit v100-16gb: one picture at a time with all blocks checkpointed needs" in str(error.value)
    assert "choose a GPU with more memory, more GPUs, or a smaller net" in str(error.value)
    with pytest.raises(MachineError) as error:
        choose(auto("stage2", "execution.checkpointed_blocks=0", "execution.micro_batch_size=178"), "v100-16gb", 8, 8)
    assert "micro-batches of 178 with 0 of 28 blocks checkpointed needs" in str(error.value)
    assert "choose smaller micro-batches (execution.micro_batch_size), more blocks checkpointed" in str(error.value)
    with pytest.raises(MachineError, match="needs 17.6 GiB of 14.5 usable; the largest part is optimizer"):
        choose(auto("stage1"), "v100-16gb", 1, 1)  # the shards of two do fit
    values = estimate("stage3_1024", [*BOTH], Machines(gpu="v100-16gb"))
    assert values["options"]["recipe"] == values["chosen"]


def test_bf16_is_not_chosen_for_a_v100() -> None:
    with pytest.raises(ConfigError, match="v100-32gb has no bf16 units"):
        choose(auto("stage2", "precision=bf16"), "v100-32gb", 8, 8)


def test_estimate_shows_a_chain_of_auto() -> None:
    overrides = [f"*.{text}" for text in BOTH]
    assert all(stage.execution.is_auto for stage in load_chain("chain", overrides).stages)
    text = report(estimate("chain", overrides, Machines()))
    assert text == report(estimate("chain", [], Machines()))
    assert "recipe's own" in report(estimate("stage2", [*BOTH], Machines()))


@pytest.mark.parametrize(
    ("cuda_name", "gib", "name"),
    [
        ("Tesla V100-SXM2-16GB", 15.77, "v100-16gb"),
        ("Tesla V100-SXM2-32GB", 31.73, "v100-32gb"),
        ("Tesla V100-PCIE-32GB", 31.74, "v100-32gb"),
        ("Tesla V100-DGXS-32GB", 31.74, "v100-32gb"),
        ("NVIDIA A100-SXM4-40GB", 39.39, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.15, "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", 79.25, "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", 79.19, "h100"),
        ("NVIDIA H200", 139.8, "h200"),
    ],
)
def test_gpus_are_known_by_cudas_name_and_memory(cuda_name: str, gib: float, name: str) -> None:
    assert gpu_named(cuda_name, int(gib * GIB)) == name


@pytest.mark.parametrize(
    ("cuda_name", "gib"),
    [
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19.5),
        ("NVIDIA GH200 480GB", 139.8),
        ("NVIDIA H100 NVL", 93.0),
        ("NVIDIA A100X", 79.2),
        ("NVIDIA GeForce RTX 4090", 23.6),
    ],
)
def test_other_gpus_are_refused_with_the_known_ones(cuda_name: str, gib: float) -> None:
    with pytest.raises(ConfigError) as error:
        gpu_named(cuda_name, int(gib * GIB))
    text = str(error.value)
    assert f"the table has no GPU like this one: {cuda_name}, {gib:.1f} GiB" in text
    assert ", ".join(rate_table().estimate.gpus) in text
    assert "--set execution.micro_batch_size=N" in text
