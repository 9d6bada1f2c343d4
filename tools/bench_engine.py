#!/usr/bin/env python
"""Measures our engine's way to reduce gradients beside DeepSpeed's own on the same weights and micro-batches.

Ranks are processes of this machine: gloo on a CPU, NCCL with one rank for each GPU. A small transformer is put under our engine
and, with the same optimizer, under DeepSpeed in each of its ways; all step in turn, at a rate so small that no weight ever moves.
Printed are time, traffic, memory, and the error of the gradient that the optimizer gets, against the fp64 sum of the same
micro-batches' gradients. At last one rank gets fewer micro-batches than the others, and none: who fails at that is replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_ranks import RankFailedError, Ranks

from pixart_ds.config.deepspeed import load_deepspeed, merge
from pixart_ds.config.schema import StageConfig
from pixart_ds.engine import deepspeed_compat
from pixart_ds.engine.deepspeed import Engine
from pixart_ds.engine.environment import RankEnvironment
from pixart_ds.engine.optimizer import AdamWEMA
from pixart_ds.engine.world import World, join_world

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WAYS = {
    "once32": "ours: fp32 sums, one reduce-scatter a step",
    "coalesced": "ZeRO-2 in coalesce_grad_reduction",
    "each": "ZeRO-2, every micro-batch reduced",
    "each_overlapped": "the same with overlap_comm, 8 buckets",
    "zero1_fp32": "ZeRO-1, sums and reduction in fp32",
}
"""Ours, and DeepSpeed's; the last is no ZeRO-2, but the one in which it can sum as exactly as we do, and once a step."""
OURS = "once32"
MISSING = {"fewer": "one micro-batch fewer on the last rank", "none": "none on the last rank"}
HEADS, TOKENS = 8, 16
TIMEOUT = timedelta(minutes=1)
"""After which a collective that a rank does not join is given up."""

Batch = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as name:
        try:
            answer = measure(options, Path(name))
        except RankFailedError as failure:
            told = f"rank {failure.rank} failed at {failure.method}, exit code {failure.code}:\n{failure.end}"
            raise SystemExit(told) from None
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        _print(answer)


def _options() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, help="default 2 on a CPU, and one for each GPU")
    parser.add_argument(
        "--precision",
        choices=DTYPES,
        action="append",
        help="may be repeated (default: bf16 and fp32; on GPUs bf16 and fp16)",
    )
    parser.add_argument(
        "--way",
        choices=WAYS,
        action="append",
        help="of DeepSpeed's, may be repeated (default: all; overlapped on GPUs)",
    )
    parser.add_argument("--params", type=float, default=30e6, help="of the transformer, about (default 30e6)")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a rank's step (default 4; at least 2)")
    parser.add_argument("--micro-batch-size", type=int, default=1, help=f"sequences of {TOKENS} tokens (default 1)")
    parser.add_argument(
        "--rounds", type=int, default=7, help="alternating rounds, one step of each, after one that warms up"
    )
    parser.add_argument(
        "--equal", action="store_true", help="leave out the trials with unequal numbers of micro-batches"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="worst_error of ours, ratio_median against the fastest of the others, and all else",
    )
    options = parser.parse_args()
    if options.micro_batches < 2:
        parser.error("--micro-batches: at least 2, else there is nothing to sum")
    options.ranks = options.ranks or (torch.cuda.device_count() if options.device == "cuda" else 2)
    options.precision = options.precision or ["bf16", "fp16" if options.device == "cuda" else "fp32"]  # CPUs: slow
    chosen = options.way or [way for way in WAYS if way != "each_overlapped" or options.device == "cuda"]
    options.way = [OURS, *(way for way in chosen if way != OURS)]
    return options


# ---- what is measured -------------------------------------------------------------------------------------------------


def measure(options: Namespace, folder: Path) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    with Ranks(options.ranks, partial(_join, options), folder) as ranks:
        for precision in options.precision:
            about = ranks.ask("build", precision)[0]
            first = {way: ranks.ask("check", way) for way in options.way}
            ranks.ask("round")
            rounds = [_slowest(ranks.ask("round")) for _ in range(options.rounds)]
            rows += [
                {"precision": precision, "way": way, **_times(rounds, way), **_costs(first[way])} for way in options.way
            ]
        uneven = [] if options.equal else _uneven(ranks, options)
    peers = [row for row in rows if row["way"] != OURS and row["precision"] == options.precision[0]]
    return {
        "ratio_median": max((row["ratio_median"] for row in peers), default=None),
        "worst_error": max(row["error"] for row in rows if row["way"] == OURS),
        "torch": torch.__version__,
        **about,
        **{key: getattr(options, key) for key in ("ranks", "micro_batches", "micro_batch_size", "rounds")},
        "rows": rows,
        "uneven": uneven,
    }


