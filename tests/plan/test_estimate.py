"""`pixart-ds estimate`: the model beside the paper, what fits, what is chosen, the command's answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pixart_ds.cli import main
from pixart_ds.config.load import load_stage
from pixart_ds.config.schema import StageConfig
from pixart_ds.engine.world import World
from pixart_ds.errors import ConfigError, MachineError
from pixart_ds.plan import counts
from pixart_ds.plan.counts import Net
from pixart_ds.plan.estimate import (
    MOST_SIZES,
    Machines,
    estimate,
    estimate_sizes,
    estimate_stage,
    sizes_between,
)
from pixart_ds.plan.estimate_report import report
from pixart_ds.plan.fit import (
    fastest,
    largest_micro_batch,
    memory_bytes,
    option,
    shard_elements,
    state_bytes,
    usable_bytes,
)
from pixart_ds.plan.step_time import Cluster, Way, image_seconds, step_seconds, table4, traffic
from pixart_ds.rates import rate_table
from tests.helpers.launch import launch

CHAIN = ["stage1", "stage2", "stage3_256", "stage3_512", "stage3_1024"]


def cluster(gpu: str = "v100-32gb", nodes: int = 8, gpus_per_node: int = 8) -> Cluster:
    about = rate_table().estimate.gpus[gpu]
    return Cluster(about, rate_table().devices[about.device].peak_tflops_fp16, nodes, gpus_per_node)


# ---- against the paper -----------------------------------------------------------------------------------------------


def test_one_set_of_constants_gives_all_five_rates_of_table_4_within_20_percent() -> None:
    rows = table4(rate_table())
    assert [row["stage"] for row in rows] == CHAIN
    assert [round(float(row["paper"]), 3) for row in rows] == [40.404, 29.431, 28.526, 9.259, 0.444]
    assert max(abs(float(row["error"])) for row in rows) < 0.2


def test_the_published_rows_are_those_of_the_recipes() -> None:
    table = rate_table()
    for name, row in table.estimate.table4.items():
        stage = load_stage(name)
        assert (row.kind, row.base_size, row.micro_conditions) == (
            stage.model.kind,
            stage.model.base_size,
            stage.model.micro_conditions,
        )
        assert row.steps == stage.total_steps
        assert row.gpus == stage.paper_gpus
        assert row.gpus * row.batch_per_gpu == stage.global_batch_size
        assert table.paper.gpu_days[name] == stage.paper_gpu_days


def test_every_gpu_is_in_the_list_of_devices_and_dated() -> None:
    table = rate_table()
    assert {"v100-16gb", "v100-32gb", "a100-40gb", "a100-80gb", "h100", "h200"} == set(table.estimate.gpus)
    assert all(gpu.device in table.devices and gpu.source and gpu.dated for gpu in table.estimate.gpus.values())


# ---- memory ----------------------------------------------------------------------------------------------------------


def engine_bytes(world: World) -> dict[str, Any]:
    """What the engine holds of a small PixArt on this rank, in each precision (run on several ranks)."""
    from pixart_ds.config.deepspeed import load_deepspeed, merge
    from pixart_ds.engine import deepspeed_compat
    from pixart_ds.engine.deepspeed import Engine
    from pixart_ds.model import build

    answer: dict[str, Any] = {}
    for precision in ("fp32", "fp16", "bf16"):
        stage = small_stage(precision)
        net = build(stage.model)
        engine = Engine.build(net, stage, world, merge(stage, load_deepspeed("zero2_cpu")))
        reduced = deepspeed_compat.give_gradient(engine.net, 0)
        buffers = sum(buffer.nbytes for buffer in engine.module.buffers())
        answer[precision] = {
            "weights": engine._zero.bit16_groups_flat[0].nbytes + buffers,
            "gradients": engine._sum.nbytes,
            "optimizer": sum(engine.shard(key).nbytes for key in ("master", "exp_avg", "exp_avg_sq")),
            "ema": engine.shard("ema").nbytes,
            "reduced": reduced.nbytes,
            "own bucket": sum(len(bucket.buffer) for bucket in engine._zero.ipg_buckets.values()),
            "partition": engine.layout.partition,
        }
    return answer


def small_stage(precision: str) -> StageConfig:
    sizes = ["depth=2", "hidden_size=36", "num_heads=3", "caption_channels=11", "max_tokens=7", "base_size=4"]
    return load_stage("stage2", [*(f"model.{size}" for size in sizes), f"precision={precision}"])


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 3])
def test_state_bytes_are_the_engines_to_the_byte(size: int) -> None:
    for rank in launch(engine_bytes, size):
        for precision, found in rank.items():
            net = Net.of(small_stage(precision).model)
            count = sum(counts.parameters(net).values())
            formula = state_bytes(net, precision, size)
            assert {part: formula[part] for part in ("weights", "gradients", "optimizer", "ema")} == {
                part: found[part] for part in ("weights", "gradients", "optimizer", "ema")
            }
            assert shard_elements(count, size) == found["partition"]
            fresh = counts.BYTES[precision] * counts.largest_parameter(net)
            assert formula["buckets"] == found["reduced"] + fresh
            assert found["own bucket"] == 0


def test_the_shards_are_a_sixty_fourth_at_full_size() -> None:
    net = Net.of(load_stage("stage2").model)
    made = state_bytes(net, "fp16", 64)
    assert shard_elements(610_856_096, 64) == 9_544_628
    assert made["optimizer"] + made["ema"] == 16 * 9_544_628
    assert made["gradients"] == 4 * 610_856_192
    assert made["weights"] == 2 * 610_856_192 + 4 * 120 * 4096


@pytest.mark.parametrize("gpu", ["v100-16gb", "v100-32gb", "h200"])
@pytest.mark.parametrize("blocks", [0, 10, 28])
def test_the_largest_micro_batch_fits_and_one_more_does_not(gpu: str, blocks: int) -> None:
    net, machines, way = Net.of(load_stage("stage3_512").model), cluster(gpu), Way("fp16", blocks)
    most = largest_micro_batch(net, way, machines)
    assert memory_bytes(net, way, most, 64)["total"] <= usable_bytes(machines)
    assert memory_bytes(net, way, most + 1, 64)["total"] > usable_bytes(machines)


def test_the_paper_batch_fits_16_gib_with_all_blocks_checkpointed_only() -> None:
    stage = load_stage("stage2")
    net, machines = Net.of(stage.model), cluster("v100-16gb")
    assert largest_micro_batch(net, Way("fp16", 28), machines) >= 178
    assert 1 <= largest_micro_batch(net, Way("fp16", 0), machines) < 60


# ---- the choice and the time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", CHAIN)
@pytest.mark.parametrize("gpu", ["v100-16gb", "a100-80gb"])
def test_nothing_that_fits_is_faster_than_what_is_chosen(recipe: str, gpu: str) -> None:
    stage, machines = load_stage(recipe), cluster(gpu)
    net = Net.of(stage.model)
    chosen = fastest(stage, net, machines)
    for blocks in range(0, 29, 4):
        for size in (1, 3, 8, 30, 200):
            other = option(stage, net, blocks, machines, size)
            if other["fits"]:
                assert chosen["step_seconds"]["total"] <= other["step_seconds"]["total"] * (1 + 1e-9)


def test_a_fuller_gpu_checkpoints_more() -> None:
    """At 1024 px 16 GiB hold fewer pictures than a rank's share without recomputing; the H200 holds all."""
    stage = load_stage("stage3_1024")
    blocks = [
        fastest(stage, Net.of(stage.model), cluster(gpu, 4))["checkpointed_blocks"] for gpu in ("v100-16gb", "h200")
    ]
    assert blocks[1] == 0
    assert blocks[0] >= blocks[1]


