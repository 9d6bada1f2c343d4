"""Runs for the tests of the ledger and of its report."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.layout import RunLayout
from pixart_ds.ledger.book import write_entry
from pixart_ds.ledger.entries import Entry


def entry(hours: float = 1.0, devices: int = 8, **changes: Any) -> Entry:
    """A launch on V100s that went well."""
    made = Entry.start("stage1", 1, 1, "cuda", devices, 1000.0, 0)
    about = {"until": 1000.0 + 3600 * hours, "outcome": "done", "images_to": 36_000, "device_kind": "v100-sxm2"}
    return Entry.from_json({**made.to_json(), **about, **changes})


def a_run(folder: Path, stages: tuple[str, ...] = ("stage1", "stage2", "stage3_256"), attempts: int = 2) -> RunLayout:
    """A run without recipes whose first two stages have attempts."""
    run = RunLayout(folder / "run")
    for stage in stages[:2]:
        for number in range(1, attempts + 1):
            run.stage(stage).attempt(number).root.mkdir(parents=True)
    files.write_json(run.manifest, {"stages": list(stages), "chain": "small"})
    return run


def pulse(launch: int, began: float, parts: dict[str, float], rank: int = 0, **more: Any) -> dict[str, Any]:
    """What a rank last said of itself."""
    return {"rank": rank, "launch": launch, "host": f"n{rank // 8 + 1}", "began": began, "parts": parts, **more}


class History:
    """Attempts of one stage, some of them killed at a random moment, as they leave their files.

    Args:
        run: The run.
        seed: Of everything that happens.
    """

    def __init__(self, run: RunLayout, stage: str, seed: int) -> None:
        self.run, self.stage, self.chance = run, run.stage(stage), random.Random(seed)
        self.now = 1_000_000.0
        self.clock = 0
        self.spans: dict[int, tuple[float, float]] = {}

    def attempt(self, number: int) -> None:
        """One attempt of up to three launches; the supervisor may be killed in each of them."""
        layout = self.stage.attempt(number)
        layout.pulses.mkdir(parents=True, exist_ok=True)
        began = until = self.now
        for launch in (1, 2, 3):
            started = self.now if launch == 1 else until
            self.now += self.chance.uniform(0, 5)
            entry_ = Entry.start(self.stage.root.name, number, launch, "cuda", 16, started, self.clock)
            entry_ = Entry.from_json({**entry_.to_json(), "pause_s": self.now - started, "device_kind": "v100-sxm2"})
            write_entry(layout, entry_)
            up = self.now + self.chance.uniform(0, 30)
            life = self.chance.uniform(0, 4000)
            names = ["startup", "productive", "data_wait", "checkpoint", "rework", "idle"]
            cuts = sorted(self.chance.uniform(0, life) for _ in names[1:])
            parts = dict(zip(names, [b - a for a, b in zip([0, *cuts], [*cuts, life], strict=True)], strict=True))
            layout.pulse(0).write_text(json.dumps(pulse(launch, up, parts)))
            self.now = until = up + life + self.chance.uniform(0, 20)
            self.clock += self.chance.randrange(1000)
            files.append_json_line(layout.metrics, {"images_seen": self.clock})
            killed = self.chance.random() < 0.3
            if killed:
                layout.heartbeat.write_text(json.dumps({"time": self.now}))
                if self.chance.random() < 0.5:
                    with open(layout.ledger, "a") as ledger:
                        ledger.write('{"format": 2, "sta')
                break
            counted = entry_.still_running(until, {"images_seen": self.clock})
            write_entry(layout, counted.divided([pulse(launch, up, parts)], ended=True).ended_as("failed", "a cause"))
            if self.chance.random() < 0.5:
                break
        self.spans[number] = (began, self.now)
        self.now += self.chance.uniform(0, 10_000)  # in the queue
