"""The loop of one stage: one screen of verbs, the same on every rank."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from pixart_ds import files
from pixart_ds.config import deepspeed as deepspeed_config
from pixart_ds.config.load import fingerprint, identity
from pixart_ds.config.schema import StageConfig
from pixart_ds.data.loader import Loader, MicroBatch
from pixart_ds.diffusion.loss import diffusion_loss, noisy
from pixart_ds.engine.agree import Votes, agree
from pixart_ds.engine.checkpoint import Shelf
from pixart_ds.engine.deepspeed import Engine
from pixart_ds.engine.handover import write_handover
from pixart_ds.engine.world import World
from pixart_ds.errors import CheckpointError, PixArtError
from pixart_ds.layout import AttemptLayout, RunLayout
from pixart_ds.log import Log, si
from pixart_ds.train.meter import Meter
from pixart_ds.train.sets import open_sets, order_of
from pixart_ds.train.start import initial_weights, net_of
from pixart_ds.train.state import TrainState, passed
from pixart_ds.train.stop import StopFlag

_MOST_SKIPS = 100
"""fp16's loss scale falls from 2¹⁶ to 1 in 16 skips; nothing healthy takes more than a few dozen in a row."""


class Ending(Enum):
    """How a rank leaves the loop."""

    DONE = "done"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Job:
    """What one rank is to run: a stage of a run, in one launch of one attempt."""

    run: RunLayout
    stage: StageConfig
    attempt: AttemptLayout
    launch: int


def fit(job: Job, world: World, stop: StopFlag, log: Log) -> Ending:
    """Trains the stage to its end, or until all ranks agree to stop; resumes from the newest committed checkpoint.

    Raises:
        DataError, CheckpointError, MachineError: With what, where, and what to do.
    """
    stage, layout = job.stage, job.run.stage(job.stage.name)
    sets = open_sets(stage)
    order = order_of(stage, sets)
    net = net_of(stage)
    start = (
        None
        if (found := Shelf.newest_of(layout, job.attempt.number, job.launch, world))
        else initial_weights(job.run, stage, net, sets)
    )
    config = deepspeed_config.merge(stage, files.read_json(layout.deepspeed))
    engine = Engine.build(net, stage, world, config)
    shelf = Shelf(layout, job.attempt.number, job.launch, engine, world, keep=stage.checkpoint.keep)
    origin = {"order": order.fingerprint, "stage": fingerprint(identity(stage))}
    if start is None:
        saved = shelf.resume(found)
        assert saved is not None
        _same_order(saved, origin, shelf)
        state, lineage = TrainState.from_json(saved["state"]), saved["lineage"]
        log.event(f"resumed at {si(state.images_seen)} images from {found}")
    else:
        engine.initialise(start.state)
        state, lineage = TrainState(), start.lineage
        log.event(f"starts from {_origin(lineage)}")
    shelf.write_start(state.to_json())
    batch = stage.global_batch_size
    every = stage.checkpoint.every.in_images(batch)
    milestone = stage.checkpoint.milestone_every.in_images(batch) if stage.checkpoint.milestone_every else None

    with (
        Loader(
            sets,
            order,
            latents=stage.data.latents,
            stage=stage.name,
            seed=stage.seed,
            condition_dropout=stage.model.condition_dropout,
            micro_batch_size=stage.execution.micro_batch_size,
            global_batch_size=batch,
            rank=world.rank,
            world_size=world.size,
            device=str(world.device),
        ) as loader,
        Meter(job.attempt, stage, log, active=world.rank == 0, world_size=world.size) as meter,
    ):

        def save(*, kept: bool = False) -> None:
            meter.sync_audit()
            began = time.monotonic()
            shelf.save(state.images_seen, {"state": state.to_json(), "lineage": lineage, **origin}, milestone=kept)
            log.event(f"saved at {si(state.images_seen)} images in {time.monotonic() - began:.1f} s")
            meter.restart_clock()

        for images_seen in loader.steps(state.images_seen, stage.total_images):
            run = _Step()
            for micro_batch in run.waiting(loader.micro_batches(images_seen)):
                engine.backward(run.loss(engine, micro_batch) / batch)
            result = engine.step()
            _refuse_endless_skipping(result.consecutive_skips, images_seen)
            state.advance(batch, result.applied)
            votes = Votes(stop=stop.requested, digest=run.digest, samples=run.samples, sums=run.sums())
            agreed = agree(world, votes)
            means = {name: total / agreed.samples for name, total in agreed.sums.items()}
            row = {**means, **result.figures(), "data_wait_s": round(run.waited, 5)}
            meter.record(state, row, samples=agreed.samples, digest=agreed.digest)
            due = passed(every, images_seen, state.images_seen)
            kept = milestone is not None and passed(milestone, images_seen, state.images_seen)
            last = state.images_seen >= stage.total_images
            if due or kept or last or agreed.stop:
                save(kept=kept or last)
            if agreed.stop and not last:
                if world.rank == 0:
                    files.write_json(job.attempt.stopped, {"images_seen": state.images_seen, "reason": stop.reason})
                log.event(f"stopped on request ({stop.reason or 'another rank was asked'})")
                return Ending.STOPPED
    write_handover(
        engine, layout.handover, {"stage": stage.name, "images_seen": state.images_seen, **origin, "lineage": lineage}
    )
    if world.rank == 0:
        files.write_json(layout.done, {**state.to_json(), "attempt": job.attempt.number, "loss": meter.smooth_loss})
    log.event("done; weights and EMA are handed over")
    return Ending.DONE


