#!/usr/bin/env python
"""Trains a small stage while things break, and proves that nothing was lost: faults drawn from a seed, restarts at random worlds.

    python tools/chaos.py --faults 100 --seed 7 --out chaos-runs/seven

A small set is drawn and prepared; in it one sample's latents are no numbers. One stage is trained on it without interruption, for
reference. The same recipe is then trained while faults befall it, each drawn before the start: which, when (at a step, or seconds
after the fault before it), and whom. Whenever the supervisor has ended, `pixart-ds train` is started again with 1 to 4 ranks, as a
queue would. After every ending: exit code and outcome are what the faults allow, no launch failed by itself, no rank is left, the
newest whole checkpoint is not older than before, saves.jsonl agrees with what is stored. At the end the audit proves the run; its
samples and draws are the reference's, and so are its losses, over the first fifty steps to 1e-5.

Seed and plan are printed; the same seed plans the same faults. What they meet still depends on the machine's speed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import xxhash

from pixart_ds import files
from pixart_ds.data.mds import FolderSource, ShardIndex
from pixart_ds.engine import line
from pixart_ds.engine.checkpoint import Reader
from pixart_ds.engine.storage import FolderStorage, read, storage_of
from pixart_ds.errors import EXIT_BUG, EXIT_DONE, EXIT_MACHINE, EXIT_STOPPED, PixArtError
from pixart_ds.layout import MARKER_NAME, CheckpointName, RunLayout, StageLayout

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "kill-rank": 5,
    "term-rank": 3,
    "stop-rank": 2,
    "kill-supervisor": 3,
    "term-supervisor": 3,
    "stop-file": 1,
    "full-disk": 1,
    "flip-bit": 2,
    "truncate": 2,
    "lose-file": 1,
    "damage-marker": 1,
    "outage": 3,
}
"""Each fault that can be asked for, and how often it comes in relation to the others."""
_DAMAGES = ("flip-bit", "truncate", "lose-file", "damage-marker")
_STOPPING = ("term-rank", "term-supervisor", "stop-file", "kill-supervisor", "full-disk")
"""After these the supervisor ends, if they meet ranks that train."""
ENDINGS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("kill-rank", "stop-rank", *_DAMAGES), (EXIT_BUG,)),
    "term-rank": (EXIT_STOPPED, EXIT_BUG),
    "term-supervisor": (EXIT_STOPPED, -signal.SIGTERM),
    "kill-supervisor": (-signal.SIGKILL,),
    "stop-file": (EXIT_STOPPED,),
    "full-disk": (EXIT_MACHINE,),
    "outage": (),
}
"""Exit codes of a supervisor that a fault allows: 70 where ranks crashed too often in a row, -15 before it has its handlers."""

BATCH, PICTURES, STEPS_PER_FAULT, EVERY, CLOSE, BOUND = 16, 120, 8, 3, 50, 1e-5
WORLDS = (1, 2, 3, 4)
RETRIES = 3
SILENCE_S, START_S = 20.0, 180.0
"""The deadlines of these runs: without a sign of life; from a rank's start to its first step."""
LEAVE_S, STUCK_S = 60.0, 600.0
"""How long ranks may outlive their supervisor, and how long training may stand still after a fault."""
DISK_BYTES = 256 << 20
_POLL_S = 0.03


class Violation(Exception):
    """Something that must hold does not."""


def main() -> int:
    options = _parser().parse_args()
    options.seed = random.SystemRandom().randrange(1, 10**6) if options.seed is None else options.seed
    folder = options.out or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    said = sys.stderr if options.json else sys.stdout
    chaos: Chaos | None = None

    def say(text: str) -> None:
        print(text, file=said, flush=True)

    say(f"seed {options.seed}")
    if any(folder.iterdir()):
        say(f"{folder} is not empty: give another --out, or remove it")
        return 2
    if unknown := [kind for kind in options.kinds.split(",") if kind not in KINDS]:
        say(f"there is no fault {' or '.join(unknown)}; there are {', '.join(KINDS)}")
        return 2
    try:
        with contextlib.ExitStack() as stack:
            chaos = Chaos(options, folder, say, stack)
            answer = chaos.run()
    except (Violation, PixArtError, subprocess.CalledProcessError) as error:
        say(f"\nFAILED: {error}\n")
        say(f"everything is kept in {folder}; the same faults again:\n  {replay(options)}")
        return 1
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        print(page(answer))
    if options.keep:
        say(f"kept in {folder}")
    else:
        shutil.rmtree(folder)
    return 0


