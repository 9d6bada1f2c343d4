"""The node: its clock, disks, limits, and the packages that are installed."""

from __future__ import annotations

import os
import platform
import re
import resource
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pixart_ds import files
from pixart_ds.doctor.ask import program
from pixart_ds.doctor.check import Check, failed, ok, skipped, warning
from pixart_ds.doctor.subject import Subject
from pixart_ds.log import si

_LATE_S, _WRONG_S = 5.0, 60.0
"""A clock that is a minute off makes signs of life look dead (execution.deadlines.silence)."""
_LOGS_BYTES = 100_000_000
"""Beside checkpoints: logs, metrics, previews of an attempt."""
_STATE_BYTES = {"fp16": 18, "bf16": 18, "fp32": 20}
"""Of a checkpoint for each parameter: weights, fp32 master, two moments and EMA."""
_CACHE_BYTES = (500_000_000, 10_000_000_000)
_TMP_BYTES = (50_000_000, 1_000_000_000)
_INODES = (1_000, 20_000)
_SHM_BYTES = (32 << 20, 512 << 20)
_OPEN_FILES = (256, 4096)
_QUOTA_S = 10.0

# ---- judgements: pure --------------------------------------------------------------------------------------------------


def judge_clock(name: str, skew_s: float, other: str) -> Check:
    """How far this node's clock is from another one.

    Args:
        name: Of the check.
        skew_s: This clock minus the other.
        other: Whose, in words.
    """
    seen = f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} {other}"
    if abs(skew_s) < _LATE_S:
        return ok(name, f"within {_LATE_S:.0f} s of {other} ({skew_s:+.1f} s)")
    remedy = "have the node's clock set (chrony, ntp)"
    return failed(name, seen, remedy) if abs(skew_s) > _WRONG_S else warning(name, seen, remedy)


@dataclass(frozen=True)
class Space:
    """What a file system says of itself.

    Attributes:
        free_bytes: For this user.
        free_inodes: None where it does not count them.
    """

    free_bytes: int
    free_inodes: int | None

    @classmethod
    def of(cls, folder: Path) -> Space:
        """Of the nearest folder above that is there."""
        said = os.statvfs(existing(folder))
        return cls(said.f_bavail * said.f_frsize, said.f_favail if said.f_files else None)


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    return next((each for each in (folder, *folder.parents) if each.is_dir()), Path("/"))


def judge_space(name: str, place: str, space: Space, bounds: tuple[int, int], why: str, remedy: str) -> Check:
    """Whether there is room.

    Args:
        name: Of the check.
        place: Which disk, in words.
        space: What it says.
        bounds: Bytes below which it fails, and below which it is a warning.
        why: What needs the room.
        remedy: Where there is none.
    """
    inodes = "inodes not counted" if space.free_inodes is None else f"{space.free_inodes:,} inodes"
    seen = f"{place}: {si(space.free_bytes, 'B')} and {inodes} free"
    least, enough = bounds
    if space.free_bytes < least:
        return failed(name, f"{seen}; {si(least, 'B')} are needed for {why}", remedy)
    if space.free_inodes is not None and space.free_inodes < _INODES[0]:
        return failed(name, f"{seen}; below {_INODES[0]:,} inodes", "delete or pack small files, or name another place")
    if space.free_bytes < enough:
        return warning(name, f"{seen}; {si(enough, 'B')} would be enough for {why}", remedy)
    if space.free_inodes is not None and space.free_inodes < _INODES[1]:
        return warning(
            name, f"{seen}; below {_INODES[1]:,} inodes", "delete or pack small files, or name another place"
        )
    return ok(name, seen)


def judge_shm(size: int | None, free: int, *, on_gpu: bool) -> Check:
    """Whether /dev/shm holds what NCCL exchanges within a node; None: it is not there."""
    name, remedy = (
        "machine.shm",
        "enlarge it: mount -o remount,size=…; in a container --shm-size or a mount of the host's",
    )
    if size is None:
        return failed(name, "there is no /dev/shm", remedy) if on_gpu else warning(name, "there is no /dev/shm", remedy)
    seen = f"{si(free, 'B')} of {si(size, 'B')} free"
    if free < _SHM_BYTES[0] and on_gpu:
        return failed(name, f"{seen}: too little for NCCL", remedy)
    return (
        warning(name, f"{seen}: little for NCCL between many GPUs", remedy) if free < _SHM_BYTES[1] else ok(name, seen)
    )


