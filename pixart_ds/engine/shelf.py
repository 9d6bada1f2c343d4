"""A stage's checkpoints as its ranks handle them: saved behind training, committed together, resumed at any world."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from pixart_ds import __version__
from pixart_ds.engine import line as lines
from pixart_ds.engine.agree import on_first, together
from pixart_ds.engine.checkpoint import Reader, commit, manifest_of, require_room, write_rank
from pixart_ds.engine.deepspeed import Engine
from pixart_ds.engine.shards import SHARD_KEYS
from pixart_ds.engine.storage import Storage, file_is_damaged, read, storage_of
from pixart_ds.engine.tensors import FileRecord, TensorSpec
from pixart_ds.engine.world import World
from pixart_ds.errors import CheckpointError, MachineError, PixArtError
from pixart_ds.layout import MANIFEST_NAME, CheckpointName, StageLayout
from pixart_ds.log import Log

Good = Callable[[int, dict[str, Any]], bool]
"""(images seen, the caller's state) of a checkpoint → whether training may go on from it."""

_ROOM_BYTES = 1 << 20
"""For the manifest, the marker and the file system's own books."""


@dataclass(frozen=True)
class Committed:
    """A save that has come to its end.

    Attributes:
        name: The checkpoint.
        milestone: Whether it is kept for ever.
        stall_s: Seconds for which training stood still, on the rank that waited longest.
        commit_s: Seconds from the beginning until it counted.
        num_bytes: Of all ranks' files.
    """

    name: CheckpointName
    milestone: bool
    stall_s: float
    commit_s: float
    num_bytes: int


@dataclass(frozen=True)
class Resumed:
    """Where training goes on.

    Attributes:
        name: The checkpoint.
        state: What was given to `save`.
        damaged: What is wrong with each newer checkpoint, which was therefore passed over.
    """

    name: CheckpointName
    state: dict[str, Any]
    damaged: list[str]


@dataclass
class _Save:
    """A checkpoint under way on this rank: first its file is written, then rank 0 commits."""

    name: CheckpointName
    manifest: dict[str, Any]
    began: float
    work: Future[Any]
    stall_s: float = 0.0
    ranks: list[FileRecord] = field(default_factory=list)


class HostCopy:
    """This rank's shards, and on rank 0 what is in no shard, in memory of their own: pinned where there is a GPU."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        pinned = engine.world.device.type == "cuda"
        count = len(engine.layout.own(engine.world.rank))
        # filled at once: else the first copy would wait for the kernel to find the pages
        self.shards = {key: torch.empty(count, pin_memory=pinned).fill_(0) for key in SHARD_KEYS}
        self.fixed: dict[str, torch.Tensor] = {}

    def take(self) -> None:
        """Copies what stands now; returns when the engine may go on."""
        for key, copy in self.shards.items():
            copy.copy_(self.engine.shard(key)[: len(copy)], non_blocking=True)
        if self.engine.world.rank == 0:
            self.fixed = {name: tensor.cpu().clone() for name, tensor in self.engine.fixed().items()}
        if self.engine.world.device.type == "cuda":
            torch.cuda.synchronize(self.engine.world.device)


class Shelf:
    """A stage's checkpoints, for one launch. All ranks call its methods together, `ready` excepted.

    A save has three parts. `save` copies the shards to host memory and lets training go on, while a thread of each rank
    writes its file and reads it back. When all are `ready`, `settle` gathers what they wrote, and rank 0's thread writes
    manifest and marker and deletes what is no longer needed; when that is ready, the next `settle` ends the save. `wait` does
    what is left of it at once.

    Args:
        layout: The stage's folder.
        attempt: Number of this attempt.
        launch: Number of this launch within it.
        engine: Whose state is saved and restored.
        world: The ranks.
        keep: Recovery checkpoints kept besides milestones.
        told: Called on all ranks with each save that has come to its end.
    """

    def __init__(
        self,
        layout: StageLayout,
        attempt: int,
        launch: int,
        engine: Engine,
        world: World,
        *,
        keep: int,
        told: Callable[[Committed], None] | None = None,
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
        self._told = told
        self.storage = storage_of(layout)
        self._number = (attempt, launch)
        self._log = Log(layout.root.name, path=layout.attempt(attempt).log)
        self._origin: CheckpointName | None = None
        self._copy: HostCopy | None = None
        self._pending: _Save | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")

    @staticmethod
    def candidates(
        layout: StageLayout, attempt: int, launch: int, world: World, good: Good = lambda images_seen, state: True
    ) -> list[CheckpointName]:
        """The committed checkpoints of the line that a launch may go on from, the newest first. Rank 0 looks for all.

        Args:
            layout, attempt, launch: Whose.
            world: The ranks.
            good: Whether a checkpoint's clock and state are acceptable, as long as its manifest can be read and understood.

        Raises:
            CheckpointError: A line was lost.
        """

        def look() -> list[str]:
            lines.newest(layout, (attempt, launch))  # raises where a line was lost
            names = reversed(lines.line(layout, (attempt, launch)))
            return [str(name) for name in names if _is_good(storage_of(layout).sub(str(name)), name, good)]

        return [name for text in on_first(world, look) if (name := CheckpointName.parse(text)) is not None]

    def line(self) -> list[CheckpointName]:
        """The committed checkpoints of the line that ends in this launch, oldest first. No collective."""
        return lines.line(self.layout, self._number)

    # ---- resuming --------------------------------------------------------------------------------------------------

    def resume(
        self, names: Sequence[CheckpointName] | None = None, check: Callable[[Reader], None] | None = None
    ) -> Resumed | None:
        """Restores the engine from the newest checkpoint of the line that is whole, bit by bit, at whatever world.

        Each rank reads its own ranges only, after the ranks together have compared all checksums.

        Args:
            names: Which to try, in their sequence; all of the line by default.
            check: Raises what speaks against going on from a checkpoint that is whole.

        Returns:
            None if there is no checkpoint.

        Raises:
            CheckpointError: None is whole, or the newest that is belongs to another net; on all ranks together.
        """
        if names is None:
            names = self.candidates(self.layout, *self._number, self.world)
        damaged: list[str] = []
        for name in names:
            try:
                reader = self._whole(str(name))
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            self._load(reader, check)
            self._origin = name
            return Resumed(name, reader.state, damaged)
        if damaged:
            raise CheckpointError(
                "no checkpoint of the stage is whole:\n" + "\n".join(damaged),
                where=self.storage.where,
                remedy="put the files of one of them back, or start a new run",
            )
        return None

    def _whole(self, name: str) -> Reader:
        """A checkpoint after all its files were read once, each rank some of them; an error of one is heard by all."""
        found: list[Reader] = []

        def look() -> None:
            found.append(Reader(self.storage.sub(name), name).verify(self.world.rank, self.world.size))

        together(self.world, look)
        return found[0]

    def _load(self, reader: Reader, check: Callable[[Reader], None] | None) -> None:
        def examine() -> None:
            self.engine.check_names(reader.shapes, f"the weights of {reader.name}")
            if check is not None:
                check(reader)

        together(self.world, examine)  # nothing is overwritten before all ranks agree
        together(self.world, lambda: self.engine.put(reader.fill, SHARD_KEYS, reader.fixed()))
        self.engine.publish()
        self.engine.set_clock(reader.manifest["clock"])

    def write_start(self, state: dict[str, Any]) -> None:
        """Says durably where this launch starts from; call it before the first step, after `resume` or `initialise`.

        Args:
            state: The caller's clock and skips, as JSON.
        """
        if self._copy is None:
            self._copy = HostCopy(self.engine)  # its pages are touched now, not when the first save stops training
        on_first(self.world, lambda: lines.write_start(self.layout, lines.Start(self._number, self._origin, state)))

    # ---- saving ----------------------------------------------------------------------------------------------------

    def save(self, images_seen: int, state: dict[str, Any], milestone: bool = False) -> CheckpointName:
        """Begins a checkpoint of what stands now, and lets training go on. It counts when `settle` or `wait` says so.

        Args:
            images_seen: The clock.
            state: The caller's state, as JSON; `resume` gives it back.
            milestone: Never delete it.

        Raises:
            MachineError: The disk is too small; on all ranks together.
            CheckpointError: A later attempt has taken the stage over.
        """
        began = time.monotonic()
        self.wait()
        name = CheckpointName(images_seen, *self._number)
        on_first(self.world, lambda: self._make_room(name))
        if self._copy is None:
            self._copy = HostCopy(self.engine)
        copy, storage = self._copy, self.storage.sub(str(name))
        copy.take()
        about = manifest_of(self.engine.layout, copy.fixed, self._about(images_seen, state), milestone=milestone)
        work = self._thread.submit(write_rank, storage, self.engine.layout, self.world.rank, copy.shards, copy.fixed)
        self._pending = _Save(name, about, began, work)
        self._pending.stall_s = time.monotonic() - began
        return name

    @property
    def ready(self) -> bool:
        """Whether this rank has done its part of what is under way; when all ranks say so, `settle` goes on without waiting."""
        return self._pending is not None and self._pending.work.done()

    def settle(self) -> None:
        """Goes on with the save that is under way, if there is one, waiting for the ranks' parts of it.

        Raises:
            MachineError: A rank could not write, or rank 0 not commit; on all ranks together. The save is given up.
            CheckpointError: Another job has taken the stage over, or writes the same checkpoint.
        """
        save, self._pending = self._pending, None
        if save is None:
            return
        if not save.ranks:
            answers = together(self.world, lambda: [save.stall_s, *vars(save.work.result()).values()])
            save.stall_s = max(answer[0] for answer in answers)
            save.ranks = [FileRecord(*answer[1:]) for answer in answers]
            save.work = self._thread.submit(self._commit, save) if self.world.rank == 0 else _done()
            self._pending = save
            return
        seconds = on_first(self.world, save.work.result)
        num_bytes = sum(each.num_bytes for each in save.ranks)
        if self._told is not None:
            self._told(Committed(save.name, save.manifest["milestone"], save.stall_s, seconds, num_bytes))

    def wait(self) -> None:
        """Ends the save that is under way, if there is one; see `settle`."""
        while self._pending is not None:
            self.settle()

    def _make_room(self, name: CheckpointName) -> None:
        """Refuses before anything is written, where it could not end well. Training waits: no store is asked, nothing is synced."""
        storage = self.storage.sub(str(name))
        self._refuse_if_overtaken()
        storage.make()
        fixed = sum(TensorSpec.of(each, tensor).num_bytes for each, tensor in self.engine.fixed().items())
        needed = 4 * len(SHARD_KEYS) * self.engine.layout.count + fixed + _ROOM_BYTES
        require_room(storage, needed, f"the checkpoint {name}")

    def _refuse_if_overtaken(self) -> None:
        if not lines.is_highest(self.layout, self._number):
            raise CheckpointError(
                "a later attempt or launch has taken this stage over; nothing that this one saves would count",
                where=self.layout.attempts,
                remedy="let the later one go on",
            )

    def _about(self, images_seen: int, state: dict[str, Any]) -> dict[str, Any]:
        attempt, launch = self._number
        return {
            "images_seen": images_seen,
            "written_by": {"attempt": attempt, "launch": launch, "package": __version__, "torch": torch.__version__},
            "started_from": _text(self._origin),
            "recipe": self.engine.recipe,
            "config": self.engine.fingerprints,
            "model": self.engine.model_config.model_dump(mode="json"),
            "clock": self.engine.clock(),
            "state": state,
        }

    def _commit(self, save: _Save) -> float:
        """Rank 0's thread: the marker, then room for the next one; returns the seconds since the beginning."""
        self._refuse_if_overtaken()
        commit(self.storage.sub(str(save.name)), save.ranks, save.manifest)
        seconds = time.monotonic() - save.began
        self._tidy_up()
        return seconds

    def _tidy_up(self) -> None:
        """What cannot be deleted ends no training: the checkpoint counts already, and the next save tries again."""
        try:
            lines.delete_expendable(self.layout, self._number, self.keep)
        except (PixArtError, OSError) as error:
            what = error.what if isinstance(error, PixArtError) else str(error)
            self._log.event(f"an old checkpoint could not be deleted, which is tried again after the next save: {what}")


def _is_good(storage: Storage, name: CheckpointName, good: Good) -> bool:
    """What cannot be read is left to `resume`, which says so."""
    try:
        return good(name.images_seen, json.loads(read(storage, MANIFEST_NAME))["state"])
    except (ValueError, LookupError, TypeError, AttributeError, OSError):  # `good` meets what a damaged file says, too
        return True
    except MachineError as error:
        if not file_is_damaged(error):
            raise
        return True


def _done() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(None)
    return future


def _text(name: CheckpointName | None) -> str | None:
    return None if name is None else str(name)
