"""Files that are whole or not there: temporary name, sync, rename, sync of the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pixart_ds.errors import DataError, MachineError, PixArtError

_CHUNK_BYTES = 1 << 24
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems answer that know no hard links."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What they answer that know no locks."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
"""What `temporary_name` gives."""


def disk_error(error: OSError, folder: Path) -> MachineError | None:
    """What a person is told of a disk that is full or read-only; None for an error of another kind.

    Args:
        error: Of a write.
        folder: Where it was, if the error does not say.
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return None
    return MachineError(
        f"a file of the run cannot be written: {error.strerror}",
        where=error.filename or folder,
        remedy="free or enlarge the disk, or its quota, then start again; what was committed is whole",
    )


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A new name beside `path` that no reader takes for a finished file; no other process has it, on no other host."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def write_durable(path: Path, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
    """Writes `pieces` to `path` so that after a crash the file is whole or absent.

    The file is written under a temporary name in the same folder, synced, renamed over `path`, and the folder is synced.

    Raises:
        OSError: The disk is full, the folder is read-only, …; the temporary file is removed first.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb", buffering=0) as file:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                for start in range(0, len(view), _CHUNK_BYTES):
                    chunk = view[start : start + _CHUNK_BYTES]
                    while chunk:  # a raw write may be short without being an error
                        chunk = chunk[file.write(chunk) :]
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Replaces a small file that is rewritten all the time: whole for every reader, but not durable.

    Raises:
        OSError: The disk is full, the folder is read-only, …; the temporary file is removed first, if the disk lets us.
    """
    temporary = temporary_name(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise


def write_new(path: Path, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
    """`write_durable` of a file that must not be there yet; of two writers at once, one gets the error.

    Raises:
        FileExistsError: It is there.
    """
    temporary = temporary_name(path)
    try:
        write_durable(temporary, pieces)
        _rename_new(temporary, path)
    except (FileExistsError, FileNotFoundError) as cause:
        if not path.exists():
            raise
        # a temporary file that is gone was removed with what killed writers had left: another one was first
        raise FileExistsError(errno.EEXIST, "it is there already", str(path)) from cause
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _rename_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, it takes nobody's place
    except OSError as cause:
        if cause.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, "it is there already", str(path)) from cause
        os.rename(temporary, path)


def remove_left_overs(folder: Path) -> None:
    """Removes what killed writers left under temporary names directly in a folder, if there is one.

    Not for a folder in which others still write: only a `write_new` whose file is there already bears it.
    """
    with contextlib.suppress(OSError):  # such as another user's, or a disk that is read-only: it is in nobody's way
        for name in filter(_TEMPORARY.fullmatch, os.listdir(folder)):
            (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def held(path: Path, what: str, *, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds a file's lock, which the kernel frees with this process, whatever becomes of it. The file stays.

    Args:
        path: Of the lock's file; it says who holds it.
        what: For the error, for example `the plan of this set`.
        waiting: Called with who holds it before this process waits; None: it does not wait.

    Raises:
        MachineError: Another process holds it, and this one does not wait; or the file system knows no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            file.seek(0)
            told = f"another process has {what} in hand: {file.read().strip() or 'it does not say which'}"
            if waiting is None:
                raise MachineError(told, where=path, remedy="wait for it, or end it first") from cause
            waiting(told)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as cause:
            if cause.errno not in _NO_LOCKS:
                raise
            raise MachineError(
                f"this file system has no locks, by which processes tell each other who has {what} in hand",
                where=path,
                remedy="name a folder on one that has: NFS does, and Lustre that is mounted with the option flock",
            ) from cause
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def write_text(path: Path, text: str) -> None:
    """`write_durable` for UTF-8 text."""
    write_durable(path, [text.encode()])


def write_json(path: Path, value: Any) -> None:
    """`write_durable` for JSON, indented, keys in the order given."""
    write_durable(path, [json_bytes(value)])


def json_bytes(value: Any) -> bytes:
    """JSON for a file of its own."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, *, error: type[PixArtError] = DataError, remedy: str | None = None) -> Any:
    """The value of a JSON file; `error` names the file if it is absent or not JSON."""
    try:
        text = path.read_bytes()
    except FileNotFoundError as cause:
        raise error(f"there is no file {path.name}", where=path, remedy=remedy) from cause
    return parse_json(text, path, error=error, remedy=remedy)


def parse_json(text: bytes, where: Path, *, error: type[PixArtError] = DataError, remedy: str | None = None) -> Any:
    """The value of a JSON text; `error` says where it came from if it is not JSON."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as cause:
        raise error(f"{where.name} is not JSON: {cause}", where=where, remedy=remedy) from cause


def last_json_line(path: Path, tail_bytes: int = 8192) -> Any | None:
    """The value of a JSON-lines file's last whole line, or None; only the file's end is read."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - tail_bytes))
        tail = file.read()
    lines = tail[: tail.rfind(b"\n") + 1].splitlines()
    return parse_json(lines[-1], path) if lines else None


def append_json_line(path: Path, value: Any) -> None:
    """Appends one JSON object as a line, in one write (whole lines even with several writers on a local disk)."""
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path, *, torn_ok: bool = False) -> Iterator[Any]:
    """The values of a JSON-lines file; a torn last line (a killed writer) is left out, a torn inner one raises, or, with `torn_ok`,
    is left out, too.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    last = len(lines) - 1
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as cause:
            if torn_ok:
                continue
            if number == last:  # no newline behind it: it was never finished
                return
            raise DataError(f"line {number + 1} is not JSON: {line[:80]!r}", where=path) from cause


def make_numbered(parent: Path, width: int = 4) -> tuple[int, Path]:
    """Takes the next free number under `parent` by an exclusive mkdir, so that two processes never share one.

    Returns:
        The number (from 1) and its folder.
    """
    parent.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
    while True:
        folder = parent / f"{number:0{width}d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        sync_folder(parent)
        return number, folder
