"""The line of checkpoints, on folders made by hand."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from subprocess import run

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixart_ds import files
from pixart_ds.engine import line as lines
from pixart_ds.engine.storage import FolderStorage
from pixart_ds.errors import CheckpointError, MachineError
from pixart_ds.layout import MARKER_NAME, CheckpointName, StageLayout


class Stage:
    """A stage's folder, written as launches would write it."""

    def __init__(self, root: Path) -> None:
        self.layout = StageLayout(root)

    def start(self, attempt: int, launch: int, origin: CheckpointName | None) -> None:
        self.layout.attempt(attempt).root.mkdir(parents=True, exist_ok=True)
        lines.write_start(
            self.layout, lines.Start((attempt, launch), origin, {"images_seen": origin.images_seen if origin else 0})
        )

    def save(
        self, images: int, attempt: int, launch: int, *, milestone: bool = False, torn: bool = False
    ) -> CheckpointName:
        name = CheckpointName(images, attempt, launch)
        folder = self.layout.checkpoints / str(name)
        folder.mkdir(parents=True)
        (folder / "rank-00000-of-00001.safetensors").write_bytes(b"x")
        if not torn:
            (folder / MARKER_NAME).write_text(json.dumps({"format": 1, "milestone": milestone, "files": {}}))
        return name

    def note(self, name: CheckpointName) -> None:
        """As an attempt notes what it has committed."""
        files.append_json_line(self.layout.attempt(name.attempt).saves, {"checkpoint": str(name), "milestone": False})

    def line(self, upto: lines.LaunchNumber | None = None) -> list[tuple[int, int, int]]:
        return [(name.images_seen, name.attempt, name.launch) for name in lines.line(self.layout, upto)]

    def folders(self) -> list[str]:
        return sorted(path.name for path in self.layout.checkpoints.iterdir())


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_an_empty_stage(stage: Stage) -> None:
    assert stage.line() == []
    assert lines.newest(stage.layout) is None
    assert lines.is_highest(stage.layout, (1, 1))


def test_launches_that_follow_each_other(stage: Stage) -> None:
    stage.start(1, 1, None)
    stage.save(10, 1, 1)
    second = stage.save(20, 1, 1)
    stage.start(1, 2, second)
    third = stage.save(30, 1, 2)
    stage.start(2, 1, third)
    assert stage.line() == [(10, 1, 1), (20, 1, 1), (30, 1, 2)]
    stage.save(40, 2, 1)
    assert stage.line()[-1] == (40, 2, 1)


def test_an_old_attempt_that_lives_on_is_ignored(stage: Stage) -> None:
    stage.start(1, 1, None)
    base = stage.save(10, 1, 1)
    stage.start(2, 1, base)
    stage.save(20, 1, 1)  # published after attempt 2 has begun
    stage.save(90, 1, 1)
    assert stage.line() == [(10, 1, 1)]
    stage.save(20, 2, 1)
    assert stage.line() == [(10, 1, 1), (20, 2, 1)]
    stage.start(3, 1, CheckpointName(20, 2, 1))
    assert stage.line() == [(10, 1, 1), (20, 2, 1)]


def test_a_roll_back_leaves_the_bad_ones(stage: Stage) -> None:
    stage.start(1, 1, None)
    good = stage.save(10, 1, 1)
    stage.save(20, 1, 1)
    stage.save(30, 1, 1)
    stage.start(1, 2, good)
    assert stage.line() == [(10, 1, 1)]
    stage.save(20, 1, 2)
    assert stage.line() == [(10, 1, 1), (20, 1, 2)]


def test_a_launch_that_starts_anew_ends_the_line(stage: Stage) -> None:
    stage.start(1, 1, None)
    stage.save(10, 1, 1)
    stage.start(2, 1, None)
    assert stage.line() == []


def test_launches_that_never_saved_are_walked_through(stage: Stage) -> None:
    stage.start(1, 1, None)
    base = stage.save(10, 1, 1)
    for attempt in (2, 3, 4):
        stage.start(attempt, 1, base)
    assert stage.line() == [(10, 1, 1)]


def test_what_is_not_committed_does_not_count(stage: Stage) -> None:
    stage.start(1, 1, None)
    stage.save(10, 1, 1)
    stage.save(20, 1, 1, torn=True)
    (stage.layout.checkpoints / "notes").mkdir()
    assert stage.line() == [(10, 1, 1)]