def test_traffic_is_three_copies_of_the_weights() -> None:
    net = Net.of(load_stage("stage2").model)
    made = traffic(net, "fp16", 4)
    assert made["psi"] == 2 * 610_856_096
    assert made["ours"] == 3 * made["psi"]
    assert made["deepspeed_zero2"] == 9 * made["psi"]
    assert traffic(net, "fp16", 1)["deepspeed_zero2"] == 3 * made["psi"]
    assert traffic(net, "fp32", 1)["ours"] == 8 * 610_856_096


def test_one_gpu_sends_nothing_and_slower_links_cost_more() -> None:
    net, way, rates = Net.of(load_stage("stage2").model), Way("fp16", 0), rate_table().estimate
    alone, node, many = (
        step_seconds(net, way, 100, 50, cluster(nodes=nodes, gpus_per_node=each), rates)["communication"]
        for nodes, each in ((1, 1), (1, 8), (8, 8))
    )
    assert alone == 0
    assert 0 < node < many
    assert many == pytest.approx(3 * 2 * 610_856_096 * 63 / 64 / (12.5e9 * 0.8))


def test_fp32_attention_and_recomputing_cost_time() -> None:
    net, rates = Net.of(load_stage("stage3_1024").model), rate_table().estimate
    plain, again, wide = (
        sum(image_seconds(net, way, 4, cluster(), rates).values())
        for way in (Way("fp16", 0), Way("fp16", 28), Way("fp16", 0, fp32_attention=True))
    )
    assert 1.2 < again / plain < 1.34
    assert wide / plain > 1.5


