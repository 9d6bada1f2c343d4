"""The engine on one, two and three gloo ranks: each world is started twice, and what it left is asserted on."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pixart_ds.engine import line
from pixart_ds.engine.checkpoint import Reader
from pixart_ds.engine.handover import read_handover
from pixart_ds.engine.optimizer import learning_rate
from pixart_ds.errors import CheckpointError
from pixart_ds.layout import MANIFEST_NAME, MARKER_NAME, HandoverLayout, StageLayout, rank_file_name
from tests.engine import ranks
from tests.engine.ranks import MORE, PRECISIONS, STEPS, WORLDS, layout_of
from tests.engine.toy import BATCH, cuts, loss_of, samples, stage_of, toy
from tests.helpers.launch import Ranks, RanksFailed, launch

pytestmark = pytest.mark.distributed

LOSS = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 1e-2}
"""Largest difference of a step's loss from plain fp32 torch; 16-bit forward passes round."""
EMA = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 5e-3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def firsts(root: Path) -> dict[int, list[Any]]:
    out = {}
    for size in WORLDS:
        running = Ranks(ranks.first, size, str(root))
        out[size] = running.results()
        assert running.outputs() == [""] * size, "the ranks of a demo must leave the terminal clean"
    return out


@pytest.fixture(scope="module")
def seconds(root: Path, firsts: dict[int, list[Any]]) -> dict[int, list[Any]]:
    damaged = StageLayout(root / "damaged")
    shutil.copytree(layout_of(str(root), "bf16", 2).root, damaged.root)
    _flip_a_bit(damaged.checkpoints / firsts[2][0]["bf16"]["name"] / "rank-00001-of-00002.safetensors")
    return {size: launch(ranks.second, size, str(root)) for size in WORLDS}