def test_a_line_up_to_a_launch(stage: Stage) -> None:
    stage.start(1, 1, None)
    base = stage.save(10, 1, 1)
    stage.start(2, 1, base)
    stage.save(20, 2, 1)
    assert stage.line(upto=(1, 5)) == [(10, 1, 1)]
    assert not lines.is_highest(stage.layout, (1, 1))
    assert lines.is_highest(stage.layout, (2, 1))


def test_an_attempt_counts_as_soon_as_its_folder_is_there(stage: Stage) -> None:
    stage.start(1, 1, None)
    stage.layout.attempt(2).root.mkdir()
    assert not lines.is_highest(stage.layout, (1, 1))
    assert lines.is_highest(stage.layout, (2, 1))


def test_a_lost_line_is_an_error_not_a_new_beginning(stage: Stage) -> None:
    stage.start(1, 1, None)
    stage.start(2, 1, CheckpointName(10, 1, 1))
    with pytest.raises(CheckpointError, match="resumed from img-000000000010-a0001-l01, but no committed checkpoint"):
        lines.newest(stage.layout)


def test_what_a_first_launch_saved_and_is_gone_is_an_error_not_a_new_beginning(stage: Stage, tmp_path: Path) -> None:
    """Nothing was resumed from it yet, so that no start file names it."""
    stage.start(1, 1, None)
    for images in (10, 20):
        stage.note(stage.save(images, 1, 1))
    with stage.layout.attempt(1).saves.open("a") as file:
        file.write('{"checkpoint": "img-0000')  # the attempt was killed
    stage.layout.attempt(2).root.mkdir()
    assert lines.newest(stage.layout, (2, 1)) == CheckpointName(20, 1, 1)
    shutil.rmtree(stage.layout.checkpoints)
    with pytest.raises(
        CheckpointError, match="had saved img-000000000020-a0001-l01, but no committed checkpoint"
    ) as error:
        lines.newest(stage.layout, (2, 1))
    assert error.value.where == str(stage.layout.checkpoints)
    assert lines.newest(stage.layout, (1, 0)) is None, "launches after that one are ignored"
    elsewhere = tmp_path / "not-mounted" / "stage1"
    files.write_json(stage.layout.checkpoints_elsewhere, {"path": str(elsewhere)})
    with pytest.raises(CheckpointError, match="mounted on this node") as error:
        lines.newest(stage.layout)
    assert error.value.where == str(elsewhere)


def test_an_attempt_that_never_saved_leaves_nothing_to_lose(stage: Stage) -> None:
    stage.start(1, 1, None)
    stage.save(10, 1, 1, torn=True)
    assert lines.newest(stage.layout, (2, 1)) is None


def test_a_damaged_start_of_an_older_attempt_stops_no_save(stage: Stage) -> None:
    stage.start(1, 1, None)
    stage.start(2, 1, None)
    stage.layout.attempt(1).start(1).write_text("{")
    assert lines.is_highest(stage.layout, (2, 1))
    stage.start(2, 2, None)
    assert not lines.is_highest(stage.layout, (2, 1))
    assert lines.is_highest(stage.layout, (2, 2))


@pytest.mark.parametrize("origin", ["img-000000000010-a0002-l01", "img-000000000010-a0003-l01", "latest"])
def test_a_start_that_names_no_earlier_launch_is_refused(stage: Stage, origin: str) -> None:
    stage.start(2, 1, None)
    path = stage.layout.attempt(2).start(1)
    path.write_text(json.dumps({"format": 1, "attempt": 2, "launch": 1, "from": origin, "state": {}}))
    with pytest.raises(CheckpointError, match="no earlier checkpoint"):
        stage.line()
    path.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        stage.line()


def test_deleting_keeps_the_newest_and_the_milestones(stage: Stage) -> None:
    stage.start(1, 1, None)
    stage.save(10, 1, 1, milestone=True)
    stage.save(20, 1, 1)
    base = stage.save(30, 1, 1)
    stage.start(2, 1, base)
    stage.save(40, 1, 1)  # off the line
    stage.save(50, 1, 1, milestone=True)  # off the line, but to be kept for ever
    damaged = stage.save(55, 1, 1)
    (stage.layout.checkpoints / str(damaged) / MARKER_NAME).write_text("{")
    stage.save(60, 1, 1, torn=True)
    stage.save(40, 2, 1)
    stage.save(70, 2, 1, torn=True)
    stage.save(80, 3, 1, torn=True)  # of a later launch: not ours to judge
    (stage.layout.checkpoints / "notes").mkdir()
    before = stage.folders()
    stage.layout.attempt(3).root.mkdir()
    assert lines.delete_expendable(stage.layout, (2, 1), keep=1) == []
    assert stage.folders() == before
    stage.layout.attempt(3).root.rmdir()
    deleted = lines.delete_expendable(stage.layout, (2, 1), keep=1)
    assert [str(name) for name in deleted] == [f"img-{images:012d}-a0001-l01" for images in (20, 30, 40)]
    assert stage.folders() == [
        f"img-{n:012d}-a000{a}-l01" for n, a in ((10, 1), (40, 2), (50, 1), (55, 1), (80, 3))
    ] + ["notes"]
    assert stage.line()[-1] == (40, 2, 1)


