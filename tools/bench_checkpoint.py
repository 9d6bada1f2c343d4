#!/usr/bin/env python
"""Times our checkpoints beside DeepSpeed's own, on the same state: saving, loading, and loading at another number of ranks.

Ranks are gloo processes on this machine's CPU. A net is trained under our engine; the same net under DeepSpeed's own ZeRO-2 with
torch's fused AdamW is given its masters and moments before each save. In each round ours is saved while training goes on as in the
loop, DeepSpeed's `save_checkpoint` blocks; both are loaded by the ranks that saved and by another number of ranks: ours as it is,
DeepSpeed's after `ds_to_universal`. All files are in the page cache when they are read, every load starts from zeros, and what it
loads is compared with what was saved. Ours also holds the EMA, syncs its files to the disk and reads them back.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_ranks import RankFailedError, Ranks

from pixart_ds.config.deepspeed import load_deepspeed, merge
from pixart_ds.config.schema import StageConfig
from pixart_ds.diffusion.loss import diffusion_loss, noisy
from pixart_ds.engine import deepspeed_compat
from pixart_ds.engine.agree import Votes, agree
from pixart_ds.engine.deepspeed import Engine
from pixart_ds.engine.environment import RankEnvironment
from pixart_ds.engine.shards import SHARD_KEYS
from pixart_ds.engine.shelf import Committed, Shelf
from pixart_ds.engine.world import World, join_world
from pixart_ds.layout import StageLayout
from pixart_ds.model import build, initialise

NETS = {
    "tiny": (2, 64, 2, 64),
    "s2": (12, 384, 6, 4096),
    "b2": (12, 768, 12, 4096),
    "l2": (24, 1024, 16, 4096),
    "xl2": (28, 1152, 16, 4096),
}
"""Depth, width, heads and caption channels; patches of 2."""
TOKENS, SIDE = 120, 32
PEER_KEYS = ("master", "exp_avg", "exp_avg_sq")
"""What DeepSpeed has of our shards: all but the EMA."""
STEPS_ALONE = 3
AIMS = {"stall_ratio": 0.2, "stall_cpu_ratio": 0.2, "reshard_ratio": 2.0, "universal_ratio": 0.1}

Fingerprint = dict[str, int]


def main() -> None:
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=options.folder) as name:
        try:
            answer = measure(options, Path(name))
        except RankFailedError as failure:
            told = f"rank {failure.rank} of {failure.size} failed at {failure.method}:\n{failure.end}"
            raise SystemExit(told) from None
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        _print(answer)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="s2", help="PixArt's size (default s2: 31 M; xl2: 611 M)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--ranks", type=int, default=2, help="that train and save (default 2)")
    parser.add_argument("--other", type=int, default=3, help="ranks that load at another world (default 3)")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds, after one that warms up")
    parser.add_argument("--folder", type=Path, help="where it is saved (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true", help="stall_ratio, reshard_ratio, universal_ratio and all else")
    return parser


# ---- what is measured -------------------------------------------------------------------------------------------------


def measure(options: Namespace, folder: Path) -> dict[str, Any]:
    join_home, join_away = (partial(_join, options, folder, home) for home in (True, False))
    with (
        Ranks(options.ranks, join_home, folder / "home") as home,
        Ranks(options.other, join_away, folder / "away") as away,
    ):
        about = home.ask("about")[0]
        first = _first_saves(home, folder)
        rounds = [_round(home, away, folder, number) for number in range(1, options.rounds + 1)]
    median = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    pairs = {
        "stall_ratio": ("stall_s", "peer_save_s"),
        "stall_cpu_ratio": ("stall_cpu_s", "peer_save_cpu_s"),
        "reshard_ratio": ("load_other_s", "load_s"),
        "universal_ratio": ("load_other_s", "peer_universal_s"),
    }
    ratios = {name: [each[own] / each[other] for each in rounds] for name, (own, other) in pairs.items()}
    return {
        **{name: statistics.median(values) for name, values in ratios.items()},
        "spread": {name: [min(values), max(values)] for name, values in ratios.items()},
        **about,
        "net": options.net,
        "precision": options.precision,
        "ranks": options.ranks,
        "other": options.other,
        "rounds": options.rounds,
        **first,
        **median,
    }


def _first_saves(home: Ranks, folder: Path) -> dict[str, float]:
    """Each engine's first save, with nothing beside it: what it takes, and what it adds to a rank's memory at its peak."""
    home.ask("prepare", 1)
    own = home.ask("save_ours", 0, False)
    peer = home.ask("save_peer", "0")
    sizes = {"bytes": _bytes(folder / "ours"), "peer_bytes": _bytes(folder / "peer")}
    shutil.rmtree(folder / "peer")
    return {
        **sizes,
        "first_stall_s": own[0]["stall_s"],
        "first_commit_s": own[0]["commit_s"],
        "first_peer_save_s": _slowest(peer),
        "save_adds_mb": max(each["added_mb"] for each in own),
        "peer_save_adds_mb": max(each.added_mb for each in peer),
    }


def _round(home: Ranks, away: Ranks, folder: Path, number: int) -> dict[str, float]:
    """Both are saved and loaded in turn; seconds of the slowest rank."""
    tag = str(number)
    wanted = home.ask("prepare", STEPS_ALONE)
    own = home.ask("save_ours", number, True)
    peer_save = home.ask("save_peer", tag)
    load = home.ask("load_ours", wanted)
    peer_load = home.ask("load_peer", tag, wanted)
    load_other = away.ask("load_ours", wanted)
    convert = away.ask("convert", tag)
    peer_other = away.ask("load_peer", f"{tag}_universal", wanted)
    shutil.rmtree(folder / "peer")
    return {
        **{key: own[0][key] for key in ("stall_s", "commit_s")},
        **{key: max(each[key] for each in own) for key in ("stall_cpu_s", "settle_s", "step_s", "step_beside_s")},
        "peer_save_s": _slowest(peer_save),
        "peer_save_cpu_s": max(each.cpu_seconds for each in peer_save),
        "load_s": _slowest(load),
        "peer_load_s": _slowest(peer_load),
        "load_other_s": _slowest(load_other),
        "peer_convert_s": _slowest(convert),
        "peer_load_universal_s": _slowest(peer_other),
        "peer_universal_s": _slowest(convert) + _slowest(peer_other),
        "load_adds_mb": max(each.added_mb for each in load),
        "peer_load_adds_mb": max(each.added_mb for each in peer_load),
    }


@dataclass(frozen=True)
class Cost:
    """What an action took on one rank.

    Attributes:
        seconds: Of the wall.
        cpu_seconds: Of the thread that waits for it: a CPU's own time is not disturbed by its neighbours.
        added_mb: What it added to the rank's resident memory at its peak.
    """

    seconds: float
    cpu_seconds: float
    added_mb: float


def costing(action: Callable[[], Any]) -> Cost:
    """Runs an action that all ranks begin together, with no file of an earlier one still on its way to the disk."""
    gc.collect()
    os.sync()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before, began, cpu = _memory_mb("VmRSS"), time.perf_counter(), time.thread_time()
    action()
    seconds, cpu_seconds = time.perf_counter() - began, time.thread_time() - cpu
    return Cost(seconds, cpu_seconds, max(0.0, _memory_mb("VmHWM") - before))


def _memory_mb(key: str) -> float:
    status = Path("/proc/self/status").read_text()
    return float(status.split(f"{key}:")[1].split()[0]) * 1024 / 1e6


def _slowest(costs: list[Cost]) -> float:
    return max(cost.seconds for cost in costs)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---- a rank -----------------------------------------------------------------------------------------------------------


class Rank:
    """One rank of a world, with the net under our engine and under DeepSpeed's own; all ranks call its methods together.

    Args:
        world: The ranks.
        options: The command's.
        folder: What is saved, ours and the peer's.
        home: Whether this world saves and loads at the same world; else it loads at another one.
    """

    def __init__(self, world: World, options: Namespace, folder: Path, home: bool) -> None:
        self.world, self.folder = world, folder
        stage = _stage(options)
        self.batch = _batch(stage, world.rank)
        own, peer = _net(stage), _net(stage)
        start = {name: tensor.clone() for name, tensor in own.state_dict().items()}
        config = merge(stage, load_deepspeed("zero2_cpu"))
        self.engine = Engine.build(own, stage, world, config)
        self.engine.initialise(start)
        adam = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-4, fused=True)
        self.peer = deepspeed_compat.initialise(
            peer, adam, {**config, "checkpoint": {"load_universal": not home}}, world.device
        )
        self.committed: list[Committed] = []
        layout = StageLayout(folder / "ours")
        self.shelf = Shelf(layout, 1, 1, self.engine, world, keep=1, told=self.committed.append)
        if home:
            layout.attempt(1).root.mkdir(parents=True, exist_ok=True)
            self.shelf.write_start({})
        self.alone = [self.train()]
        self.peer.backward(self._loss(self.peer))  # its moments are made by its first step
        self.peer.step()

    def about(self) -> dict[str, Any]:
        return {
            "parameters": self.engine.layout.count,
            "tensors": len(self.engine.layout.places),
            "torch": torch.__version__,
        }

    def _loss(self, net: Any) -> torch.Tensor:
        x, noise, t = self.batch["latents"], self.batch["noise"], self.batch["timesteps"]
        output = net(noisy(x, noise, t), t, self.batch["captions"], self.batch["mask"])
        return diffusion_loss(output, x, noise, t).total.sum() / self.world.size

    def train(self) -> float:
        """One step of ours; its seconds."""
        began = time.perf_counter()
        self.engine.backward(self._loss(self.engine.net))
        self.engine.step()
        return time.perf_counter() - began

    # ---- saving ----------------------------------------------------------------------------------------------------

    def prepare(self, steps: int) -> Fingerprint:
        """Trains, then gives the peer our masters and moments; returns this rank's part of the fingerprint of what is now held."""
        self.alone = [self.train() for _ in range(steps)]
        for key in PEER_KEYS:
            self._peer_shard(key).copy_(self.engine.shard(key))
        self.peer.optimizer.update_lp_params()
        return self._fingerprint(SHARD_KEYS, self.engine.shard)

    def save_ours(self, clock: int, beside: bool) -> dict[str, float]:
        """A save until it counts: while training goes on, as in the loop, or waited for.

        Returns:
            stall_s and commit_s as the shelf tells them; stall_cpu_s: the stalled thread's own; settle_s: of the calls of
            `settle`, which stall training, too; step_s and step_beside_s: a step's, before the save and during it; added_mb.
        """
        while_writing: list[float] = []
        settling = stall_cpu = 0.0

        def save() -> None:
            nonlocal settling, stall_cpu
            began = time.thread_time()
            self.shelf.save(clock, {})
            stall_cpu = time.thread_time() - began
            while beside and not any(each.name.images_seen == clock for each in self.committed):
                while_writing.append(self.train())
                if agree(self.world, Votes(saved=self.shelf.ready)).saved == self.world.size:
                    began = time.perf_counter()
                    self.shelf.settle()
                    settling += time.perf_counter() - began
            self.shelf.wait()

        cost = costing(save)
        told = self.committed[-1]
        return {
            "stall_s": told.stall_s,
            "commit_s": told.commit_s,
            "stall_cpu_s": stall_cpu,
            "settle_s": settling,
            "step_s": statistics.median(self.alone),
            "step_beside_s": statistics.median(while_writing) if beside else 0.0,
            "added_mb": cost.added_mb,
        }

    def save_peer(self, tag: str) -> Cost:
        about: dict[str, Any] = {"universal_checkpoint_info": {}}  # else the converter refuses it
        return costing(lambda: self.peer.save_checkpoint(str(self.folder / "peer"), tag=tag, client_state=about))

    # ---- loading ---------------------------------------------------------------------------------------------------

    def load_ours(self, wanted: list[Fingerprint]) -> Cost:
        self._forget(SHARD_KEYS, self.engine.shard)
        cost = costing(self.shelf.resume)
        self._compare("ours", wanted, SHARD_KEYS, self.engine.shard)
        return cost

    def load_peer(self, tag: str, wanted: list[Fingerprint]) -> Cost:
        self._forget(PEER_KEYS, self._peer_shard)
        cost = costing(lambda: self.peer.load_checkpoint(str(self.folder / "peer"), tag=tag))
        self._compare("DeepSpeed's", wanted, PEER_KEYS, self._peer_shard)
        return cost

    def convert(self, tag: str) -> Cost:
        """DeepSpeed's universal conversion, in this process as if it were the command; rank 0 does it."""
        from deepspeed.checkpoint import ds_to_universal

        ds_to_universal.tqdm.tqdm.set_lock(threading.RLock())  # its own would be a semaphore that nobody takes away
        folder = self.folder / "peer"
        arguments = Namespace(
            input_folder=str(folder / tag), output_folder=str(folder / f"{tag}_universal"), num_extract_workers=1,
            num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
        )  # fmt: skip
        return costing(lambda: ds_to_universal.main(arguments) if self.world.rank == 0 else None)

    def _peer_shard(self, key: str) -> torch.Tensor:
        master: torch.Tensor = self.peer.optimizer.single_partition_of_fp32_groups[0]
        return master.detach() if key == "master" else self.peer.optimizer.optimizer.state[master][key]

    def _forget(self, keys: tuple[str, ...], shard: Callable[[str], torch.Tensor]) -> None:
        for key in keys:
            shard(key).zero_()

    def _fingerprint(self, keys: tuple[str, ...], shard: Callable[[str], torch.Tensor]) -> Fingerprint:
        """Sums over this rank's elements of bits times place, modulo 2⁶⁴: ranks' sums add up to the same at every world."""
        base, own = self.world.rank * self.engine.layout.partition, len(self.engine.layout.own(self.world.rank))
        found = dict.fromkeys(keys, 0)
        for key in keys:
            for start in range(0, own, 1 << 22):
                bits = shard(key)[start : min(own, start + (1 << 22))].view(torch.int32).long()
                place = torch.arange(base + start + 1, base + start + 1 + len(bits))
                found[key] += int((bits * place).sum())
        return found

    def _compare(
        self, whose: str, wanted: list[Fingerprint], keys: tuple[str, ...], shard: Callable[[str], torch.Tensor]
    ) -> None:
        parts: list[Any] = [None] * self.world.size
        dist.all_gather_object(parts, self._fingerprint(keys, shard))
        for key in keys:
            if (sum(part[key] for part in parts) - sum(part[key] for part in wanted)) % 2**64:
                raise RuntimeError(f"{whose} {key} was loaded otherwise than it was saved: nothing to compare")


