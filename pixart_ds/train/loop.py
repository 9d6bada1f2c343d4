"""The loop of one stage: one screen of verbs, the same on every rank."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from pixart_ds import files
from pixart_ds.config import deepspeed as deepspeed_config
from pixart_ds.config.change import Change, changes_since
from pixart_ds.config.load import fingerprint, identity
from pixart_ds.config.schema import Duration, StageConfig
from pixart_ds.data.cache import options_of
from pixart_ds.data.loader import Loader
from pixart_ds.data.reader import MicroBatch
from pixart_ds.diffusion.loss import diffusion_loss, noisy
from pixart_ds.engine.agree import Agreement, Votes, agree
from pixart_ds.engine.checkpoint import Reader
from pixart_ds.engine.deepspeed import Engine, StepResult
from pixart_ds.engine.handover import write_handover
from pixart_ds.engine.shelf import Committed, Shelf
from pixart_ds.engine.world import World
from pixart_ds.errors import PixArtError
from pixart_ds.layout import AttemptLayout, RunLayout
from pixart_ds.log import Log, si
from pixart_ds.model import require_backend
from pixart_ds.train.execution import in_numbers
from pixart_ds.train.meter import Meter
from pixart_ds.train.pace import Pace
from pixart_ds.train.sets import contents_of, open_sets, order_of, reading_of
from pixart_ds.train.start import initial_weights, net_of
from pixart_ds.train.state import TrainState, passed
from pixart_ds.train.stop import StopFlag

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_MOST_SKIPS = 100
"""fp16's loss scale falls from 2¹⁶ to 1 in 16 skips; nothing healthy takes more than a few dozen in a row."""


@dataclass(frozen=True)
class Job:
    """What one rank is to run: a stage of a run, in one launch of one attempt."""

    run: RunLayout
    stage: StageConfig
    attempt: AttemptLayout
    launch: int


def fit(job: Job, world: World, stop: StopFlag, log: Log) -> None:
    """Trains the stage to its end, or until all ranks agree to stop; resumes from the newest committed checkpoint.

    Raises:
        ConfigError, DataError, CheckpointError, MachineError: With what, where, and what to do.
    """
    job = replace(job, stage=in_numbers(job.stage, world, log))
    training = _Training(job, world, log)
    stage, state, engine = job.stage, training.state, training.engine
    batch = stage.global_batch_size
    with (
        training.loader() as loader,
        Meter(job.attempt, stage, log, active=world.rank == 0, world_size=world.size, launch=job.launch) as meter,
    ):
        for images_seen in loader.steps(state.images_seen, stage.total_images):
            step = _Step(stage.min_snr_gamma)
            for micro_batch in step.waiting(loader.micro_batches(images_seen)):
                engine.backward(step.loss(engine, micro_batch) / batch)  # each sample weighs 1/N
            result = engine.step()
            _refuse_endless_skipping(result.consecutive_skips, images_seen)
            state.advance(batch, result.applied)
            agreed = agree(world, step.votes(stop=stop.requested, save=training.pace.due, saved=training.shelf.ready))
            meter.record(state, step.row(agreed, result), samples=agreed.samples, digest=agreed.digest)
            last = state.images_seen >= stage.total_images
            if agreed.saved == world.size:
                training.shelf.settle()
            if agreed.save or training.due(images_seen) or last or agreed.stop:
                training.save(meter, milestone=last or training.milestone_due(images_seen))
            if agreed.stop and not last:
                training.leave(stop.reason)
                return
        training.hand_over(meter.smooth_loss)