def test_what_cannot_be_deleted_is_told_and_deleted_the_next_time(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, whose folders keep a file that somebody holds open."""
    stage.start(1, 1, None)
    held = stage.layout.checkpoints / str(stage.save(10, 1, 1))
    for images in (20, 30):
        stage.save(images, 1, 1)
    rmdir = os.rmdir

    def refuse(path: str) -> None:
        if Path(path) == held:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        rmdir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        with pytest.raises(MachineError, match=f"{held}: cannot delete the folder: Directory not empty") as error:
            lines.delete_expendable(stage.layout, (1, 1), keep=1)
    assert "who holds a file in it open" in str(error.value)
    assert stage.folders() == [f"img-{images:012d}-a0001-l01" for images in (10, 30)], "the others are deleted"
    assert stage.line() == [(30, 1, 1)], "it does not look committed"
    assert lines.delete_expendable(stage.layout, (1, 1), keep=1) == []
    assert stage.folders() == ["img-000000000030-a0001-l01"]


def test_a_checkpoint_that_a_person_deletes_meanwhile_stops_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.start(1, 1, None)
    first, second = stage.save(10, 1, 1), stage.save(20, 1, 1)
    stage.save(30, 1, 1)
    delete, is_milestone = FolderStorage.delete, lines.is_milestone

    def gone_before_it_is_read(layout: StageLayout, name: CheckpointName) -> bool:
        if name == first:
            shutil.rmtree(layout.checkpoints / str(name))
        return is_milestone(layout, name)

    def gone_before_it_is_deleted(self: FolderStorage, first: str) -> None:
        shutil.rmtree(self.folder)
        delete(self, first)

    monkeypatch.setattr(lines, "is_milestone", gone_before_it_is_read)
    monkeypatch.setattr(FolderStorage, "delete", gone_before_it_is_deleted)
    assert lines.delete_expendable(stage.layout, (1, 1), keep=1) == [second]
    assert stage.line() == [(30, 1, 1)]


def test_a_marker_that_the_disk_does_not_give_passes_for_no_killed_save(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.start(1, 1, None)
    damaged = stage.layout.checkpoints / str(stage.save(10, 1, 1))
    stage.save(20, 1, 1)
    look = os.stat

    def refuse(path: Path, **how: bool) -> os.stat_result:
        if path == damaged / MARKER_NAME:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return look(path, **how)

    (damaged / MARKER_NAME).write_text("{")
    monkeypatch.setattr(os, "stat", refuse)
    assert stage.line() == [(10, 1, 1), (20, 1, 1)]
    assert lines.delete_expendable(stage.layout, (1, 1), keep=1) == []
    assert damaged.exists()


NAMES = st.lists(st.builds(CheckpointName, st.integers(0, 50), st.integers(1, 3), st.integers(1, 3)), unique=True)


@given(NAMES, NAMES, st.sets(st.integers(0, 50)), st.integers(1, 4))
def test_expendable_never_takes_the_last_good_one(
    one: list[CheckpointName], other: list[CheckpointName], kept: set[int], keep: int
) -> None:
    on_line = sorted(one)
    off_line = [name for name in other if name not in one]
    milestones = {name for name in [*on_line, *off_line] if name.images_seen in kept}
    gone = lines.expendable(on_line, off_line, milestones, keep)
    left = [name for name in on_line if name not in gone]
    assert left[-1:] == on_line[-1:]
    assert not milestones & set(gone)
    recovery = [name for name in on_line if name not in milestones]
    assert [name for name in left if name not in milestones] == recovery[-keep:]
    assert set(gone) <= {*on_line, *off_line}


def test_reading_the_line_needs_no_torch() -> None:
    code = "import sys, pixart_ds.engine.line; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
