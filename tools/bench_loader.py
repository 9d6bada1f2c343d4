#!/usr/bin/env python
"""Times our loader beside stock StreamingDataset and StreamingDataLoader on the same rows, from a warm disk and from an S3 store.

Rows are those of a 256-px stage: latents of 8 x 32 x 32 and captions of 20 to 100 tokens of 4,096 channels, in fp16. The peer gets
them once more as one set with both columns, uncompressed, and packs tokens as ours does. Our loader also draws noise, latents and
timesteps for each sample; like for like is without that (`reading`), and both are printed.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pixart_ds.config.schema import SetConfig
from pixart_ds.data import reader as reader_module
from pixart_ds.data.cache import CacheOptions
from pixart_ds.data.format import ALIGNMENT, CAPTIONS, LatentsInfo, Row, SetDescription, latents_folder
from pixart_ds.data.loader import Loader
from pixart_ds.data.shards import PreparedSet
from pixart_ds.data.streaming_compat import mds_writer
from pixart_ds.data.writer import Conditions, SetWriter
from pixart_ds.demo.store import DemoStore
from pixart_ds.diffusion.noise import draw_all
from pixart_ds.log import Log
from pixart_ds.plan.order import Order, SetRows
from pixart_ds.s3 import s3_client, split_url

ROOT = Path(__file__).resolve().parents[1]
CHANNELS, LATENTS, ROWS_PER_SHARD = 4096, (8, 32, 32), 64
BATCH = 64


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(1)
    answer: dict[str, Any] = {"samples": options.samples, "batch": BATCH}
    with tempfile.TemporaryDirectory(prefix="bench-loader-", dir=options.folder) as name:
        folder = Path(name)
        made = write_sets(folder, options.samples)
        answer["bytes_per_sample"] = _bytes(made) // options.samples
        answer |= warm(folder, made, options)
        answer["beside_training"] = beside_training(made, options.rounds)
        if not options.no_store:
            answer |= from_store(folder, made)
        if options.plan:
            answer["plan"] = plan_of_ten_million()
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        _print(answer)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds, one pass of each loader")
    parser.add_argument("--workers", type=int, action="append", help="the peer's (default 0, 1 and 2)")
    parser.add_argument(
        "--folder", type=Path, help="where the sets are written (default: the system's temporary folder)"
    )
    parser.add_argument("--no-store", action="store_true", help="leave the S3 store out")
    parser.add_argument("--plan", action="store_true", help="also time a rank's plan of 10 M samples")
    parser.add_argument(
        "--json", action="store_true", help="ratio_median, first_batch_s, epoch2_store_fraction and all else"
    )
    return parser


# ---- rows -------------------------------------------------------------------------------------------------------------


def write_sets(folder: Path, samples: int) -> PreparedSet:
    """The rows as a prepared set in `ours`, and with both columns in one stock set in `stock`."""
    random = np.random.default_rng(0)
    about = SetDescription(
        ratios=(1.0,), latents={"256": LatentsInfo(square=True, sizes=(LATENTS[1:],))}, latent_channels=4,
        downsampling_factor=8, scaling_factor=0.18215, caption_channels=CHANNELS, max_tokens=120, classes=(), vae="-",
        text_encoder="-", vae_fingerprint="-", text_fingerprint="-", source="random numbers",
    )  # fmt: skip
    writer = SetWriter(folder / "ours", about)
    columns = {"caption_embeds": "bytes", "latents": "bytes"}
    with mds_writer()(
        out=str(folder / "stock"), columns=columns, hashes=["xxh3_64"], size_limit="32mb", progress_bar=False
    ) as stock:
        for part in range(-(-samples // ROWS_PER_SHARD)):
            count = min(ROWS_PER_SHARD, samples - part * ROWS_PER_SHARD)
            rows = [_row(random, f"{part}/{number}") for number in range(count)]
            writer.write_part(part, 0, rows)
            for row in rows:
                stock.write({"caption_embeds": row.caption_embeds.tobytes(), "latents": row.latents["256"].tobytes()})
    writer.finish(Conditions(np.zeros((120, CHANNELS), np.float16), np.eye(1, 120, dtype=np.uint8)[0]))
    return PreparedSet.open(folder / "ours")


def _row(random: np.random.Generator, name: str) -> Row:
    tokens = int(random.integers(20, 101))
    latents = random.standard_normal(LATENTS, np.float32).astype(np.float16)
    np.abs(latents[len(latents) // 2 :], out=latents[len(latents) // 2 :])  # standard deviations
    return Row(
        name=name,
        caption="a caption",
        caption_embeds=random.standard_normal((tokens, CHANNELS), np.float32).astype(np.float16),
        class_label=-1,
        original_height=512,
        original_width=512,
        latents={"256": latents},
        crops={"256": (256, 256, 0, 0)},
    )


def _bytes(made: PreparedSet) -> int:
    return sum(int(made.index(name).sizes.sum()) for name in ("captions", "256"))


# ---- the two loaders --------------------------------------------------------------------------------------------------


def _order(made: PreparedSet) -> Order:
    return Order([made.rows_for("256", SetConfig(path="-"))], seed=0, lanes=1, strip_length=64, window=4)


def our_loader(made: PreparedSet, *, batch: int = BATCH, cache: CacheOptions | None = None) -> Loader:
    return Loader(
        [made], _order(made), latents="256", stage="bench", seed=0, condition_dropout=0.1, micro_batch_size=batch,
        global_batch_size=batch, rank=0, world_size=1, cache=cache,
    )  # fmt: skip


@contextmanager
def without_draws() -> Iterator[None]:
    """The loader's draws are all those of one sample: what is left is reading."""
    same = draw_all(0, "bench", [(0, 0)], (4, *LATENTS[1:]), 0.1)
    reader_module.draw_all = lambda seed, stage, samples, *_: same * len(samples)
    try:
        yield
    finally:
        reader_module.draw_all = draw_all


