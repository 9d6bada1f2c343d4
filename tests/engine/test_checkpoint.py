"""Checkpoints as files: any world to any world, kills, damage, full and read-only disks, two writers, the oldest format."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_ds.engine import line, storage
from pixart_ds.engine.checkpoint import Reader, commit, manifest_of, write_rank
from pixart_ds.engine.shards import SHARD_KEYS
from pixart_ds.engine.shelf import Committed, Shelf
from pixart_ds.engine.storage import FolderStorage, S3Storage, read
from pixart_ds.errors import CheckpointError, MachineError
from pixart_ds.layout import MANIFEST_NAME, MARKER_NAME, StageLayout, rank_file_name
from tests.engine.flat import FlatEngine, content, layout_of
from tests.engine.golden.make import STATE, expected
from tests.helpers.disk import small_disk
from tests.helpers.launch import ROOT

WORLDS = (1, 2, 3, 4, 6, 8, 48, 64)
GOLDEN = Path(__file__).parent / "golden"
KILLS = 100


def write(folder: Path, world_size: int, clock: int = 7, shapes: dict[str, tuple[int, ...]] | None = None) -> Path:
    """A committed checkpoint of all ranks of a world."""
    storage, files = FolderStorage(folder), []
    folder.mkdir(parents=True)
    for rank in range(world_size):
        engine = FlatEngine(rank, world_size, shapes)
        engine.train_to(clock)
        own = len(engine.layout.own(rank))
        shards = {key: shard[:own] for key, shard in engine.shards.items()}
        files.append(write_rank(storage, engine.layout, rank, shards, engine.fixed()))
    about = {"images_seen": clock, "clock": {"ticks": clock}, "state": {"note": "naïve"}}
    commit(storage, files, manifest_of(engine.layout, engine.fixed(), about, milestone=False))
    return folder


def load(
    folder: Path, rank: int, world_size: int, shapes: dict[str, tuple[int, ...]] | None = None
) -> tuple[FlatEngine, int]:
    """One rank's state from a checkpoint, and the bytes of shards that it read."""
    engine, reader = FlatEngine(rank, world_size, shapes), Reader.at(folder)
    engine.put(reader.fill, SHARD_KEYS, reader.fixed())
    engine.set_clock(reader.manifest["clock"])
    return engine, reader.bytes_read


@pytest.mark.parametrize("before", WORLDS)
def test_every_world_loads_what_every_world_saved_each_rank_its_own_ranges(tmp_path: Path, before: int) -> None:
    folder = write(tmp_path / "checkpoint", before)
    Reader.at(folder).verify()
    for after in WORLDS:
        for rank in range(after):
            engine, count = load(folder, rank, after)
            assert engine.stands_at(7)
            assert count == 16 * len(engine.layout.own(rank))


_NETS = st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=9)


@settings(max_examples=40)
@given(_NETS, st.integers(1, 40), st.integers(1, 40))
def test_any_net_at_any_two_worlds(
    tmp_path_factory: pytest.TempPathFactory, nets: list[list[int]], before: int, after: int
) -> None:
    shapes = {f"p{number}": tuple(shape) for number, shape in enumerate(nets)}
    folder = write(tmp_path_factory.mktemp("net") / "checkpoint", before, shapes=shapes)
    assert all(load(folder, rank, after, shapes)[0].stands_at(7) for rank in range(after))


def test_a_net_whose_parameters_come_in_another_sequence(tmp_path: Path) -> None:
    """Shards are filled by name: another version of a net may list the same parameters otherwise."""
    folder = write(tmp_path / "checkpoint", 3)
    names = [place.name for place in layout_of(1).places][::-1]
    reader, whole = Reader.at(folder), layout_of(1)
    out = torch.empty(whole.count)
    counts = {place.name: place.count for place in whole.places}
    reader.fill("ema", [(name, 0, counts[name]) for name in names], out)
    flat = content("ema", 7, whole.count)
    parts = {place.name: flat[place.offset : place.end] for place in whole.places}
    assert torch.equal(out, torch.cat([parts[name] for name in names]))


