"""Checkpoints: a safetensors file for each rank, a manifest, a marker; saved together, resumed at any world."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pixart_ds import __version__, files
from pixart_ds.engine import line as lines
from pixart_ds.engine.agree import on_first, together
from pixart_ds.engine.deepspeed import SHARD_KEYS, Engine
from pixart_ds.engine.shards import FlatLayout, Place
from pixart_ds.engine.tensors import CHECKSUM, FileRecord, TensorSpec, problem, record, write_tensors
from pixart_ds.engine.world import World
from pixart_ds.errors import CheckpointError, MachineError
from pixart_ds.layout import CheckpointLayout, CheckpointName, StageLayout

FORMAT = 1
_FIXED = "fixed."
_ROOM_BYTES = 1 << 20
"""For the manifest, the marker and the file system's own books."""


class Reader:
    """A committed checkpoint, from its files alone: no process group, no DeepSpeed.

    Args:
        folder: The checkpoint's folder.

    Attributes:
        manifest: Its manifest.
        layout: Where each parameter lies in the flat shards.

    Raises:
        CheckpointError: It is not committed, of another format, or a file is missing or of the wrong size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        names = CheckpointLayout(self.folder)
        if not names.marker.exists():
            what = "is not committed: its save was not finished" if self.folder.is_dir() else "is not there"
            raise CheckpointError(
                f"the checkpoint {self.folder.name} {what}",
                where=self.folder,
                remedy="use another one, with a file COMMITTED in it",
            )
        marker = files.read_json(names.marker, error=CheckpointError)
        if not isinstance(marker, dict) or marker.get("format") != FORMAT:
            found = marker.get("format") if isinstance(marker, dict) else marker
            raise CheckpointError(
                f"the checkpoint has format {found!r}, this version reads {FORMAT}",
                where=names.marker,
                remedy="use the version that wrote it",
            )
        self.milestone: bool = marker["milestone"]
        self.files = [FileRecord.from_json(name, values) for name, values in marker["files"].items()]
        self._refuse([problem(self.folder, wanted, whole=wanted.name == names.manifest.name) for wanted in self.files])
        self.manifest: dict[str, Any] = files.read_json(names.manifest, error=CheckpointError)
        places = tuple(
            Place(entry["name"], entry["offset"], tuple(entry["shape"])) for entry in self.manifest["parameters"]
        )
        self.layout = FlatLayout(places, self.manifest["partition"], self.manifest["world_size"])
        self._refuse(self.layout.problems())
        self._places = {place.name: place for place in places}
        self._open: dict[int, Any] = {}
        self._verified = False
        self.bytes_read = 0

    def _refuse(self, problems: list[Any]) -> None:
        if found := [text for text in problems if text is not None]:
            raise CheckpointError(
                f"the checkpoint {self.folder.name} cannot be trusted:\n" + "\n".join(f"  - {text}" for text in found),
                where=self.folder,
                remedy="put the files back; or move the folder away, and the run goes on from the checkpoint before it",
            )

    @property
    def images_seen(self) -> int:
        return int(self.manifest["images_seen"])

    @property
    def state(self) -> dict[str, Any]:
        """What the caller of `Shelf.save` gave."""
        value: dict[str, Any] = self.manifest["state"]
        return value

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters and of what is in no shard, by name."""
        fixed = {entry["name"]: tuple(entry["shape"]) for entry in self.manifest["fixed"]}
        return {place.name: place.shape for place in self.layout.places} | fixed

    def verify(self, part: int = 0, parts: int = 1) -> Reader:
        """Reads the files and compares their checksums: all of them, or every `parts`-th from `part`.

        Raises:
            CheckpointError: Every damaged file.
        """
        self._refuse([problem(self.folder, wanted, whole=True) for wanted in self.files[part::parts]])
        self._verified = parts == 1
        return self

    def fetch(self, name: str, key: str, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Elements [start, end) of a flattened parameter: fp32, on the CPU. Reads nothing else.

        Args:
            name: The parameter.
            key: `master`, `exp_avg`, `exp_avg_sq` or `ema`.
            start: First element.
            end: Behind the last one; None for the parameter's end.
        """
        place = self._places[name]
        end = place.count if end is None else end
        parts = []
        for rank, a, b in self.layout.pieces(place.offset + start, place.offset + end):
            base = rank * self.layout.partition
            parts.append(self._file(rank).get_slice(key)[a - base : b - base])
        self.bytes_read += 4 * (end - start)
        return torch.cat(parts) if parts else torch.empty(0)

    def fixed(self) -> dict[str, torch.Tensor]:
        """Buffers and frozen parameters."""
        return {entry["name"]: self._file(0).get_tensor(_FIXED + entry["name"]) for entry in self.manifest["fixed"]}

    def state_dict(self, key: str = "ema") -> dict[str, torch.Tensor]:
        """The net's whole state in fp32 with the masters or their EMA as weights; checksums are compared first."""
        if not self._verified:
            self.verify()
        return {
            place.name: self.fetch(place.name, key).view(place.shape) for place in self.layout.places
        } | self.fixed()

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            path = CheckpointLayout(self.folder).rank_file(rank, self.layout.world_size)
            self._open[rank] = safe_open(path, framework="pt", device="cpu")
        return self._open[rank]


class Shelf:
    """A stage's checkpoints, for one launch. All ranks call its methods together.

    Args:
        layout: The stage's folder.
        attempt: Number of this attempt.
        launch: Number of this launch within it.
        engine: Whose state is saved and restored.
        world: The ranks.
        keep: Recovery checkpoints kept besides milestones.
    """

    def __init__(
        self, layout: StageLayout, attempt: int, launch: int, engine: Engine, world: World, *, keep: int
    ) -> None:
        if not 0 <= launch <= lines.MAX_LAUNCHES:
            raise CheckpointError(
                f"launch {launch} does not fit into a checkpoint's name",
                where=layout.root,
                remedy="begin a new attempt: start the stage again",
            )
        self.layout = layout
        self.engine = engine
        self.world = world
        self.keep = keep
        self._number = (attempt, launch)
        self._origin: CheckpointName | None = None

    @staticmethod
    def newest_of(layout: StageLayout, attempt: int, launch: int, world: World | None = None) -> CheckpointName | None:
        """The checkpoint that a launch goes on from, or None. With `world`, rank 0 looks for all."""
        if world is None:
            return lines.newest(layout, (attempt, launch))
        name = on_first(world, lambda: _text(lines.newest(layout, (attempt, launch))))
        return None if name is None else CheckpointName.parse(name)

    def line(self) -> list[CheckpointName]:
        """The committed checkpoints of the line that ends in this launch, oldest first. No collective."""
        return lines.line(self.layout, self._number)

    def newest(self) -> CheckpointName | None:
        """The last of the line, or None. Rank 0 looks for all."""
        return Shelf.newest_of(self.layout, *self._number, self.world)

    def resume(self, name: CheckpointName | None = None) -> dict[str, Any] | None:
        """Restores the engine, bit by bit, at whatever world; each rank reads its own ranges only.

        Args:
            name: Which one; by default the newest of the line.

        Returns:
            The state that was given to `save`; None if there is no checkpoint.

        Raises:
            CheckpointError: It is damaged, or of another net; on all ranks together.
        """
        name = self.newest() if name is None else name
        if name is None:
            return None
        readers: list[Reader] = []

        def read() -> None:
            reader = Reader(self.layout.checkpoints / str(name)).verify(self.world.rank, self.world.size)
            self.engine.check_names(reader.shapes, f"the weights of {name}")
            readers.append(reader)

        together(self.world, read)  # every file is whole before any shard is touched
        reader = readers[0]
        together(self.world, lambda: self.engine.put(reader.fetch, SHARD_KEYS, reader.fixed()))
        self.engine.publish()
        self.engine.set_clock(reader.manifest["clock"])
        self._origin = name
        return reader.state

    def write_start(self, state: dict[str, Any]) -> None:
        """Says durably where this launch starts from; call it before the first step, after `resume` or `initialise`.

        Args:
            state: The caller's clock and skips, as JSON.
        """
        on_first(self.world, lambda: lines.write_start(self.layout, lines.Start(self._number, self._origin, state)))

    def save(self, images_seen: int, state: dict[str, Any], milestone: bool = False) -> CheckpointName:
        """Writes and commits a checkpoint, then deletes what is no longer needed. It counts when this returns.

        Every rank writes its file, reads it back and compares; rank 0 sees all files, writes the manifest, then
        the marker.

        Args:
            images_seen: The clock.
            state: The caller's state, as JSON; `resume` gives it back.
            milestone: Never delete it.

        Raises:
            MachineError: The disk is too small or refuses; on all ranks together.
            CheckpointError: A later attempt has taken the run over, or this checkpoint is there already.
        """
        name = CheckpointName(images_seen, *self._number)
        folder = self.layout.checkpoints / str(name)
        names = CheckpointLayout(folder)
        on_first(self.world, lambda: self._make_room(folder))
        records = together(self.world, lambda: list(vars(self._write_own(names)).values()))
        ranks = [FileRecord(*values) for values in records]
        on_first(self.world, lambda: self._commit(names, ranks, images_seen, state, milestone))
        on_first(
            self.world, lambda: [str(old) for old in lines.delete_expendable(self.layout, self._number, self.keep)]
        )
        return name

    def _make_room(self, folder: Path) -> None:
        """Refuses before anything is written, where it could not end well."""
        if not lines.is_highest(self.layout, self._number):
            raise CheckpointError(
                "a later attempt or launch has taken this stage over; nothing that this one saves would count",
                where=self.layout.attempts,
                remedy="let the later one go on",
            )
        if CheckpointLayout(folder).marker.exists():
            raise CheckpointError(f"the checkpoint {folder.name} is there already", where=folder)
        folder.mkdir(parents=True, exist_ok=True)
        files.sync_folder(folder.parent)
        layout = self.engine.layout
        fixed = sum(spec.num_bytes for spec in _fixed_specs(self.engine))
        needed = 4 * len(SHARD_KEYS) * layout.count + fixed + _ROOM_BYTES
        require_room(folder, needed, f"the checkpoint {folder.name}")

    def _write_own(self, names: CheckpointLayout) -> FileRecord:
        """This rank's file: its flat ranges without padding; on rank 0 also what is in no shard."""
        path = names.rank_file(self.world.rank, self.world.size)
        specs, tensors = _own_tensors(self.engine)
        written = write_tensors(path, specs, tensors)
        if (found := record(path)) != written:
            raise MachineError(
                f"{path.name} was written, but reads back as {found.num_bytes} bytes with {CHECKSUM} {found.checksum} "
                f"instead of {written.num_bytes} bytes with {written.checksum}",
                where=path,
                remedy="have the file system or the disk checked",
            )
        return written

    def _commit(
        self, names: CheckpointLayout, ranks: list[FileRecord], images_seen: int, state: dict[str, Any], milestone: bool
    ) -> None:
        if missing := [text for wanted in ranks if (text := problem(names.root, wanted, whole=False)) is not None]:
            raise MachineError(
                "files that other ranks have written are not seen by rank 0:\n"
                + "\n".join(f"  - {text}" for text in missing),
                where=names.root,
                remedy="put the run on a file system that all nodes share",
            )
        engine = self.engine
        manifest = {
            "format": FORMAT,
            "images_seen": images_seen,
            "milestone": milestone,
            "written_by": {
                "attempt": self._number[0],
                "launch": self._number[1],
                "package": __version__,
                "torch": torch.__version__,
            },
            "written_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "started_from": _text(self._origin),
            "config": engine.fingerprints,
            "model": engine.model_config.model_dump(mode="json"),
            "world_size": self.world.size,
            "partition": engine.layout.partition,
            "clock": engine.clock(),
            "state": state,
            "shards": list(SHARD_KEYS),
            "parameters": [
                {"name": place.name, "offset": place.offset, "shape": list(place.shape), "dtype": "F32"}
                for place in engine.layout.places
            ],
            "fixed": [
                {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype_name}
                for spec in _fixed_specs(engine)
            ],
        }
        files.write_json(names.manifest, manifest)
        records = [record(names.manifest), *ranks]
        files.write_json(
            names.marker,
            {"format": FORMAT, "milestone": milestone, "files": {entry.name: entry.to_json() for entry in records}},
        )


def _own_tensors(engine: Engine) -> tuple[list[TensorSpec], Iterator[torch.Tensor]]:
    own = engine.layout.own(engine.world.rank)
    fixed = engine.fixed() if engine.world.rank == 0 else {}
    specs = [TensorSpec(key, torch.float32, (len(own),)) for key in SHARD_KEYS]
    specs += [TensorSpec.of(_FIXED + name, tensor) for name, tensor in fixed.items()]

    def tensors() -> Iterator[torch.Tensor]:
        for key in SHARD_KEYS:
            yield engine.shard(key)[: len(own)]
        yield from fixed.values()

    return specs, tensors()


def _fixed_specs(engine: Engine) -> list[TensorSpec]:
    return [TensorSpec.of(name, tensor) for name, tensor in engine.fixed().items()]


def require_room(folder: Path, needed: int, what: str) -> None:
    """Raises MachineError with both numbers unless the disk under `folder` has `needed` free bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"{what} needs {_size(needed)}, but only {_size(free)} are free",
            where=folder,
            remedy="free disk space, or put the run on a larger disk",
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _text(name: CheckpointName | None) -> str | None:
    return None if name is None else str(name)