def _join(options: Namespace, folder: Path, home: bool, given: RankEnvironment) -> Rank:
    return Rank(join_world("cpu", environment=given), options, folder, home)


def _stage(options: Namespace) -> StageConfig:
    depth, width, heads, channels = NETS[options.net]
    return StageConfig.model_validate(
        {
            "name": "bench",
            "length": {"steps": 1000},
            "global_batch_size": options.ranks,
            "precision": options.precision,
            "model": {
                "kind": "pixart",
                "depth": depth,
                "hidden_size": width,
                "num_heads": heads,
                "caption_channels": channels,
                "max_tokens": TOKENS,
            },
            "init": {},
            "data": {"sets": [{"path": "none"}], "latents": "none"},
            "optimizer": {"learning_rate": 1e-4, "warmup_steps": 0},
            "execution": {"deepspeed": "zero2_cpu", "checkpointed_blocks": "none"},
            "checkpoint": {"every": {"steps": 500}},
        }
    )


def _net(stage: StageConfig) -> nn.Module:
    net = build(stage.model)
    initialise(net, 0)
    return net


def _batch(stage: StageConfig, rank: int) -> dict[str, torch.Tensor]:
    """One picture for each rank."""
    random = torch.Generator().manual_seed(rank)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[stage.precision]
    assert stage.model.caption_channels is not None
    return {
        "latents": torch.randn(1, 4, SIDE, SIDE, generator=random),
        "noise": torch.randn(1, 4, SIDE, SIDE, generator=random),
        "timesteps": torch.randint(0, 1000, (1,), generator=random),
        "captions": torch.randn(1, TOKENS, stage.model.caption_channels, generator=random).to(dtype),
        "mask": torch.arange(TOKENS)[None] < 70,
    }


