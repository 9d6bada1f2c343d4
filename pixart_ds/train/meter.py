"""What rank 0 records of each step: metrics for machines, TensorBoard, the audit's line, a line for people now and then."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from pixart_ds.config.schema import StageConfig
from pixart_ds.layout import AttemptLayout
from pixart_ds.log import Log, duration, si
from pixart_ds.train.state import TrainState

_LINE_EVERY_SECONDS = 20.0


class Meter:
    """Writes `metrics.jsonl`, `audit.jsonl` and TensorBoard's event files of an attempt; on other ranks it does nothing.

    Each line of the audit says which attempt and launch wrote it, and on how many ranks: the launches of an attempt share the file.

    Args:
        active: Whether this is rank 0.
        world_size: Ranks, for the rate of each.
        launch: Number of this launch within the attempt.
    """

    def __init__(
        self, attempt: AttemptLayout, stage: StageConfig, log: Log, *, active: bool, world_size: int, launch: int
    ) -> None:
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.stage = stage
        self.log = log
        self.world_size = world_size
        self._writer = {"attempt": attempt.number, "launch": launch, "world_size": world_size}
        self._metrics = _append_to(attempt.metrics, buffering=1)
        self._audit = _append_to(attempt.audit)
        self._events = SummaryWriter(str(attempt.tensorboard))
        self._last = self._last_line = time.monotonic()
        self._rate: float | None = None
        self._loss: float | None = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self._metrics.close()
            self._audit.close()
            self._events.close()

    def record(self, state: TrainState, row: dict[str, Any], *, samples: int, digest: int) -> None:
        """Records one step.

        Args:
            state: The clock after the step.
            row: Figures by name: loss, grad_norm, learning_rate, loss_scale, applied, data_wait_s, …
            samples: Images of the step, over all ranks.
            digest: Sum modulo 2⁶⁴ of the hashes of what was delivered (architecture: audited).
        """
        if not self.active:
            return
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        row = {
            "images_seen": state.images_seen,
            "step": state.images_seen // self.stage.global_batch_size,
            "seconds": round(seconds, 5),
            **row,
        }
        finite = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None for name, value in row.items()
        }
        self._metrics.write(json.dumps(finite) + "\n")
        audited = {
            "images_seen": state.images_seen,
            "samples": samples,
            "applied": row["applied"],
            "digest": f"{digest:016x}",
            **self._writer,
        }
        self._audit.write(json.dumps(audited) + "\n")
        for name, value in finite.items():
            if isinstance(value, float):
                self._events.add_scalar(f"train/{name}", value, state.images_seen)
        self._rate = samples / seconds if self._rate is None else 0.95 * self._rate + 0.05 * samples / seconds
        if row["applied"]:
            self._loss = row["loss"] if self._loss is None else 0.95 * self._loss + 0.05 * row["loss"]
        if now - self._last_line > _LINE_EVERY_SECONDS:
            self._last_line = now
            self._line(state)

    def _line(self, state: TrainState) -> None:
        assert self._rate is not None
        total = self.stage.total_images
        left = (total - state.images_seen) / self._rate
        loss = "no finite loss yet" if self._loss is None else f"loss {self._loss:.4f}"
        self.log.event(
            f"{state.images_seen / total:4.0%}  {si(state.images_seen)} of {si(total)} images  {loss}  "
            f"{si(self._rate)} images/s ({si(self._rate / self.world_size)} a rank)  {duration(left)} left"
        )

    def sync_audit(self) -> None:
        """Makes the audit's lines durable; called before a checkpoint is committed."""
        if self.active:
            self._audit.flush()
            os.fsync(self._audit.fileno())

    def restart_clock(self) -> None:
        """Leaves what happened since the last step (a save, a start) out of the next step's seconds."""
        if self.active:
            self._last = time.monotonic()

    @property
    def smooth_loss(self) -> float | None:
        return self._loss if self.active else None


def _append_to(path: Path, buffering: int = -1) -> TextIO:
    """The file, open for more lines; a line that a killed launch left torn is ended, so that ours stands alone."""
    torn = False
    if path.exists() and path.stat().st_size:
        with open(path, "rb") as before:
            before.seek(-1, os.SEEK_END)
            torn = before.read() != b"\n"
    file = open(path, "a", encoding="utf-8", buffering=buffering)  # noqa: SIM115 - the caller closes it
    if torn:
        file.write("\n")
    return file
