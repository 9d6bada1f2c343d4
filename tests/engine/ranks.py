"""What the ranks of the distributed tests run; tensors go to files, results are JSON."""

from __future__ import annotations

import datetime
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from pixart_ds import files
from pixart_ds.config.deepspeed import load_deepspeed, merge
from pixart_ds.engine import checkpoint as checkpoint_module
from pixart_ds.engine import deepspeed_compat
from pixart_ds.engine import shelf as shelf_module
from pixart_ds.engine import storage as storage_module
from pixart_ds.engine.agree import Votes, agree, gather, on_first, together
from pixart_ds.engine.deepspeed import Engine, StepResult
from pixart_ds.engine.handover import write_handover
from pixart_ds.engine.shards import SHARD_KEYS
from pixart_ds.engine.shelf import Shelf
from pixart_ds.engine.world import World
from pixart_ds.errors import CheckpointError, DataError, MachineError, PixArtError
from pixart_ds.layout import CheckpointName, StageLayout
from tests.engine.toy import BATCH, cuts, loss_of, samples, stage_of, toy

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WORLDS = (1, 2, 3)
STEPS, MORE = 6, 3


def build(world: World, precision: str, seed: int = 0, **optimizer: Any) -> Engine:
    stage = stage_of(precision, **optimizer)
    net = toy(seed)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    engine = Engine.build(net, stage, world, merge(stage, load_deepspeed("zero2_cpu")))
    engine.initialise(state)
    return engine


def train(engine: Engine, step: int, spoil: tuple[int, str] | None = None) -> tuple[float, StepResult]:
    """One step; the loss over all ranks. `spoil`: (rank, what becomes of its first loss)."""
    x, y = samples(step)
    total = 0.0
    for number, piece in enumerate(cuts(step, engine.world.size)[engine.world.rank]):
        loss = loss_of(engine.net, x[piece], y[piece])
        total += float(loss.detach())
        if spoil is not None and spoil[0] == engine.world.rank and number == 0:
            loss = {
                "times inf": loss * float("inf"),
                "times nan": loss * float("nan"),
                "plus nan": loss + float("nan"),
            }[spoil[1]]
        engine.backward(loss)
    result = engine.step()
    return agree(engine.world, Votes(sums={"loss": total})).sums["loss"], result


def snapshot(engine: Engine) -> dict[str, torch.Tensor]:
    """Everything that is trained, whole, on every rank."""
    return {f"{key}/{name}": tensor for key in SHARD_KEYS for name, tensor in engine.full(key)}


def frozen_in_time(engine: Engine) -> list[torch.Tensor]:
    """Every tensor of this rank that a step may move, padding included."""
    weights = [parameter.detach().clone() for parameter in engine.module.parameters()]
    return [*(engine.shard(key).clone() for key in (*SHARD_KEYS, "step")), *weights]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights_follow(engine: Engine, masters: dict[str, torch.Tensor]) -> bool:
    """The net's weights are the masters, rounded to the precision; buffers are fp32."""
    dtype = PRECISIONS[engine.precision]
    named = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    return all(torch.equal(p.detach(), masters[f"master/{name}"].to(dtype)) for name, p in named) and all(
        buffer.dtype == torch.float32 for buffer in engine.module.buffers()
    )


def layout_of(root: str, precision: str, world_size: int) -> StageLayout:
    return StageLayout(Path(root) / f"{precision}-{world_size}")


def shelf_of(engine: Engine, layout: StageLayout, attempt: int, launch: int = 1, keep: int = 2) -> Shelf:
    if engine.world.rank == 0:
        layout.attempt(attempt).root.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    return Shelf(layout, attempt, launch, engine, engine.world, keep=keep)