# ---- for people -------------------------------------------------------------------------------------------------------


def _print(answer: dict[str, Any]) -> None:
    a = answer
    print(
        f"PixArt {a['net']}, {a['parameters'] / 1e6:.1f} M parameters in {a['tensors']} tensors, {a['precision']}, "
        f"a world of {a['ranks']}; ours {a['bytes'] / 1e6:.0f} MB with the EMA, DeepSpeed's {a['peer_bytes'] / 1e6:.0f} MB; "
        f"medians of {a['rounds']} rounds"
    )
    rows = [
        ("training stands still for a save", a["stall_s"], a["peer_save_s"]),
        ("… of them the waiting thread's CPU", a["stall_cpu_s"], a["peer_save_cpu_s"]),
        ("… for the first save", a["first_stall_s"], a["first_peer_save_s"]),
        (f"load at a world of {a['ranks']}", a["load_s"], a["peer_load_s"]),
        (f"load at a world of {a['other']}", a["load_other_s"], a["peer_universal_s"]),
    ]
    print(f"  {'seconds':<36}{'ours':>9}{'DeepSpeed':>11}")
    for name, own, peer in rows:
        print(f"  {name:<36}{own:>9.3f}{peer:>11.3f}")
    print(
        f"  DeepSpeed's load at {a['other']}: {a['peer_convert_s']:.2f} to convert, {a['peer_load_universal_s']:.2f} to load"
    )
    print(
        f"  ours counts after {a['commit_s']:.2f} s ({a['first_commit_s']:.2f} with no step beside it), settling takes "
        f"{1e3 * a['settle_s']:.0f} ms; a step of {a['step_s']:.2f} s takes {a['step_beside_s']:.2f} s beside the writing"
    )
    print(
        f"  a rank's memory at its peak: a save adds {a['save_adds_mb']:.0f} MB (DeepSpeed {a['peer_save_adds_mb']:.0f}), "
        f"a load {a['load_adds_mb']:.0f} MB (DeepSpeed {a['peer_load_adds_mb']:.0f})"
    )
    for name, aim in AIMS.items():
        low, high = a["spread"][name]
        print(f"  {name} {a[name]:.3f} ({low:.3f} to {high:.3f}), aim {aim}")


if __name__ == "__main__":
    main()