@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("format-*")), ids=lambda folder: folder.name)
def test_every_format_that_was_ever_committed_still_loads(folder: Path) -> None:
    layout = StageLayout(folder)
    newest = line.newest(layout)
    assert newest is not None
    reader = Reader.at(layout.checkpoints / str(newest)).verify()
    assert reader.milestone
    assert reader.state == STATE
    assert (reader.manifest["clock"]["applied_steps"], reader.manifest["clock"]["scaler"]["cur_scale"]) == (6, 512.0)
    for key in SHARD_KEYS:
        weights = reader.state_dict(key)
        for place in reader.layout.places:
            assert torch.equal(weights[place.name].view(-1), expected(place.name, key, place.count))
    assert weights["position"].shape == (7, 30)


# ---- a shelf of one rank -------------------------------------------------------------------------------------------


def shelf_at(root: Path, attempt: int, told: Callable[[Committed], None] | None = None, keep: int = 2) -> Shelf:
    layout = StageLayout(root)
    layout.attempt(attempt).root.mkdir(parents=True, exist_ok=True)
    engine: Any = FlatEngine()
    return Shelf(layout, attempt, 1, engine, engine.world, keep=keep, told=told)


def saved(root: Path, clocks: tuple[int, ...], attempt: int = 1) -> Shelf:
    """A stage with these checkpoints."""
    shelf = shelf_at(root, attempt, keep=len(clocks))
    shelf.write_start({})
    for clock in clocks:
        shelf.engine.train_to(clock)  # type: ignore[attr-defined]
        shelf.save(clock, {"clock": clock})
    shelf.wait()
    return shelf