def train_and_average(engine: Engine, step: int) -> tuple[float, bool]:
    """One step; whether its EMA is, bit by bit, what one process makes of the EMA before it and the weights after it."""
    before = snapshot(engine)
    loss, _ = train(engine, step)
    after, weight = snapshot(engine), 1 - stage_of().optimizer.ema_decay
    names = [name.removeprefix("ema/") for name in after if name.startswith("ema/")]
    averages = {name: before[f"ema/{name}"].lerp_(after[f"master/{name}"], weight) for name in names}
    return loss, all(torch.equal(after[f"ema/{name}"], average) for name, average in averages.items())


def save(shelf: Shelf, images_seen: int, state: dict[str, Any], milestone: bool = False) -> CheckpointName:
    """A save that is waited for."""
    name = shelf.save(images_seen, state, milestone)
    shelf.wait()
    return name


def first(world: World, root: str) -> dict[str, Any]:
    """In one start of the processes: initialise, train, skip, save, hand over; in every precision."""
    out: dict[str, Any] = {"agreed": _agreed(world), "together": _together(world)}
    for precision in PRECISIONS:
        got = out[precision] = {}
        engine, weights = build(world, precision), toy().state_dict()
        state = snapshot(engine)
        got["initialised"] = all(
            torch.equal(tensor, weights[name.split("/")[1]]) if name.startswith(("master", "ema")) else not tensor.any()
            for name, tensor in state.items()
        ) and weights_follow(engine, state)
        with pytest.raises(CheckpointError) as refused:
            engine.initialise(
                {
                    **{n: t for n, t in weights.items() if n != "head.bias"},
                    "inp.bias": torch.zeros(1),
                    "new": torch.zeros(2),
                }
            )
        got["refused"] = str(refused.value)

        runs = [train(engine, step) for step in range(STEPS)]
        got["losses"] = [loss for loss, _ in runs]
        got["figures"] = [result.figures() for _, result in runs]
        if world.rank == 0:
            save_file(
                {name: tensor.contiguous() for name, tensor in snapshot(engine).items()},
                f"{root}/trained-{precision}-{world.size}",
            )
        else:
            snapshot(engine)

        got["skips"] = []
        busy = max(rank for rank, share in enumerate(cuts(STEPS, world.size)) if share)
        for spoil in ("times inf", "times nan", "plus nan"):
            before, clock = frozen_in_time(engine), engine.clock()
            _, result = train(engine, STEPS, spoil=(busy, spoil))
            unmoved = (
                all(map(torch.equal, before, frozen_in_time(engine))) and engine.applied_steps == clock["applied_steps"]
            )
            got["skips"].append([spoil, unmoved, result.figures()])
        got["after_skips"] = train(engine, STEPS + 1)[1].figures()
        if precision == "fp16":
            vars(engine._zero.loss_scaler)["cur_scale"] = 1.0
            got["at_minimum_scale"] = train(engine, STEPS, spoil=(busy, "times inf"))[1].figures()

        layout = layout_of(root, precision, world.size)
        shelf = shelf_of(engine, layout, attempt=1)
        shelf.write_start({"images_seen": 0})
        got["name"] = str(save(shelf, 91, {"images_seen": 91, "note": "naïve"}))
        got["clock"] = engine.clock()
        saved = {name: tensor.clone() for name, tensor in snapshot(engine).items()}
        if world.rank == 0:
            save_file(
                {name: tensor.contiguous() for name, tensor in saved.items()}, f"{root}/saved-{precision}-{world.size}"
            )
        got["only_first_gets_them"] = len(list(engine.full("ema", to=0))) == (
            len(engine.layout.places) if world.rank == 0 else 0
        )
        write_handover(engine, layout.handover, {"stage": "toy"})
        got["more"] = [train(engine, step)[0] for step in range(STEPS + 2, STEPS + 2 + MORE)]
        if world.rank == 0:
            save_file(
                {name: t.contiguous() for name, t in snapshot(engine).items()}, f"{root}/end-{precision}-{world.size}"
            )
        else:
            snapshot(engine)
    if world.size == 2:
        out["shelf"] = _retention(world, engine, StageLayout(Path(root) / "retention"))
    return out


