"""A run's recipes, resolved and frozen into its folder; a later start with other ones is refused with a diff."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Sequence
from pathlib import Path

from pixart_ds import __version__, files
from pixart_ds.config import deepspeed
from pixart_ds.config.budget import write_first
from pixart_ds.config.load import (
    apply_overrides,
    differences,
    dump_yaml,
    fingerprint,
    identity,
    read_frozen,
    validate,
)
from pixart_ds.config.schema import ChainConfig, ExecutionConfig, StageConfig
from pixart_ds.errors import ConfigError
from pixart_ds.layout import RunLayout


def create_run(root: Path, chain: ChainConfig, recipe: str) -> RunLayout:
    """Freezes a chain into a new run folder, or checks that the folder holds the same chain.

    Args:
        root: The run's folder; it may exist if it is empty or holds this chain.
        chain: The resolved chain.
        recipe: How the user named it; recorded.

    Raises:
        ConfigError: The folder holds something else; the message lists every key that differs.
    """
    run = RunLayout(root)
    if run.manifest.exists():
        check_run(run, chain)
        return run
    if root.is_dir() and any(p for p in root.iterdir() if not p.name.endswith(".tmp") and not _ours(run, chain, p)):
        raise ConfigError(
            "the folder is neither empty nor a run",
            where=root,
            remedy="name a new folder, or one that `pixart-ds create` made",
        )
    root.mkdir(parents=True, exist_ok=True)
    for stage in chain.stages:
        layout = run.stage(stage.name)
        layout.root.mkdir(exist_ok=True)
        files.write_json(layout.deepspeed, deepspeed.merge(stage, deepspeed.load_deepspeed(stage.execution.deepspeed)))
        files.write_text(layout.config, dump_yaml(stage))
        if stage.checkpoint.path is not None:
            own = f"{root.resolve().name}-{secrets.token_hex(4)}"  # another run may have the same name
            where = stage.checkpoint.path.rstrip("/")
            where = where if "://" in where else str(Path(where).absolute())
            files.write_json(layout.checkpoints_elsewhere, {"path": f"{where}/{own}/{stage.name}"})
    files.write_text(run.chain, dump_yaml(chain))
    write_first(run, chain.budget)
    files.write_json(  # written last: a folder without it was not finished and is written again
        run.manifest,
        {
            "format": 1,
            "run": root.name,
            "chain": chain.name,
            "recipe": recipe,
            "stages": [stage.name for stage in chain.stages],
            "fingerprints": {stage.name: fingerprint(identity(stage)) for stage in chain.stages},
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "package": __version__,
        },
    )
    return run


def _ours(run: RunLayout, chain: ChainConfig, path: Path) -> bool:
    return path in (run.chain, run.budget) or path.name in {stage.name for stage in chain.stages}


def open_run(root: Path) -> RunLayout:
    """The layout of an existing run.

    Raises:
        ConfigError: There is no run in the folder.
    """
    run = RunLayout(root)
    if not run.manifest.exists():
        raise ConfigError(
            "there is no run in this folder (no manifest.json)",
            where=root,
            remedy="make one: pixart-ds create RUN --chain demo/chain",
        )
    return run


def check_run(run: RunLayout, chain: ChainConfig) -> None:
    """Refuses a chain that would train something else than what the run holds; `execution`, `previews` and the budget may differ.

    Raises:
        ConfigError: Every stage and key that differs, old and new value.
    """
    frozen = read_frozen(ChainConfig, run.chain)
    before = {stage.name: identity(stage) for stage in frozen.stages}
    after = {stage.name: identity(stage) for stage in chain.stages}
    lines = differences(before, after)
    if lines:
        raise ConfigError(
            "the run was made from another recipe:\n" + "\n".join(f"  - {line}" for line in lines),
            where=run.root,
            remedy="go on with the run's own recipe (leave --chain and --set away), or start a new run",
        )


def read_stage(run: RunLayout, name: str) -> StageConfig:
    """The frozen config of a stage.

    Raises:
        ConfigError: The run has no such stage; the message lists those it has.
    """
    layout = run.stage(name)
    if not layout.config.exists():
        known = files.read_json(run.manifest, error=ConfigError)["stages"]
        raise ConfigError(f"the run has no stage {name!r}", where=run.root, remedy=f"choose one of: {', '.join(known)}")
    return read_frozen(StageConfig, layout.config)


def with_execution(stage: StageConfig, execution: ExecutionConfig) -> StageConfig:
    """The stage as one attempt runs it."""
    return stage.model_copy(update={"execution": execution})


def override_execution(stage: StageConfig, overrides: Sequence[str]) -> StageConfig:
    """The stage as an attempt runs it, with overrides of keys that may differ between attempts.

    Raises:
        ConfigError: An override changes what is trained; every such key is listed.
    """
    changed = validate(
        StageConfig, apply_overrides(stage.model_dump(mode="json", exclude_none=True), overrides), "--set"
    )
    lines = differences(identity(stage), identity(changed))
    if lines:
        raise ConfigError(
            "these keys belong to the run and cannot change between attempts:\n"
            + "\n".join(f"  - {line}" for line in lines),
            where="--set",
            remedy="override only keys of `execution`, `checkpoint` and `previews`; "
            "or change it on record with `pixart-ds change`; or start a new run",
        )
    return changed
