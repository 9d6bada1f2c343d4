"""The code that a run's attempts run: a copy in the run, so that editing the checkout changes no job that waits.

code/current.json              which copy counts
code/history.jsonl             a line for each time that one was chosen
code/<hash>/                   package, recipes, DeepSpeed files, slurm/ and lists of requirements, as in a checkout
"""

from __future__ import annotations

import datetime
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.config import deepspeed, profile
from pixart_ds.errors import ConfigError
from pixart_ds.layout import FROZEN_NAME, RunLayout
from pixart_ds.train.attempt import code_commit

_PACKAGE = Path(__file__).resolve().parents[1]
_LEFT_OUT = ("__pycache__", ".pyc", ".tmp", ".swp")
_LISTS = ("pyproject.toml", "requirements.txt", "requirements-cuda.txt")


@dataclass(frozen=True)
class Frozen:
    """A copy of the code.

    Attributes:
        folder: Put it first on Python's path.
        hash: Of all files and their names.
        commit: What the checkout's git said; None outside of one.
        changed: Whether the checkout had changes that were not committed.
        new: Whether it was copied just now.
    """

    folder: Path
    hash: str
    commit: str | None
    changed: bool
    new: bool

    def __str__(self) -> str:
        what = f"commit {self.commit[:12]}" if self.commit else "no checkout"
        return f"{self.hash} ({what}{', with changes' if self.changed else ''})"


def freeze(run: RunLayout, by: str, *, update: bool = False, dry_run: bool = False) -> Frozen:
    """The run's copy of the code; made now if there is none, or anew from this process's code with `update`.

    Args:
        run: The run.
        by: Who asks for it, for the record.
        update: Copy what this process runs in place of what was frozen before, which stays for jobs that run it.
        dry_run: Copy nothing, and say what would be.
    """
    if not update:
        if (before := current(run)) is not None:
            return before
    elif (_PACKAGE.parent / FROZEN_NAME).exists():
        raise ConfigError(
            "this process runs a frozen copy itself, and has no other code to take",
            where=_PACKAGE.parent,
            remedy="call --update-code from the checkout: pixart-ds launch … --update-code",
        )
    before_hash = _recorded(run)
    here = _files()
    found = _hash(here)
    folder = run.code / found
    changes = before_hash != found
    if dry_run:
        return Frozen(folder.absolute(), found, code_commit(), _changed(), changes)
    if not (folder / FROZEN_NAME).exists():
        run.code.mkdir(exist_ok=True)
        temporary = files.temporary_name(folder)
        for name, path in here.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, temporary / name)
        about = {"hash": found, "commit": code_commit(), "changed": _changed(), "files": len(here)}
        files.write_json(temporary / FROZEN_NAME, about)
        if folder.exists():  # damaged, or being made: it is kept for a person to see
            os.rename(folder, files.temporary_name(folder))
        try:
            os.rename(temporary, folder)
        except OSError:  # another process has made the same copy meanwhile
            shutil.rmtree(temporary)
    if changes:
        files.write_json(run.code / "current.json", {"hash": found})
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        files.append_json_line(
            run.code / "history.jsonl", {"hash": found, "replaces": before_hash, "by": by, "at": now}
        )
    chosen = current(run)
    assert chosen is not None
    return replace(chosen, new=changes)


def current(run: RunLayout) -> Frozen | None:
    """The copy that counts; None if the run has none.

    Raises:
        ConfigError: It is recorded, but gone.
    """
    if (recorded := _recorded(run)) is None:
        return None
    folder = run.code / recorded
    about = files.read_json(
        folder / FROZEN_NAME,
        error=ConfigError,
        remedy="the run's copy of the code is damaged: freeze it anew with --update-code",
    )
    return Frozen(folder.absolute(), about["hash"], about["commit"], about["changed"], new=False)


def _recorded(run: RunLayout) -> str | None:
    """The hash of the copy that counts; None if there is none."""
    path = run.code / "current.json"
    if not path.exists():
        return None
    found: str = files.read_json(path, error=ConfigError)["hash"]
    return found


def runs_here(frozen: Frozen) -> bool:
    """Whether this process runs that copy."""
    return _PACKAGE.parent == frozen.folder.resolve()


def hash_here() -> str:
    """The hash of the code that this process runs; a frozen copy has its original's."""
    return _hash(_files())


def replace_process(frozen: Frozen, arguments: Sequence[str], variables: Mapping[str, str]) -> None:
    """Becomes `pixart-ds ARGUMENTS` of the copy; does not return.

    PYTHONSAFEPATH keeps the folder that a job was submitted from, which may be a checkout, off Python's path.
    """
    path = os.pathsep.join([str(frozen.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **variables}
    os.execve(sys.executable, [sys.executable, "-m", "pixart_ds", *arguments], environment)


def _files() -> dict[str, Path]:
    """What is copied: name in the copy → file."""
    folders = {"pixart_ds": _PACKAGE}
    folders["ds_configs"] = next(each for each in deepspeed.FOLDERS if each.is_dir())
    folders["slurm"] = profile.slurm_folder()
    found = {
        f"{name}/{path.relative_to(folder)}": path
        for name, folder in folders.items()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part in str(path.relative_to(folder)) for part in _LEFT_OUT)
    }
    lists = {name: _PACKAGE.parent / name for name in _LISTS}
    return found | {name: path for name, path in lists.items() if path.is_file()}


def _hash(here: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name in sorted(here):
        content = here[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _changed() -> bool:
    """Whether the checkout differs from its commit; of a frozen copy, what it says of itself."""
    about = _PACKAGE.parent / FROZEN_NAME
    if about.exists():
        known: dict[str, Any] = files.read_json(about)
        return bool(known["changed"])
    what = ("pixart_ds", "ds_configs", "slurm", *_LISTS)
    command = ["git", "-C", str(_PACKAGE.parent), "status", "--porcelain", "--", *what]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # a compute node without git
        return False
    return bool(answer.stdout.strip())
