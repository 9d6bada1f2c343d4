"""What test_deepspeed_keys runs on its ranks: the same two steps under many DeepSpeed configs, and what each of them changed."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pixart_ds.config.deepspeed import merge
from pixart_ds.engine import deepspeed_compat
from pixart_ds.engine.deepspeed import Engine
from pixart_ds.engine.world import World
from tests.engine.toy import stage_of

WIDTH, LAYERS = 48, 4
ZERO = "zero_optimization."
NO_EFFECT: tuple[tuple[str, Any], ...] = (
    (ZERO + "reduce_bucket_size", 1000),
    (ZERO + "reduce_bucket_size", 200_000_000),
    (ZERO + "contiguous_gradients", False),
    (ZERO + "overlap_comm", True),
    (ZERO + "reduce_scatter", False),
    (ZERO + "use_multi_rank_bucket_allreduce", False),
    (ZERO + "ignore_unused_parameters", False),
    (ZERO + "allgather_bucket_size", 1000),
    (ZERO + "allgather_partitions", False),
    ("communication_data_type", "fp16"),
    ("prescale_gradients", True),
    ("gradient_predivide_factor", 2.0),
    ("no_such_key", 1),
)
"""Keys that are refused because they would do nothing, with another value than DeepSpeed's default."""

_COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "barrier")


def keys(world: World) -> dict[str, Any]:
    """All that the tests look at, in one start of the processes."""
    made: dict[str, Any] = {"same": {}}
    for precision in ("bf16", "fp16"):
        made["same"][precision] = {"base": two_steps(world, precision)}
        for key, value in NO_EFFECT:
            made["same"][precision][f"{key} = {value}"] = attempt(
                lambda p=precision, k=key, v=value: two_steps(world, p, {k: v})
            )
        made["same"][precision]["loss scale"] = two_steps(world, precision, {"fp16.initial_scale_power": 4})
    made["raw"] = {bucket: raw_calls(world, bucket) for bucket in (1000, 200_000_000)}
    made["dangerous"] = dangerous(world)
    return made


def attempt(action: Callable[[], Any]) -> Any:
    """What an action gives, or the error it ends with; on all ranks alike."""
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Net(nn.Module):
    """Keeps what its input was, as it came in."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x.detach()
        out: torch.Tensor = self.layers(x.to(self.layers[0].weight.dtype))
        return out


def config_of(precision: str, changed: dict[str, Any]) -> dict[str, Any]:
    """A file that says least, merged, with dotted keys set in it afterwards, past the refusal."""
    section = {"initial_scale_power": 8, "loss_scale_window": 100, "hysteresis": 1}
    config = merge(stage_of(precision), {"fp16": section, "zero_optimization": {"stage": 2}})
    for key, value in changed.items():
        *sections, last = key.split(".")
        at = config
        for name in sections:
            at = at.setdefault(name, {})
        at[last] = copy.deepcopy(value)
    return config


def build(world: World, precision: str, changed: dict[str, Any] | None = None) -> Engine:
    torch.manual_seed(0)
    net = Net()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    engine = Engine.build(net, stage_of(precision), world, config_of(precision, changed or {}))
    engine.initialise(state)
    return engine


def train(engine: Engine, spoil: float | None = None) -> dict[str, Any]:
    """A step of two micro-batches; `spoil` multiplies rank 0's first loss."""
    for number in range(2):
        luck = torch.Generator().manual_seed(10 * engine.world.rank + number)
        loss = engine.net(torch.randn(4, WIDTH, generator=luck)).float().pow(2).mean() / 4
        spoiled = spoil is not None and engine.world.rank == number == 0
        engine.backward(loss * spoil if spoiled else loss)
    return engine.step().figures()


def two_steps(world: World, precision: str, changed: dict[str, Any] | None = None) -> dict[str, Any]:
    engine = build(world, precision, changed)
    train(engine)
    with counted() as calls:
        figures = train(engine)
    weights = b"".join(parameter.detach().float().numpy().tobytes() for parameter in engine.module.parameters())
    buckets = engine._zero.ipg_buckets.values()
    return {
        "calls": calls,
        "figures": figures,
        "weights": hashlib.sha256(weights).hexdigest(),
        "masters": hashlib.sha256(engine.shard("master").numpy().tobytes()).hexdigest(),
        "buckets": sum(buffer.nbytes for bucket in buckets for buffer in bucket.buffer),
    }