def _slowest(answers: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """By way and part of a step, of the ranks' seconds the most."""
    return {
        way: {part: max(answer[way][part] for answer in answers) for part in parts} for way, parts in answers[0].items()
    }


def _times(rounds: list[dict[str, dict[str, float]]], way: str) -> dict[str, Any]:
    """Medians over the rounds; the ratios are ours / theirs of backward and step together: below 1, ours is faster."""
    parts = {f"{part}_s": statistics.median(turn[way][part] for turn in rounds) for part in rounds[0][way]}
    ratios = [_reducing(turn[OURS]) / _reducing(turn[way]) for turn in rounds]
    return {
        **parts,
        "ratio_median": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "cpu_ratio_median": statistics.median(turn[OURS]["cpu"] / turn[way]["cpu"] for turn in rounds),
    }


def _reducing(parts: dict[str, float]) -> float:
    return parts["backward"] + parts["step"]


def _costs(answers: list[dict[str, Any]]) -> dict[str, Any]:
    return {**answers[0], "memory_mb": max(answer["memory_mb"] for answer in answers)}


def _uneven(ranks: Ranks, options: Namespace) -> list[dict[str, Any]]:
    """Who can step if the ranks have unequal numbers of micro-batches. Who cannot with one fewer is not asked with none."""
    rows: list[dict[str, Any]] = []
    failed: set[str] = set()
    for missing in MISSING:
        for way in options.way:
            row: dict[str, Any] = {"way": way, "missing": missing, "works": False, "error": None, "told": None}
            if way in failed:
                row["told"] = "not tried: it fails with one fewer"
            else:
                try:
                    row |= {"works": True, "error": ranks.ask("uneven", options.precision[0], way, missing)[0]}
                except RankFailedError as failure:
                    row["told"] = _last_words(failure)
                    failed.add(way)
                    ranks.restart()
            rows.append(row)
    return rows


def _last_words(failure: RankFailedError) -> str:
    lines = [line.strip() for line in failure.output.splitlines() if line.strip()]
    errors = [line for line in lines if "what():" in line or "Error:" in line]
    return f"exit code {failure.code}: " + (errors[-1] if errors else "".join(lines[-1:]))[:180]


# ---- one way ----------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Seconds of the parts of a step; on a GPU only after all that was asked of it is done."""

    device: torch.device
    parts: dict[str, float] = field(default_factory=dict)
    since: float = 0.0

    def start(self) -> Self:
        self._settle()
        self.parts, self.since = {"forward": 0.0, "backward": 0.0, "step": 0.0}, time.perf_counter()
        return self

    def lap(self, part: str) -> None:
        """What was done since the last lap belongs to `part`."""
        self._settle()
        now = time.perf_counter()
        self.parts[part] += now - self.since
        self.since = now

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Ours:
    """A net under our engine."""

    def __init__(self, net: nn.Module, stage: StageConfig, world: World, config: dict[str, Any]) -> None:
        start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        self.engine = Engine.build(net, stage, world, config)
        self.engine.initialise(start)
        self.net = self.engine.net
        self.held_bytes = self.engine._sum.nbytes

    def gradient(self) -> list[torch.Tensor]:
        return list(self.net.optimizer.averaged_gradients[0])

    def step(self, batches: Sequence[Batch], loss: Callable[[Any, Batch], torch.Tensor], watch: Watch) -> None:
        for batch in batches:
            value = loss(self.net, batch)
            watch.lap("forward")
            self.engine.backward(value)
            watch.lap("backward")
        self.engine.step()
        watch.lap("step")


class Peer:
    """A net under DeepSpeed alone, which is told when a step's last micro-batch comes, so that their numbers may differ."""

    def __init__(self, way: str, net: nn.Module, stage: StageConfig, world: World, config: dict[str, Any]) -> None:
        self.way = way
        adam = AdamWEMA(net.parameters(), stage.optimizer)
        self.net = deepspeed_compat.initialise(net, adam, config, world.device)
        adam.seed()
        self.own_sums = not hasattr(self.net.optimizer, "averaged_gradients")
        """In bf16 ZeRO-1 with fp32 sums is another optimizer of DeepSpeed's, which keeps them between steps."""
        self.held_bytes = self.net.optimizer.fp32_groups_gradients_flat[0].nbytes if self.own_sums else 0

    def gradient(self) -> list[torch.Tensor]:
        zero = self.net.optimizer
        return [zero.fp32_groups_gradient_flat_partition[0]] if self.own_sums else list(zero.averaged_gradients[0])

    def step(self, batches: Sequence[Batch], loss: Callable[[Any, Batch], torch.Tensor], watch: Watch) -> None:
        coalesced = self.way == "coalesced"
        with self.net.coalesce_grad_reduction() if coalesced else contextlib.nullcontext():
            for number, batch in enumerate(batches, start=1):
                if not coalesced:
                    self.net.set_gradient_accumulation_boundary(number == len(batches))
                value = loss(self.net, batch)
                watch.lap("forward")
                self.net.backward(value, scale_wrt_gas=False)
                watch.lap("backward")
                if not coalesced and number < len(batches):
                    self.net.step()  # counts the micro-batch
                    watch.lap("step")
        self.net.set_gradient_accumulation_boundary(True)
        self.net.step()
        watch.lap("step")


def _config(way: str, stage: StageConfig, parameters: int, micro_batches: int) -> dict[str, Any]:
    """DeepSpeed's for a way: its defaults, but for buckets that suit the net and sums that need no division."""
    config = merge(stage, load_deepspeed("zero2_cpu"))
    if way == OURS:
        return config
    del config["data_types"]
    zero = config["zero_optimization"]
    zero["reduce_bucket_size"] = parameters
    if way != "coalesced":
        config["gradient_accumulation_steps"] = micro_batches
    if way == "each_overlapped":
        zero |= {"overlap_comm": True, "reduce_bucket_size": parameters // 8}
    if way == "zero1_fp32":
        zero["stage"] = 1
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return config


# ---- a rank -----------------------------------------------------------------------------------------------------------


class Rank:
    """One rank, with the net under each way; all ranks call its methods together."""

    def __init__(self, world: World, options: Namespace, traffic: Traffic) -> None:
        self.world, self.options, self.traffic = world, options, traffic
        self.ways: dict[str, Ours | Peer] = {}

    def build(self, precision: str, ways: Sequence[str] | None = None) -> dict[str, Any]:
        """Puts the same net under each way, and checks that it is the same to the bit."""
        self.ways.clear()
        gc.collect()
        options, dtype = self.options, DTYPES[precision]
        stage = _stage(options, precision)
        torch.manual_seed(0)
        net = _net(int(options.params))
        for parameter in net.parameters():
            if not parameter.any():  # next to zero, the least rate is not small
                nn.init.normal_(parameter, 0, 0.02)
        self.width = net.layers[0].linear1.in_features
        self.plain = _net(int(options.params)).to(self.world.device, dtype)
        self.plain.load_state_dict(net.state_dict())
        self.parameters = sum(parameter.numel() for parameter in net.parameters())
        self.batches = [self._batch(number, dtype) for number in range(options.micro_batches)]
        for way in ways or options.way:
            own = _net(int(options.params))
            own.load_state_dict(net.state_dict())
            config = _config(way, stage, self.parameters, options.micro_batches)
            made = Ours(own, stage, self.world, config) if way == OURS else Peer(way, own, stage, self.world, config)
            self.ways[way] = made
        self._compare()
        cuda = self.world.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name() if cuda else "CPU, one thread a rank",
            "parameters": self.parameters,
            "activations_mb": self._peak(lambda: self._loss(self.plain, self.batches[0])) / 1e6,
        }

    def _compare(self) -> None:
        for way, made in self.ways.items():
            both = zip(made.net.module.parameters(), self.plain.parameters(), strict=True)
            if not all(torch.equal(one, other) for one, other in both):
                raise RuntimeError(f"{way} has other weights than the plain net: nothing to compare")

    def _batch(self, number: int, dtype: torch.dtype) -> Batch:
        luck = torch.Generator().manual_seed(1000 * self.world.rank + number)
        shape = (self.options.micro_batch_size, TOKENS, self.width)
        x, y = torch.randn(shape, generator=luck), torch.randn(shape, generator=luck)
        return x.to(self.world.device, dtype), y.to(self.world.device)

    def _loss(self, net: Any, batch: Batch) -> torch.Tensor:
        """Sum over the sequences, each weighing 1/N, in fp32."""
        x, y = batch
        samples = self.world.size * self.options.micro_batches * self.options.micro_batch_size
        error: torch.Tensor = (net(x).float() - y).pow(2).mean((1, 2)).sum() / samples
        return error

    def _step(self, way: str, batches: Sequence[Batch] | None = None) -> Watch:
        watch = Watch(self.world.device).start()
        self.ways[way].step(self.batches if batches is None else batches, self._loss, watch)
        return watch

    # ---- time ------------------------------------------------------------------------------------------------------

    def round(self) -> dict[str, dict[str, float]]:
        """A step of each way, in turn; seconds of its parts, and of this process's CPU."""
        parts = {}
        for way in self.ways:
            gc.collect()
            dist.barrier()
            began = time.process_time()
            parts[way] = self._step(way).parts | {"cpu": time.process_time() - began}
        self._compare()
        return parts

    # ---- error, memory, traffic ------------------------------------------------------------------------------------

    def check(self, way: str) -> dict[str, Any]:
        """The first steps of a way: memory in two, then the gradient's error in one, and the traffic in another."""
        memory = self.ways[way].held_bytes + self._peak(lambda: [self._step(way) for _ in range(2)])
        error = self._error(way, self.batches)
        with self.traffic.counted() as counts:
            self._step(way)
        return {"memory_mb": memory / 1e6, "error": error, **counts.per_rank(self.world.size)}

    def _peak(self, action: Callable[[], Any]) -> int:
        """Most bytes that an action held at once beyond what was there before; a CPU's are those that torch asked for."""
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            action()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            action()
        assert profile.profiler is not None
        assert profile.profiler.kineto_results is not None
        now = most = 0
        found = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
        for event in sorted(found, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most

    def _error(self, way: str, batches: Sequence[Batch]) -> float:
        """Relative L2 error, over all ranks, of the gradient that DeepSpeed's step is given."""
        made = self.ways[way]
        zero = made.net.optimizer
        given: list[torch.Tensor] = []
        scale, step = float(zero.loss_scaler.cur_scale) if hasattr(zero, "loss_scaler") else 1.0, zero.step

        def watched(*args: Any, **more: Any) -> Any:
            given.extend(part.detach().double().reshape(-1) for part in made.gradient())
            return step(*args, **more)

        zero.step = watched
        try:
            self._step(way, batches)
        finally:
            del zero.step
        got = torch.cat(given) / scale
        partition = len(got)
        wanted = torch.zeros(partition * self.world.size, dtype=torch.float64, device=self.world.device)
        self._add_gradients(batches, wanted, scale)
        dist.all_reduce(wanted)
        own = wanted[self.world.rank * partition :][:partition]
        squares = torch.stack([(got - own).square().sum(), own.square().sum()])
        dist.all_reduce(squares)
        return math.sqrt(float(squares[0] / squares[1]))

    def _add_gradients(self, batches: Sequence[Batch], into: torch.Tensor, scale: float) -> None:
        """Adds each micro-batch's own gradient, without the loss scale, to a flat fp64 tensor."""
        parameters = list(self.plain.parameters())
        for batch in batches:
            at = 0
            for gradient in torch.autograd.grad(self._loss(self.plain, batch) * scale, parameters):
                into[at : at + gradient.numel()] += gradient.reshape(-1).double() / scale
                at += gradient.numel()

    # ---- unequal numbers -------------------------------------------------------------------------------------------

    def uneven(self, precision: str, way: str, missing: str) -> float:
        """The gradient's error if the last rank has fewer micro-batches than the others."""
        self.build(precision, [way])
        last = self.world.rank == self.world.size - 1
        fewer = {"fewer": self.batches[:-1], "none": []}[missing]
        return self._error(way, fewer if last else self.batches)


def _join(options: Namespace, given: RankEnvironment) -> Rank:
    traffic = Traffic()
    world = join_world(options.device, TIMEOUT, given)
    gc.freeze()  # else each collection walks through all that was imported
    return Rank(world, options, traffic)


class Traffic:
    """Counts the calls of torch.distributed and the bytes of their tensors; put in place before DeepSpeed takes its functions."""

    SENT: ClassVar = {
        "all_reduce": 2,
        "reduce_scatter": 1,
        "all_gather": 1,
        "all_to_all": 1,
        "reduce": 1,
        "broadcast": 1,
    }
    """How often a rank of a ring sends (W-1)/W of the whole tensor, by the name's beginning."""

    def __init__(self) -> None:
        self.calls: dict[str, list[int]] = {}
        self._depth = 0
        for name in vars(dist).copy():
            if name.startswith(tuple(self.SENT)) and "object" not in name and callable(function := getattr(dist, name)):
                setattr(dist, name, self._counting(name, function))

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **more: Any) -> Any:
            self._depth += 1
            if self._depth == 1:  # else torch calls one by another
                self.calls.setdefault(name, []).append(max(map(_bytes, (*args, *more.values()))))
            try:
                return function(*args, **more)
            finally:
                self._depth -= 1

        return counting

    @contextlib.contextmanager
    def counted(self) -> Iterator[Self]:
        self.calls.clear()
        yield self
        self.calls = {name: list(sizes) for name, sizes in self.calls.items()}

    def per_rank(self, size: int) -> dict[str, Any]:
        """calls in all, large_calls: by name those of 1 kB and more with their MB, sent_mb: what a rank sends in rings."""
        ring = (size - 1) / size
        large = {name: [each for each in sizes if each >= 1000] for name, sizes in self.calls.items()}
        sent = sum(
            next(times for start, times in self.SENT.items() if name.startswith(start)) * ring * sum(sizes)
            for name, sizes in self.calls.items()
        )
        return {
            "calls": sum(map(len, self.calls.values())),
            "large_calls": {name: [len(sizes), sum(sizes) / 1e6] for name, sizes in large.items() if sizes},
            "sent_mb": sent / 1e6,
        }


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _net(parameters: int) -> nn.TransformerEncoder:
    """About as many parameters, in 8 to 32 blocks if that can be."""
    width = 64
    while 12 * (2 * width) ** 2 * 8 <= parameters:
        width *= 2
    block = nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(block, max(1, round(parameters / (12 * width**2))), enable_nested_tensor=False)


def _stage(options: Namespace, precision: str) -> StageConfig:
    return StageConfig.model_validate(
        {
            "name": "bench",
            "length": {"steps": 1000},
            "global_batch_size": options.ranks * options.micro_batches * options.micro_batch_size,
            "precision": precision,
            "model": {"kind": "dit", "depth": 1, "hidden_size": 12, "num_heads": 1, "num_classes": 3},
            "init": {},
            "data": {"sets": [{"path": "none"}], "latents": "none"},
            "optimizer": {"learning_rate": 1e-30, "warmup_steps": 0, "weight_decay": 0.0},
            "execution": {"deepspeed": "zero2_cpu", "checkpointed_blocks": "none"},
            "checkpoint": {"every": {"steps": 500}},
        }
    )


# ---- for people -------------------------------------------------------------------------------------------------------


def _print(answer: dict[str, Any]) -> None:
    a = answer
    print(
        f"{a['device']}, {a['ranks']} ranks, {a['parameters'] / 1e6:.1f} M parameters, {a['micro_batches']} micro-batches a step; "
        f"medians of {a['rounds']} rounds"
    )
    print(
        "ratio = ours / theirs, backward and step together; sent = by each rank of a ring; error = relative, of the gradient"
    )
    print(
        f"{'':<50}{'backward s':>11}{'step s':>8}{'ratio':>7}{'low to high':>14}{'CPU':>6}{'calls':>7}{'sent MB':>9}"
        f"{'memory MB':>11}{'error':>9}"
    )
    for precision in dict.fromkeys(row["precision"] for row in a["rows"]):
        print(precision)
        for row in (row for row in a["rows"] if row["precision"] == precision):
            against = " " * 27
            if row["way"] != OURS:
                spread = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
                against = f"{row['ratio_median']:>7.2f}{spread:>14}{row['cpu_ratio_median']:>6.2f}"
            print(
                f"  {WAYS[row['way']]:<48}{row['backward_s']:>11.3f}{row['step_s']:>8.3f}{against}"
                f"{row['calls']:>7}{row['sent_mb']:>9.1f}{row['memory_mb']:>11.1f}{row['error']:>9.1e}"
            )
    print(
        f"memory: the most a step holds besides weights, masters, moments and EMA; activations: {a['activations_mb']:.1f} MB"
    )
    for row in a["uneven"]:
        told = f"works, error {row['error']:.1e}" if row["works"] else f"fails: {row['told']}"
        print(f"{MISSING[row['missing']]}, {row['way']}: {told}")


if __name__ == "__main__":
    main()