def replay(options: Namespace) -> str:
    """The command that plans the same faults."""
    words = ["python", "tools/chaos.py", "--faults", options.faults, "--seed", options.seed, "--kinds", options.kinds]
    words += ["--store", "s3"] if options.store else []
    words += ["--no-nan"] if options.no_nan else []
    return shlex.join([*map(str, words), "--out", "FOLDER"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20, help="how many (default 20); the stage's length follows")
    parser.add_argument("--seed", type=int, help="of the faults and worlds (default: drawn, and printed)")
    parser.add_argument("--out", type=Path, help="an empty folder (default: a temporary one)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"only these, joined by commas: {', '.join(KINDS)}")
    parser.add_argument("--store", choices=("s3",), help="set and checkpoints in an OpenStack Swift; outages need it")
    parser.add_argument("--no-nan", action="store_true", help="a set without a sample that is no number")
    parser.add_argument("--keep", action="store_true", help="keep the folder also if all went well")
    parser.add_argument("--json", action="store_true", help="the figures as JSON; what happens goes to stderr")
    return parser


# ---- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One fault as it was drawn.

    Attributes:
        number: From 1.
        kind: Of KINDS.
        step: It is due when this step has been trained …
        after_s: … and this many seconds have passed. If `at_once`: so long after the fault before it, if that is earlier.
        at_once: As a rule it meets the recovery from the fault before it.
        whom: In [0, 1): which rank, file, byte.
        seconds: How long a store is away.
    """

    number: int
    kind: str
    step: int
    after_s: float
    at_once: bool
    whom: float
    seconds: float

    def __str__(self) -> str:
        when = (
            f"{self.after_s:.1f} s later, or at step {self.step}"
            if self.at_once
            else f"at step {self.step} + {self.after_s:.1f} s"
        )
        return f"fault {self.number} {self.kind} ({when})"


def steps_for(faults: int) -> int:
    """How long a stage must be for so many faults."""
    return max(CLOSE + 10, STEPS_PER_FAULT * (faults + 2))


def plan(seed: int, count: int, kinds: Sequence[str]) -> list[Fault]:
    """The faults of a seed, in their sequence: each kind at least once, if there are enough; a quarter follow at once."""
    chance = random.Random(f"faults {seed}")
    chosen = chance.sample(kinds, min(count, len(kinds)))
    chosen += chance.choices(kinds, [KINDS[kind] for kind in kinds], k=count - len(chosen))
    chance.shuffle(chosen)
    total = steps_for(count)
    found = []
    for number, kind in enumerate(chosen, start=1):
        at_once = number > 1 and chance.random() < 0.25
        found.append(
            Fault(
                number,
                kind,
                step=round((number - chance.random()) * (total - 2 * STEPS_PER_FAULT) / count) + 1,
                after_s=chance.uniform(0, 8) if at_once else chance.uniform(0, 0.1),
                at_once=at_once,
                whom=chance.random(),
                seconds=chance.uniform(3, 20),
            )
        )
    return found


# ---- the set ----------------------------------------------------------------------------------------------------------


def pixart(*words: object) -> subprocess.CompletedProcess[str]:
    """A command of ours.

    Raises:
        Violation: It failed.
    """
    answer = subprocess.run(_command(*words), capture_output=True, text=True, check=False, cwd=ROOT, env=_environment())
    if answer.returncode:
        raise Violation(f"pixart-ds {words[0]} ended with {answer.returncode}:\n{answer.stdout}{answer.stderr}")
    return answer


def _command(*words: object) -> list[str]:
    return [sys.executable, "-m", "pixart_ds", *map(str, words)]


def _environment() -> dict[str, str]:
    slurm_free = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return {**slurm_free, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def make_set(folder: Path, *, nan: bool) -> Path:
    """A small prepared set; with `nan` one sample's latents are no numbers."""
    from pixart_ds.demo.pictures import write_pictures

    write_pictures(folder / "pictures", PICTURES, seed=1)
    encoders = ROOT / "pixart_ds/demo/encoders"
    places = {"source.path": folder / "pictures", "output": folder / "set"}
    places |= {"vae": encoders / "vae", "text_encoder": encoders / "text"}
    pixart("prepare", "smoke/prepare", *_sets(f"{key}={path}" for key, path in places.items()))
    if nan:
        poison(folder / "set", "40-buckets")
    return folder / "set"


def _sets(values: Iterator[str] | Sequence[str]) -> list[str]:
    return [word for each in values for word in ("--set", each)]


def poison(folder: Path, latents: str) -> None:
    """Makes the first sample's latents NaN, as a broken encoder would have written them: all hashes are right."""
    index_file = folder / f"latents-{latents}" / "index.json"
    raw = index_file.read_bytes()
    index = json.loads(raw)
    first = index["shards"][0]
    shards = FolderSource(ShardIndex.parse(raw, index_file), index_file.parent)
    values = shards.open(0).read(0)["latents"]
    shard = index_file.parent / first["raw_data"]["basename"]
    content = shard.read_bytes().replace(values, struct.pack("<e", float("nan")) * (len(values) // 2), 1)
    shard.write_bytes(content)
    first["raw_data"]["hashes"]["xxh3_64"] = xxhash.xxh3_64_hexdigest(content)
    index_file.write_text(json.dumps(index))
    manifest = files.read_json(folder / "manifest.json")
    manifest["fingerprint"] = hashlib.blake2b(content, digest_size=16).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


# ---- what is around a run ---------------------------------------------------------------------------------------------


class Store:
    """OpenStack Swift on a folder, which can go away and come back at the same address."""

    bucket = "chaos"

    def __init__(self, root: Path) -> None:
        setup = ["bash", str(ROOT / "tools/s3_setup.sh"), str(ROOT / ".venv-swift")]
        subprocess.run(setup, check=True, env={**os.environ, "PYTHON": sys.executable}, stdout=sys.stderr)
        self._root, self._port = root, "0"
        self._process: subprocess.Popen[str] | None = None
        self._back_at: float | None = None

    def __enter__(self) -> Self:
        self._start()
        for name in [name for name in os.environ if name.startswith(("AWS_", "S3_"))]:
            del os.environ[name]
        keys = {
            "AWS_ACCESS_KEY_ID": "chaos:chaos",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        os.environ.update({"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self._port}", "NO_PROXY": "127.0.0.1", **keys})
        self.client().create_bucket(Bucket=self.bucket)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def client(self) -> Any:
        from pixart_ds.s3 import s3_client

        return s3_client()

    @property
    def away(self) -> bool:
        return self._back_at is not None

    def go_away(self, seconds: float) -> None:
        """Kills it; `look` brings it back."""
        self._stop()
        self._back_at = time.monotonic() + seconds

    def look(self, *, now: bool = False) -> bool:
        """Whether it has come back in this moment."""
        if self._back_at is None or (time.monotonic() < self._back_at and not now):
            return False
        self._back_at = None
        self._start()
        return True

    def _start(self) -> None:
        python, server = ROOT / ".venv-swift/bin/python", ROOT / "tools/s3_server.py"
        options = ["--port", self._port, "--key", "chaos:chaos", "--secret", "secret", "--region", "us-east-1"]
        self._process = subprocess.Popen(
            [str(python), str(server), str(self._root), *options],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        ready = self._process.stdout.readline().split()
        if ready[:1] != ["READY"]:
            raise Violation(f"the object store did not start: {ready}")
        self._port = ready[1].rpartition(":")[2]

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class Disk:
    """A small file system in memory, for a run to fill; `folder` is on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def __enter__(self) -> Self:
        self.folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", self.folder], check=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()
        if kind is not None:  # the evidence
            shutil.copytree(self.folder, self.folder.with_name("kept"))
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    @staticmethod
    def is_possible() -> bool:
        """Whether this machine lets us mount one."""
        with tempfile.TemporaryDirectory() as name:
            mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", name], capture_output=True, check=False)
            if mounted.returncode == 0:
                subprocess.run(["umount", name], check=True)
        return mounted.returncode == 0

    @property
    def full(self) -> bool:
        return self._filler.exists()

    def fill(self) -> None:
        """To the last byte."""
        with open(self._filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 20)):
                pass

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)


@dataclass(frozen=True)
class Process:
    """A rank that runs: its number, process and state (R, S, T, …)."""

    rank: int
    pid: int
    state: str


def ranks_of(run: Path) -> list[Process]:
    """The rank processes of a run that are on this machine."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"pixart_ds.train.rank" not in words or str(run).encode() not in words:
                continue
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            told = dict(each.split(b"=", 1) for each in (folder / "environ").read_bytes().split(b"\0") if b"=" in each)
            if state != "Z" and b"RANK" in told:
                found.append(Process(int(told[b"RANK"]), int(folder.name), state))
    return sorted(found, key=lambda each: each.rank)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file: what a killed writer tore is left out."""
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


def final_rows(stage: StageLayout, name: str) -> dict[int, dict[str, Any]]:
    """By clock, the last line that was written of it."""
    rows = (row for attempt in stage.all_attempts() for row in rows_of(getattr(attempt, name)))
    return {row["images_seen"]: row for row in rows}


def newest_whole(stage: StageLayout) -> CheckpointName | None:
    """The checkpoint that a start must go on from."""
    for name in reversed(line.line(stage)):
        if _is_whole(stage, name):
            return name
    return None


def _is_whole(stage: StageLayout, name: CheckpointName) -> bool:
    try:
        Reader(storage_of(stage).sub(str(name)), str(name)).verify()
    except (PixArtError, KeyError, ValueError, TypeError, FileNotFoundError):
        return False
    return True


# ---- the run ----------------------------------------------------------------------------------------------------------


@dataclass
class Struck:
    """A fault that happened.

    Attributes:
        fault: Which.
        at: When, on the monotonic clock.
        start: The highest launch that had begun to train by then.
        disturbed: Another one came before training went on.
        recovered_s: Seconds until the end of the next step.
    """

    fault: Fault
    at: float
    start: tuple[int, int]
    disturbed: bool = False
    recovered_s: float | None = None


@dataclass
class Attempt:
    """A supervisor that runs, and what has befallen it."""

    process: subprocess.Popen[bytes]
    began: float
    world: int
    before: int
    faults: list[Fault] = field(default_factory=list)


class Chaos:
    """One stage under faults, and its reference.

    Args:
        options: The command's.
        folder: For everything.
        say: Where lines for people go.
        stack: Closes store and disk at the end.
    """

    def __init__(
        self, options: Namespace, folder: Path, say: Callable[[str], None], stack: contextlib.ExitStack
    ) -> None:
        self.options, self.folder, self.say = options, folder, say
        kinds = options.kinds.split(",")
        if options.store is None and "outage" in kinds:
            kinds.remove("outage")
            say("no outages: they need --store s3")
        if "full-disk" in kinds and not Disk.is_possible():
            kinds.remove("full-disk")
            say("no full disk: this machine lets us mount none")
        self.plan = plan(options.seed, options.faults, kinds)
        self.steps = steps_for(options.faults)
        self.store = stack.enter_context(Store(folder / "store")) if options.store else None
        self.disk = stack.enter_context(Disk(folder / "disk")) if "full-disk" in kinds else None
        self.run_folder = (self.disk.folder if self.disk else folder) / "broken"
        self.stage = RunLayout(self.run_folder).stage("stage1")
        self.worlds = random.Random(f"worlds {options.seed}")
        self.struck: list[Struck] = []
        self.damaged: dict[CheckpointName, tuple[int, int]] = {}
        self.floor = 0
        self.endings: Counter[str] = Counter()
        self.attempt: Attempt | None = None
        self._rows = 0
        stack.callback(self._end_all)

    def run(self) -> dict[str, Any]:
        """All of it; the figures as JSON.

        Raises:
            Violation: Something does not hold.
        """
        began = time.monotonic()
        data = str(make_set(self.folder, nan=not self.options.no_nan))
        if self.store:
            data = f"s3://{self.store.bucket}/set"
            pixart("upload", self.folder / "set", data)
        self.say(f"{self.steps} steps of {BATCH}; the reference first")
        whole = self._create(self.folder / "whole", data)
        reference_began = time.monotonic()
        answer = self._train(self.folder / "whole", 2).wait()
        if answer:
            raise Violation(f"the reference ended with {answer}: see {self.folder}/train.txt")
        reference_s = time.monotonic() - reference_began
        self._create(self.run_folder, data)
        self.say(f"it took {reference_s:.0f} s; now with {len(self.plan)} faults")
        broken_began = time.monotonic()
        self._until_done()
        broken_s = time.monotonic() - broken_began
        return {
            "seed": self.options.seed,
            "replay": replay(self.options),
            "store": self.options.store,
            "steps": self.steps,
            "images": self.steps * BATCH,
            "reference_s": round(reference_s, 1),
            "broken_s": round(broken_s, 1),
            "seconds": round(time.monotonic() - began, 1),
            **self._figures(),
            **compare(whole, self.stage, self.steps),
            "audit": self._audit(),
            "time": self._account(),
        }

    def _create(self, run: Path, data: str) -> StageLayout:
        values = [
            f"*.data.sets=[{{path: {data}}}]",
            f"*.global_batch_size={BATCH}",
            f"stage1.length.steps={self.steps}",
        ]
        values += [f"stage1.checkpoint.every.steps={EVERY}", "stage1.data.latents=40-buckets"]
        if self.store:
            values += [f"stage1.checkpoint.path=s3://{self.store.bucket}/runs"]
            values += [f"*.execution.cache={{mode: node-job, folder: {self.folder / 'cache'}}}"]
        pixart("create", run, "--chain", "smoke/chain", *_sets(values))
        return RunLayout(run).stage("stage1")

    def _train(self, run: Path, world: int) -> subprocess.Popen[bytes]:
        deadlines = {"silence": SILENCE_S, "start": START_S}
        words = ["train", run, "stage1", "--device", "cpu", "--processes", world, "--retries", RETRIES]
        words += _sets([f"execution.deadlines.{name}={seconds}" for name, seconds in deadlines.items()])
        with open(self.folder / "train.txt", "ab") as log:
            return subprocess.Popen(
                _command(*words),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=_environment(),
                start_new_session=True,
            )

    # ---- what happens ----------------------------------------------------------------------------------------------

    def _until_done(self) -> None:
        """Starts the stage as long as it is not done, and lets the faults befall it in their sequence."""
        waiting = list(self.plan)
        while not self.stage.done.exists():
            if self.attempt is None:
                self._start()
            assert self.attempt is not None
            self._look_around()
            if waiting and self._is_due(waiting[0]) and self._strike(waiting[0]):
                waiting.pop(0)
            if self.attempt.process.poll() is not None:
                self._ended()
            time.sleep(_POLL_S)
        if self.attempt is not None:
            self.attempt.process.wait()
            self._ended()
        if waiting:
            raise Violation(f"the stage was done before {len(waiting)} of the faults came")

    def _start(self) -> None:
        if self.stage.stop_request.exists():
            self.stage.stop_request.unlink()
        world, before = self.worlds.choice(WORLDS), len(self.stage.all_attempts())
        self.attempt = Attempt(self._train(self.run_folder, world), time.monotonic(), world, before)

    def _look_around(self) -> None:
        """Sees whether training goes on, and ends what is to end by itself."""
        if self.store and self.store.look():
            self.say("          the store is back")
        rows = sum(_lines(attempt.metrics) for attempt in self.stage.all_attempts()[-1:])
        grown, self._rows = rows > self._rows, rows
        open_ones = [each for each in self.struck if each.recovered_s is None]
        if grown and open_ones:
            now, start = time.monotonic(), self._newest_start()
            for each in open_ones:
                if start > each.start or each.fault.kind == "outage":
                    each.recovered_s = now - each.at
        if open_ones and time.monotonic() - open_ones[-1].at > STUCK_S:
            raise Violation(f"no step for {STUCK_S:.0f} s after {open_ones[-1].fault}")

    def _newest_start(self) -> tuple[int, int]:
        return max(line.read_starts(self.stage), default=(0, 0))

    def _is_due(self, fault: Fault) -> bool:
        last = self.struck[-1] if self.struck else None
        if fault.at_once and last is not None and time.monotonic() - last.at > fault.after_s:
            return True
        if last is not None and last.recovered_s is None:
            return False
        row = next((row for each in reversed(self.stage.all_attempts()) if (row := _last_row(each.metrics))), None)
        if row is None or row["step"] < fault.step:
            return False
        if not fault.at_once:
            time.sleep(fault.after_s)
        return True

    def _strike(self, fault: Fault) -> bool:
        """Lets a fault happen; False if it finds nothing to befall yet."""
        assert self.attempt is not None
        if self.attempt.process.poll() is not None or len(self.stage.all_attempts()) <= self.attempt.before:
            return False
        if (self.store and self.store.away) or (self.disk and self.disk.full):
            return False
        ranks = ranks_of(self.run_folder)
        start, at = self._newest_start(), time.monotonic()
        action: Callable[[Fault, list[Process]], str | None] = {
            "kill-rank": self._signal_rank,
            "term-rank": self._signal_rank,
            "stop-rank": self._signal_rank,
            "kill-supervisor": self._signal_supervisor,
            "term-supervisor": self._signal_supervisor,
            "stop-file": self._ask_by_file,
            "full-disk": self._fill_disk,
            "outage": self._outage,
        }.get(fault.kind, self._damage)
        told = action(fault, ranks)
        if told is None:
            return False
        for each in self.struck:
            each.disturbed |= each.recovered_s is None
        self.struck.append(Struck(fault, at, start))
        self.attempt.faults.append(fault)
        row = _last_row(self.stage.all_attempts()[-1].metrics)
        place = f"after step {row['step']}" if row else "before a step"
        self.say(f"{fault}: {told}, attempt {self.attempt.before + 1}, {self.attempt.world} ranks, {place}")
        return True

    def _signal_rank(self, fault: Fault, ranks: list[Process]) -> str | None:
        moving = [each for each in ranks if each.state != "T"]
        if not moving:
            return None
        number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}[fault.kind.split("-")[0]]
        chosen = moving[int(fault.whom * len(moving))]
        with contextlib.suppress(ProcessLookupError):
            os.kill(chosen.pid, number)
            return f"{number.name} to rank {chosen.rank}"
        return None

    def _signal_supervisor(self, fault: Fault, ranks: list[Process]) -> str | None:
        assert self.attempt is not None
        number = signal.SIGKILL if fault.kind == "kill-supervisor" else signal.SIGTERM
        self.attempt.process.send_signal(number)
        return f"{number.name} to the supervisor"

    def _ask_by_file(self, fault: Fault, ranks: list[Process]) -> str | None:
        if not ranks:
            return None
        self.stage.stop_request.touch()
        return "a stop file"

    def _fill_disk(self, fault: Fault, ranks: list[Process]) -> str | None:
        assert self.disk is not None
        if not ranks:
            return None
        self.disk.fill()
        return "the disk is full"

    def _outage(self, fault: Fault, ranks: list[Process]) -> str | None:
        assert self.store is not None
        self.store.go_away(fault.seconds)
        return f"the store goes away for {fault.seconds:.0f} s"

    def _damage(self, fault: Fault, ranks: list[Process]) -> str | None:
        """Kills a rank, and damages the newest checkpoint before the next launch reads it; a whole one is left behind it."""
        if not ranks or any(each.state == "T" for each in ranks):
            return None
        if len([name for name in line.line(self.stage)[-2:] if _is_whole(self.stage, name)]) < 2:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[int(fault.whom * len(ranks))].pid, signal.SIGKILL)
        self._wait_until_left({each.pid for each in ranks})
        names = line.line(self.stage)
        if len([name for name in names[-2:] if _is_whole(self.stage, name)]) < 2:
            return "a rank killed, but no checkpoint damaged: there is only one"
        what = damage(self.stage, names[-1], fault)
        self.damaged[names[-1]] = self._newest_start()
        whole = newest_whole(self.stage)
        assert whole is not None
        self.floor = whole.images_seen
        return f"a rank killed, and {names[-1]}: {what}"

    def _wait_until_left(self, pids: set[int]) -> None:
        until = time.monotonic() + LEAVE_S
        while left := [each.pid for each in ranks_of(self.run_folder) if each.pid in pids]:
            if time.monotonic() > until:
                raise Violation(f"ranks are still there {LEAVE_S:.0f} s after their supervisor or a peer ended: {left}")
            time.sleep(_POLL_S)

    # ---- what must hold --------------------------------------------------------------------------------------------

    def _ended(self) -> None:
        """Looks at what a supervisor has left behind."""
        assert self.attempt is not None
        ended, self.attempt = self.attempt, None
        code = ended.process.returncode
        if self.store:
            self.store.look(now=True)
        self._no_rank_is_left(code, ended.faults)
        if self.disk:
            self.disk.free()
        begun = self.stage.all_attempts()[ended.before :]
        if len(begun) > 1:
            raise Violation(f"one start made {len(begun)} attempts")
        outcome = files.read_json(begun[0].outcome) if begun and begun[0].outcome.exists() else None
        said = "no outcome" if outcome is None else outcome["outcome"]
        self.endings[f"{said}, {code}"] += 1
        cause = "" if outcome is None or not outcome["cause"] else f" ({outcome['cause'].splitlines()[0]})"
        self.say(f"          ended with {code}: {said}{cause}")
        check_ending(code, outcome, ended.faults, done=self.stage.done.exists())
        self._checkpoints_hold()

    def _no_rank_is_left(self, code: int, faults: Sequence[Fault]) -> None:
        """All ranks leave soon. A rank that we stopped cannot: then the rest is killed, as a scheduler does at the end of a job."""
        ranks = ranks_of(self.run_folder)
        if code >= 0 and ranks:
            # a full disk may end the supervisor just after it started ranks, who hear of its end from the kernel and leave
            full = code == EXIT_MACHINE and any(fault.kind == "full-disk" for fault in faults)
            until = time.monotonic() + (LEAVE_S if full else 0.5)
            while (ranks := ranks_of(self.run_folder)) and time.monotonic() < until:
                time.sleep(_POLL_S)
            if ranks:
                raise Violation(f"the supervisor ended with {code} and left ranks behind: {ranks}")
        if any(each.state == "T" for each in ranks):
            for each in ranks:
                os.kill(each.pid, signal.SIGKILL)
        self._wait_until_left({each.pid for each in ranks})

    def _checkpoints_hold(self) -> None:
        """No whole checkpoint was lost, no damaged one was used, and saves.jsonl says what there is."""
        newest = newest_whole(self.stage)
        clock = 0 if newest is None else newest.images_seen
        if clock < self.floor:
            raise Violation(f"the newest whole checkpoint is {newest}, but there had been one at {self.floor} images")
        self.floor = clock
        for number, start in line.read_starts(self.stage).items():
            if start.origin in self.damaged and number > self.damaged[start.origin]:
                raise Violation(f"launch {number} started from {start.origin}, which had been damaged")
        check_saves(self.stage, set(self.damaged))

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _figures(self) -> dict[str, Any]:
        """Faults by kind with the seconds from each to the next step, launches, checkpoints passed over."""
        by_kind: dict[str, list[Struck]] = defaultdict(list)
        for each in self.struck:
            by_kind[each.fault.kind].append(each)
        kinds = {}
        for kind, all_of in sorted(by_kind.items()):
            alone = [each.recovered_s for each in all_of if each.recovered_s is not None and not each.disturbed]
            seconds = {"mean_s": round(statistics.mean(alone), 2), "worst_s": round(max(alone), 2)} if alone else {}
            kinds[kind] = {"faults": len(all_of), "undisturbed": len(alone), **seconds}
        attempts = self.stage.all_attempts()
        logs = [each.log.read_text(errors="replace") for each in attempts if each.log.exists()]
        return {
            "faults": len(self.struck),
            "by_kind": kinds,
            "attempts": len(attempts),
            "launches": len(line.read_starts(self.stage)),
            "endings": dict(self.endings.most_common()),
            "checkpoints_damaged": len(self.damaged),
            "checkpoints_passed_over": sum(text.count("passed over:") for text in logs),
        }

    def _audit(self) -> dict[str, Any]:
        (stage,) = json.loads(pixart("audit", self.run_folder, "--json").stdout)["stages"]
        if stage["violation"] is not None or stage["proven"]["steps"] != self.steps:
            raise Violation(f"the audit proves {stage['proven']} of {self.steps} steps")
        return {
            "proven_steps": stage["proven"]["steps"],
            "rework_steps": stage["rework"]["steps"],
            "refused_steps": stage["skipped_steps"],
        }

    def _account(self) -> dict[str, float]:
        """Where the ranks' time went, in parts of it, by the ledger: it must have lost none of what was killed."""
        values = json.loads(pixart("cost", self.run_folder, "--no-sacct", "--format", "json").stdout)
        (run,), whole = values["runs"], values["account"]["device_seconds"]
        parts: dict[str, float] = values["account"]["parts"]
        if run["problems"] and not all("is cut off" in problem for problem in run["problems"]):
            raise Violation(f"the ledger cannot be read: {run['problems']}")
        if abs(sum(parts.values()) - whole) > 0.1 or min(parts.values()) < 0:
            raise Violation(f"the ledger's parts {parts} are not its {whole} device-seconds")
        if values["account"]["images_gained"] != self.steps * BATCH:
            raise Violation(f"the ledger counts {values['account']['images_gained']} images, not {self.steps * BATCH}")
        return {name: round(seconds / whole, 4) for name, seconds in parts.items()}

    def _end_all(self) -> None:
        """Whatever still runs, if we leave early."""
        if self.attempt is not None and self.attempt.process.poll() is None:
            self.attempt.process.kill()
            self.attempt.process.wait()
        for each in ranks_of(self.run_folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGKILL)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _last_row(path: Path) -> dict[str, Any] | None:
    """The last line, if it is whole."""
    with contextlib.suppress(PixArtError):
        row: dict[str, Any] | None = files.last_json_line(path)
        return row
    return None


def damage(stage: StageLayout, name: CheckpointName, fault: Fault) -> str:
    """Damages a checkpoint's file as the fault says; what was done."""
    storage = storage_of(stage).sub(str(name))
    ranks = sorted(each for each in storage.sizes() if each.endswith(".safetensors"))
    chosen = MARKER_NAME if fault.kind == "damage-marker" else ranks[int(fault.whom * len(ranks))]
    content = bytearray(read(storage, chosen))
    at = int(fault.whom * 7919 % 1 * (len(content) - 1))  # not the last byte: without its newline a marker is as good
    if fault.kind == "lose-file":
        what, new = "is gone", None
    elif fault.kind == "truncate" or (fault.kind == "damage-marker" and fault.number % 2):
        what, new = f"ends at byte {at}", bytes(content[:at])
    else:
        content[at] ^= 1 << fault.number % 8
        what, new = f"has a bit flipped in byte {at}", bytes(content)
    if isinstance(storage, FolderStorage):
        path = storage.folder / chosen
        path.unlink() if new is None else path.write_bytes(new)
    else:
        from pixart_ds.s3 import s3_client, split_url

        bucket, prefix = split_url(storage.where)
        where = {"Bucket": bucket, "Key": f"{prefix.rstrip('/')}/{chosen}"}
        s3_client().delete_object(**where) if new is None else s3_client().put_object(Body=new, **where)
    return f"{chosen} {what}"


def check_ending(code: int, outcome: dict[str, Any] | None, faults: Sequence[Fault], *, done: bool) -> None:
    """Compares how a supervisor ended with what the faults allow.

    Raises:
        Violation: They do not explain it.
    """
    kinds = [fault.kind for fault in faults]
    about = f"exit code {code}, outcome {outcome and outcome['outcome']}, after {kinds or 'no fault'}"
    allowed = {EXIT_DONE, *itertools.chain.from_iterable(ENDINGS[kind] for kind in kinds)}
    if code not in allowed:
        raise Violation(f"{about}: allowed were {sorted(allowed)}")
    if (code == EXIT_DONE) != done and code >= 0:
        raise Violation(f"{about}: the stage is {'' if done else 'not '}done")
    if outcome is None:
        if code >= 0 and "full-disk" not in kinds:
            raise Violation(f"{about}: there is no outcome.json")
        return
    if code >= 0 and outcome["exit_code"] != code:
        raise Violation(f"{about}: outcome.json says {outcome['exit_code']}")
    wanted = {EXIT_DONE: ("done",), EXIT_STOPPED: ("stopped", "failed")}.get(code, ("failed",))
    if code >= 0 and outcome["outcome"] not in wanted:
        raise Violation(f"{about}: the outcome should be {' or '.join(wanted)}")
    crashed = sum(launch["ending"] == "failed" for launch in outcome["launches"])
    if crashed > len(faults):
        raise Violation(f"{about}: {crashed} launches failed, so one did by itself: {outcome['launches']}")
    if code == EXIT_BUG and crashed <= RETRIES:
        raise Violation(f"{about}: it gave up after {crashed} failed launches, {RETRIES} retries were asked for")


def check_saves(stage: StageLayout, damaged: set[CheckpointName]) -> None:
    """Compares saves.jsonl with the checkpoints that are stored.

    A launch that was killed may have committed its last checkpoint without a word; all others have their row, and the last row's
    checkpoint is there.

    Raises:
        Violation: They do not agree.
    """
    rows = [row["checkpoint"] for attempt in stage.all_attempts() for row in rows_of(attempt.saves)]
    there = line.committed(stage)
    last_of = {(name.attempt, name.launch): name for name in there}
    if untold := [str(name) for name in there if str(name) not in rows and last_of[name.attempt, name.launch] != name]:
        raise Violation(f"checkpoints that saves.jsonl does not name: {untold}")
    told = [name for row in rows if (name := CheckpointName.parse(row)) is not None and name not in damaged]
    newest = max(told, key=lambda name: (name.attempt, name.launch, name.images_seen), default=None)
    later = [
        name
        for name in damaged
        if newest is not None and (name.attempt, name.launch) >= (newest.attempt, newest.launch)
    ]
    if newest is not None and newest not in there and not later:
        raise Violation(
            f"saves.jsonl names {newest} last, which is not there; there are {[str(name) for name in there]}"
        )


def compare(whole: StageLayout, broken: StageLayout, steps: int) -> dict[str, Any]:
    """Compares samples, draws, refused steps and losses with those of the reference.

    Raises:
        Violation: They differ.
    """
    one, other = final_rows(whole, "audit"), final_rows(broken, "audit")
    clocks = [BATCH * step for step in range(1, steps + 1)]
    if sorted(one) != clocks or sorted(other) != clocks:
        raise Violation(f"{len(one)} and {len(other)} steps were logged, not {steps}")
    for key in ("digest", "applied"):
        if off := [clock // BATCH for clock in clocks if one[clock][key] != other[clock][key]]:
            raise Violation(f"steps {off[:10]} have another {key} than the reference: {len(off)} in all")
    bad = [_bad_samples(stage) for stage in (whole, broken)]
    if bad[0] != bad[1]:
        raise Violation(f"other samples were no numbers than in the reference: {bad}")
    losses, again = final_rows(whole, "metrics"), final_rows(broken, "metrics")
    if off := [clock // BATCH for clock in clocks if (losses[clock]["loss"] is None) != (again[clock]["loss"] is None)]:
        raise Violation(f"steps {off[:10]} have a loss in one run only")
    differences = {
        clock // BATCH: abs(again[clock]["loss"] / losses[clock]["loss"] - 1)
        for clock in clocks
        if losses[clock]["loss"] is not None
    }
    close = max(value for step, value in differences.items() if step <= CLOSE)
    if close > BOUND:
        raise Violation(f"losses of the first {CLOSE} steps differ by {close:.1e}, more than {BOUND:.0e}")
    part = max(CLOSE, -(-steps // 10))
    spans = itertools.groupby(differences.items(), key=lambda item: (item[0] - 1) // part)
    return {
        "loss_difference_first_steps": close,
        "first_steps": CLOSE,
        "loss_difference": {f"to step {part * (at + 1)}": max(value for _, value in span) for at, span in spans},
        "samples_not_finite": sorted({sample for samples in bad[0].values() for sample in samples}),
    }


def _bad_samples(stage: StageLayout) -> dict[int, list[int]]:
    """By the clock of each refused step, the samples whose loss was no number."""
    rows = final_rows(stage, "refused")
    return {
        clock: [each["sample_id"] for each in row["samples"] if each["loss"] is None] for clock, row in rows.items()
    }


def page(answer: dict[str, Any]) -> str:
    """The figures for people."""
    a = answer
    lines = [
        f"{a['faults']} faults over {a['steps']} steps in {a['attempts']} attempts, {a['launches']} launches; seed {a['seed']}; "
        f"{a['broken_s']:.0f} s, the reference {a['reference_s']:.0f} s",
        f"  {'fault':<18}{'number':>7}{'alone':>7}   seconds to the next step: mean, worst",
    ]
    for kind, each in a["by_kind"].items():
        seconds = f"{each['mean_s']:>10.1f}{each['worst_s']:>8.1f}" if "mean_s" in each else ""
        lines.append(f"  {kind:<18}{each['faults']:>7}{each['undisturbed']:>7}{seconds}")
    audit, spans = a["audit"], ", ".join(f"{span} {value:.0e}" for span, value in a["loss_difference"].items())
    lines += [
        f"  endings           {', '.join(f'{name}: {count}' for name, count in a['endings'].items())}",
        f"  checkpoints       {a['checkpoints_damaged']} damaged, {a['checkpoints_passed_over']} times one was passed over",
        f"  audit             {audit['proven_steps']} steps proven, {audit['rework_steps']} trained again, "
        f"{audit['refused_steps']} refused for samples {a['samples_not_finite']}; all as in the reference",
        f"  time              {', '.join(f'{name} {part:.1%}' for name, part in a['time'].items())}",
        f"  losses            differ by {a['loss_difference_first_steps']:.0e} in the first {a['first_steps']} steps; {spans}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