def _agreed(world: World) -> dict[str, Any]:
    votes = Votes(
        stop=world.rank == world.size - 1,
        saved=world.rank > 0,
        digest=2**64 - 1 - world.rank,
        samples=world.rank,
        sums={"b": 0.5, "a": world.rank},
        each={"wait": 2.0 * world.rank},
    )
    return vars(agree(world, votes))


def _together(world: World) -> dict[str, Any]:
    """Failures of one rank reach all."""

    def fail(kind: type[Exception], what: str, **more: str) -> None:
        if world.rank == world.size - 1:
            raise kind(what, **more)

    out: dict[str, Any] = {"gathered": gather(world, {"é" * world.rank: world.rank})}
    with pytest.raises(DataError) as known:
        together(world, lambda: fail(DataError, "torn", where="there", remedy="mend it"))
    out["known"] = str(known.value)
    with pytest.raises((KeyError, PixArtError)) as unknown:
        together(world, lambda: fail(KeyError, "key"))
    out["unknown"] = [type(unknown.value).__name__, str(unknown.value)]
    out["first"] = on_first(world, lambda: world.rank + 41)
    return out


def _retention(world: World, engine: Engine, layout: StageLayout) -> dict[str, Any]:
    """Saves that keep few, and saves that fail on one rank."""
    out: dict[str, Any] = {}
    shelf = shelf_of(engine, layout, attempt=1, keep=1)
    shelf.write_start({})
    save(shelf, 10, {}, milestone=True)
    save(shelf, 20, {})
    save(shelf, 30, {})
    out["kept"] = [str(name) for name in shelf.line()]
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 0:
            patch.setattr(storage_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1234})())
        with pytest.raises(MachineError) as full:
            save(shelf, 40, {})
    out["disk_full"] = str(full.value)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr("pixart_ds.files.write_durable", _no_space)
        with pytest.raises(MachineError) as refused:
            save(shelf, 40, {})
    out["write_failed"] = str(refused.value)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(checkpoint_module, "record", lambda _, name: checkpoint_module.FileRecord(name, 5, "00"))
        with pytest.raises(MachineError) as bent:
            save(shelf, 50, {})
    out["read_back"] = str(bent.value)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 0:
            patch.setattr("pixart_ds.files.write_durable", _write_failing_on("raw.safetensors"))
        with pytest.raises(MachineError) as failed:
            write_handover(engine, layout.handover, {})
    out["handover_failed"] = str(failed.value)
    out["newest_after_failures"] = str(shelf.line()[-1])
    out["uncommitted"] = sorted(path.name for path in layout.checkpoints.iterdir() if not (path / "COMMITTED").exists())
    dist.barrier()
    later = shelf_of(engine, layout, attempt=2)
    with pytest.raises(CheckpointError) as fenced:
        save(shelf, 60, {})
    out["fenced"] = str(fenced.value)
    later.resume()
    later.write_start({})
    save(later, 60, {})
    out["after"] = sorted(path.name for path in layout.checkpoints.iterdir())
    return out


def _no_space(path: Path, pieces: Any) -> None:
    next(iter(pieces))
    raise OSError(28, "No space left on device", str(path))


def _write_failing_on(name: str) -> Any:
    write = files.write_durable
    return lambda path, pieces: _no_space(path, pieces) if path.name == name else write(path, pieces)