def _packed(samples: list[dict[str, bytes]]) -> dict[str, torch.Tensor]:
    """The peer's collate: tokens end to end, as ours."""
    captions = [np.frombuffer(sample["caption_embeds"], np.float16).reshape(-1, CHANNELS) for sample in samples]
    latents = np.stack([np.frombuffer(sample["latents"], np.float16).reshape(LATENTS) for sample in samples])
    lengths = torch.tensor([len(caption) for caption in captions])
    return {
        "latents": torch.from_numpy(latents),
        "caption_embeds": torch.from_numpy(np.concatenate(captions)),
        "lengths": lengths,
    }


def stock_loader(local: Path, workers: int, remote: str | None = None) -> Any:
    """Stock classes with their own defaults but for shuffling, as one would train with them."""
    from streaming import StreamingDataLoader, StreamingDataset

    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    data = StreamingDataset(
        remote=remote, local=str(local), shuffle=True, batch_size=BATCH, num_canonical_nodes=1, shuffle_block_size=4096
    )
    return StreamingDataLoader(
        data, batch_size=BATCH, num_workers=workers, collate_fn=_packed, persistent_workers=workers > 0
    )


@dataclass
class Pass:
    """One pass of a loader: samples a second, CPU-seconds a sample of this process and its children, seconds to the first batch."""

    rate: float
    cpu: float
    first: float


def timed(batches: Iterator[Any], count: Callable[[Any], int], *, began: float | None = None) -> Pass:
    wall, cpu = time.perf_counter(), _cpu()
    samples, first = 0, 0.0
    for batch in batches:
        samples += count(batch)
        first = first or time.perf_counter() - (began or wall)
    return Pass(samples / (time.perf_counter() - wall), (_cpu() - cpu) / samples, first)


def _cpu() -> float:
    """CPU-seconds of this process and of the workers that live under it."""
    own = time.process_time()
    ticks, me = os.sysconf("SC_CLK_TCK"), str(os.getpid())
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            values = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if values[1] == me:
            own += (int(values[11]) + int(values[12])) / ticks
    return own


