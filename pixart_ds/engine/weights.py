"""A net's weights from wherever they lie: a run, a checkpoint, a handover, an exported folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pixart_ds import files
from pixart_ds.config.freeze import open_run, read_stage
from pixart_ds.config.load import read_frozen, validate
from pixart_ds.config.schema import ModelConfig, StageConfig
from pixart_ds.engine import line
from pixart_ds.engine.checkpoint import Reader
from pixart_ds.engine.foreign import read_foreign
from pixart_ds.engine.handover import read_handover
from pixart_ds.engine.storage import storage_of
from pixart_ds.errors import CheckpointError, ConfigError
from pixart_ds.layout import MARKER_NAME, HandoverLayout, RunLayout, StageLayout

State = dict[str, torch.Tensor]
WeightsKind = Literal["raw", "ema"]
_SHARD_OF = {"raw": "master", "ema": "ema"}


@dataclass(frozen=True)
class Weights:
    """A net's weights and what is known of them.

    Attributes:
        model: The net.
        state: fp32, official names; the null caption may be missing.
        kind: raw or ema.
        lineage: Where they come from.
        stage: The recipe that trained them, if it lies with them.
        pipeline: The diffusers folder they are from, with its own encoders, or None.
        where: The folder that holds them.
        clean_captions: Whether the captions they were trained on had been cleaned, where the folder says so.
    """

    model: ModelConfig
    state: State
    kind: WeightsKind
    lineage: dict[str, Any]
    stage: StageConfig | None
    pipeline: Path | None
    where: Path
    clean_captions: bool | None = None

    def encoder(self, kind: Literal["vae", "text_encoder"], given: str | None, of_set: str | None) -> str:
        """Folder or hub name of the encoder that belongs to the weights.

        Args:
            kind: Which.
            given: What the user named; it comes first, then the pipeline's own.
            of_set: The one that prepared the set they were trained on.

        Raises:
            ConfigError: Nothing says which.
        """
        own = self.pipeline / kind if self.pipeline else None
        if found := given or (str(own) if own and own.is_dir() else of_set):
            return found
        raise ConfigError(
            f"nothing says which {kind.replace('_', ' ')} belongs to the weights",
            where=self.where,
            remedy=f"add --{kind.replace('_', '-')} FOLDER",
        )


def open_weights(source: Path, *, stage: str | None = None, kind: WeightsKind = "ema") -> Weights:
    """Weights from a run's folder (its last finished stage, or `stage`), a checkpoint's, a handover's, or an exported one.

    Raises:
        ConfigError: The folder is none of these.
        CheckpointError: The weights are missing or damaged.
    """
    source = Path(source)
    if RunLayout(source).manifest.exists() and RunLayout(source).chain.exists():
        return _of_run(open_run(source), stage, kind)
    if stage is not None:
        raise ConfigError(f"a stage ({stage}) can be chosen in a run only", where=source, remedy="leave --stage away")
    if (source / MARKER_NAME).exists():
        return _of_checkpoint(Reader.at(source), kind, StageLayout(source.parent.parent))
    if HandoverLayout(source).lineage.exists():
        return _of_handover(source, kind)
    if (source / "model_index.json").exists() or (source / "config.json").exists():
        return _of_pipeline(source, kind)
    raise ConfigError(
        "there are no weights here: this is no run, no committed checkpoint, no handover and no diffusers folder",
        where=source,
        remedy=f"make a handover of it: pixart-ds import {source} --out FOLDER" if source.is_file() else None,
    )


def licences_of(lineage: Any) -> list[str]:
    """The licences in a lineage, newest first: those of imported weights bind what was trained from them."""
    if not isinstance(lineage, dict):
        return []
    own = [str(lineage["licence"])] if "licence" in lineage else []
    return list(dict.fromkeys(own + [text for value in lineage.values() for text in licences_of(value)]))


def _of_run(run: RunLayout, name: str | None, kind: WeightsKind) -> Weights:
    """The handover of a stage, or, while it trains, its newest checkpoint."""
    names = [name] if name else list(reversed(files.read_json(run.manifest, error=CheckpointError)["stages"]))
    for each in names:
        read_stage(run, each)
        layout = run.stage(each)
        if HandoverLayout(layout.handover).lineage.exists():
            return _of_handover(layout.handover, kind)
        if (newest := line.newest(layout)) is not None:
            return _of_checkpoint(Reader(storage_of(layout).sub(str(newest)), str(newest)), kind, layout)
    raise CheckpointError(
        f"{name or 'no stage of the run'} has {'no' if name else 'a'} handover or committed checkpoint",
        where=run.root,
        remedy="train first, or name another stage",
    )


def _of_checkpoint(reader: Reader, kind: WeightsKind, layout: StageLayout) -> Weights:
    stage, where = _stage_beside(layout), Path(reader.storage.where)
    model = validate(ModelConfig, reader.manifest["model"], where)
    about = {"checkpoint": reader.name, "images_seen": reader.images_seen, "lineage": reader.state.get("lineage")}
    return Weights(model, reader.state_dict(_SHARD_OF[kind]), kind, about, stage, None, where)


def _of_handover(folder: Path, kind: WeightsKind) -> Weights:
    found = read_handover(folder, kind)
    stage = _stage_beside(StageLayout(folder.parent))
    return Weights(validate(ModelConfig, found.model, folder), found.state, kind, found.lineage, stage, None, folder)


def _of_pipeline(folder: Path, kind: WeightsKind) -> Weights:
    foreign = read_foreign(folder)
    stored = foreign.note.get("weights", kind)
    if stored != kind:
        raise CheckpointError(
            f"the folder holds {stored} weights, not {kind}", where=folder, remedy=f"use --weights {stored}"
        )
    note = foreign.note
    return Weights(
        foreign.model,
        foreign.states["raw"],
        kind,
        note.get("lineage", {}),
        None,
        folder,
        folder,
        note.get("clean_captions"),
    )


def _stage_beside(layout: StageLayout) -> StageConfig | None:
    return read_frozen(StageConfig, layout.config) if layout.config.exists() else None