def stands_at(shelf: Shelf, clock: int) -> bool:
    return shelf.engine.stands_at(clock)  # type: ignore[attr-defined, no-any-return]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is what stood when `save` was called, though the shards move on before a byte is written."""
    told: list[Committed] = []
    shelf = shelf_at(tmp_path, 1, told.append)
    shelf.write_start({})
    write_durable = FolderStorage.write

    go_on = threading.Event()

    def held(self: FolderStorage, name: str, pieces: Any, *, new: bool = False) -> None:
        assert go_on.wait(60)
        write_durable(self, name, pieces, new=new)

    monkeypatch.setattr(FolderStorage, "write", held)
    shelf.engine.train_to(1)  # type: ignore[attr-defined]
    name = shelf.save(1, {})
    shelf.engine.train_to(2)  # type: ignore[attr-defined]
    assert not shelf.ready
    assert line.committed(shelf.layout) == told == []
    go_on.set()
    while not shelf.ready:
        time.sleep(0.01)
    shelf.settle()
    assert told == [], "rank 0 is still to commit"
    shelf.wait()
    assert [each.name for each in told] == line.committed(shelf.layout) == [name]
    assert 0 < told[0].stall_s < told[0].commit_s
    assert told[0].num_bytes == (tmp_path / "checkpoints" / str(name) / rank_file_name(0, 1)).stat().st_size
    later = shelf_at(tmp_path, 2)
    resumed = later.resume()
    assert resumed is not None
    assert resumed.name == name
    assert stands_at(later, 1)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a truncated file": (lambda folder: _cut(folder / rank_file_name(0, 1)), "bytes instead of"),
    "a bit flipped": (lambda folder: _flip(folder / rank_file_name(0, 1)), "is damaged: its xxh3_128"),
    "a missing file": (lambda folder: (folder / rank_file_name(0, 1)).unlink(), "is missing"),
    "a damaged manifest": (lambda folder: _flip(folder / MANIFEST_NAME), "manifest.json is damaged"),
    "no manifest": (lambda folder: (folder / MANIFEST_NAME).unlink(), "manifest.json is missing"),
    "a damaged marker": (
        lambda folder: (folder / MARKER_NAME).write_text('{"format": 1, "fi'),
        "COMMITTED is not JSON",
    ),
    "a key of the marker": (
        lambda folder: (folder / MARKER_NAME).write_text(
            (folder / MARKER_NAME).read_text().replace("milestone", "mjlestone")
        ),
        "its marker is damaged",
    ),
    "an empty marker": (lambda folder: (folder / MARKER_NAME).write_text(""), "COMMITTED is not JSON"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_the_newest_whole_checkpoint_loads_and_what_is_wrong_with_newer_ones_is_said(tmp_path: Path, what: str) -> None:
    saved(tmp_path, (10, 20, 30))
    damage, message = DAMAGE[what]
    layout = StageLayout(tmp_path)
    for name in line.committed(layout)[1:]:
        damage(layout.checkpoints / str(name))
    shelf = shelf_at(tmp_path, 2)
    resumed = shelf.resume()
    assert resumed is not None
    assert (resumed.name.images_seen, resumed.state) == (10, {"clock": 10})
    assert stands_at(shelf, 10)
    assert len(resumed.damaged) == 2
    for clock, text in zip((30, 20), resumed.damaged, strict=True):
        assert message in text
        assert f"img-{clock:012d}" in text
    shelf.write_start({})
    shelf.save(40, {})
    shelf.wait()
    assert [name.images_seen for name in line.line(layout)] == [10, 40], "the line goes around the damaged ones"


@pytest.mark.parametrize("manifest", ["[]", '{"state": {"stAte": {}}}', '{"stAte": {}}', '{"state": 3}', "{"])
def test_an_old_manifest_that_is_damaged_does_not_stand_before_a_whole_checkpoint(
    tmp_path: Path, manifest: str
) -> None:
    shelf = saved(tmp_path, (10, 20))
    old, new = line.committed(shelf.layout)
    (shelf.layout.checkpoints / str(old) / MANIFEST_NAME).write_text(manifest)
    good = lambda images_seen, state: state["clock"] == images_seen  # noqa: E731
    later = shelf_at(tmp_path, 2)
    names = Shelf.candidates(shelf.layout, 2, 1, later.world, good)
    assert names == [new, old], "the damaged one is left to `resume`, which says what is wrong with it"
    resumed = later.resume(names)
    assert resumed is not None
    assert (resumed.name, resumed.damaged) == (new, [])


@pytest.mark.parametrize("name", [MARKER_NAME, MANIFEST_NAME, rank_file_name(0, 1)])
def test_a_file_that_the_disk_does_not_give_is_damage_of_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shelf = saved(tmp_path, (10, 20))
    old, new = line.committed(shelf.layout)
    bad = shelf.layout.checkpoints / str(new) / name

    def refuse(path: Path, *how: Any, **more: Any) -> Any:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return open(path, *how, **more)

    monkeypatch.setattr(storage, "open", refuse, raising=False)
    with pytest.raises(MachineError, match=f"cannot read {name}: Input/output error"):
        read(FolderStorage(bad.parent), name)
    later = shelf_at(tmp_path, 2)
    names = Shelf.candidates(shelf.layout, 2, 1, later.world, lambda images_seen, state: bool(state["clock"]))
    resumed = later.resume(names)
    assert resumed is not None
    assert (resumed.name, stands_at(later, 10)) == (old, True)
    assert len(resumed.damaged) == 1
    assert f"cannot read {name}: Input/output error" in resumed.damaged[0]
    assert line.is_milestone(shelf.layout, new) == (name == MARKER_NAME), "it is kept for a person to see"


def test_an_old_checkpoint_that_cannot_be_deleted_is_told_and_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = saved(tmp_path, (10,))
    log = shelf.layout.attempt(1).log
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda path: (_ for _ in ()).throw(OSError(errno.ENOTEMPTY, "Directory not empty")))
        shelf.save(20, {})
        shelf.wait()
    assert [name.images_seen for name in line.line(shelf.layout)] == [20]
    assert "an old checkpoint could not be deleted" in log.read_text()
    assert "img-000000000010-a0001-l01: cannot delete the folder: Directory not empty" in log.read_text()
    shelf.save(30, {})
    shelf.wait()
    assert [name.images_seen for name in line.present(shelf.layout)] == [30]
    assert log.read_text().count("could not be deleted") == 1


def test_where_no_checkpoint_is_whole_nothing_starts_anew(tmp_path: Path) -> None:
    saved(tmp_path, (10, 20))
    layout = StageLayout(tmp_path)
    for name in line.committed(layout):
        _flip(layout.checkpoints / str(name) / rank_file_name(0, 1))
    with pytest.raises(CheckpointError, match="no checkpoint of the stage is whole") as error:
        shelf_at(tmp_path, 2).resume()
    assert str(error.value).count("is damaged") == 2


