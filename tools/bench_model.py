#!/usr/bin/env python
"""Times a training step of our net beside diffusers' PixArtTransformer2DModel.

Both have the same weights, batch, dtype, threads and GEMM library, and run alternately in one process: forward, loss, backward and
fused AdamW. Text is as captions are: 20 to 120 tokens, mean 70; both get the same padded features and mask. Ours packs the real
tokens, diffusers' attends under the mask; compiled, ours attends under the mask, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pixart_ds.config.schema import ModelConfig
from pixart_ds.diffusion.loss import diffusion_loss, noisy
from pixart_ds.export.diffusers import transformer_of
from pixart_ds.model import build, initialise
from pixart_ds.plan.counts import Net, training_flops

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width, heads of DiT's sizes; patches of 2."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = 120
CAPTION_CHANNELS = 4096


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        checkpointed: Our first blocks that are recomputed; diffusers' can be all or none.
        peer_checkpointed: Whether diffusers recomputes all blocks.
        compiled: Whether both nets are compiled, block by block.
    """

    size: str
    pixels: int
    dtype: str
    batch: int
    checkpointed: int
    peer_checkpointed: bool
    compiled: bool

    @property
    def name(self) -> str:
        depth = SIZES[self.size][0]
        kept = {0: "none", depth: "all"}.get(self.checkpointed, f"first {self.checkpointed}")
        against = " compiled" if self.compiled else ""
        peer = "all" if self.peer_checkpointed else "none"
        return (
            f"{self.size}/2 {self.pixels}px {self.dtype} batch {self.batch}, recomputed {kept} (peer {peer}){against}"
        )


