"""A stage under way on one rank: what is around the loop's steps, from the weights it starts with to the handover."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pixart_ds import files
from pixart_ds.config import deepspeed as deepspeed_config
from pixart_ds.config.change import Change, changes_since
from pixart_ds.config.load import fingerprint, identity
from pixart_ds.config.schema import Duration, StageConfig
from pixart_ds.data.cache import options_of
from pixart_ds.data.loader import Loader
from pixart_ds.engine.agree import Agreement, gather, on_first
from pixart_ds.engine.checkpoint import Reader
from pixart_ds.engine.deepspeed import Engine, StepResult
from pixart_ds.engine.handover import write_handover
from pixart_ds.engine.line import is_highest
from pixart_ds.engine.shelf import Committed, Shelf
from pixart_ds.engine.world import World
from pixart_ds.errors import CheckpointError, ConfigError
from pixart_ds.layout import AttemptLayout, CheckpointName, RunLayout, StageLayout
from pixart_ds.ledger.book import furthest
from pixart_ds.log import Log, si
from pixart_ds.model import require_backend
from pixart_ds.plan.work import Work
from pixart_ds.train.figures import peak_flops
from pixart_ds.train.forecast import images_ahead
from pixart_ds.train.guard import Guard, Verdict, is_persistent
from pixart_ds.train.meter import Meter
from pixart_ds.train.pace import Pace
from pixart_ds.train.previews import Previews
from pixart_ds.train.pulse import Pulse
from pixart_ds.train.sets import contents_of, open_sets, order_of, reading_of
from pixart_ds.train.skips import Window, is_clean, read_records, read_windows, record_window
from pixart_ds.train.start import Start, initial_weights, net_of
from pixart_ds.train.state import TrainState, passed, windows_of
from pixart_ds.train.stop import StopFlag

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_WORST = 16
"""Samples of a refused step that are recorded: those with a loss that is no number, then the highest."""

Evidence = list[dict[str, Any]]
"""One rank's samples of a step: id, timestep and loss of each."""


@dataclass(frozen=True)
class Job:
    """What one rank is to run: a stage of a run, in one launch of one attempt."""

    run: RunLayout
    stage: StageConfig
    attempt: AttemptLayout
    launch: int
    pulse: Pulse