def test_what_speaks_against_a_whole_checkpoint_is_an_error_not_a_step_back(tmp_path: Path) -> None:
    saved(tmp_path, (10, 20))

    def refuse(reader: Reader) -> None:
        raise CheckpointError(f"another recipe made {reader.name}")

    shelf = shelf_at(tmp_path, 2)
    with pytest.raises(CheckpointError, match="another recipe made img-000000000020"):
        shelf.resume(check=refuse)
    assert not shelf.engine.shard("master").ge(0).any(), "nothing was overwritten"


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def test_a_disk_that_fills_up_meanwhile_leaves_the_older_checkpoint(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = shelf_at(small_disk, 1)
    with pytest.raises(MachineError, match=r"needs 1\.\d\d MB, but only 0\.\d\d MB are free"):
        shelf.save(5, {})
    monkeypatch.setattr(FolderStorage, "free_bytes", lambda self: None)  # as a quota that statfs does not tell
    shelf = saved(small_disk, (10,))
    (small_disk / "filler").write_bytes(bytes(250_000))
    shelf.save(20, {})
    with pytest.raises(MachineError, match="cannot write rank-00000-of-00001.safetensors: No space left on device"):
        shelf.wait()
    assert [name.images_seen for name in line.committed(shelf.layout)] == [10]
    (small_disk / "filler").unlink()
    later = shelf_at(small_disk, 2)
    assert later.resume() is not None
    assert stands_at(later, 10)


def test_a_read_only_disk_is_named(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderStorage, "free_bytes", lambda self: None)
    shelf = saved(small_disk, (10,))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(MachineError, match="cannot make the folder: Read-only file system"):
        shelf.save(20, {})
    assert shelf_at_read_only(shelf) == 10


def shelf_at_read_only(shelf: Shelf) -> int:
    engine: Any = FlatEngine()
    reader = Shelf(shelf.layout, 1, 2, engine, engine.world, keep=1)
    assert reader.resume() is not None
    assert engine.stands_at(engine.ticks)
    return int(engine.ticks)


def test_of_two_writers_of_one_checkpoint_one_counts_and_is_whole(tmp_path: Path) -> None:
    one, other = saved(tmp_path, (10,)), shelf_at(tmp_path, 1)
    for shelf, clock in ((one, 20), (other, 99)):
        shelf.engine.train_to(clock)  # type: ignore[attr-defined]
    name = one.save(20, {})
    other.save(20, {})
    failed = [shelf for shelf in (one, other) if not _committed(shelf)]
    assert len(failed) == 1
    failed[0].save(20, {})
    with pytest.raises(CheckpointError, match="another writer has begun the same checkpoint"):
        failed[0].wait()
    reader = Reader.at(tmp_path / "checkpoints" / str(name)).verify()
    assert reader.manifest["clock"]["ticks"] == (99 if failed == [one] else 20)
    later = shelf_at(tmp_path, 2)
    assert later.resume() is not None
    assert later.engine.stands_at(reader.manifest["clock"]["ticks"])  # type: ignore[attr-defined]


def _committed(shelf: Shelf) -> bool:
    try:
        shelf.wait()
    except CheckpointError as error:
        if "another writer has begun the same checkpoint: rank-00000-of-00001.safetensors" not in str(error):
            raise
        return False
    return True


def test_a_writer_that_was_overtaken_commits_nothing(tmp_path: Path) -> None:
    old = saved(tmp_path, (10,))
    old.save(20, {})
    new = shelf_at(tmp_path, 2)
    assert new.resume() is not None
    new.write_start({})
    with pytest.raises(CheckpointError, match="later attempt or launch has taken this stage over"):
        old.wait()
    new.save(20, {})
    new.wait()
    assert [str(name) for name in line.line(new.layout)] == ["img-000000000010-a0001-l01", "img-000000000020-a0002-l01"]


def test_a_failed_save_does_not_end_the_shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = saved(tmp_path, (10,))
    with monkeypatch.context() as patch:
        patch.setattr(FolderStorage, "write", lambda *args, **more: (_ for _ in ()).throw(MachineError("no")))
        shelf.save(20, {})
        with pytest.raises(MachineError, match="no"):
            shelf.wait()
    shelf.wait()
    shelf.save(30, {})
    shelf.wait()
    assert [name.images_seen for name in line.committed(shelf.layout)] == [30], "keep is 1"


# ---- a store that is silent for a while, on a clock of its own ------------------------------------------------------


class SlowStore:
    """The client of a store, and the clock: each piece or request takes `seconds`; what `fails` counts down breaks off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, fails: int) -> None:
        self.now, self.seconds, self.fails = 0.0, seconds, fails
        self.content = bytes(range(200))
        self.taken = b""
        monkeypatch.setattr(storage.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(storage.time, "sleep", self._pass)

    def _pass(self, seconds: float) -> None:
        self.now += seconds

    def _fail(self) -> None:
        self.fails -= 1
        raise ConnectionResetError("the connection broke off")

    def client(self) -> SlowStore:
        return self

    def get_object(self, Range: str = "bytes=0-", **key: str) -> dict[str, Any]:
        self.at = int(Range.removeprefix("bytes=").split("-")[0])
        return {"Body": self}

    def iter_chunks(self, size: int) -> Iterator[bytes]:
        for number, at in enumerate(range(self.at, len(self.content), 10)):
            self._pass(self.seconds)
            if number == 4 and self.fails:
                self._fail()
            yield self.content[at : at + 10]

    def close(self) -> None:
        """Of an answer's body."""

    def put_object(self, Body: bytes, **key: str) -> None:
        self._pass(self.seconds)
        if self.fails:
            self._fail()
        self.taken = Body


def test_a_long_read_that_breaks_off_goes_on_however_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = SlowStore(monkeypatch, seconds=100, fails=3)
    assert read(S3Storage("s3://bucket/stage", 300, store), "file") == store.content
    assert store.now > 2000


def test_a_long_upload_that_breaks_off_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = SlowStore(monkeypatch, seconds=400, fails=1)
    S3Storage("s3://bucket/stage", 300, store).write("file", lambda: [b"content"])
    assert store.taken == b"content"


def test_a_store_that_stays_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = SlowStore(monkeypatch, seconds=1, fails=10**6)
    with pytest.raises(MachineError, match="the store did not take file"):
        S3Storage("s3://bucket/stage", 300, store).write("file", lambda: [b"content"])
    assert 300 <= store.now < 330


# ---- kills ---------------------------------------------------------------------------------------------------------


def test_a_hundred_kills_leave_a_whole_checkpoint_each_time(tmp_path: Path) -> None:
    """Each of a hundred attempts is killed at a random moment of its saves; the next one resumes, bit by bit."""
    luck = random.Random(11)
    command = [sys.executable, "-m", "tests.engine.test_checkpoint", str(tmp_path), str(luck.random())]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert answer.returncode == 0, answer.stderr
    torn, clock = map(int, answer.stdout.split()[-2:])
    assert torn > KILLS // 5, f"only {torn} of {KILLS} kills fell into a save"
    assert clock >= 10, "hardly any save came to its end"


def _save_for_ever(root: Path, attempt: int) -> None:
    """One attempt: resumes, proves what it found, and saves until it is killed."""
    shelf = shelf_at(root, attempt)
    resumed = shelf.resume()
    clock = 0 if resumed is None else resumed.name.images_seen
    assert resumed is None or (stands_at(shelf, clock) and not resumed.damaged), resumed
    shelf.write_start({})
    while True:
        clock += 1
        shelf.engine.train_to(clock)  # type: ignore[attr-defined]
        shelf.save(clock, {})


def _kill_many(root: Path, seed: float) -> None:
    luck, torn, layout = random.Random(seed), 0, StageLayout(root)
    newest, window, fruitless = -1, 0.15, 0
    for attempt in range(1, KILLS + 1):
        child = os.fork()
        if child == 0:
            try:
                _save_for_ever(root, attempt)
            finally:
                os._exit(1)
        while not layout.attempt(attempt).start(1).exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the attempt ended by itself"
            time.sleep(0.001)
        time.sleep(luck.uniform(0, window))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, "the attempt ended by itself"
        torn += line.present(layout) != line.committed(layout)
        before = newest
        if there := line.committed(layout):
            assert there[-1].images_seen >= newest
            newest = there[-1].images_seen
            Reader.at(layout.checkpoints / str(there[-1])).verify()
        fruitless = 0 if newest > before else fruitless + 1
        if fruitless == 5:  # a save takes longer on this disk
            window, fruitless = min(2 * window, 2.0), 0
    print(torn, newest)


if __name__ == "__main__":
    _kill_many(Path(sys.argv[1]), float(sys.argv[2]))
    shutil.rmtree(sys.argv[1])
