"""The verb `export`: which stage, which weights, which encoders."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from pixart_ds.config.freeze import open_run, read_stage
from pixart_ds.data.shards import PreparedSet
from pixart_ds.engine.handover import read_handover
from pixart_ds.layout import last_done


def export_run(options: Namespace) -> dict[str, Any]:
    """Writes a stage's weights as a diffusers pipeline; returns what was written where."""
    from pixart_ds.export.diffusers import export_pipeline

    run = open_run(options.run)
    name = options.stage or last_done(run)
    stage = read_stage(run, name)
    out = options.out or run.export
    about = PreparedSet.open(Path(stage.data.sets[0].path)).description
    state, lineage = read_handover(run.stage(name).handover, options.weights)
    if not options.dry_run:
        export_pipeline(
            out,
            stage.model,
            state,
            vae=options.vae or about.vae,
            text_encoder=options.text_encoder or about.text_encoder,
            lineage={"run": str(run.root), "stage": name, "weights": options.weights, "lineage": lineage},
        )
    return {"stage": name, "weights": options.weights, "out": str(out)}