class Training:
    """Engine, shelf, clock and guard of a stage, and what is written around its steps."""

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
        windows = _windows(layout, world)
        there = self._clean_checkpoints(windows)
        start = None if there else initial_weights(job.run, stage, net, self.sets)
        self.engine = Engine.build(net, stage, world, deepspeed_config.merge(stage, files.read_json(layout.deepspeed)))
        keep = stage.checkpoint.keep
        self.shelf = Shelf(layout, job.attempt.number, job.launch, self.engine, world, keep=keep, told=self._note)
        self.pace = Pace(stage.checkpoint)
        self.previews = Previews(stage, self.sets[0], layout, world, log)
        self.origin = {"order": self.order.fingerprint, "sets": contents_of(stage, self.sets)}
        kept = self._resume(there) if start is None else self._initialise(start)
        self.state.skips = windows
        self.guard = Guard(stage.guard, stage.global_batch_size, kept)
        self._recent: deque[tuple[int, Callable[[], Evidence]]] = deque(maxlen=stage.guard.spike_steps)
        self._owed: dict[str, bool] | None = None
        self._furthest = on_first(world, lambda: furthest(layout))
        for window in windows:
            log.event(f"{window} are left out: training went wrong there")
        first = world.rank - world.local_rank
        log.event(reading_of(stage, self.sets, self.order, first, world.local_size, world.size))
        self.shelf.write_start({**self.state.to_json(), "order": self.order.fingerprint})

    def _resume(self, names: list[CheckpointName]) -> dict[str, Any] | list[float]:
        """Goes on from the first of these checkpoints that is whole; returns the guard's history.

        It is empty after a change: the old losses are no measure of another objective, or of other data.
        """
        changes: list[Change] = []
        found = self.shelf.resume(names, lambda reader: changes.extend(self._changes_since(reader)))
        assert found is not None
        for problem in found.damaged:
            self.log.event(f"passed over: {problem}")
        self.state, self.lineage = TrainState.from_json(found.state["state"]), found.state["lineage"]
        self.log.event(f"resumed at {si(self.state.images_seen)} images from {found.name}")
        self._take_over(changes)
        kept: dict[str, Any] | list[float] = [] if changes else found.state.get("guard", [])
        return kept

    def _initialise(self, start: Start) -> list[float]:
        """Begins the stage; returns the guard's history, which is empty."""
        self.engine.initialise(start.state)
        self.state, self.lineage = TrainState(), start.lineage
        self.log.event(f"starts from {_origin(self.lineage)}")
        return []

    def _clean_checkpoints(self, windows: tuple[Window, ...]) -> list[CheckpointName]:
        """The line's checkpoints, newest first, that are from before training went wrong, or went around that.

        Raises:
            CheckpointError: There are others only.
        """
        layout, number = self.layout, (self.job.attempt.number, self.job.launch)

        def good(images_seen: int, state: dict[str, Any]) -> bool:
            return is_clean(images_seen, windows_of(state["state"]), windows)

        found = Shelf.candidates(layout, *number, self.world, good)
        if not found and (others := Shelf.candidates(layout, *number, self.world)):
            raise CheckpointError(
                f"all {len(others)} checkpoints that are left are from after training went wrong: {windows[0]}",
                where=layout.skips,
                remedy="start a new run; or, if these checkpoints are good, remove the window from this file",
            )
        return found

    def _changes_since(self, reader: Reader) -> list[Change]:
        """What was changed and allowed since a checkpoint; what was not allowed is an error."""
        data = {"order": reader.state["order"], "sets": reader.state.get("sets", {})}
        recipe = reader.manifest.get("recipe", {})
        where, lineage = reader.storage.where, reader.state.get("lineage")
        return changes_since(self.layout, recipe, self.engine.recipe, data, self.origin, where, lineage)

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

    def meter(self) -> Meter:
        """What rank 0 records with. A collective."""
        peak, first = peak_flops(self.stage, self.world, self.log), self.world.rank == 0
        self.job.pulse.tell(peak_flops=peak)
        return Meter(
            self.job.attempt,
            self.stage,
            self.log,
            active=first,
            world_size=self.world.size,
            launch=self.job.launch,
            peak_flops=peak,
            images_ahead=images_ahead(self.job.run, self.stage) if first else 0.0,
        )

    @property
    def figures(self) -> dict[str, float | None]:
        """By name, what belongs into every step's row."""
        return {"checkpoint_stall_s": self.pace.stall_s}

    def account(self, row: dict[str, Any], work: Work, result: StepResult) -> None:
        """Says what the step that has ended was for the ledger; one that was trained before, or is refused, is rework."""
        moved = result.applied and self.state.images_seen > self._furthest
        self.job.pulse.step_ended(data_wait_s=row["data_wait_s"], moved=moved, flops=work.model_flops)

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

    def left_out(self, meter: Meter) -> None:
        """Passes over a step that is left out: its images count as seen."""
        self.state.advance(self.stage.global_batch_size, applied=False)
        meter.left_out(self.state)

    def save_if_due(self, meter: Meter, agreed: Agreement, images_before: int, *, last: bool) -> None:
        """Begins a checkpoint if one is due, and there is no doubt about the last steps; at a stop and at the end in any case."""
        milestone = self.milestone_due(images_before)
        if agreed.save or self.due(images_before):
            self._owed = {"milestone": milestone or bool(self._owed and self._owed["milestone"])}
        if last or agreed.stop or (self._owed is not None and not self.guard.doubts):
            self._save(meter, milestone=last or bool(self._owed and self._owed["milestone"]))

    def _save(self, meter: Meter, *, milestone: bool) -> None:
        """The audit's lines are durable before the checkpoint is."""
        meter.sync_audit()
        state = {"state": self.state.to_json(), "guard": self.guard.to_json(), "lineage": self.lineage, **self.origin}
        self.pace.begun()
        self._owed = None
        with self.job.pulse.during("save"):
            self.shelf.save(self.state.images_seen, state, milestone=milestone)
        meter.restart_clock()

    def preview_if_due(self, meter: Meter, images_before: int, stop: StopFlag) -> None:
        """Draws pictures from the EMA if they are due."""
        if self.previews.due(images_before, self.state.images_seen):
            with self.job.pulse.during("preview"):
                self.previews.draw(self.engine, self.state.images_seen, meter, lambda: stop.requested)
            meter.restart_clock()

    def _wait_for_commit(self) -> None:
        with self.job.pulse.during("save"):
            self.shelf.wait()

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

    # ---- when something is wrong -----------------------------------------------------------------------------------

    def judge(
        self, images_before: int, evidence: Callable[[], Evidence], agreed: Agreement, result: StepResult
    ) -> Verdict | None:
        """The guard's verdict of a step; a refused step is recorded with its worst samples."""
        self._recent.append((images_before, evidence))
        if not result.applied:
            self._record_refusal(images_before, evidence(), result)
        loss = agreed.sums["loss"] / agreed.samples
        return self.guard.judge(
            images_before, loss=loss, applied=result.applied, consecutive_skips=result.consecutive_skips
        )

    def _record_refusal(self, images_before: int, evidence: Evidence, result: StepResult) -> None:
        answers = gather(self.world, _worst(evidence))
        worst = _worst([row for rows in answers for row in rows])
        told: dict[str, Any] = {
            "images_seen": images_before + self.stage.global_batch_size,
            "loss_scale": result.loss_scale,
        }
        told |= {"consecutive_skips": result.consecutive_skips, "samples": worst}
        if self.world.rank == 0:
            files.append_json_line(self.job.attempt.refused, told)

    def roll_back(self, verdict: Verdict) -> None:
        """Records what is to be left out, and why, for the next launch; then this one is over.

        Raises:
            ConfigError: Going back has not helped so far.
        """
        self._wait_for_commit()
        recent = gather(self.world, [[clock, evidence()] for clock, evidence in self._recent])
        samples = [{"images_seen": clock, **row} for answer in recent for clock, rows in answer for row in rows]
        on_first(self.world, lambda: self._record_roll_back(verdict, samples))
        self.log.event(f"{verdict.reason}: {verdict.window} are left out; training goes back to an earlier checkpoint")

    def _record_roll_back(self, verdict: Verdict, samples: Evidence) -> None:
        config = self.stage.guard
        self._refuse_if_taken_over()
        records = read_records(self.layout)
        about = {"reason": verdict.reason, "attempt": self.job.attempt.number, "launch": self.job.launch}
        window = {"after": verdict.window.after, "upto": verdict.window.upto}
        marker = self.job.attempt.rolled_back(self.job.launch)
        files.write_json(marker, {**about, **window, "earlier": records, "samples": samples})
        if is_persistent(config, self.stage.global_batch_size, records, verdict.window):
            raise ConfigError(
                f"{verdict.reason}; training was sent back {len(records)} times, and it did not help",
                where=marker,
                remedy="look at the samples there and at the learning rate; lower it with `pixart-ds change`, or train in bf16",
            )
        record_window(self.layout, verdict.window, about)

    def _refuse_if_taken_over(self) -> None:
        """Raises CheckpointError if a later attempt or launch has begun: this one lives on, on a node that was given up."""
        if not is_highest(self.layout, (self.job.attempt.number, self.job.launch)):
            raise CheckpointError("a later attempt has taken this stage over", where=self.layout.attempts)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def leave(self, reason: str | None) -> None:
        """Tells the supervisor that all is saved, when it is committed."""
        self._wait_for_commit()
        if self.world.rank == 0:
            files.write_json(self.job.attempt.stopped, {"images_seen": self.state.images_seen, "reason": reason})
        self.log.event(f"stopped on request ({reason or 'another rank was asked'})")

    def hand_over(self, loss: float | None) -> None:
        """Gives weights, EMA and lineage to the next stage, and marks this one done."""
        self._wait_for_commit()
        on_first(self.world, self._refuse_if_taken_over)
        self.job.pulse.enter("save")
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


def _windows(layout: StageLayout, world: World) -> tuple[Window, ...]:
    """The recorded windows as rank 0 sees them: file systems may tell other nodes later."""
    seen = on_first(world, lambda: [[window.after, window.upto] for window in read_windows(layout)])
    return tuple(Window(after, upto) for after, upto in seen)


def _worst(rows: Evidence) -> Evidence:
    """Losses that are no number first, then the highest."""
    return sorted(rows, key=lambda row: (row["loss"] is not None, -(row["loss"] or 0)))[:_WORST]


def _origin(lineage: dict[str, Any]) -> str:
    if lineage["source"] == "scratch":
        return f"scratch, seed {lineage['seed']}"
    how = "re-parameterised" if lineage["source"] == "reparameterise" else "handed over"
    return f"the {lineage['weights']} weights of {lineage.get('stage') or lineage['path']}, {how}"
