"""The main job in small: pictures, a prepared set, the five stages, pictures again, an export and a cost report."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pixart_ds import files
from pixart_ds.config.freeze import create_run, read_stage
from pixart_ds.config.load import load_chain, load_prepare
from pixart_ds.config.schema import SourceConfig, StageConfig
from pixart_ds.demo.judge import MEASURES
from pixart_ds.demo.pictures import caption, held_out_scenes, write_pictures
from pixart_ds.errors import EXIT_STOPPED, MachineError, PixArtError
from pixart_ds.layout import RunLayout
from pixart_ds.log import Log, duration
from pixart_ds.prepare.items import Item
from pixart_ds.prepare.sources import open_source
from pixart_ds.report.command import render, write_page

if TYPE_CHECKING:
    from pixart_ds.demo.grids import Sheet

ENCODERS = Path(__file__).parent / "encoders"
PROMPT_SEED = 5
INTERRUPTED_STAGE = "stage3_256"
"""The stage that is stopped in the middle and resumed on another number of processes."""


@dataclass(frozen=True)
class Size:
    """How much of everything: `full` learns, `smoke` only runs every part."""

    recipes: str
    pictures: int
    prompts: int


SIZES = {"full": Size("demo", 6000, 48), "smoke": Size("smoke", 96, 6)}


@dataclass
class Demo:
    """The demo in one folder; running it again goes on where it stopped.

    Args:
        out: Folder of everything that the demo makes.
        size: A key of `SIZES`.
        images: The user's own pictures and captions instead of drawn ones.
        device: cpu or cuda.
        processes: Ranks.
        store: Where training reads the prepared set: folder, or s3 for an object store that the demo starts.
    """

    out: Path
    size: str = "full"
    images: Path | None = None
    device: str = "cpu"
    processes: int = 2
    store: str = "folder"
    times: list[tuple[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.about = SIZES[self.size]
        self.log = Log("demo")
        self.pictures = self.images or self.out / "pictures"
        self.data = self.out / "data"
        self.run_layout = RunLayout(self.out / "run")
        self.grids = self.out / "grids"

    def run(self) -> int:
        """Does what is not done yet; returns the exit code."""
        self._check_device()
        self.out.mkdir(parents=True, exist_ok=True)
        if self.images is None:
            with self._part("draw pictures"):
                self._draw()
        else:
            self.log.event(
                f"your own pictures from {self.images}; the toy VAE has only seen drawn scenes, so expect blurred pictures"
            )
        with self._part("prepare latents and caption features"):
            self._prepare()
        with self._stored() as path:
            self._train_and_show(self._create(path))
        return 0

    def _train_and_show(self, run: RunLayout) -> None:
        sheets = []
        for name in files.read_json(run.manifest)["stages"]:
            stage = read_stage(run, name)
            with self._part(f"train {name}"):
                self._train(run, stage)
            with self._part(f"sample {name}"):
                sheets.append((name, self._sample(run, stage)))
        with self._part("export to diffusers and sample there"):
            picture = self._export(run, stage)
        self._summary(sheets, picture, self._cost_report(run))

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        self.log.event(f"── {name}")
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self.times.append((name, seconds))
        self.log.event(f"   {name}: {duration(seconds)}")

    def _check_device(self) -> None:
        if self.device == "cuda":
            import torch

            if torch.cuda.device_count() < self.processes:
                raise MachineError(
                    f"{self.processes} processes need as many GPUs; this machine shows {torch.cuda.device_count()}",
                    remedy="use DEVICE=cpu, or fewer --processes",
                )

    def _draw(self) -> None:
        write_pictures(self.pictures, self.about.pictures, seed=0)

    def _prompts(self) -> list[str]:
        """Prompts that no training picture shows; of the user's own pictures some of their captions."""
        if self.images is None:
            return [caption(scene) for scene in held_out_scenes(self.about.prompts, PROMPT_SEED)]
        source = open_source(SourceConfig(path=str(self.images)))
        found = (item for chunk in source.chunks() for item in source.scan(chunk))
        captions = sorted({item.caption for item in found if isinstance(item, Item) and item.caption is not None})
        return captions[:: max(1, len(captions) // self.about.prompts)][: self.about.prompts]

    def _prepare(self) -> None:
        from pixart_ds.prepare.pipeline import prepare

        config = load_prepare(
            f"{self.about.recipes}/prepare",
            [
                f"source.path={json.dumps(str(self.pictures))}",
                f"output={json.dumps(str(self.data))}",
                f"vae={json.dumps(str(ENCODERS / 'vae'))}",
                f"text_encoder={json.dumps(str(ENCODERS / 'text'))}",
                f"prompts={json.dumps(self._prompts())}",
            ],
        )
        report = prepare(config, processes=self.processes)
        for line in str(report).splitlines():
            self.log.event(f"   {line}")

    @contextmanager
    def _stored(self) -> Iterator[str]:
        """The path that training reads the prepared set from: its folder, or where it lies in a store that runs meanwhile."""
        if self.store == "folder":
            yield str(self.data.resolve())
            return
        from pixart_ds.demo.store import DemoStore

        self.log.event("── start an object store")
        with DemoStore(self.out / "store", self.log) as store:
            with self._part("upload the prepared set"):
                store.upload(self.data)
            yield store.url

    def _create(self, path: str) -> RunLayout:
        from pixart_ds.data.shards import PreparedSet

        classes = PreparedSet.open(self.data).description.classes
        recipe = f"{self.about.recipes}/chain"
        overrides = [f"*.data.sets={json.dumps([{'path': path}])}", f"stage1.model.num_classes={max(1, len(classes))}"]
        if self.store != "folder":
            overrides.append("*.execution.cache.mode=node-job")  # there is nothing to be read in place
        return create_run(self.run_layout.root, load_chain(recipe, overrides), recipe)

    def _train(self, run: RunLayout, stage: StageConfig) -> None:
        layout = run.stage(stage.name)
        if layout.done.exists():
            self.log.event("   is done already")
            return
        if stage.name == INTERRUPTED_STAGE and not layout.all_attempts():
            self._train_half(run, stage)
            fewer = 1 if self.processes > 1 else 2
            self.log.event(
                f"   stopped with exit code {EXIT_STOPPED}; resumes on {fewer} process{'es' if fewer > 1 else ''} "
                f"instead of {self.processes}"
            )
            self._supervise(run, stage, fewer).check()
        else:
            self._supervise(run, stage, self.processes).check()

    def _supervise(self, run: RunLayout, stage: StageConfig, processes: int) -> _Supervised:
        command = ["train", str(run.root), stage.name, "--processes", str(processes), "--device", self.device]
        return _Supervised([sys.executable, "-m", "pixart_ds", *command], stage.name)

    def _train_half(self, run: RunLayout, stage: StageConfig) -> None:
        """Starts the stage, sends SIGTERM when half of it is done, and expects the exit code of a saved stop."""
        supervised = self._supervise(run, stage, self.processes)
        metrics = run.stage(stage.name).attempt(1).metrics
        while supervised.process.poll() is None:
            row = files.last_json_line(metrics)
            if row is not None and row["images_seen"] >= stage.total_images // 2:
                self.log.event(f"   SIGTERM to {stage.name} at {row['images_seen']} of {stage.total_images} images")
                supervised.process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.02)
        supervised.check(EXIT_STOPPED)

    def _sample(self, run: RunLayout, stage: StageConfig) -> Sheet:
        """Draws the stage's sheet; the judge scores it where the world is the drawn one."""
        from pixart_ds.demo.grids import draw_sheet

        scenes = held_out_scenes(self.about.prompts, PROMPT_SEED) if self.images is None else None
        sheet = draw_sheet(run, stage.name, self.data, self.grids, scenes, self.device)
        files.write_durable(run.stage(stage.name).sheet, [sheet.path.read_bytes()])
        return sheet

    def _export(self, run: RunLayout, stage: StageConfig) -> Path:
        """Exports the last stage, and makes a picture from the folder through diffusers alone."""
        from pixart_ds.data.shards import PreparedSet
        from pixart_ds.demo.grids import draw_from_export
        from pixart_ds.engine.weights import open_weights
        from pixart_ds.export.diffusers import export_pipeline

        about = PreparedSet.open(self.data).description
        weights = open_weights(run.stage(stage.name).handover)
        folder, picture = self.out / "pipeline", self.out / "pipeline.png"
        export_pipeline(
            folder, stage.model, weights.state, vae=about.vae, text_encoder=about.text_encoder,
            about={
                "source": str(weights.where), "stage": stage.name, "weights": "ema",
                "model": stage.model.model_dump(mode="json"), "lineage": weights.lineage,
            },
        )  # fmt: skip
        side = stage.model.base_size * stage.model.patch_size * about.downsampling_factor
        draw_from_export(folder, stage, self._prompts()[0], side, picture)
        return picture

    def _cost_report(self, run: RunLayout) -> str:
        """Writes the page with the stages' sheets, and the text, which is returned."""
        write_page(run.root)
        text = render([run.root], "text", {})
        files.write_text(self.out / "cost_report.txt", text + "\n")
        return text

    def _summary(self, sheets: Sequence[tuple[str, Sheet]], picture: Path, report: str) -> None:
        lines = ["", report.rstrip(), ""]
        source = (
            self.run_layout.root if self.store == "folder" else self.out / "pipeline"
        )  # the run's set stops with the store
        if any(sheet.score for _, sheet in sheets):
            lines.append("What the judge reads in the pictures of held-out prompts (share that is right):")
            lines.append(f"  {'stage':<14}" + "".join(f"{name:>9}" for name in MEASURES))
            for stage, sheet in sheets:
                values = sheet.score or {}
                lines.append(
                    f"  {stage:<14}"
                    + "".join(f"{values[name]:9.2f}" if name in values else f"{'-':>9}" for name in MEASURES)
                )
            lines.append("")
        lines.append("Time of each part:")
        lines += [f"  {name:<44}{duration(seconds):>14}" for name, seconds in self.times]
        lines.append(f"  {'together':<44}{duration(sum(seconds for _, seconds in self.times)):>14}")
        lines += [
            "",
            "Where everything lies:",
            f"  pictures of each stage   {self.grids}",
            f"  run, checkpoints, logs   {self.run_layout.root}",
            f"  diffusers pipeline       {self.out / 'pipeline'}  (its picture: {picture})",
            f"  cost report              {self.run_layout.report}  (as text: {self.out / 'cost_report.txt'})",
            "",
            "Next:",
            f'  pixart-ds sample {source} --prompt "{self._prompts()[0]}" --out picture.png',
            f"  tensorboard --logdir {self.run_layout.root}",
        ]
        print("\n".join(lines), flush=True)


class _Supervised:
    """A stage's supervisor as a child process; a Ctrl-C of the terminal reaches both."""

    def __init__(self, command: Sequence[str], name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(command)

    def check(self, expected: int = 0) -> None:
        try:
            code = self.process.wait()
        except KeyboardInterrupt:
            self.process.wait()  # it saves and leaves
            raise
        if code != expected:
            error = PixArtError(
                f"{self.name} ended with exit code {code} instead of {expected}; its messages stand above"
            )
            error.exit_code = code if code in (2, 3, 4, 5, EXIT_STOPPED) else error.exit_code
            raise error
