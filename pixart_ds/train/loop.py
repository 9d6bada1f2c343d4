"""The loop of one stage: one screen of verbs, the same on every rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pixart_ds.config.schema import StageConfig
from pixart_ds.data.reader import MicroBatch
from pixart_ds.diffusion.loss import diffusion_loss, noisy
from pixart_ds.engine.agree import Votes, agree
from pixart_ds.engine.deepspeed import Engine
from pixart_ds.engine.world import World
from pixart_ds.log import Log
from pixart_ds.train.execution import in_numbers
from pixart_ds.train.figures import Figures, row_of, work_in
from pixart_ds.train.pulse import Pulse
from pixart_ds.train.stop import StopFlag
from pixart_ds.train.training import Evidence, Job, Training


def fit(job: Job, world: World, stop: StopFlag, log: Log) -> None:
    """Trains the stage to its end, until all ranks agree to stop, or until the guard sends it back; resumes from the newest
    committed checkpoint that is whole.

    Raises:
        ConfigError, DataError, CheckpointError, MachineError: With what, where, and what to do.
    """
    job = replace(job, stage=in_numbers(job.stage, world, log))
    training = Training(job, world, log)
    stage, state, engine = job.stage, training.state, training.engine
    batch = stage.global_batch_size

    def said() -> Votes:
        return Votes(stop=stop.requested, save=training.pace.due, saved=training.shelf.ready)

    with training.loader() as loader, training.meter() as meter:
        for images_seen in loader.steps(state.images_seen, stage.total_images, state.leaves_out):
            if state.leaves_out(images_seen):
                training.left_out(meter)
                agreed = agree(world, said())
            else:
                step = _Step(stage, world.device, job.pulse)
                for micro_batch in step.waiting(loader.micro_batches(images_seen)):
                    engine.backward(step.loss(engine, micro_batch) / batch)  # each sample weighs 1/N
                job.pulse.enter("together")
                result = engine.step()
                state.advance(batch, result.applied)
                agreed = agree(world, step.votes(said))
                row = {**row_of(agreed), **result.figures(), **training.figures}
                work = work_in(agreed)
                meter.record(state, row, work, digest=agreed.digest)
                training.account(row, work, result)
                verdict = training.judge(images_seen, step.evidence, agreed, result)
                if verdict is not None:
                    training.roll_back(verdict)
                    return
            if agreed.saved == world.size:
                training.shelf.settle()
            last = state.images_seen >= stage.total_images
            training.save_if_due(meter, agreed, images_seen, last=last)
            if agreed.stop and not last:
                training.leave(stop.reason if stop.requested else None)  # another rank may have noticed the file first
                return
            training.preview_if_due(meter, images_seen, stop)
            job.pulse.stepped(state.images_seen)
        training.hand_over(meter.smooth_loss)


class _Step:
    """One rank's part of a step."""

    def __init__(self, stage: StageConfig, device: torch.device, pulse: Pulse) -> None:
        self.pulse = pulse
        self.min_snr_gamma = stage.min_snr_gamma
        self.samples = 0
        self.digest = 0
        self.figures = Figures(stage, device)
        self._seen: list[tuple[Any, torch.Tensor, torch.Tensor]] = []  # ids, timesteps, losses of each micro-batch

    def waiting(self, batches: Any) -> Any:
        """The micro-batches, counting the seconds that the loop waits for each."""
        iterator = iter(batches)
        while True:
            self.pulse.enter("data")
            began = time.monotonic()
            batch = next(iterator, None)
            self.pulse.enter("compute")
            self.figures.waited(time.monotonic() - began)
            if batch is None:
                self.figures.ready()
                return
            yield batch

    def loss(self, engine: Engine, batch: MicroBatch) -> torch.Tensor:
        """Sum over the micro-batch of ε-MSE plus VLB (paper.md 3), in fp32."""
        inputs = noisy(batch.latents, batch.noise, batch.timesteps)
        conditions = {name: getattr(batch, name) for name in engine.condition_names}
        output = engine.net(inputs, batch.timesteps, dropped=batch.dropped, **conditions)
        losses = diffusion_loss(output, batch.latents, batch.noise, batch.timesteps, min_snr_gamma=self.min_snr_gamma)
        self.figures.add(batch, losses)
        self.samples += len(batch.timesteps)
        self._seen.append((batch.sample_ids, batch.timesteps, losses.total.detach()))
        self.digest = (self.digest + batch.digest) % 2**64
        return losses.total.sum()

    def votes(self, said: Callable[[], Votes]) -> Votes:
        """What this rank says after the step.

        Its sums are fetched first, which waits for the device: a stop that is asked for meanwhile is still heard in this step.
        """
        sums, each = self.figures.sums(), self.figures.each()
        return replace(said(), digest=self.digest, samples=self.samples, sums=sums, each=each)

    def evidence(self) -> Evidence:
        """Id, timestep and loss of each of its samples; a loss that is no number is None."""
        return [
            {"sample_id": sample, "timestep": timestep, "loss": loss if math.isfinite(loss) else None}
            for ids, timesteps, losses in self._seen
            for sample, timestep, loss in zip(ids.tolist(), timesteps.tolist(), losses.tolist(), strict=True)
        ]