def judge_files(soft: int, hard: int) -> Check:
    """Whether a process may open as many files as its shards and connections take."""
    name, remedy = (
        "machine.open_files",
        "ulimit -n 65536 in the job's set-up (slurm/setup.sh, or `setup` of the profile)",
    )
    seen = f"a process may open {'any number of' if soft == resource.RLIM_INFINITY else f'{soft:,}'} files"
    if soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES[1]:
        return ok(name, seen)
    seen += f" (it may ask for {'any number' if hard == resource.RLIM_INFINITY else f'{hard:,}'})"
    return failed(name, seen, remedy) if soft < _OPEN_FILES[0] else warning(name, seen, remedy)


def judge_quota(text: str) -> Check:
    """What `quota` prints: a star stands behind what is above the limit."""
    over = [" ".join(line.split()) for line in text.splitlines() if re.search(r"\d\*", line)]
    if over:
        return failed("machine.quota", f"above the quota: {'; '.join(over)}", "delete files, or have the quota raised")
    return ok("machine.quota", "no quota is exceeded" if text.strip() else "no quota is set")


def judge_packages(
    wanted: Sequence[str], pinned: Mapping[str, str], installed: Mapping[str, str | None], python: tuple[str, str]
) -> Check:
    """Whether what is installed is what the package was written for.

    Args:
        wanted: Requirements, as pyproject.toml writes them.
        pinned: Versions of the pinned list, which counts as well where it is newer.
        installed: By name; None: it is not.
        python: Its version, and the range that is wanted.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    name, remedy = (
        "machine.packages",
        "make setup, in the checkout; on a site's own python: pip install -r requirements.txt",
    )
    missing: list[str] = []
    wrong: list[str] = []
    if not SpecifierSet(python[1]).contains(python[0]):
        missing.append(f"Python {python[0]} is not {python[1]}")
    needs = [Requirement(text) for text in wanted]
    needs = [
        need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})
    ]  # no tools of developers
    for need in needs:
        have = installed.get(need.name)
        if have is None:
            missing.append(f"{need.name} is not installed")
        elif not need.specifier.contains(have, prereleases=True) and have != pinned.get(need.name):
            exact = any(each.operator == "==" for each in need.specifier)  # private names of it are used
            (missing if exact else wrong).append(f"{need.name} {have} is not {need.specifier}")
    if missing:
        return failed(name, "; ".join(missing + wrong), remedy)
    if wrong:
        return warning(name, "; ".join(wrong), remedy)
    return ok(name, f"Python {python[0]}, and {len(needs)} packages in their ranges")


def checkpoint_bytes(subject: Subject) -> int:
    """Of one checkpoint of the stage, by the net's size; 0 without a stage."""
    from pixart_ds.plan.counts import Net, parameters

    if subject.stage is None:
        return 0
    return sum(parameters(Net.of(subject.stage.model)).values()) * _STATE_BYTES[subject.stage.precision]


# ---- probes ------------------------------------------------------------------------------------------------------------


def run_folder(subject: Subject) -> Check:
    """A file is written, read and removed in the run's folder; its date tells the file system's clock."""
    name = "machine.run_folder"
    if subject.run is None:
        return skipped(name, "no run was given")
    folder = _home(subject)
    remedy = "make the folder writable for you on this node, or see that its file system is mounted here"
    path = files.temporary_name(folder / f"doctor-{subject.host}")
    content = os.urandom(4096)
    try:
        try:
            files.write_durable(path, [content])
            if path.read_bytes() != content:
                return failed(
                    name, f"{folder}: a file reads otherwise than it was written", "have the file system checked"
                )
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        return failed(name, f"{folder}: {error.strerror}", remedy)
    return ok(name, f"{folder} can be written and read")


def clock(subject: Subject) -> Check:
    """This node's clock against the date that the run's file system gives a new file."""
    name = "machine.clock"
    if subject.run is None:
        return skipped(name, "no run was given, whose file system has a clock")
    path = files.temporary_name(_home(subject) / f"doctor-{subject.host}")
    try:
        try:
            path.write_bytes(b"0")
            before = time.time()
            os.utime(path)  # as now, by the file system's own word
            skew_s = (before + time.time()) / 2 - path.stat().st_mtime
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        return skipped(name, f"no file can be made in the run's folder ({error.strerror}): see machine.run_folder")
    return judge_clock(name, skew_s, "the run's file system")


def run_space(subject: Subject) -> Check:
    name = "machine.run_space"
    if subject.run is None:
        return skipped(name, "no run was given")
    folder, own = _home(subject), checkpoint_bytes(subject)
    elsewhere = subject.stage is not None and subject.run.stage(subject.stage.name).checkpoints_elsewhere.exists()
    if elsewhere:
        own = 0
    bounds = own + _LOGS_BYTES, 2 * own + _LOGS_BYTES
    why = f"a checkpoint of {si(own, 'B')} with logs" if own else "an attempt's logs"
    remedy = "free or enlarge the disk, or start a run elsewhere (checkpoint.path for checkpoints alone)"
    return judge_space(name, str(folder), Space.of(folder), bounds, why, remedy)