def second(world: World, root: str) -> dict[str, Any]:
    """Loads what every world has saved, and goes on; refuses what is damaged."""
    out: dict[str, Any] = {}
    for precision in PRECISIONS:
        engine = build(world, precision, seed=5)
        train(engine, 0)
        for origin in WORLDS:
            layout = layout_of(root, precision, origin)
            shelf = shelf_of(engine, layout, attempt=2, launch=world.size)
            read = _count_reads(shelf)
            state = snapshot(engine)
            own = len(engine.layout.own(world.rank))
            got = out[f"{precision}-{origin}"] = {
                "state": read[0],
                "bitwise": same(state, load_file(f"{root}/saved-{precision}-{origin}")),
                "weights": weights_follow(engine, state),
                "fixed": all(torch.equal(t, toy().state_dict()[n]) for n, t in engine.fixed().items()),
                "own_ranges_only": read[1] == 16 * own,
                "clock": engine.clock(),
            }
            more = [train_and_average(engine, step) for step in range(STEPS + 2, STEPS + 2 + MORE)]
            got["more"], got["average"] = [loss for loss, _ in more], all(exact for _, exact in more)
            got["end"] = same(snapshot(engine), load_file(f"{root}/end-{precision}-{origin}"))
    with pytest.raises(CheckpointError) as damaged:
        shelf_of(engine, StageLayout(Path(root) / "damaged"), attempt=3).resume()
    out["damaged"] = str(damaged.value)
    layout = StageLayout(Path(root) / f"new-{world.size}")
    out["nothing"] = shelf_of(engine, layout, attempt=1).resume()
    return out


def _count_reads(shelf: Shelf) -> tuple[Any, int]:
    readers = []

    class Counting(checkpoint_module.Reader):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            readers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shelf_module, "Reader", Counting)
        resumed = shelf.resume()
    assert resumed is not None
    return resumed.state, readers[0].bytes_read


def save_for_ever(world: World, root: str) -> None:
    """Trains a step and saves, again and again, until it is killed."""
    engine = build(world, "fp32")
    shelf = shelf_of(engine, StageLayout(Path(root)), attempt=1)
    shelf.write_start({})
    for step in range(10_000):
        train(engine, step)
        shelf.save(BATCH * (step + 1), {"images_seen": BATCH * (step + 1)})  # while the one before is written


def go_on(world: World, root: str) -> dict[str, Any]:
    """What the next attempt does after a kill."""
    engine = build(world, "fp32", seed=3)
    layout = StageLayout(Path(root))
    shelf = shelf_of(engine, layout, attempt=2)
    resumed = shelf.resume()
    shelf.write_start({})
    assert resumed is not None
    state, steps = resumed.state, engine.applied_steps
    train(engine, steps)
    save(shelf, state["images_seen"] + BATCH, {"images_seen": state["images_seen"] + BATCH})
    uncommitted = [path.name for path in layout.checkpoints.iterdir() if not (path / "COMMITTED").exists()]
    return {"state": state, "steps": steps, "uncommitted": uncommitted, "line": [str(name) for name in shelf.line()]}


def raw_deepspeed(world: World) -> None:
    """DeepSpeed reducing in its own way, with a rank that runs no micro-batch."""
    stage = stage_of("fp32")
    net = toy()
    adam = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    engine = deepspeed_compat.initialise(net, adam, merge(stage, load_deepspeed("zero2_cpu")), world.device)
    x, y = samples(0)
    if world.rank == 0:
        engine.backward(loss_of(engine, x, y), scale_wrt_gas=False)
    engine.step()


def groups_and_warnings(world: World) -> dict[str, Any]:
    """Which work-arounds inside a process group are still needed."""
    from deepspeed.utils import groups

    out: dict[str, Any] = {"ours": _timeout(groups._WORLD_GROUP)}
    groups._WORLD_GROUP = None
    out["deepspeeds_clone"] = _timeout(groups._clone_world_group())
    deepspeed_compat.give_clone_a_timeout(datetime.timedelta(seconds=77))
    out["asked"] = _timeout(groups._clone_world_group())
    engine = build(world, "fp32")
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        train(engine, 0)
    out["warnings"] = [str(warning.message) for warning in caught if warning.category is FutureWarning]
    return out


def _timeout(group: Any) -> float:
    seconds: float = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds
