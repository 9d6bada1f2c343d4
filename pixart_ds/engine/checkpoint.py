"""The format of a checkpoint: a safetensors file for each rank, a manifest, a marker; written and read without a process group."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pixart_ds import files
from pixart_ds.engine.shards import SHARD_KEYS, FlatLayout, Place
from pixart_ds.engine.storage import Storage, file_is_damaged, read, storage_at
from pixart_ds.engine.tensors import (
    CHECKSUM,
    FileRecord,
    TensorSpec,
    problem,
    read_elements,
    read_header,
    record,
    write_tensors,
)
from pixart_ds.errors import CheckpointError, MachineError
from pixart_ds.layout import MANIFEST_NAME, MARKER_NAME, rank_file_name

FORMAT = 1
_FIXED = "fixed."


class Reader:
    """A committed checkpoint, from its files alone: no process group, no DeepSpeed.

    Args:
        storage: The checkpoint's folder.
        name: Its name.

    Attributes:
        manifest: Its manifest.
        layout: Where each parameter lies in the flat shards.
        bytes_read: Of shards, so far.

    Raises:
        CheckpointError: It is not committed, of another format, or a file is missing, of the wrong size or cannot be read.
        MachineError: The store is silent, which says nothing about the checkpoint.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        marker = self._read_marker()
        try:
            self.milestone = bool(marker["milestone"])
            self.files = [FileRecord.from_json(each, values) for each, values in marker["files"].items()]
            if MANIFEST_NAME not in marker["files"]:
                raise KeyError(MANIFEST_NAME)
        except (KeyError, TypeError, ValueError, AttributeError) as cause:
            raise CheckpointError(
                f"the checkpoint {name} cannot be trusted: its marker is damaged ({type(cause).__name__}: {cause})",
                where=f"{storage.where}/{MARKER_NAME}",
                remedy="put the file back, or go on from the checkpoint before it",
            ) from cause
        self._refuse([self._problem(wanted, whole=wanted.name == MANIFEST_NAME) for wanted in self.files])
        self.manifest: dict[str, Any] = self._json(MANIFEST_NAME)
        places = tuple(
            Place(entry["name"], entry["offset"], tuple(entry["shape"])) for entry in self.manifest["parameters"]
        )
        self.layout = FlatLayout(places, self.manifest["partition"], self.manifest["world_size"])
        self._refuse(self.layout.problems())
        self._places = {place.name: place for place in places}
        self._headers: dict[int, dict[str, tuple[TensorSpec, int]]] = {}
        self._verified = False
        self.bytes_read = 0

    @classmethod
    def at(cls, location: str | Path) -> Reader:
        """The checkpoint in a folder or at an s3:// address."""
        return cls(storage_at(location), str(location).rstrip("/").rsplit("/", 1)[-1])

    def _read_marker(self) -> dict[str, Any]:
        with self._reading(MARKER_NAME):
            committed = self.storage.size(MARKER_NAME) is not None
        if not committed:
            there = bool(self.storage.sizes())
            what = "is not committed: its save was not finished" if there else "is not there"
            raise CheckpointError(
                f"the checkpoint {self.name} {what}",
                where=self.storage.where,
                remedy="use another one, with a file COMMITTED in it",
            )
        marker = self._json(MARKER_NAME)
        if not isinstance(marker, dict) or marker.get("format") != FORMAT:
            found = marker.get("format") if isinstance(marker, dict) else marker
            raise CheckpointError(
                f"the checkpoint has format {found!r}, this version reads {FORMAT}",
                where=f"{self.storage.where}/{MARKER_NAME}",
                remedy="use the version that wrote it",
            )
        return marker

    def _json(self, name: str) -> Any:
        where = Path(self.storage.where) / name
        with self._reading(name):
            content = read(self.storage, name)
        return files.parse_json(content, where, error=CheckpointError)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """A file that the disk does not give is this checkpoint's damage: another one may be whole."""
        try:
            yield
        except FileNotFoundError:
            self._refuse([f"{name} is missing"])
        except MachineError as error:
            if not file_is_damaged(error):
                raise
            self._refuse([error.what])

    def _problem(self, wanted: FileRecord, *, whole: bool) -> str | None:
        try:
            return problem(self.storage, wanted, whole=whole)
        except FileNotFoundError:  # deleted a moment ago
            return f"{wanted.name} is missing"
        except MachineError as error:
            if not file_is_damaged(error):
                raise
            return error.what

    def _refuse(self, problems: Iterable[str | None]) -> None:
        if found := [text for text in problems if text is not None]:
            raise CheckpointError(
                f"the checkpoint {self.name} cannot be trusted:\n" + "\n".join(f"  - {text}" for text in found),
                where=self.storage.where,
                remedy="put the files back, or go on from the checkpoint before it",
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
        self._refuse([self._problem(wanted, whole=True) for wanted in self.files[part::parts]])
        self._verified = parts == 1
        return self

    def fill(self, key: str, wanted: Iterable[tuple[str, int, int]], out: torch.Tensor) -> None:
        """Fills `out` with elements of flattened parameters, one behind the other. Reads nothing else; neighbours in one read.

        Args:
            key: `master`, `exp_avg`, `exp_avg_sq` or `ema`.
            wanted: (parameter, start, end) of each part.
            out: (their elements,) fp32, contiguous, on the CPU.
        """
        filled = 0
        for rank, start, end in self._runs(wanted):
            specs, begin = self._header(rank)[key]
            at = begin + specs.dtype.itemsize * (start - rank * self.layout.partition)
            read_elements(
                self.storage,
                rank_file_name(rank, self.layout.world_size),
                at,
                out[filled : filled + end - start],
            )
            filled += end - start
        self.bytes_read += 4 * filled
        if filled != len(out):
            raise ValueError(f"{filled} elements were wanted for {len(out)}")

    def _runs(self, wanted: Iterable[tuple[str, int, int]]) -> Iterator[tuple[int, int, int]]:
        """(rank, a, b): ranges of the flat sequence in one rank's file each, neighbours joined."""
        last: tuple[int, int, int] | None = None
        for name, start, end in wanted:
            offset = self._places[name].offset
            for rank, a, b in self.layout.pieces(offset + start, offset + end):
                if last is not None and last[0] == rank and last[2] == a:
                    last = (rank, last[1], b)
                    continue
                if last is not None:
                    yield last
                last = (rank, a, b)
        if last is not None:
            yield last

    def fixed(self) -> dict[str, torch.Tensor]:
        """Buffers and frozen parameters."""
        found = {}
        for entry in self.manifest["fixed"]:
            spec, begin = self._header(0)[_FIXED + entry["name"]]
            tensor = torch.empty(spec.shape, dtype=spec.dtype)
            read_elements(self.storage, rank_file_name(0, self.layout.world_size), begin, tensor)
            found[entry["name"]] = tensor
        return found

    def state_dict(self, key: str = "ema") -> dict[str, torch.Tensor]:
        """The net's whole state in fp32 with the masters or their EMA as weights; checksums are compared first."""
        if not self._verified:
            self.verify()
        state = {}
        for place in self.layout.places:
            state[place.name] = torch.empty(place.shape)
            self.fill(key, [(place.name, 0, place.count)], state[place.name].view(-1))
        return state | self.fixed()

    def _header(self, rank: int) -> dict[str, tuple[TensorSpec, int]]:
        if rank not in self._headers:
            self._headers[rank] = read_header(self.storage, rank_file_name(rank, self.layout.world_size))
        return self._headers[rank]


def write_rank(
    storage: Storage,
    layout: FlatLayout,
    rank: int,
    shards: Mapping[str, torch.Tensor],
    fixed: Mapping[str, torch.Tensor],
) -> FileRecord:
    """Writes a rank's file, reads it back and compares.

    Args:
        storage: The checkpoint's folder.
        layout: Of the shards.
        rank: Whose.
        shards: Its flat ranges without padding, by key.
        fixed: What is in no shard; rank 0's file holds it.

    Raises:
        MachineError: The disk or the store refuses, or gives something else back.
        CheckpointError: Another writer has written it.
    """
    name = rank_file_name(rank, layout.world_size)
    own = len(layout.own(rank))
    specs = [TensorSpec(key, torch.float32, (own,)) for key in SHARD_KEYS]
    tensors = [shards[key] for key in SHARD_KEYS]
    if rank == 0:
        specs += [TensorSpec.of(_FIXED + each, tensor) for each, tensor in fixed.items()]
        tensors += fixed.values()
    with _one_writer(storage):
        written = write_tensors(storage, name, specs, lambda: iter(tensors), new=True)
    if (found := record(storage, name)) != written:
        raise MachineError(
            f"{name} was written, but reads back as {found.num_bytes} bytes with {CHECKSUM} {found.checksum} "
            f"instead of {written.num_bytes} bytes with {written.checksum}",
            where=storage.where,
            remedy="have the file system or the disk checked",
        )
    return written


def manifest_of(
    layout: FlatLayout, fixed: Mapping[str, torch.Tensor], about: Mapping[str, Any], *, milestone: bool
) -> dict[str, Any]:
    """What a manifest says of the tensors, and what `about` adds."""
    return {
        "format": FORMAT,
        "milestone": milestone,
        "written_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **about,
        "world_size": layout.world_size,
        "partition": layout.partition,
        "shards": list(SHARD_KEYS),
        "parameters": [
            {"name": place.name, "offset": place.offset, "shape": list(place.shape), "dtype": "F32"}
            for place in layout.places
        ],
        "fixed": [
            {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype_name}
            for spec in (TensorSpec.of(name, tensor) for name, tensor in fixed.items())
        ],
    }


def commit(storage: Storage, ranks: Iterable[FileRecord], manifest: Mapping[str, Any]) -> None:
    """Writes the manifest and then the marker: from now on the checkpoint counts.

    Args:
        storage: The checkpoint's folder.
        ranks: What each rank has written and verified.
        manifest: What `manifest_of` made.

    Raises:
        MachineError: A rank's file cannot be seen from here, or the disk or the store refuses.
        CheckpointError: Another writer has committed it.
    """
    ranks = list(ranks)
    if missing := [text for wanted in ranks if (text := problem(storage, wanted, whole=False)) is not None]:
        raise MachineError(
            "files that other ranks have written are not seen by rank 0:\n" + "\n".join(f"  - {t}" for t in missing),
            where=storage.where,
            remedy="put the run on a file system that all nodes share",
        )
    with _one_writer(storage):
        storage.write(MANIFEST_NAME, lambda: [files.json_bytes(manifest)], new=True)
    records = [record(storage, MANIFEST_NAME), *ranks]
    marker = {
        "format": FORMAT,
        "milestone": manifest["milestone"],
        "files": {entry.name: entry.to_json() for entry in records},
    }
    storage.sync()
    with _one_writer(storage):
        storage.write(MARKER_NAME, lambda: [files.json_bytes(marker)], new=True)


@contextmanager
def _one_writer(storage: Storage) -> Iterator[None]:
    """A file that is there already is another writer's: names hold attempt and launch, and a launch saves a clock once."""
    try:
        yield
    except FileExistsError as cause:
        raise CheckpointError(
            f"another writer has begun the same checkpoint: {Path(str(cause.filename)).name} is there",
            where=storage.where,
            remedy="see that only one job runs this stage",
        ) from cause


def require_room(storage: Storage, needed: int, what: str) -> None:
    """Raises MachineError with both numbers unless there are `needed` free bytes."""
    free = storage.free_bytes()
    if free is not None and needed > free:
        raise MachineError(
            f"{what} needs {_size(needed)}, but only {_size(free)} are free",
            where=storage.where,
            remedy="free disk space, or put the run on a larger disk",
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