def cache_space(subject: Subject) -> Check:
    """The node's own disk that shards are copied to."""
    name = "machine.cache_space"
    if subject.stage is None:
        return skipped(name, "no run was given")
    cache = (subject.profile.cache if subject.profile else None) or subject.stage.execution.cache
    if cache.mode == "shared":
        return skipped(name, "execution.cache.mode shared: nothing is copied to the node")
    folder = cache_folder(subject)
    enough = _CACHE_BYTES[1] if cache.limit_gb is None else int(cache.limit_gb * 1e9)
    bounds = min(_CACHE_BYTES[0], enough), enough
    remedy = "free the node's disk, name another one (execution.cache.folder), or read in place (execution.cache.mode shared)"
    space = Space.of(folder)
    if space.free_bytes < enough:  # what is cached already makes room
        space = Space(space.free_bytes + _cached_bytes(folder), space.free_inodes)
    return judge_space(name, str(folder), space, bounds, "the cache of shards", remedy)


def _cached_bytes(folder: Path) -> int:
    """Of the shards in a cache; they may come and go meanwhile."""
    found = 0
    for path in folder.rglob("*.mds"):
        with suppress(OSError):
            found += path.stat().st_blocks * 512
    return found


def tmp_space(subject: Subject) -> Check:
    folder = Path(subject.environment.get("TMPDIR", "/tmp"))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "cannot be written" if folder.is_dir() else "is not there"
        return failed("machine.tmp_space", f"TMPDIR {folder} {what}", "name another folder in TMPDIR")
    remedy = "free the disk, or name another folder in TMPDIR"
    return judge_space("machine.tmp_space", str(folder), Space.of(folder), _TMP_BYTES, "temporary files", remedy)


def shm(subject: Subject) -> Check:
    on_gpu = subject.device == "cuda"
    try:
        said = os.statvfs("/dev/shm")
    except OSError:
        return judge_shm(None, 0, on_gpu=on_gpu)
    return judge_shm(said.f_blocks * said.f_frsize, said.f_bavail * said.f_frsize, on_gpu=on_gpu)


def quota(subject: Subject) -> Check:
    answer = program("quota", "-w", timeout_s=_QUOTA_S)
    if answer is None:
        return skipped("machine.quota", "there is no program quota here; run_space is what statvfs says")
    if answer.returncode and not answer.stdout.strip():
        return skipped("machine.quota", f"quota says nothing: {' '.join(answer.stderr.split()) or answer.returncode}")
    return judge_quota(answer.stdout)


def open_files(subject: Subject) -> Check:
    return judge_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def packages(subject: Subject) -> Check:
    wanted, python, pinned = _requirements()
    if not wanted:
        return skipped(
            "machine.packages", "the package says nowhere what it requires: neither pyproject.toml nor metadata"
        )
    from packaging.requirements import Requirement

    names = [Requirement(text).name for text in wanted]
    installed: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return judge_packages(wanted, pinned, installed, (platform.python_version(), python))


def _requirements() -> tuple[list[str], str, dict[str, str]]:
    """Requirements, range of Python, and pinned versions: of the checkout, else of what was installed."""
    root = Path(__file__).resolve().parents[3]
    pins = root / "requirements.txt"
    found = re.findall(r"^([\w.-]+)==(\S+)", pins.read_text(), re.MULTILINE) if pins.is_file() else []
    if (root / "pyproject.toml").is_file():
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        return list(project["dependencies"]), project["requires-python"], dict(found)
    try:
        about = metadata.metadata("pixart-ds")
    except metadata.PackageNotFoundError:
        return [], "", {}
    return metadata.requires("pixart-ds") or [], about["Requires-Python"], dict(found)


def _home(subject: Subject) -> Path:
    """The stage's folder, or the run's."""
    assert subject.run is not None
    return subject.run.root if subject.stage is None else subject.run.stage(subject.stage.name).root


def cache_folder(subject: Subject) -> Path:
    """Where the node's copies of shards lie, as `data.cache` chooses it; nothing is made there."""
    assert subject.stage is not None
    cache = (subject.profile.cache if subject.profile else None) or subject.stage.execution.cache
    if cache.folder:
        return Path(cache.folder)
    return Path(subject.environment.get("TMPDIR", "/tmp")) / f"pixart_ds-{os.getuid()}"


QUICK = (run_folder, clock, run_space, cache_space, tmp_space, shm)
FULL = (*QUICK, quota, open_files, packages)