# ---- the command -----------------------------------------------------------------------------------------------------


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["estimate", *words, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_a_stage_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    values = answer(capsys, "stage2")
    assert values["parameters"] == 610_856_096
    assert values["training_flops_per_image"] == pytest.approx(3 * 298.1e9, rel=0.005)
    memory = values["memory_bytes"]
    assert memory["total"] == sum(size for part, size in memory.items() if part != "total")
    assert memory["total"] <= values["usable_bytes"] < values["capacity_bytes"]
    assert values["gpus"] == 64
    seconds = values["step_seconds"]
    assert seconds["total"] == pytest.approx(sum(value for part, value in seconds.items() if part != "total"))
    assert values["gpu_days"] == pytest.approx(150_000 * seconds["total"] * 64 / 86400)
    assert values["images_per_second_per_gpu"] == pytest.approx(178 / seconds["total"])
    assert values["table4_error"] < 0.2
    rates = values["assumptions"]["rates"]
    watts = rates["board_watts"] + rates["host_watts"]
    assert values["kwh"] == pytest.approx(values["gpu_days"] * 24 * watts / 1000 * rates["pue"])
    assert values["dollars"] == pytest.approx(values["gpu_days"] * 24 * rates["price_per_hour"])
    assert values["kg_co2e"] == pytest.approx(values["kwh"] * rates["grams_per_kwh"] / 1000)
    assert {"all", "none", "recipe"} == set(values["options"])


def test_a_chain_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    values = answer(capsys, "chain")
    assert [stage["stage"] for stage in values["stages"]] == CHAIN
    assert values["paper_gpu_days"] == 1656
    assert values["total_gpu_days"] == pytest.approx(sum(stage["gpu_days"] for stage in values["stages"]))
    assert [stage["gpus"] for stage in values["stages"]] == [8, 64, 64, 64, 32]
    assert values["table4_error"] == max(abs(row["error"]) for row in values["table4"]) < 0.2


def test_options_and_overrides_are_heeded(capsys: pytest.CaptureFixture[str]) -> None:
    plain = answer(capsys, "stage2")
    other = answer(
        capsys, "stage2", "--gpu", "h100", "--nodes", "2", "--gpus-per-node", "4", "--set", "length.steps=75000",
        "--country", "FRA", "--pue", "1.5", "--price", "2",
    )  # fmt: skip
    assert (other["gpus"], other["nodes"], other["steps"]) == (8, 2, 75_000)
    assert other["dollars"] == pytest.approx(other["gpu_days"] * 24 * 2)
    rates = other["assumptions"]["rates"]
    assert (rates["pue"], rates["grams_per_kwh"], rates["device"]) == (1.5, 56, "h100")
    assert other["images_per_second_per_gpu"] > plain["images_per_second_per_gpu"]
    slow = answer(capsys, "stage3_1024", "--set", "paper=true")
    assert slow["fp32_attention"] is True
    assert slow["images_per_second_per_gpu"] < answer(capsys, "stage3_1024")["images_per_second_per_gpu"]
    chained = answer(capsys, "chain", "--set", "stage2.length.steps=1000", "--nodes", "1")
    assert [stage["gpus"] for stage in chained["stages"]] == [8] * 5
    assert chained["stages"][1]["steps"] == 1000


def test_the_text_fits_a_terminal_and_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["stage2"],
        ["chain"],
        ["demo/chain"],
        ["stage3_1024", "--gpu", "v100-16gb"],
        ["stage1", "--gpu", "h200"],
    ):
        assert main(["estimate", *words]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 120
        assert (
            text.index("held against the paper") < text.index("Projection, never measured") < text.index("Assumptions")
        )
        for assumed in ("PUE 1.2", "g CO2e/kWh", "92 %", "TFLOP/s", "an hour of it"):
            assert assumed in text


def test_the_paper_total_stands_beside_the_chains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "chain"]) == 0
    (together,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  together"))
    assert "1,656" in together


def test_an_unknown_gpu_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "stage2", "--gpu", "v100"]) == 2
    text = capsys.readouterr().err
    assert "there is no GPU 'v100' in the table" in text
    assert "v100-16gb, v100-32gb, a100-40gb, a100-80gb, h100, h200" in text


