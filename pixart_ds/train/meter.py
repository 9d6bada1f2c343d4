"""What rank 0 records of each step: metrics for machines, TensorBoard, the audit's line, a line for people now and then."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from pixart_ds.config.schema import StageConfig
from pixart_ds.layout import AttemptLayout
from pixart_ds.log import Log, duration, si
from pixart_ds.plan.work import Work, rates
from pixart_ds.train.forecast import Forecast
from pixart_ds.train.replay import LEFT_OUT
from pixart_ds.train.state import TrainState

_LINE_EVERY_SECONDS = 20.0
_CLOCK = ("images_seen", "step")


class Meter:
    """Writes `metrics.jsonl`, `audit.jsonl` and TensorBoard's event files of an attempt; on other ranks it does nothing.

    Each line of the audit says which attempt and launch wrote it, and on how many ranks: the launches of an attempt share the file.

    Args:
        active: Whether this is rank 0.
        world_size: Ranks, for the rate of each.
        launch: Number of this launch within the attempt.
        peak_flops: What the GPUs of all ranks can do in a second, for MFU and HFU; None where that is not known.
        images_ahead: What comes after the stage (`forecast.images_ahead`).
    """

    def __init__(
        self,
        attempt: AttemptLayout,
        stage: StageConfig,
        log: Log,
        *,
        active: bool,
        world_size: int,
        launch: int,
        peak_flops: float | None = None,
        images_ahead: float = 0.0,
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
        self._forecast = Forecast(stage.total_images, images_ahead)
        self._peak_flops = peak_flops
        self._smooth: dict[str, float] = {}
        if launch == 1:
            self._write_hparams()

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self._metrics.close()
            self._audit.close()
            self._events.close()

    def record(self, state: TrainState, row: dict[str, Any], work: Work, *, digest: int) -> None:
        """Records one step.

        Args:
            state: The clock after the step.
            row: Figures by name: loss, grad_norm, learning_rate, loss_scale, applied, data_wait_s, … (docs/meters.md).
            work: Of the step, over all ranks.
            digest: Sum modulo 2⁶⁴ of the hashes of what was delivered (architecture: audited).
        """
        if not self.active:
            return
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._forecast.record(state.images_seen, now)
        row = {
            "images_seen": state.images_seen,
            "step": state.images_seen // self.stage.global_batch_size,
            "seconds": round(seconds, 5),
            **row,
            "skipped_steps": state.skipped_steps,
            **{name: _short(value) for name, value in self._derived(work, seconds).items()},
        }
        finite = {name: _shown(value) for name, value in row.items()}
        self._metrics.write(json.dumps(finite) + "\n")
        audited = {
            "images_seen": state.images_seen,
            "samples": int(work.images),
            "applied": row["applied"],
            "digest": f"{digest:016x}",
            **self._writer,
        }
        self._audit.write(json.dumps(audited) + "\n")
        for name, value in finite.items():
            if name not in _CLOCK and isinstance(value, float | int) and not isinstance(value, bool):
                self._events.add_scalar(f"train/{name}", value, state.images_seen)
        for name in ("images_per_second", "mfu", *(("loss",) if row["applied"] else ())):
            self._follow(name, row[name])
        if now - self._last_line > _LINE_EVERY_SECONDS:
            self._last_line = now
            self._line(state)

    def left_out(self, state: TrainState) -> None:
        """Records a step that was passed over."""
        if not self.active:
            return
        samples = self.stage.global_batch_size
        row = {"images_seen": state.images_seen, "samples": samples, "applied": False, "left_out": True}
        self._audit.write(json.dumps({**row, "digest": f"{LEFT_OUT:016x}", **self._writer}) + "\n")
        self.restart_clock()

    def _derived(self, work: Work, seconds: float) -> dict[str, float | None]:
        """What follows from the step's time."""
        left = {"seconds_left": self._forecast.seconds_left, "chain_seconds_left": self._forecast.chain_seconds_left}
        return {**rates(work, seconds, self.world_size, self._peak_flops), **left}

    def picture(self, name: str, pixels: npt.NDArray[np.uint8], images_seen: int) -> None:
        """Shows a picture (H, W, 3) in TensorBoard."""
        if self.active:
            self._events.add_image(name, pixels, images_seen, dataformats="HWC")
            self._events.flush()

    def _follow(self, name: str, value: float | None) -> None:
        if value is not None:
            before = self._smooth.get(name, value)
            self._smooth[name] = 0.95 * before + 0.05 * value

    def _line(self, state: TrainState) -> None:
        total, rate, forecast = self.stage.total_images, self._smooth["images_per_second"], self._forecast
        parts = [
            f"{state.images_seen / total:4.0%}  {si(state.images_seen)} of {si(total)} images",
            f"loss {self._smooth['loss']:.4f}" if "loss" in self._smooth else "no finite loss yet",
            f"{si(rate)} images/s ({si(rate / self.world_size)} a rank)",
        ]
        if "mfu" in self._smooth:
            parts.append(f"MFU {self._smooth['mfu']:.1%}")
        if forecast.seconds_left is not None and forecast.chain_seconds_left is not None:
            chain = f" ({duration(forecast.chain_seconds_left)} to the chain's end)"
            more = forecast.chain_seconds_left > forecast.seconds_left
            parts.append(f"{duration(forecast.seconds_left)} left{chain if more else ''}")
        self.log.event("  ".join(parts))

    def _write_hparams(self) -> None:
        """The recipe and how it is run, for TensorBoard's table of attempts."""
        from torch.utils.tensorboard.summary import hparams

        values = _flat({**self.stage.model_dump(mode="json"), "world_size": self.world_size})
        if self._peak_flops is not None:
            values["peak_tflops_per_rank"] = self._peak_flops / self.world_size / 1e12
        writer = self._events.file_writer
        assert writer is not None
        for summary in hparams(values, {"train/loss": 0.0, "train/mfu": 0.0}):
            writer.add_summary(summary)

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
        return self._smooth.get("loss") if self.active else None


def _shown(value: Any) -> Any:
    """A figure as JSON: null where it is no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: float | None) -> float | None:
    """With six digits: a stage has a hundred thousand rows."""
    return None if value is None else float(f"{value:.6g}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | float | str]:
    """Nested keys joined by dots; what is no number, truth or word as text."""
    found: dict[str, bool | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found


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
