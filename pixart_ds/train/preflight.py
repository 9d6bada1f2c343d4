"""What can be known before a process is started: the sets fit the recipe, the stage before has handed over."""

from __future__ import annotations

from pathlib import Path

from pixart_ds.config.freeze import read_stage
from pixart_ds.config.schema import StageConfig
from pixart_ds.errors import CheckpointError
from pixart_ds.layout import HandoverLayout, RunLayout
from pixart_ds.train.sets import open_sets, order_of


def preflight(run: RunLayout, stage: StageConfig) -> None:
    """Checks a stage's data and origin without torch and without a process.

    Raises:
        DataError, ConfigError: The sets are missing, damaged, or do not fit the recipe.
        CheckpointError: The stage before has handed nothing over.
    """
    check_origin(run, stage)
    order_of(stage, open_sets(stage))


def check_origin(run: RunLayout, stage: StageConfig) -> None:
    """Raises CheckpointError unless what this stage starts from is there."""
    if stage.init.source == "scratch":
        return
    folder = origin_of(run, stage)
    if HandoverLayout(folder).lineage.exists():
        return
    if stage.init.path is not None:
        raise CheckpointError(
            f"{stage.name} starts from the handover {stage.init.path}, which is not there",
            where=folder.absolute(),
            remedy="make it: pixart-ds import WEIGHTS --out FOLDER; or set init.path in a new run",
        )
    raise CheckpointError(
        f"{stage.name} starts from {stage.init.stage}, which has handed nothing over yet",
        where=folder,
        remedy=f"finish it first: pixart-ds train {run.root} {stage.init.stage}",
    )


def origin_of(run: RunLayout, stage: StageConfig) -> Path:
    """The folder of the handover that a stage starts from."""
    if stage.init.path is not None:
        return Path(stage.init.path)
    assert stage.init.stage is not None
    read_stage(run, stage.init.stage)
    return run.stage(stage.init.stage).handover