def _flip_a_bit(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-40, 2)
        byte = file.read(1)
        file.seek(-40, 2)
        file.write(bytes([byte[0] ^ 1]))


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and EMA of plain fp32 torch: AdamW, clipping, warm-up, on whole batches."""
    net, config = toy(), stage_of().optimizer
    params = [parameter for parameter in net.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(
        params, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, foreach=False
    )
    averages = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    losses, norms = [], []
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps)
        loss = loss_of(net, *samples(step))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, config.gradient_clipping)))
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
        for name, parameter in net.named_parameters():
            if name in averages:
                averages[name] = 0.9 * averages[name] + 0.1 * parameter.detach()
    return losses, norms, averages


def test_shares_of_the_toy_cover_each_step_once_and_leave_a_rank_idle() -> None:
    for size in WORLDS:
        for step in range(STEPS + 2 + MORE):
            shares = cuts(step, size)
            assert sorted(i for share in shares for piece in share for i in range(BATCH)[piece]) == list(range(BATCH))
            assert size == 1 or [] in shares


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", WORLDS)
def test_a_step_equals_plain_torch(
    firsts: dict[int, list[Any]], root: Path, reference: Any, size: int, precision: str
) -> None:
    losses, norms, averages = reference
    for got in (result[precision] for result in firsts[size]):
        assert got["initialised"]
        assert max(abs(a - b) for a, b in zip(got["losses"], losses, strict=True)) <= LOSS[precision]
        tolerance = 1e-6 if precision == "fp32" else 1e-2
        assert all(
            abs(row["grad_norm"] - norm) <= tolerance * norm for row, norm in zip(got["figures"], norms, strict=True)
        )
        assert all(row["applied"] and row["consecutive_skips"] == 0 for row in got["figures"])
        config = stage_of().optimizer
        rates = [learning_rate(config, step, global_batch_size=BATCH, total_steps=20) for step in range(STEPS)]
        assert [row["learning_rate"] for row in got["figures"]] == rates
    trained = load_file(root / f"trained-{precision}-{size}")
    off = {name: float((trained[f"ema/{name}"] - average).abs().max()) for name, average in averages.items()}
    assert max(off.values()) <= EMA[precision], off


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", WORLDS)
def test_a_bad_loss_on_one_rank_makes_all_skip(firsts: dict[int, list[Any]], size: int, precision: str) -> None:
    for got in (result[precision] for result in firsts[size]):
        scale = got["figures"][-1]["loss_scale"]
        for count, (spoil, unmoved, figures) in enumerate(got["skips"], start=1):
            assert unmoved, spoil
            assert not figures["applied"]
            assert figures["consecutive_skips"] == count
            assert figures["grad_norm"] == float("inf")
            assert figures["loss_scale"] == (scale / 2**count if precision == "fp16" else 1)
        assert got["after_skips"]["applied"]
        assert got["after_skips"]["consecutive_skips"] == 0


def test_fp16_goes_on_at_the_minimum_scale(firsts: dict[int, list[Any]]) -> None:
    for size in WORLDS:
        for result in firsts[size]:
            figures = result["fp16"]["at_minimum_scale"]
            assert (figures["applied"], figures["loss_scale"], figures["consecutive_skips"]) == (False, 1.0, 1)


def test_initial_weights_of_another_net_are_refused_key_by_key(firsts: dict[int, list[Any]]) -> None:
    text = firsts[1][0]["fp32"]["refused"]
    for line_ in ("missing: head.bias (3,)", "extra: new (2,)", "shape of inp.bias: (1,) instead of (30,)"):
        assert line_ in text


def test_the_ranks_agree(firsts: dict[int, list[Any]]) -> None:
    for size in WORLDS:
        digest = sum(2**64 - 1 - rank for rank in range(size)) % 2**64
        whole = sum(range(size))
        wanted = {
            "stop": True,
            "save": False,
            "saved": size - 1,
            "digest": digest,
            "samples": whole,
            "sums": {"a": whole, "b": size / 2},
            "each": {"wait": [2.0 * rank for rank in range(size)]},
        }
        assert [result["agreed"] for result in firsts[size]] == [wanted] * size


def test_a_failure_of_one_rank_is_heard_by_all(firsts: dict[int, list[Any]]) -> None:
    for size in WORLDS:
        for rank, result in enumerate(firsts[size]):
            got = result["together"]
            assert got["gathered"] == [{"é" * r: r} for r in range(size)]
            assert got["known"] == "torn\n  where: there\n  to do: mend it"
            failing = rank == size - 1
            assert got["unknown"] == (
                ["KeyError", "'key'"] if failing else ["PixArtError", f"rank {size - 1}: KeyError: 'key'"]
            )
            assert got["first"] == 41


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", WORLDS)
def test_any_world_resumes_what_any_world_saved(
    firsts: dict[int, list[Any]], seconds: dict[int, list[Any]], size: int, precision: str
) -> None:
    for origin in WORLDS:
        saved = firsts[origin][0][precision]
        for result in seconds[size]:
            got = result[f"{precision}-{origin}"]
            assert got["bitwise"]
            assert got["weights"]
            assert got["fixed"]
            assert got["own_ranges_only"]
            assert got["average"], "the EMA of a step is not exact"
            assert got["clock"] == saved["clock"]
            assert got["state"] == {"images_seen": 91, "note": "naïve"}
            off = max(abs(a - b) for a, b in zip(got["more"], saved["more"], strict=True))
            assert off == 0 if origin == size else off <= LOSS[precision]
            assert got["end"] or origin != size


def test_a_damaged_file_is_refused_on_all_ranks(seconds: dict[int, list[Any]]) -> None:
    for size in WORLDS:
        for result in seconds[size]:
            assert "rank-00001-of-00002.safetensors is damaged" in result["damaged"]
            assert "no checkpoint of the stage is whole" in result["damaged"]
            assert result["nothing"] is None


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", WORLDS)
def test_files_alone_give_weights_and_ema(firsts: dict[int, list[Any]], root: Path, size: int, precision: str) -> None:
    layout = layout_of(str(root), precision, size)
    reader = Reader.at(layout.checkpoints / firsts[size][0][precision]["name"])
    saved = load_file(root / f"saved-{precision}-{size}")
    fixed = {name: toy().state_dict()[name] for name in ("table", "position")}
    for key, weights in (("master", "raw"), ("ema", "ema")):
        wanted = {name.split("/")[1]: tensor for name, tensor in saved.items() if name.startswith(key + "/")} | fixed
        handed = read_handover(layout.handover, weights)  # type: ignore[arg-type]
        assert ranks.same(reader.state_dict(key), wanted)
        assert ranks.same(handed.state, wanted)
        assert handed.lineage == {"stage": "toy"}
        assert handed.model == reader.manifest["model"]
    assert all(result[precision]["only_first_gets_them"] for result in firsts[size])
    assert reader.images_seen == 91
    assert reader.manifest["config"].keys() == {"stage", "deepspeed"}


def test_ranges_of_a_parameter_cross_the_ranks_files(firsts: dict[int, list[Any]], root: Path) -> None:
    reader = Reader.at(layout_of(str(root), "fp32", 3).checkpoints / firsts[3][0]["fp32"]["name"])
    saved = load_file(root / "saved-fp32-3")
    for place in reader.layout.places:
        flat = saved[f"exp_avg/{place.name}"].reshape(-1)
        for start, end in ((0, place.count), (1, place.count - 1), (place.count // 2, place.count // 2)):
            out = torch.empty(end - start)
            reader.fill("exp_avg", [(place.name, start, end)], out)
            assert torch.equal(out, flat[start:end])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MARKER_NAME).unlink(), "is not committed: its save was not finished"),
        (shutil.rmtree, "is not there"),
        (
            lambda folder: _flip_a_bit(folder / rank_file_name(0, 2)),
            r"rank-00000-of-00002.safetensors is damaged: its xxh3_128 is \w+ instead",
        ),
        (lambda folder: _flip_a_bit(folder / MANIFEST_NAME), "manifest.json is damaged"),
        (lambda folder: (folder / rank_file_name(1, 2)).unlink(), "rank-00001-of-00002.safetensors is missing"),
        (lambda folder: (folder / rank_file_name(1, 2)).write_bytes(b"short"), "has 5 bytes instead of"),
        (lambda folder: (folder / MARKER_NAME).write_text('{"format": 2}'), "has format 2, this version reads 1"),
        (lambda folder: (folder / MARKER_NAME).write_text("{"), "COMMITTED is not JSON"),
    ],
)
def test_what_is_torn_is_refused(
    firsts: dict[int, list[Any]], root: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    name = firsts[2][0]["fp32"]["name"]
    copied = shutil.copytree(layout_of(str(root), "fp32", 2).checkpoints / name, tmp_path / name)
    damage(copied)
    with pytest.raises(CheckpointError, match=message):
        Reader.at(copied).state_dict("ema")


def test_a_handover_that_is_torn_is_refused(firsts: dict[int, list[Any]], root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(layout_of(str(root), "fp32", 2).handover, tmp_path / "handover")
    _flip_a_bit(HandoverLayout(folder).ema)
    read_handover(folder, "raw")
    with pytest.raises(CheckpointError, match="ema.safetensors is damaged"):
        read_handover(folder, "ema")
    HandoverLayout(folder).lineage.unlink()
    with pytest.raises(CheckpointError, match="no file lineage.json"):
        read_handover(folder, "raw")


def test_saves_keep_few_and_fail_together(firsts: dict[int, list[Any]]) -> None:
    for result in firsts[2]:
        got = result["shelf"]
        assert got["kept"] == ["img-000000000010-a0001-l01", "img-000000000030-a0001-l01"]
        assert "only 0.00 MB are free" in got["disk_full"]
        assert "checkpoint img-000000000040-a0001-l01 needs" in got["disk_full"]
        assert "cannot write rank-00001-of-00002.safetensors: No space left on device" in got["write_failed"]
        assert "reads back as 5 bytes" in got["read_back"]
        assert "cannot write raw.safetensors: No space left on device" in got["handover_failed"]
        assert got["newest_after_failures"] == "img-000000000030-a0001-l01"
        assert got["uncommitted"] == ["img-000000000040-a0001-l01", "img-000000000050-a0001-l01"]
        assert "later attempt or launch has taken this stage over" in got["fenced"]
        assert got["after"] == [f"img-{n:012d}-a000{a}-l01" for n, a in ((10, 1), (30, 1), (60, 2))]


def _has_files(folder: Path) -> bool:
    """False also for one that another process has just removed."""
    try:
        return any(folder.iterdir())
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("moment", ["while a file is written", "at random"])
def test_a_kill_during_a_save_leaves_the_older_checkpoint(tmp_path: Path, moment: str) -> None:
    layout = StageLayout(tmp_path)
    running = Ranks(ranks.save_for_ever, 2, str(tmp_path))
    deadline = time.monotonic() + 90
    while len(line.committed(layout)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    if moment == "at random":
        time.sleep(random.uniform(0, 1))
    else:
        while not (
            torn := [p for p in layout.checkpoints.iterdir() if not (p / "COMMITTED").exists() and _has_files(p)]
        ):
            assert time.monotonic() < deadline
    running.kill()
    newest = line.newest(layout)
    assert newest is not None
    assert newest.images_seen >= 2 * BATCH
    if moment != "at random":
        assert torn
    (went_on,) = launch(ranks.go_on, 1, str(tmp_path))
    assert went_on["state"] == {"images_seen": newest.images_seen}
    assert went_on["steps"] == newest.images_seen // BATCH
    assert went_on["uncommitted"] == []
    assert went_on["line"] == [str(newest), f"img-{newest.images_seen + BATCH:012d}-a0002-l01"]
    Reader.at(layout.checkpoints / went_on["line"][0]).verify()


def test_deepspeed_still_cannot_step_with_a_rank_that_had_no_micro_batch() -> None:
    """From the day that this launch ends well, `stop_reducing_in_backward` and `give_gradient` may be needless."""
    with pytest.raises(RanksFailed, match=r"deepspeed/runtime/zero/stage_1_and_2\.py"):
        launch(ranks.raw_deepspeed, 2)


def test_deepspeed_still_needs_its_groups_and_warnings_mended() -> None:
    got, _ = launch(ranks.groups_and_warnings, 2)
    assert got["ours"] == 30 * 60
    assert got["asked"] == 77
    assert got["deepspeeds_clone"] != got["asked"]
    if hasattr(torch.distributed, "reduce_scatter_single"):  # torch ≥ 2.13
        assert any("all_gather_into_tensor" in text for text in got["warnings"]), "needless: ALL_GATHER_WARNING"
    assert not any("reduce_scatter" in text for text in got["warnings"])
