"""The handover: a stage's weights and their EMA as two plain safetensors files, and where they come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from pixart_ds import files
from pixart_ds.engine.agree import on_first
from pixart_ds.engine.checkpoint import require_room
from pixart_ds.engine.deepspeed import Engine
from pixart_ds.engine.tensors import FileRecord, TensorSpec, problem, write_tensors
from pixart_ds.errors import CheckpointError
from pixart_ds.layout import HandoverLayout

FORMAT = 1
_SHARD_OF: dict[str, str] = {"raw": "master", "ema": "ema"}


def write_handover(engine: Engine, folder: Path, lineage: dict[str, Any]) -> None:
    """Writes a stage's fp32 weights and EMA, each with buffers; rank 0 gets them parameter by parameter. A collective.

    The lineage is written last; one that is there already is removed first, so that it never speaks of other files.

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

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        names.lineage.unlink(missing_ok=True)
        files.sync_folder(folder)
        require_room(folder, 2 * sum(spec.num_bytes for spec in specs), "the handover")

    on_first(engine.world, prepare)
    records = {}
    for weights, shard in _SHARD_OF.items():
        record = _write_streamed(engine, _path(names, weights), shard, specs, fixed)
        records[weights] = {"file": record.name, **record.to_json()}
    on_first(
        engine.world, lambda: files.write_json(names.lineage, {"format": FORMAT, "files": records, "lineage": lineage})
    )


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
            written = write_tensors(path, specs, tensors())
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


def read_handover(folder: Path, weights: Literal["raw", "ema"]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The full state and the lineage of a handover; any process may call it.

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
    if (wrong := problem(folder, FileRecord.from_json(entry["file"], entry), whole=True)) is not None:
        raise CheckpointError(f"the handover cannot be trusted: {wrong}", where=folder, remedy=remedy)
    return load_file(_path(names, weights)), value["lineage"]


def _path(names: HandoverLayout, weights: str) -> Path:
    return names.raw if weights == "raw" else names.ema
