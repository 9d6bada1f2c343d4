"""Pictures that the EMA draws while a stage trains: the same prompts and seeds each time, shared over the ranks.

Nothing of training is touched: the EMA is copied into a net of its own, all draws have their own generators, and what other
libraries draw from the global ones is taken back. Net, VAE and what they needed are freed before training goes on.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from pixart_ds.config.schema import StageConfig
from pixart_ds.data.shards import PreparedSet
from pixart_ds.encoders.fingerprint import encoder_folder
from pixart_ds.encoders.latents import KLEncoder
from pixart_ds.engine.agree import on_first, together
from pixart_ds.engine.deepspeed import Engine
from pixart_ds.engine.world import World
from pixart_ds.errors import PixArtError
from pixart_ds.layout import StageLayout
from pixart_ds.log import Log, si
from pixart_ds.model import DiT, PixArt, build
from pixart_ds.sampling.generate import Wish, decode, denoise
from pixart_ds.sampling.grid import save_grid
from pixart_ds.train.meter import Meter
from pixart_ds.train.state import passed

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_SMALLEST_CELL, _LARGEST_CELL = 176, 320

Picture = npt.NDArray[np.uint8]


class _Asked(Exception):
    """Someone asked for a stop; the sheet is given up."""


class Previews:
    """A stage's previews on one rank.

    Args:
        stage: With every `auto` chosen.
        prepared: The set that holds the prompts' features and names the VAE.
        layout: Where sheets go.
        world: The ranks.
        log: Where it is said.

    Raises:
        ConfigError: Previews are wanted, and the VAE's folder is not there.
    """

    def __init__(self, stage: StageConfig, prepared: PreparedSet, layout: StageLayout, world: World, log: Log) -> None:
        self._stage, self._prepared, self._layout, self._world, self._log = stage, prepared, layout, world, log
        if stage.previews.every is not None:
            encoder_folder(prepared.description.vae, "VAE")

    def due(self, before: int, after: int) -> bool:
        """Whether a sheet falls into the step from `before` to `after` images."""
        every = self._stage.previews.every
        return every is not None and passed(every.in_images(self._stage.global_batch_size), before, after)

    def draw(self, engine: Engine, images_seen: int, meter: Meter, stop: Callable[[], bool]) -> None:
        """Draws a sheet, writes it and shows it in TensorBoard. A collective.

        A rank that is asked to stop gives up before its next denoising step, the others after their batch. A sheet that cannot
        be made is told, and ends no training.

        Args:
            engine: Whose EMA draws.
            images_seen: The clock.
            meter: Rank 0's.
            stop: Whether this rank is asked to stop.
        """
        began = time.monotonic()
        with self._untouched():
            try:
                wishes, captions = self._wishes()
                parts = _Parts(self._world, stop)
                # nobody else holds the net: it is gone before the VAE comes
                latents = self._latents(self._net(engine), wishes, parts)
                mine = self._pictures(latents, parts)
                sheet = self._collected(wishes, mine)
                on_first(self._world, lambda: self._show(sheet, captions[: len(sheet)], images_seen, meter))
            except _Asked:
                self._log.event(f"the previews at {si(images_seen)} images are given up: a stop was asked for")
            except Exception as error:
                what = error.what if isinstance(error, PixArtError) else f"{type(error).__name__}: {error}"
                self._log.event(f"no previews at {si(images_seen)} images: {what}")
            else:
                seconds = time.monotonic() - began
                self._log.event(f"previews at {si(images_seen)} images: {len(wishes)} pictures in {seconds:.1f} s")

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Global generators as before, and memory given back."""
        device = self._world.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                yield
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _wishes(self) -> tuple[list[Wish], list[str]]:
        """What the sheet shows, with captions. A collective: a rank that cannot read it takes the others along."""
        found: list[tuple[list[Wish], list[str]]] = []
        together(self._world, lambda: found.append(held_wishes(self._stage, self._prepared)))
        ((wishes, captions),) = found
        return wishes[: self._stage.previews.count], captions

    def _net(self, engine: Engine) -> PixArt | DiT:
        """A net with the EMA's weights, gathered parameter by parameter; on a GPU in the stage's precision. A collective.

        Raises:
            Exception: Some rank failed, most likely for want of memory; on all ranks, and none is left in a broadcast.
        """
        stage = self._stage
        weights: dict[str, torch.Tensor] = {}
        # within the gathering no rank may raise alone: what can fail for want of memory is asked for before it
        together(self._world, lambda: self._make_room(engine, weights))
        failure: Exception | None = None
        for name, tensor in engine.full("ema"):
            if failure is None:
                try:
                    weights[name].copy_(tensor)
                except Exception as error:  # the others are still sending: on to the end, and then it is told
                    failure = error
        nets: list[PixArt | DiT] = []

        def load() -> None:
            if failure is not None:
                raise failure
            with torch.device("meta"):
                net = build(
                    stage.model,
                    fp32_attention=stage.fp32_attention,
                    attention_backend=stage.execution.attention_backend,
                )
            net.load_state_dict({**engine.fixed(), **weights}, assign=True)
            nets.append(net.eval())

        together(self._world, load)
        return nets.pop()

    def _make_room(self, engine: Engine, weights: dict[str, torch.Tensor]) -> None:
        """Allocates the net's weights, and once what gathering needs besides: two whole parameters in fp32."""
        device, places = self._world.device, engine.layout.places
        dtype = _DTYPES[self._stage.precision] if device.type == "cuda" else torch.float32
        weights.update({place.name: torch.empty(place.shape, dtype=dtype, device=device) for place in places})
        torch.empty(2, max(place.count for place in places), device=device)

    def _latents(self, net: PixArt | DiT, wishes: Sequence[Wish], parts: _Parts) -> list[torch.Tensor]:
        """Of this rank's share: from its own number on, every size-th. The ranks go from batch to batch together."""
        mine, previews = wishes[self._world.rank :: self._world.size], self._stage.previews
        at_once = max(1, int(self._stage.execution.micro_batch_size) // 2)  # guidance doubles it
        latents: list[torch.Tensor] = []

        def work() -> None:
            done = len(latents)
            latents.extend(
                denoise(
                    net,
                    self._prepared.description.downsampling_factor,
                    mine[done : done + at_once],
                    null_embeds=self._prepared.null_embeds[: self._prepared.null_length],
                    guidance_scale=previews.guidance_scale,
                    num_inference_steps=previews.num_inference_steps,
                    scheduler=previews.scheduler,
                    null_caption=previews.null_caption,
                    between=parts.between,
                )
            )

        for _ in range(0, -(-len(wishes) // self._world.size), at_once):
            parts.do(work)
        return latents

    def _pictures(self, latents: Sequence[torch.Tensor], parts: _Parts) -> list[Picture]:
        pictures: list[Picture] = []

        def work() -> None:
            if latents:
                vae = KLEncoder(self._prepared.description.vae, str(self._world.device))
                pictures.extend(decode(vae, latents, parts.between))

        parts.do(work)
        return pictures

    def _collected(self, wishes: Sequence[Wish], mine: Sequence[Picture]) -> list[torch.Tensor]:
        """All ranks' pictures, in the sequence of the wishes. A collective; what can fail comes before the first broadcast."""
        sheet: list[torch.Tensor] = []

        def allocate() -> None:
            for number, wish in enumerate(wishes):
                place, owner = divmod(number, self._world.size)
                pixels = torch.empty(*wish.size, 3, dtype=torch.uint8, device=self._world.device)
                if owner == self._world.rank:
                    pixels.copy_(torch.from_numpy(mine[place]))
                sheet.append(pixels)

        together(self._world, allocate)
        for number, pixels in enumerate(sheet):
            dist.broadcast(pixels, number % self._world.size)
        return sheet

    def _show(self, sheet: Sequence[torch.Tensor], captions: Sequence[str], images_seen: int, meter: Meter) -> None:
        pictures = [pixels.cpu().numpy() for pixels in sheet]
        cell = min(max(_SMALLEST_CELL, *(max(each.shape) for each in pictures)), _LARGEST_CELL)
        title = f"{self._stage.name}, EMA at {si(images_seen)} images"
        grid = save_grid(pictures, captions, self._layout.preview(images_seen), title=title, cell=cell)
        meter.picture("previews/ema", grid, images_seen)


class _Parts:
    """Work that each rank does alone, in parts after each of which all hear whether to go on."""

    def __init__(self, world: World, stop: Callable[[], bool]) -> None:
        self._world, self._stop = world, stop

    def between(self) -> None:
        """Raises `_Asked` if this rank is asked to stop."""
        if self._stop():
            raise _Asked

    def do(self, work: Callable[[], None]) -> None:
        """One part.

        Raises:
            _Asked: Some rank is asked to stop; on all ranks.
            Exception: Some rank failed; on all ranks.
        """

        def action() -> bool:
            try:
                self.between()
                work()
            except _Asked:
                return True
            return False

        if any(together(self._world, action)):
            raise _Asked


def held_wishes(stage: StageConfig, prepared: PreparedSet) -> tuple[list[Wish], list[str]]:
    """Every held prompt, or every class twice, with captions; in the sizes of the stage's buckets, the likeliest most often."""
    about, seed = prepared.description, stage.previews.seed
    sizes = _sizes(stage, prepared)
    if stage.model.kind == "dit":
        classes = [name for name in about.classes for _ in range(2)]
        return [Wish(about.classes.index(name), sizes[0], seed + n) for n, name in enumerate(classes)], classes
    wishes = [Wish(embeds, sizes[n % len(sizes)], seed + n) for n, (_, embeds) in enumerate(prepared.prompts)]
    return wishes, [text for text, _ in prepared.prompts]


def _sizes(stage: StageConfig, prepared: PreparedSet) -> list[tuple[int, int]]:
    """The stage's sizes in pixels, those of partitions with most rows first."""
    info, factor = prepared.description.latents[stage.data.latents], prepared.description.downsampling_factor
    if info.square:
        return [(info.sizes[0][0] * factor, info.sizes[0][1] * factor)]
    rows = np.bincount(prepared.partitions, weights=prepared.counts, minlength=len(info.sizes))
    ranked = sorted(range(len(info.sizes)), key=lambda number: -rows[number])
    return [(info.sizes[n][0] * factor, info.sizes[n][1] * factor) for n in ranked if rows[n]]