@contextmanager
def counted() -> Iterator[list[list[Any]]]:
    """The calls of torch.distributed in a block: name and bytes of each, in their sequence."""
    calls: list[list[Any]] = []
    names = [name for name in vars(dist).copy() if name.startswith(_COLLECTIVES) and callable(getattr(dist, name))]
    old = {name: getattr(dist, name) for name in names}
    depth = 0

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal depth
            depth += 1
            if depth == 1:  # else torch calls one by another
                calls.append([name, max(map(_bytes, (*args, *more.values())), default=0)])
            try:
                return old[name](*args, **more)
            finally:
                depth -= 1

        return call

    from deepspeed.comm import comm

    backend = comm.cdb
    taken = backend.all_gather_function, backend.reduce_scatter_function
    try:
        for name in names:
            setattr(dist, name, counting(name))
        # DeepSpeed took these two when it was connected
        backend.all_gather_function = backend.get_all_gather_function()
        backend.reduce_scatter_function = backend.get_reduce_scatter_function()
        yield calls
    finally:
        for name in names:
            setattr(dist, name, old[name])
        backend.all_gather_function, backend.reduce_scatter_function = taken


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def raw_calls(world: World, bucket: int) -> list[list[Any]]:
    """DeepSpeed reducing in its own way: what the same measurement sees where a bucket's size does something."""
    torch.manual_seed(0)
    net = Net()
    adam = torch.optim.AdamW(net.parameters(), lr=1e-3)
    config = config_of("bf16", {ZERO + "reduce_bucket_size": bucket})
    engine = deepspeed_compat.initialise(net, adam, config, world.device)
    with counted() as calls:
        engine.backward(engine(torch.randn(4, WIDTH)).float().pow(2).mean())
        engine.step()
    return calls


def dangerous(world: World) -> dict[str, Any]:
    """What becomes of a run under the keys that are refused because of what they do."""
    return {
        "grad check": {checked: _after_a_nan(world, checked) for checked in (True, False)},
        "16-bit masters": attempt(lambda: _sixteen_bit_states(world)),
        "fp16 masters": attempt(
            lambda: build(world, "fp16", {"fp16.fp16_master_weights_and_grads": True}) and "started"
        ),
        "no norm": attempt(lambda: build(world, "bf16", {ZERO + "compute_grad_norm": False}) and "started"),
        "grad_accum_dtype": attempt(
            lambda: two_steps(world, "bf16", {"data_types.grad_accum_dtype": "bf16"}) and "stepped"
        ),
        "round robin": attempt(lambda: build(world, "bf16", {ZERO + "round_robin_gradients": True}) and "started"),
        "auto_cast": {cast: _seen(world, cast) for cast in (True, False)},
        "autocast norm": _autocast(world),
        "fixed scale": _fixed_scale(world),
        "accumulation": _accumulating(world),
    }


def _after_a_nan(world: World, checked: bool) -> dict[str, Any]:
    engine = build(world, "bf16", {"bf16.check_grad_overflow": checked})
    train(engine)
    result = train(engine, spoil=float("nan"))
    return {
        "applied": result["applied"],
        "nan": any(bool(parameter.isnan().any()) for parameter in engine.module.parameters()),
        "steps": engine.applied_steps,
    }


def _sixteen_bit_states(world: World) -> list[str]:
    changed = {"bf16.bf16_master_weights_and_grads": True, "bf16.bf16_optimizer_states": True}
    engine = build(world, "bf16", changed)
    train(engine)
    return [str(engine.shard(key).dtype) for key in ("master", "exp_avg", "exp_avg_sq")]


def _seen(world: World, cast: bool) -> float:
    """What the net sees of 2,049 in fp32."""
    engine = build(world, "fp16", {"fp16.auto_cast": cast})
    engine.net(torch.full((1, WIDTH), 2049.0))
    seen = engine.module.seen
    assert isinstance(seen, torch.Tensor)
    return float(seen.flatten()[0])


def _autocast(world: World) -> dict[str, Any]:
    """In both ways of fp16: the norm that is held against the clipping's limit, and the scale before and after an overflow."""
    from deepspeed.runtime import torch_autocast

    plain = build(world, "fp16")
    out = {"fp16": [train(plain)["grad_norm"], plain._zero.loss_scaler.cur_scale]}
    train(plain, spoil=float("inf"))
    out["fp16"].append(plain._zero.loss_scaler.cur_scale)
    try:
        engine = build(world, "fp32", {"torch_autocast": {"enabled": True, "dtype": "float16"}})
        scaler = engine._zero.torch_autocast_gradscaler
        out["torch_autocast"] = [train(engine)["grad_norm"], scaler.get_scale()]
        train(engine, spoil=float("inf"))
        out["torch_autocast"].append(scaler.get_scale())
    finally:
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # of the process: later engines would scale their losses, too
    return out


def _fixed_scale(world: World) -> list[Any]:
    engine = build(world, "fp16", {"fp16.loss_scale": 128})
    return [train(engine)["loss_scale"], *(train(engine, spoil=float("inf"))["loss_scale"] for _ in range(2))]


def _accumulating(world: World) -> list[int]:
    """Adam's steps after each of two of ours, if DeepSpeed is told to accumulate."""
    engine = build(world, "bf16", {"gradient_accumulation_steps": 2})
    steps = []
    for _ in range(2):
        attempt(lambda: train(engine))
        steps.append(engine.applied_steps)
    return steps