def test_bf16_on_a_v100_is_refused() -> None:
    with pytest.raises(ConfigError, match="v100-32gb has no bf16 units"):
        estimate("stage2", ["precision=bf16"], Machines())
    assert estimate("stage2", ["precision=bf16"], Machines(gpu="a100-40gb"))["fits"]


def test_what_does_not_fit_is_exit_code_3_for_a_stage_and_a_row_for_a_chain(capsys: pytest.CaptureFixture[str]) -> None:
    huge = ["model.hidden_size=4608", "model.num_heads=64"]
    words = [word for text in huge for word in ("--set", text)]
    assert main(["estimate", "stage3_1024", "--gpu", "v100-16gb", *words]) == 3
    text = capsys.readouterr().err
    assert "stage3_1024 does not fit v100-16gb: one picture at a time with all blocks checkpointed needs" in text
    assert "the largest part is gradients" in text
    with pytest.raises(MachineError):
        estimate("stage3_1024", huge, Machines(gpu="v100-16gb"))
    values = estimate("chain", [f"*.{text}" for text in huge], Machines(gpu="v100-16gb"))
    assert values["total_gpu_days"] is None
    assert not values["stages"][4]["fits"]
    text = report(values)
    assert "does not fit: one picture needs" in text
    assert "not to be had: a stage does not fit" in text


def test_a_demo_stage_is_estimated_in_fp32() -> None:
    values = estimate_stage(load_stage("demo/stage3_1024"), Machines(nodes=1, gpus_per_node=2))
    assert values["precision"] == "fp32"
    assert values["fits"]
    assert 0 < values["gpu_days"] < 0.1


# ---- a range of nodes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fewest", [1, 2, 3, 8, 17, 64, 1000])
def test_a_range_has_every_size_or_both_ends_and_multiples_between(fewest: int) -> None:
    for most in (*range(fewest, fewest + 300), 10**6, 10**30):
        sizes = sizes_between(fewest, most)
        assert (sizes[0], sizes[-1]) == (fewest, most)
        assert sizes == sorted(set(sizes))
        if most - fewest < MOST_SIZES:
            assert sizes == list(range(fewest, most + 1))
        else:
            step = sizes[2] - sizes[1]
            assert len(sizes) <= MOST_SIZES < len(multiples(fewest, most, step - 1)) + 2, "no smaller step would do"
            assert sizes[1:-1] == [*multiples(fewest, most, step)]


def multiples(fewest: int, most: int, step: int) -> range:
    """Those between two numbers, without the two."""
    return range((fewest // step + 1) * step, most, step)


def test_the_sizes_of_a_long_range_are_round() -> None:
    assert sizes_between(1, 64) == [1, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 64]
    assert sizes_between(4, 64) == [*range(4, 65, 4)]
    assert sizes_between(4, 4) == [4]


@pytest.mark.parametrize(
    "words",
    [
        ["stage2", "--nodes", "4-8"],
        ["stage1", "--nodes", "1-3", "--gpus-per-node", "3", "--gpu", "a100-40gb", "--price", "2", "--country", "FRA"],
        ["stage3_1024", "--nodes", "50-52", "--set", "length.steps=2000"],
    ],
)
def test_a_row_of_a_stage_is_what_its_number_of_nodes_alone_says(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    values = answer(capsys, *words)
    fewest, most = map(int, words[2].split("-"))
    assert [row["nodes"] for row in values["sizes"]] == [*range(fewest, most + 1)]
    for row in values["sizes"]:
        alone = answer(capsys, words[0], "--nodes", str(row["nodes"]), *words[3:])
        assert values.keys() & alone.keys() - {"kind"} >= {"stage", "steps", "precision", "assumptions", "table4"}
        assert all(values[key] == alone[key] for key in values.keys() & alone.keys() - {"kind"})
        own = row.keys() - {"images_per_second", "gpu_days_over_cheapest"}
        assert {"gpus", "days", "gpu_days", "kwh", "kg_co2e", "dollars", "micro_batch_size", "micro_batches"} <= own
        assert {key: row[key] for key in own} == {key: (alone["chosen"] | alone)[key] for key in own}
        assert row["images_per_second"] == pytest.approx(alone["images_per_second_per_gpu"] * alone["gpus"])
    days = [row["gpu_days"] for row in values["sizes"]]
    assert [row["gpu_days_over_cheapest"] for row in values["sizes"]] == [each / min(days) - 1 for each in days]


def test_a_row_of_a_chain_is_the_total_that_its_number_of_nodes_alone_says(capsys: pytest.CaptureFixture[str]) -> None:
    values = answer(capsys, "chain", "--nodes", "3-4", "--set", "stage2.length.steps=1000")
    assert [row["nodes"] for row in values["sizes"]] == [3, 4]
    assert values["paper_gpu_days"] == 1656
    for row in values["sizes"]:
        alone = answer(capsys, "chain", "--nodes", str(row["nodes"]), "--set", "stage2.length.steps=1000")
        assert {stage["gpus"] for stage in alone["stages"]} == {row["gpus"]}
        for key in ("days", "gpu_days", "dollars", "kwh", "kg_co2e"):
            assert row[key] == alone[f"total_{key}"]


def test_one_number_of_nodes_is_no_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert "sizes" not in answer(capsys, "stage2", "--nodes", "8")
    assert len(answer(capsys, "stage2", "--nodes", "8-8")["sizes"]) == 1
    texts = []
    for words in (["stage2"], ["stage2", "--nodes", "8"]):  # the paper's 64 GPUs are 8 nodes
        assert main(["estimate", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ("8-4", "8-4: the range ends below its start; did you mean 4-8?"),
        ("0-4", "0 is not at least 1"),
        ("0", "0 is not at least 1"),
        ("4-", "'4-' is neither a number of nodes (8) nor a range of them (4-8)"),
        ("-4", "'-4' is neither"),
        ("4-8-16", "'4-8-16' is neither"),
        ("4..8", "'4..8' is neither"),
        ("4 - 8", "'4 - 8' is neither"),
        ("", "'' is neither"),
    ],
)
def test_a_bad_range_is_refused(nodes: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["estimate", "stage2", f"--nodes={nodes}"])
    assert end.value.code == 2
    assert f"argument --nodes: {said}" in capsys.readouterr().err


def lines_of_sizes(text: str) -> list[str]:
    """The table of sizes in an answer for people: the line of titles and one for each size."""
    lines = text.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("  nodes  GPUs"))
    return lines[start : lines.index("", start)]


def test_the_table_of_a_stage_has_a_line_for_each_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "stage2", "--nodes", "4-8"]) == 0
    text = capsys.readouterr().out
    assert "Projection, never measured: stage2 on 4 to 8 nodes of 8 × v100-32gb, fp16" in text
    assert (
        "150,000 steps × 11,392 = 1,708,800,000 images, on any number of nodes; the paper's V100-days: 672 on 64"
        in text
    )
    assert text.index("held against the paper") < text.index("Projection") < text.index("Assumptions")
    titles, *rows = lines_of_sizes(text)
    assert re.split(" {2,}", titles.strip()) == [
        "nodes", "GPUs", "samples", "micro-batches", "step, s", "images/s",
        "days", "GPU-days", "dearer", "kWh", "kg CO2e", "$",
    ]  # fmt: skip
    assert {len(line) for line in (titles, *rows)} == {len(titles)}
    assert len(titles) <= 110
    assert [row.split()[:2] for row in rows] == [[str(nodes), str(8 * nodes)] for nodes in range(4, 9)]
    assert [row.split()[2:6] for row in (rows[0], rows[4])] == [["356", "6", "×", "60"], ["178", "3", "×", "60"]]
    assert sum("cheapest" in row for row in rows) == 1
    assert "sizes:" not in text


