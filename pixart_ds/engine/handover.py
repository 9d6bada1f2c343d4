"""The handover: weights and their EMA as two plain safetensors files, the net they belong to, and where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from pixart_ds import files
from pixart_ds.config.schema import ModelConfig
from pixart_ds.engine.agree import on_first
from pixart_ds.engine.checkpoint import require_room
from pixart_ds.engine.deepspeed import Engine
from pixart_ds.engine.storage import FolderStorage
from pixart_ds.engine.tensors import FileRecord, TensorSpec, problem, write_tensors
from pixart_ds.errors import CheckpointError, ConfigError
from pixart_ds.layout import HandoverLayout

FORMAT = 1
_SHARD_OF: dict[str, str] = {"raw": "master", "ema": "ema"}


def write_handover(engine: Engine, folder: Path, lineage: dict[str, Any]) -> None:
    """Writes a stage's fp32 weights and EMA, each with buffers; rank 0 gets them parameter by parameter. A collective.

    The lineage is written last: a handover without it is not there.

    Args:
        engine: After its last step.
        folder: The stage's handover folder.
        lineage: Where the weights come from, as JSON.

    Raises:
        MachineError: The disk is too small or refuses; on all ranks together.
    """
    names = HandoverLayout(folder)
    fixed = engine.fixed()
    specs = [TensorSpec(place.name, torch.float32, place.shape) for place in engine.layout.places]
    specs += [TensorSpec.of(name, tensor) for name, tensor in fixed.items()]

    on_first(engine.world, lambda: _prepare(names, 2 * sum(spec.num_bytes for spec in specs)))
    records = {}
    for weights, shard in _SHARD_OF.items():
        record = _write_streamed(engine, _path(names, weights), shard, specs, fixed)
        records[weights] = {"file": record.name, **record.to_json()}
    on_first(engine.world, lambda: _finish(names, records, lineage, engine.model_config))


def save_handover(
    folder: Path, states: Mapping[str, Mapping[str, torch.Tensor]], lineage: dict[str, Any], model: ModelConfig
) -> None:
    """Writes weights that this process holds as a handover; where only one kind is given, it stands for both.

    Raises:
        MachineError: The disk is too small.
        ConfigError: Something else lies in the folder.
    """
    names = HandoverLayout(folder)
    unfinished = {names.raw.name, names.ema.name}  # of an import that was cut off
    if folder.exists() and any(path.name not in unfinished and path.suffix != ".tmp" for path in folder.iterdir()):
        raise ConfigError("the folder is not empty", where=folder.resolve(), remedy="name a new folder")
    size = sum(4 * tensor.numel() for state in states.values() for tensor in state.values())
    _prepare(names, size)
    records = {}
    for kind, state in states.items():
        specs = [TensorSpec(name, torch.float32, tuple(tensor.shape)) for name, tensor in state.items()]
        path, tensors = _path(names, kind), state.values()
        written = write_tensors(
            FolderStorage(folder),
            path.name,
            specs,
            lambda tensors=tensors: (each.float() for each in tensors),  # type: ignore[misc]
        )
        records[kind] = {"file": written.name, **written.to_json()}
    only = next(iter(records.values()))
    _finish(names, {kind: records.get(kind, only) for kind in _SHARD_OF}, lineage, model)


def _prepare(names: HandoverLayout, num_bytes: int) -> None:
    """The folder, without a lineage: one that is there is removed first, so that it never speaks of other files."""
    names.root.mkdir(parents=True, exist_ok=True)
    names.lineage.unlink(missing_ok=True)
    files.sync_folder(names.root)
    require_room(FolderStorage(names.root), num_bytes, "the handover")


def _finish(names: HandoverLayout, records: dict[str, Any], lineage: dict[str, Any], model: ModelConfig) -> None:
    about = {"format": FORMAT, "model": model.model_dump(mode="json"), "files": records, "lineage": lineage}
    files.write_json(names.lineage, about)


def _write_streamed(
    engine: Engine, path: Path, shard: str, specs: list[TensorSpec], fixed: dict[str, torch.Tensor]
) -> FileRecord:
    parameters = engine.full(shard, to=0)

    def tensors() -> Iterator[torch.Tensor]:
        for _, tensor in parameters:
            yield tensor
        yield from fixed.values()

    failure: Exception | None = None
    written: FileRecord | None = None
    if engine.world.rank == 0:
        try:
            written = write_tensors(FolderStorage(path.parent), path.name, specs, tensors)
        except Exception as error:
            failure = error
    for _ in parameters:  # the other ranks' part; and on rank 0 the rest after a failure, for they are still sending
        pass

    def told() -> list[Any]:
        if failure is not None:
            raise failure
        assert written is not None
        return list(vars(written).values())

    return FileRecord(*on_first(engine.world, told))


@dataclass(frozen=True)
class Handover:
    """What a handover holds of one kind of weights.

    Attributes:
        state: fp32, by name.
        lineage: Where they come from.
        model: The net, as `model:` of a recipe.
    """

    state: dict[str, torch.Tensor]
    lineage: dict[str, Any]
    model: dict[str, Any]


def read_handover(folder: Path, weights: Literal["raw", "ema"]) -> Handover:
    """Reads a handover, checksum first; any process may call it.

    Raises:
        CheckpointError: There is none, or its file is missing or damaged.
    """
    names = HandoverLayout(folder)
    remedy = "finish the stage that hands over, or repeat its last steps: remove its DONE.json and train it again"
    value = files.read_json(names.lineage, error=CheckpointError, remedy=remedy)
    if value.get("format") != FORMAT:
        raise CheckpointError(
            f"the handover has format {value.get('format')!r}, this version reads {FORMAT}", where=names.lineage
        )
    entry = value["files"][weights]
    if (wrong := problem(FolderStorage(folder), FileRecord.from_json(entry["file"], entry), whole=True)) is not None:
        raise CheckpointError(f"the handover cannot be trusted: {wrong}", where=folder, remedy=remedy)
    return Handover(load_file(folder / entry["file"]), value["lineage"], value["model"])


def _path(names: HandoverLayout, weights: str) -> Path:
    return names.raw if weights == "raw" else names.ema
