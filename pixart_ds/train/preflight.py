"""What can be known before a process is started: the sets fit the recipe, the stage before has handed over."""

from __future__ import annotations

from pathlib import Path

from pixart_ds import files
from pixart_ds.config import deepspeed
from pixart_ds.config.freeze import read_stage
from pixart_ds.config.schema import StageConfig
from pixart_ds.errors import CheckpointError, ConfigError
from pixart_ds.layout import HandoverLayout, RunLayout
from pixart_ds.plan.fit import GIVE_NUMBERS
from pixart_ds.train.sets import open_sets, order_of


def preflight(run: RunLayout, stage: StageConfig, device: str, *, origin: bool = True, data: bool = True) -> None:
    """Checks a stage's data and origin without torch and without a process.

    Args:
        run, stage: The stage as the attempt is to run it.
        device: What the ranks will compute on: cpu or cuda.
        origin: Whether the stage before must have handed over by now.
        data: Whether the sets must be there by now.

    Raises:
        DataError, ConfigError: The sets are missing, damaged, or do not fit the recipe; or numbers are left to choose on a CPU.
        CheckpointError: The stage before has handed nothing over.
    """
    refuse_auto_without_gpu(stage, device)
    _check_deepspeed(run, stage)
    if origin:
        check_origin(run, stage)
    if data:
        order_of(stage, open_sets(stage))


def refuse_auto_without_gpu(stage: StageConfig, device: str) -> None:
    """Raises ConfigError where `execution` leaves a number to auto and there is no GPU to choose it for."""
    left = [key for key in ("micro_batch_size", "checkpointed_blocks") if getattr(stage.execution, key) == "auto"]
    if left and device != "cuda":
        raise ConfigError(
            f"auto is chosen for a GPU's memory, and {stage.name} is to run on {device}",
            where=", ".join(f"execution.{key}" for key in left),
            remedy=GIVE_NUMBERS,
        )


def _check_deepspeed(run: RunLayout, stage: StageConfig) -> None:
    """Holds the run's frozen DeepSpeed file, which a person may have edited, against the recipe.

    Raises:
        ConfigError: They disagree; or the attempt names another file, which would be passed over in silence.
    """
    path = run.stage(stage.name).deepspeed
    frozen, given = read_stage(run, stage.name).execution.deepspeed, stage.execution.deepspeed
    if given != frozen:
        raise ConfigError(
            f"{stage.name} was made with the DeepSpeed file {frozen}, which is frozen into the run; {given} would change nothing",
            where=path,
            remedy="leave execution.deepspeed away and edit that file, or start a new run",
        )
    deepspeed.merge(stage, files.read_json(path, error=ConfigError), where=path)


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