class _Step:
    """One rank's part of a step: losses are summed on the device, and fetched once at the end."""

    def __init__(self) -> None:
        self.samples = 0
        self.digest = 0
        self.waited = 0.0
        self._sums: torch.Tensor | None = None

    def waiting(self, batches: Any) -> Any:
        """The micro-batches, counting the seconds that the loop waits for each."""
        iterator = iter(batches)
        while True:
            began = time.monotonic()
            batch = next(iterator, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def loss(self, engine: Engine, batch: MicroBatch) -> torch.Tensor:
        """Sum over the micro-batch of ε-MSE plus VLB (paper.md 3), in fp32."""
        inputs = noisy(batch.latents, batch.noise, batch.timesteps)
        conditions = {name: getattr(batch, name) for name in engine.condition_names}
        output = engine.net(inputs, batch.timesteps, dropped=batch.dropped, **conditions)
        losses = diffusion_loss(output, batch.latents, batch.noise, batch.timesteps)
        sums = torch.stack([losses.total.detach().sum(), losses.mse.detach().sum(), losses.vlb.detach().sum()]).double()
        self._sums = sums if self._sums is None else self._sums + sums
        self.samples += len(batch.timesteps)
        self.digest = (self.digest + batch.digest) % 2**64
        return losses.total.sum()

    def sums(self) -> dict[str, float]:
        values = [0.0, 0.0, 0.0] if self._sums is None else self._sums.tolist()
        return dict(zip(("loss", "mse", "vlb"), values, strict=True))


def _same_order(saved: dict[str, Any], origin: dict[str, str], shelf: Shelf) -> None:
    if saved["order"] != origin["order"]:
        raise CheckpointError(
            f"the checkpoint was trained on another order of the data ({saved['order']}, now {origin['order']}): "
            "a set, a filter or a key of `order` has changed",
            where=shelf.layout.checkpoints,
            remedy="put the prepared sets back as they were, or start a new run",
        )


def _refuse_endless_skipping(consecutive_skips: int, images_seen: int) -> None:
    """Ends a training that no longer trains; all ranks count alike. The newest checkpoint is from before."""
    if consecutive_skips >= _MOST_SKIPS:
        raise PixArtError(
            f"{consecutive_skips} steps in a row had a loss or gradient that is not finite, up to {images_seen} images",
            remedy="look at loss_scale and grad_norm in metrics.jsonl; resume from an earlier checkpoint, or in bf16",
        )


def _origin(lineage: dict[str, Any]) -> str:
    if lineage["source"] == "scratch":
        return f"scratch, seed {lineage['seed']}"
    how = "re-parameterised" if lineage["source"] == "reparameterise" else "handed over"
    return f"the {lineage['weights']} weights of {lineage['stage']}, {how}"