@dataclass(frozen=True)
class Row:
    """What was measured; seconds a step.

    Attributes:
        ratio_median: Median over the rounds of peer / ours: above 1, ours is faster.
        ours_share, peer_share: FLOPs each had to do for the model, by its seconds and the machine's measured GEMM rate.
        ours_gib, peer_gib: Peak device memory; 0 on a CPU.
    """

    case: str
    ours_cpu: float
    peer_cpu: float
    ours_wall: float
    peer_wall: float
    ratio_median: float
    ratio_low: float
    ratio_high: float
    gemm_tflops: float
    ours_share: float
    peer_share: float
    ours_gib: float
    peer_gib: float


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(options.device)
    about = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {options.threads} threads",
        "rounds": options.rounds,
    }
    rows = []
    if not options.json:
        print(" · ".join(f"{key} {value}" for key, value in about.items()))
        print("ratio = diffusers / ours (median; lowest and highest round); share = of the measured GEMM rate")
    for case in _cases(options):
        rows.append(measure(case, device, options.rounds))
        if not options.json:
            print(_line(rows[-1], device), flush=True)
    first = rows[0]
    if options.json:
        answer = {**about, "ratio_median": first.ratio_median, "gemm_share": first.ours_share}
        print(json.dumps({**answer, "rows": [asdict(row) for row in rows]}, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, action="append", help="may be repeated (default S; XL on a GPU)")
    parser.add_argument(
        "--pixels", type=int, action="append", help="256, 512 or 1024 (default 256; 256 and 1024 on a GPU)"
    )
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default fp32; bf16 and fp16 on a GPU")
    parser.add_argument("--batch", type=int, help="pictures (default 8; on a GPU 64 at 256 px, 4 at 1024)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10, help="alternating rounds, one step of each net")
    parser.add_argument("--checkpointing", choices=("none", "half", "all", "each"), default="none")
    parser.add_argument("--compile", action="store_true", help="both nets compiled, block by block")
    parser.add_argument("--json", action="store_true", help="ratio_median and gemm_share are the first case's")
    return parser


def _cases(options: argparse.Namespace) -> list[Case]:
    gpu = options.device == "cuda"
    kinds = ("none", "half", "all") if options.checkpointing == "each" else (options.checkpointing,)
    return [
        Case(
            size, pixels, dtype, options.batch or ((64 * 256**2 // pixels**2) if gpu else 8),
            {"none": 0, "half": SIZES[size][0] // 2, "all": SIZES[size][0]}[kind], kind != "none", options.compile,
        )
        for size in options.size or (["XL"] if gpu else ["S"])
        for pixels in options.pixels or ([256, 1024] if gpu else [256])
        for dtype in options.dtype or (["bf16", "fp16"] if gpu else ["fp32"])
        for kind in kinds
    ]  # fmt: skip


def measure(case: Case, device: torch.device, rounds: int) -> Row:
    """Both nets on one case: a warm-up step of each, then alternating rounds."""
    depth, width, heads = SIZES[case.size]
    model = ModelConfig(
        kind="pixart", depth=depth, hidden_size=width, num_heads=heads, caption_channels=CAPTION_CHANNELS,
        max_tokens=TOKENS, base_size=case.pixels // 16, interpolation_scale=2.0 if case.pixels == 1024 else 1.0,
    )  # fmt: skip
    net, peer = _pair(model, case, device)
    batch = _batch(case, device)
    steps = [_Stepper(net, _ours(net, batch), device), _Stepper(peer, _theirs(peer, batch), device)]
    same = [float(step.first.detach()) for step in steps]  # the first step has run: both start from one loss
    if abs(same[0] - same[1]) > (1e-4 if case.dtype == "fp32" else 2e-2) * abs(same[1]):
        raise SystemExit(f"{case.name}: the nets disagree, losses {same[0]:.6f} and {same[1]:.6f}: nothing to compare")
    for step in steps:
        step.run()
    times = [[step.timed() for step in steps] for _ in range(rounds)]
    rate = gemm_rate(case, device)
    real = round(float(batch["mask"].sum(1).float().mean()))
    flops = [case.batch * training_flops(replace(Net.of(model), text=text)) for text in (real, TOKENS)]
    clock = 1 if device.type == "cuda" else 0  # a CPU's own time is not disturbed by its neighbours
    ratios = [peer_time[clock] / own[clock] for own, peer_time in times]
    seconds = [[statistics.median(pair[which][kind] for pair in times) for kind in (0, 1)] for which in (0, 1)]
    shares = [flops[which] / seconds[which][clock] / rate for which in (0, 1)]
    return Row(
        case.name, seconds[0][0], seconds[1][0], seconds[0][1], seconds[1][1],
        statistics.median(ratios), min(ratios), max(ratios), rate / 1e12, shares[0], shares[1],
        steps[0].peak_gib, steps[1].peak_gib,
    )  # fmt: skip


def _pair(model: ModelConfig, case: Case, device: torch.device) -> tuple[Any, Any]:
    """Our net and diffusers' with the same random weights, none of them zero."""
    net = build(model, packed_text=not case.compiled, checkpointed_blocks=case.checkpointed)
    initialise(net, 0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02, generator=random)
    logging.set_verbosity_error()  # it warns of no module by name
    peer = transformer_of(model, net.state_dict()).train()
    if case.peer_checkpointed:
        peer.enable_gradient_checkpointing()
    pair: list[Any] = [each.to(device, DTYPES[case.dtype]) for each in (net, peer)]
    if case.compiled:
        for block in (*pair[0].blocks, *pair[1].transformer_blocks):
            block.compile()
    return pair[0], pair[1]


def _batch(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(2)
    side, count = case.pixels // 8, case.batch
    lengths = torch.linspace(20, TOKENS, count).round() if count > 1 else torch.tensor([70.0])
    order = torch.randperm(count, generator=random)
    return {
        "latents": torch.randn(count, 4, side, side, generator=random).to(device),
        "noise": torch.randn(count, 4, side, side, generator=random).to(device),
        "timesteps": torch.randint(0, 1000, (count,), generator=random).to(device),
        "captions": torch.randn(count, TOKENS, CAPTION_CHANNELS, generator=random).to(device, DTYPES[case.dtype]),
        "mask": torch.arange(TOKENS)[None] < lengths[order][:, None],
    }


def _ours(net: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    def loss() -> torch.Tensor:
        x, noise, t = batch["latents"], batch["noise"], batch["timesteps"]
        output = net(noisy(x, noise, t), t, batch["captions"], batch["mask"])
        return diffusion_loss(output, x, noise, t).total.mean()

    return loss


def _theirs(peer: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    mask, dtype = batch["mask"].to(batch["latents"].device), batch["captions"].dtype
    sizes = {"resolution": None, "aspect_ratio": None}

    def loss() -> torch.Tensor:
        x, noise, t = batch["latents"], batch["noise"], batch["timesteps"]
        output = peer(
            noisy(x, noise, t).to(dtype), encoder_hidden_states=batch["captions"], encoder_attention_mask=mask,
            timestep=t, added_cond_kwargs=sizes, return_dict=False,
        )[0]  # fmt: skip
        return diffusion_loss(output, x, noise, t).total.mean()

    return loss


class _Stepper:
    """Training steps of one net, timed; the first is run at once, and its loss kept."""

    def __init__(self, net: nn.Module, loss: Callable[[], torch.Tensor], device: torch.device) -> None:
        self.loss, self.device = loss, device
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)
        self.peak_gib = 0.0
        self.first = self.run()

    def run(self) -> torch.Tensor:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def timed(self) -> tuple[float, float]:
        """Seconds of CPU and of the wall for one step."""
        self._settle()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        cpu, wall = time.process_time(), time.perf_counter()
        self.run()
        self._settle()
        taken = (time.process_time() - cpu, time.perf_counter() - wall)
        if self.device.type == "cuda":
            self.peak_gib = max(self.peak_gib, torch.cuda.max_memory_allocated() / 2**30)
        return taken

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def gemm_rate(case: Case, device: torch.device) -> float:
    """FLOP/s of the machine's best product of the net's shapes: tokens by width by 4 widths, and back."""
    width, tokens = SIZES[case.size][1], case.batch * (case.pixels // 16) ** 2
    shapes = ((tokens, width, 4 * width), (tokens, 4 * width, width), (tokens, width, 3 * width))
    best = 0.0
    for rows, inner, columns in shapes:
        a = torch.randn(rows, inner, device=device, dtype=DTYPES[case.dtype])
        b = torch.randn(columns, inner, device=device, dtype=DTYPES[case.dtype])
        repeats = max(1, int(2e10 if device.type == "cpu" else 2e13) // (2 * rows * inner * columns))
        for _ in range(4):
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter() if device.type == "cuda" else time.process_time()
            for _ in range(repeats):
                product = a @ b.T
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken = (time.perf_counter() if device.type == "cuda" else time.process_time()) - began
            best = max(best, repeats * 2 * rows * inner * columns / taken)
        del product
    return best


def _line(row: Row, device: torch.device) -> str:
    own, peer = (row.ours_wall, row.peer_wall) if device.type == "cuda" else (row.ours_cpu, row.peer_cpu)
    memory = f" · {row.ours_gib:.1f} / {row.peer_gib:.1f} GiB" if row.ours_gib else ""
    return (
        f"{row.case}\n    ratio {row.ratio_median:.3f} ({row.ratio_low:.2f} to {row.ratio_high:.2f}) · "
        f"ours {own:.3f} s, diffusers {peer:.3f} s · GEMM {row.gemm_tflops:.3g} TFLOP/s, "
        f"share {row.ours_share:.2f} / {row.peer_share:.2f}{memory}"
    )


if __name__ == "__main__":
    main()