def _ours(loader: Loader, samples: int) -> Iterator[Any]:
    for at in loader.steps(0, samples):
        yield from loader.micro_batches(at)


def _count(batch: Any) -> int:
    return len(batch.sample_ids) if hasattr(batch, "sample_ids") else len(batch["lengths"])


# ---- what is measured -------------------------------------------------------------------------------------------------


def warm(folder: Path, made: PreparedSet, options: argparse.Namespace) -> dict[str, Any]:
    """Alternating passes over files that the page cache holds; the limit is reading the same bytes into one buffer."""
    samples = options.samples
    stocks = {workers: stock_loader(folder / "stock", workers) for workers in options.workers or (0, 1, 2)}
    passes: dict[str, list[Pass]] = {"reading": [], "ours": [], **{f"stock, {w} workers": [] for w in stocks}}
    limits = []
    with our_loader(made) as loader:
        for number in range(options.rounds + 1):  # the first round warms up: files are hashed, memory is touched
            turn: dict[str, Pass] = {}
            with without_draws():
                turn["reading"] = timed(_ours(loader, samples), _count)
            turn["ours"] = timed(_ours(loader, samples), _count)
            for workers, stock in stocks.items():
                turn[f"stock, {workers} workers"] = timed(iter(stock), _count)
            limit = _limit(folder / "ours", samples), _limit_by_sample(made)
            if number:
                limits.append(limit)
                for name, value in turn.items():
                    passes[name].append(value)
    best = max((name for name in passes if name.startswith("stock")), key=lambda name: _median(passes[name], "rate"))
    by_file, by_sample = (statistics.median(values) for values in zip(*limits, strict=True))
    ratios = [own.rate / peer.rate for own, peer in zip(passes["reading"], passes[best], strict=True)]
    drawn = [own.rate / peer.rate for own, peer in zip(passes["ours"], passes[best], strict=True)]
    rows = {name: {key: _median(values, key) for key in ("rate", "cpu", "first")} for name, values in passes.items()}
    return {
        "warm": rows,
        "best_peer": best,
        "ratio_median": statistics.median(ratios),
        "ratio_with_draws_median": statistics.median(drawn),
        "cpu_ratio_median": _median(passes[best], "cpu") / _median(passes["reading"], "cpu"),
        "limit_samples_per_s": by_file,
        "limit_by_sample_samples_per_s": by_sample,
        "share_of_limit": _median(passes["reading"], "rate") / by_file,
        "share_of_limit_by_sample": _median(passes["reading"], "rate") / by_sample,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def _median(values: list[Pass], key: str) -> float:
    return statistics.median(getattr(value, key) for value in values)


def _limit(folder: Path, samples: int) -> float:
    """Samples a second if only their bytes are read, file by file, into one buffer of a micro-batch's size."""
    # whole pages, and touched: 16 bytes beside them, where malloc puts a bytearray, the same copy takes twice as long
    buffer = mmap.mmap(-1, BATCH << 19, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    began = time.perf_counter()
    for path in sorted(folder.glob("*/*.mds")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return samples / (time.perf_counter() - began)


def _limit_by_sample(made: PreparedSet) -> float:
    """The same, sample by sample in the loader's sequence, each shard's part of it with one read."""
    plans = [_order(made).share(at, BATCH, 0, 1) for at in range(0, made.num_samples, BATCH)]
    shards: dict[tuple[str, int], tuple[int, list[int]]] = {}
    for name, folder in (("captions", CAPTIONS), ("256", latents_folder("256"))):
        for group, file in enumerate(made.index(name).names):
            descriptor = os.open(Path(made.path) / folder / file, os.O_RDONLY)
            count = int.from_bytes(os.pread(descriptor, 4, 0), "little")
            shards[name, group] = descriptor, np.frombuffer(os.pread(descriptor, 4 * count + 4, 4), "<u4").tolist()
    place = memoryview(mmap.mmap(-1, BATCH << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))
    began = time.perf_counter()
    for plan in plans:
        at = 0
        for group, row in zip(plan.group.tolist(), plan.row.tolist(), strict=True):
            for name in ("captions", "256"):
                descriptor, offsets = shards[name, group]
                at += (offsets[row] - at) % ALIGNMENT  # the kernel copies faster where both sides lie alike
                at += os.preadv(descriptor, [place[at : at + offsets[row + 1] - offsets[row]]], offsets[row])
    took = time.perf_counter() - began
    for descriptor, _ in shards.values():
        os.close(descriptor)
    return made.num_samples / took


class _Trainer:
    """Training steps of some 80 ms of one core."""

    def __init__(self) -> None:
        layers = [torch.nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True) for _ in range(3)]
        self.net, self.x = torch.nn.Sequential(*layers), torch.randn(2, 64, 384)

    def step(self) -> float:
        """Seconds of one."""
        began = time.perf_counter()
        self.net(self.x).square().mean().backward()
        return time.perf_counter() - began


def beside_training(made: PreparedSet, rounds: int) -> dict[str, float]:
    """How much a training step is slowed by the loader that feeds it from a warm disk, four samples a step."""
    step = _Trainer().step
    alone, fed = [], []
    steps = 24
    for _ in range(rounds + 1):
        alone.append(statistics.median(step() for _ in range(steps)))
        with our_loader(made, batch=4) as loader:
            fed.append(statistics.median(step() for _ in _ours(loader, 4 * steps)))
    ratios = [two / one for one, two in zip(alone[1:], fed[1:], strict=True)]
    return {"step_ms": 1e3 * statistics.median(alone[1:]), "slowdown": statistics.median(ratios) - 1}


_HELPER = """
import sys
from pathlib import Path
from pixart_ds.data.cache import CacheOptions
from pixart_ds.data.shards import PreparedSet
made = PreparedSet.open(sys.argv[1])
sources = [made.source(name, CacheOptions(Path(sys.argv[2]))) for name in ("captions", "256")]
for number in range(len(made.counts)):
    for source in sources:
        source.open(number)
"""


def downloads_beside_training(folder: Path, remote: PreparedSet) -> dict[str, dict[str, float]]:
    """Steps fed from a cold cache, with the downloads in the rank's own threads, and in another process that runs ahead."""
    train = _Trainer()
    alone = sorted(train.step() for _ in range(48))
    made = {"alone": {"median_ms": 1e3 * statistics.median(alone), "worst_ms": 1e3 * alone[-1]}}
    for where in ("rank", "helper"):
        cache, helper = folder / f"cache-{where}", None
        if where == "helper":
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            helper = subprocess.Popen([sys.executable, "-c", _HELPER, remote.path, str(cache)], env=environment)
        steps = []
        with our_loader(remote, batch=8, cache=CacheOptions(cache)) as loader:
            for _ in _ours(loader, remote.num_samples // 8 * 8):
                steps.append(train.step())
        if helper is not None:
            helper.wait()
        steps.sort()
        made[where] = {"median_ms": 1e3 * statistics.median(steps), "worst_ms": 1e3 * steps[-1]}
    return made


def from_store(folder: Path, made: PreparedSet) -> dict[str, Any]:
    """From a real S3 server on this machine, which shares its cores: first batch, both passes, and what the second one fetches."""
    with DemoStore(folder / "store", Log("bench", None)) as store:
        store.upload(folder / "ours")
        began = time.perf_counter()
        remote = PreparedSet.open(store.url)
        options = CacheOptions(folder / "cache")
        with our_loader(remote, cache=options) as loader:
            cold = timed(_ours(loader, made.num_samples), _count, began=began)
            sources = loader._shards._sources.values()
            fetched = sum(source.downloads for source in sources)  # type: ignore[attr-defined]
            again = timed(_ours(loader, made.num_samples), _count)
            more = sum(source.downloads for source in sources) - fetched  # type: ignore[attr-defined]
        beside = downloads_beside_training(folder, remote)
        stock_url = _put_stock(folder / "stock", store.url)
        began = time.perf_counter()
        peer = timed(iter(stock_loader(folder / "stock-cache", 1, stock_url)), _count, began=began)
    return {
        "store": {
            "cold": vars(cold),
            "second_pass": vars(again),
            "stock, 1 worker, cold": vars(peer),
        },
        "downloads_beside_training": beside,
        "first_batch_s": cold.first,
        "epoch2_store_fraction": more / fetched,
    }


def _put_stock(folder: Path, beside: str) -> str:
    """Copies the peer's set into the bucket of another one; returns its address."""
    bucket, _ = split_url(beside)
    for path in sorted(folder.iterdir()):
        s3_client().upload_file(str(path), bucket, f"stock/{path.name}")
    return f"s3://{bucket}/stock"


def plan_of_ten_million() -> dict[str, float]:
    """A rank's plan of 10 M samples in 83,000 shards and 40 buckets, at 64 ranks: seconds and megabytes."""
    random = np.random.default_rng(0)
    counts = np.full(83_333, 120, np.int64)
    buckets = np.minimum(random.zipf(1.3, len(counts)) - 1, 39).astype(np.int64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    order = Order([SetRows("ten million", counts, buckets, None)], seed=0, lanes=64, strip_length=64, window=4)
    order.share(0, 11_392, 0, 64)
    first = time.perf_counter() - began
    began = time.perf_counter()
    for step in range(1, 101):
        order.share(step * 11_392, 11_392, 0, 64)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    return {"first_share_s": first, "next_share_ms": 10 * (time.perf_counter() - began), "memory_mb": memory}


def _print(answer: dict[str, Any]) -> None:
    size = answer["bytes_per_sample"]
    print(
        f"{answer['samples']} samples of {size / 1e3:.0f} kB, batch {BATCH}; medians of alternating passes over a warm disk"
    )
    print(f"  {'':<20}{'samples/s':>11}{'MB/s':>8}{'CPU µs/sample':>15}")
    for name, row in answer["warm"].items():
        label = {"reading": "ours, without draws", "ours": "ours, with draws"}.get(name, name)
        print(f"  {label:<20}{row['rate']:>11,.0f}{row['rate'] * size / 1e6:>8,.0f}{row['cpu'] * 1e6:>15,.0f}")
    print(f"  {'readinto, by file':<20}{answer['limit_samples_per_s']:>11,.0f}")
    print(f"  {'readinto, by sample':<20}{answer['limit_by_sample_samples_per_s']:>11,.0f}")
    print(
        f"  {answer['ratio_median']:.1f} times the best stock setting ({answer['best_peer']}), "
        f"{answer['ratio_with_draws_median']:.1f} with draws; {answer['share_of_limit']:.2f} of readinto by file, "
        f"{answer['share_of_limit_by_sample']:.2f} by sample"
    )
    train = answer["beside_training"]
    print(f"  a training step of {train['step_ms']:.0f} ms is slowed by {100 * train['slowdown']:.1f} %")
    if "store" in answer:
        for name, row in answer["store"].items():
            print(f"  S3, {name}: {row['rate']:,.0f} samples/s, first batch after {row['first']:.2f} s")
        for name, row in answer["downloads_beside_training"].items():
            where = {
                "alone": "alone",
                "rank": "fed cold, downloads in the rank",
                "helper": "fed cold, downloads in a helper",
            }[name]
            print(f"  a training step {where}: median {row['median_ms']:.0f} ms, worst {row['worst_ms']:.0f} ms")
        print(f"  the second pass took {100 * answer['epoch2_store_fraction']:.1f} % of its shards from the store")
    if "plan" in answer:
        plan = answer["plan"]
        print(
            f"  plan of 10 M samples: first share {plan['first_share_s']:.2f} s, the next {plan['next_share_ms']:.1f} ms, "
            f"{plan['memory_mb']:.0f} MB"
        )


if __name__ == "__main__":
    main()