class _Training:
    """A stage under way on this rank: engine, shelf and clock, and what is written around the steps."""

    def __init__(self, job: Job, world: World, log: Log) -> None:
        stage, layout = job.stage, job.run.stage(job.stage.name)
        self.job, self.stage, self.layout, self.world, self.log = job, stage, layout, world, log
        self.sets = open_sets(stage)
        self.order = order_of(stage, self.sets)
        net = net_of(stage)
        require_backend(
            net.attention_options,
            stage.model.hidden_size // stage.model.num_heads,
            _DTYPES[stage.precision],
            world.device,
        )
        there = Shelf.newest_of(layout, job.attempt.number, job.launch, world)
        start = None if there else initial_weights(job.run, stage, net, self.sets)
        self.engine = Engine.build(net, stage, world, deepspeed_config.merge(stage, files.read_json(layout.deepspeed)))
        keep = stage.checkpoint.keep
        self.shelf = Shelf(layout, job.attempt.number, job.launch, self.engine, world, keep=keep, told=self._note)
        self.pace = Pace(stage.checkpoint)
        self.origin = {"order": self.order.fingerprint, "sets": contents_of(stage, self.sets)}
        if start is None:
            changes: list[Change] = []
            found = self.shelf.resume(lambda reader: changes.extend(self._changes_since(reader)))
            assert found is not None
            for problem in found.damaged:
                log.event(f"passed over: {problem}")
            self.state, self.lineage = TrainState.from_json(found.state["state"]), found.state["lineage"]
            log.event(f"resumed at {si(self.state.images_seen)} images from {found.name}")
            self._take_over(changes)
        else:
            self.engine.initialise(start.state)
            self.state, self.lineage = TrainState(), start.lineage
            log.event(f"starts from {_origin(self.lineage)}")
        first = world.rank - world.local_rank
        log.event(reading_of(stage, self.sets, self.order, first, world.local_size, world.size))
        self.shelf.write_start({**self.state.to_json(), "order": self.order.fingerprint})

    def _changes_since(self, reader: Reader) -> list[Change]:
        """What was changed and allowed since a checkpoint; what was not allowed is an error."""
        data = {"order": reader.state["order"], "sets": reader.state.get("sets", {})}
        recipe = reader.manifest.get("recipe", {})
        return changes_since(self.layout, recipe, self.engine.recipe, data, self.origin, reader.storage.where)

    def _take_over(self, changes: list[Change]) -> None:
        """Records in the lineage what has changed at this clock."""
        for change in changes:
            told = {**change.told(), "images_seen": self.state.images_seen}
            self.lineage = {**self.lineage, "changes": [*self.lineage.get("changes", []), told]}
            what = ", ".join(change.differences) or "the content of its sets"
            self.log.event(f"from here on with another {' and '.join(change.allowed)}, as was allowed: {what}")

    def loader(self) -> Loader:
        """This rank's loader, reading ahead."""
        return Loader(
            self.sets,
            self.order,
            latents=self.stage.data.latents,
            stage=self.stage.name,
            seed=self.stage.seed,
            condition_dropout=self.stage.model.condition_dropout,
            micro_batch_size=int(self.stage.execution.micro_batch_size),
            global_batch_size=self.stage.global_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            device=self.world.device,
            captions="caption_embeds" in self.engine.condition_names,
            cache=options_of(self.stage.execution.cache, self._job_name()),
        )

    def _job_name(self) -> str:
        """The same for all ranks and launches of this allocation, and no other's."""
        run = fingerprint(str(self.job.run.root.absolute()))
        return os.environ.get("SLURM_JOB_ID") or f"{run}-{self.stage.name}-{self.job.attempt.number}"

    def due(self, images_before: int) -> bool:
        """Whether a checkpoint falls into the step that began at `images_before`."""
        return self._passed(self.stage.checkpoint.every, images_before) or self.milestone_due(images_before)

    def milestone_due(self, images_before: int) -> bool:
        """Whether that checkpoint is one that is kept."""
        return self._passed(self.stage.checkpoint.milestone_every, images_before)

    def _passed(self, interval: Duration | None, images_before: int) -> bool:
        if interval is None:
            return False
        return passed(interval.in_images(self.stage.global_batch_size), images_before, self.state.images_seen)

    def save(self, meter: Meter, *, milestone: bool) -> None:
        """Begins a checkpoint; the audit's lines are durable before it."""
        meter.sync_audit()
        content = {"state": self.state.to_json(), "lineage": self.lineage, **self.origin}
        self.pace.begun()
        self.shelf.save(self.state.images_seen, content, milestone=milestone)
        meter.restart_clock()

    def _note(self, what: Committed) -> None:
        """Records a checkpoint that counts from now on."""
        self.pace.committed(what)
        row = {"checkpoint": str(what.name), "milestone": what.milestone, "bytes": what.num_bytes}
        row |= {"stall_s": round(what.stall_s, 4), "commit_s": round(what.commit_s, 4), "time": time.time()}
        if self.world.rank == 0:
            files.append_json_line(self.job.attempt.saves, row)
        self.log.event(
            f"saved at {si(what.name.images_seen)} images: {si(what.num_bytes, 'B')} in {what.commit_s:.1f} s, "
            f"for {what.stall_s:.2f} s of which training stood still"
        )

    def leave(self, reason: str | None) -> None:
        """Tells the supervisor that all is saved, when it is committed."""
        self.shelf.wait()
        if self.world.rank == 0:
            files.write_json(self.job.attempt.stopped, {"images_seen": self.state.images_seen, "reason": reason})
        self.log.event(f"stopped on request ({reason or 'another rank was asked'})")

    def hand_over(self, loss: float | None) -> None:
        """Gives weights, EMA and lineage to the next stage, and marks this one done."""
        self.shelf.wait()
        about = {
            "stage": self.stage.name,
            "images_seen": self.state.images_seen,
            "recipe": fingerprint(identity(self.stage)),
            **self.origin,
            "lineage": self.lineage,
        }
        write_handover(self.engine, self.layout.handover, about)
        if self.world.rank == 0:
            done = {**self.state.to_json(), "attempt": self.job.attempt.number, "loss": loss}
            files.write_json(self.layout.done, done)
        self.log.event("done; weights and EMA are handed over")


class _Step:
    """One rank's part of a step: losses are summed on the device, and fetched once at the end."""

    def __init__(self, min_snr_gamma: float | None) -> None:
        self.min_snr_gamma = min_snr_gamma
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
        losses = diffusion_loss(output, batch.latents, batch.noise, batch.timesteps, min_snr_gamma=self.min_snr_gamma)
        sums = torch.stack([losses.total.detach().sum(), losses.mse.detach().sum(), losses.vlb.detach().sum()]).double()
        self._sums = sums if self._sums is None else self._sums + sums
        self.samples += len(batch.timesteps)
        self.digest = (self.digest + batch.digest) % 2**64
        return losses.total.sum()

    def votes(self, *, stop: bool, save: bool, saved: bool) -> Votes:
        """What this rank says after the step; fetches its sums from the device."""
        values = [0.0, 0.0, 0.0] if self._sums is None else self._sums.tolist()
        sums = dict(zip(("loss", "mse", "vlb"), values, strict=True))
        return Votes(stop, save, saved, self.digest, self.samples, sums)

    def row(self, agreed: Agreement, result: StepResult) -> dict[str, Any]:
        """The step's figures by name: means over all ranks' samples, and this rank's wait for data."""
        means = {name: total / agreed.samples for name, total in agreed.sums.items()}
        return {**means, **result.figures(), "data_wait_s": round(self.waited, 5)}


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
    return f"the {lineage['weights']} weights of {lineage.get('stage') or lineage['path']}, {how}"
