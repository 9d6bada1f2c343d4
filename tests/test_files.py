"""Durable files: whole or absent, whatever happens."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from pixart_ds import files
from pixart_ds.errors import CheckpointError, DataError, MachineError


def test_write_durable_replaces_the_file_and_leaves_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"α": 1})
    files.write_json(path, {"β": [2, 3]})
    assert files.read_json(path) == {"β": [2, 3]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    files.write_durable(path, [b"old"])

    def pieces() -> object:
        yield b"half of the new"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_durable(path, pieces())  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    files.write_durable(path, [b"0" * 1000])
    script = textwrap.dedent(f"""
        from pathlib import Path
        from pixart_ds import files
        def pieces():
            yield b"1" * 500
            print("half", flush=True)
            while True:
                yield b"1"
        files.write_durable(Path({str(path)!r}), pieces())
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_bytes() == b"0" * 1000


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    left = [files.temporary_name(tmp_path / "a.json"), files.temporary_name(files.temporary_name(tmp_path / "b"))]
    others = [tmp_path / "a.json", tmp_path / ".mine.tmp", tmp_path / ".draft.0123456789ab.tmp.txt"]
    others.append(files.temporary_name(tmp_path / "below/c"))
    for path in (*left, *others):
        path.write_text("something")
    files.remove_left_overs(tmp_path)
    files.remove_left_overs(tmp_path / "nothing")
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)


def test_a_second_writer_is_told_so_even_if_its_temporary_file_is_taken_for_a_left_over(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_new(path, [b"the first"])
    done, removals = threading.Event(), 0

    def remove() -> None:
        nonlocal removals
        while not done.is_set():
            files.remove_left_overs(tmp_path)
            removals += 1

    remover = threading.Thread(target=remove)
    remover.start()
    try:
        for _ in range(300):
            with pytest.raises(FileExistsError) as caught:
                files.write_new(path, [b"another"])
            assert caught.value.filename == str(path)
    finally:
        done.set()
        remover.join()
    assert removals > 100
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"a.json": b"the first"}


def test_a_text_is_replaced_whole_and_what_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    files.replace_text(path, "old")
    files.replace_text(path, "α")
    assert path.read_text(encoding="utf-8") == "α"

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space"):
        files.replace_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(OSError, match="No space"):  # not the error of the removal
        files.replace_text(path, "new")
    assert path.read_text(encoding="utf-8") == "α"


def test_read_json_names_the_file_in_the_callers_kind_of_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file x.json") as caught:
        files.read_json(tmp_path / "x.json", error=CheckpointError, remedy="save one")
    assert str(tmp_path) in str(caught.value)
    assert "to do: save one" in str(caught.value)
    (tmp_path / "y.json").write_text("{")
    with pytest.raises(DataError, match="y.json is not JSON"):
        files.read_json(tmp_path / "y.json")


def test_json_lines_forgive_a_torn_end_but_no_torn_middle(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for number in range(3):
        files.append_json_line(path, {"n": number})
    with open(path, "a") as file:
        file.write('{"n": 3')
    assert [row["n"] for row in files.read_json_lines(path)] == [0, 1, 2]
    assert files.last_json_line(path) == {"n": 2}
    path.write_text('{"n": 0}\n{"n":\n{"n": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        list(files.read_json_lines(path))
    assert [row["n"] for row in files.read_json_lines(path, torn_ok=True)] == [0, 2]
    assert files.last_json_line(tmp_path / "none.jsonl") is None


def test_last_json_line_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(5000)))
    assert files.last_json_line(path) == {"n": 4999}


def test_two_processes_never_take_the_same_number(tmp_path: Path) -> None:
    take = f"(files.make_numbered(Path({str(tmp_path)!r}))[0] for _ in range(20))"
    script = f"from pathlib import Path; from pixart_ds import files; print(*{take})"
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    numbers = [int(word) for process in processes for word in process.communicate()[0].split()]
    assert sorted(numbers) == list(range(1, 61))
    assert os.path.isdir(tmp_path / "0060")


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", without)
    with (
        pytest.raises(MachineError, match="no locks, .* who has the plan in hand") as caught,
        files.held(tmp_path / "a", "the plan"),
    ):
        pass
    assert "Lustre" in str(caught.value)