def test_a_long_range_says_which_sizes_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "chain", "--nodes", "1-64"]) == 0
    text = capsys.readouterr().out
    assert "14 of 64 sizes: both ends, and the multiples of 5 between them" in text
    titles, *rows = lines_of_sizes(text)
    assert "micro-batches" not in titles
    assert [row.split()[0] for row in rows] == [str(nodes) for nodes in sizes_between(1, 64)]
    assert "each stage on as many nodes; the paper's V100-days: 1,656" in text


def test_a_size_that_does_not_fit_is_a_line_and_if_none_does_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    wide = ["model.hidden_size=1536"]
    machines = Machines(gpu="v100-16gb", gpus_per_node=1)
    values = estimate_sizes("stage3_1024", wide, machines, 1, 8)
    fits = [row["fits"] for row in values["sizes"]]
    assert fits == sorted(fits), "more ranks have smaller shards"
    assert fits[-1]
    assert not fits[0]
    first = values["sizes"][0]
    assert (first["gpu_days"], first["micro_batches"], first["gpu_days_over_cheapest"]) == (None, None, None)
    assert min(row["gpu_days_over_cheapest"] for row in values["sizes"] if row["fits"]) == 0
    lines = lines_of_sizes(report(values))
    assert ["does not fit: one picture needs" in line for line in lines[1:]] == [not each for each in fits]
    assert max(map(len, lines)) <= 110
    chain = estimate_sizes("chain", [f"*.{text}" for text in wide], machines, 1, 1)
    assert "stage3_1024" in chain["sizes"][0]["too_large"]
    assert "does not fit: " + ", ".join(chain["sizes"][0]["too_large"]) in report(chain)
    assert main(["estimate", "stage2", "--nodes", "1-2", "--gpu", "v100-16gb", "--set", "model.hidden_size=4608"]) == 3
    assert "stage2 does not fit v100-16gb: one picture at a time" in capsys.readouterr().err


def test_help_names_every_option_and_needs_no_heavy_library() -> None:
    code = (
        "import sys\nfrom pixart_ds.cli import main\n"
        "try:\n    main(['estimate', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'yaml', 'pydantic'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("--gpu", "--nodes", "--gpus-per-node", "--set", "--country", "--pue", "--price", "--json"):
        assert word in done.stdout


def test_it_answers_without_torch() -> None:
    code = (
        "import sys\nfrom pixart_ds.cli import main\nassert main(['estimate', 'chain', '--json']) == 0\n"
        "heavy = {'torch', 'deepspeed', 'diffusers', 'transformers', 'streaming'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr


# ---- a chain's budget ------------------------------------------------------------------------------------------------


def test_a_chain_says_of_each_limit_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["chain", "--set", "budget.gpu_days=1000", "--set", "budget.usd=10000"]
    found = answer(capsys, *words)
    days, dollars = found["budget"]
    assert (days["what"], days["limit"], days["fits"]) == ("gpu_days", 1000.0, True)
    assert (days["estimate"], days["part"]) == (found["total_gpu_days"], found["total_gpu_days"] / 1000)
    assert (dollars["estimate"], dollars["fits"]) == (found["total_dollars"], False)
    assert main(["estimate", *words]) == 0
    text = capsys.readouterr().out
    assert "  budget of 1,000 gpu_days: 854 estimated, 85.4%: fits\n" in text
    assert "  budget of 10,000 usd: 19,881 estimated, 198.8%: DOES NOT FIT\n" in text
    assert answer(capsys, "chain")["budget"] == []


def test_each_size_says_whether_the_chain_fits_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", "budget.gpu_days=900", "--set", "budget.kwh=11000"]
    assert main(["estimate", "chain", "--nodes", "4-6", *words]) == 0
    titles, *rows = lines_of_sizes(capsys.readouterr().out)
    assert titles.endswith("  budget")
    assert [re.split(" {2,}", row)[-1] for row in rows] == ["fits", "over: kwh", "over: gpu_days, kwh"]


def test_where_a_stage_does_not_fit_nothing_is_said_of_the_budget() -> None:
    wide = ["*.model.hidden_size=1536", "budget.usd=1"]
    values = estimate("chain", wide, Machines(gpu="v100-16gb", gpus_per_node=1, nodes=1))
    assert values["budget"] == [{"what": "usd", "limit": 1.0, "estimate": None, "part": None, "fits": None}]
    assert "budget of 1 usd: no estimate, as a stage does not fit the GPUs" in report(values)
