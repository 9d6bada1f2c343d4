"""`pixart-ds prepare`: from a source of pictures to a finished set, in phases that a killed process does not lose.

WORK/recipe.json        what the set is made of; another recipe is refused
WORK/scan/              what the source holds (`scan`)
WORK/plan/              which pictures make which part (`parts`)
WORK/captions/          what a model wrote, by part (`caption`)
WORK/repeated.parquet   captions that several pictures share
WORK/features/          their features, until the set is finished
WORK/set.json           the set's description, once the encoders are known
WORK/conditions.safetensors  what the encoder makes of the empty caption and of the held prompts
WORK/locks/             one file for each share of the work that some process has in hand
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pixart_ds import files
from pixart_ds.config.schema import PrepareConfig
from pixart_ds.data.format import MANIFEST, latents_folder
from pixart_ds.data.shards import PreparedSet
from pixart_ds.data.store import exists, is_remote, open_store
from pixart_ds.data.target import open_target
from pixart_ds.data.writer import parts_done
from pixart_ds.errors import DataError, MachineError
from pixart_ds.log import Log, Work, duration
from pixart_ds.plan.buckets import PAPER_RATIOS
from pixart_ds.prepare import finish, workers
from pixart_ds.prepare.caption import CaptionFiles
from pixart_ds.prepare.parts import Plan, decisions, make_plan, share
from pixart_ds.prepare.repeated import REPEATED, write_repeated
from pixart_ds.prepare.scan import Scan, scan
from pixart_ds.prepare.sources import open_source

_LEFT_OVER = r"(captions|latents-[^/]+)/part-\d+-[0-9a-f]{16}\.mds$|(.*/)?\.[^/]*\.tmp$"
"""What a process that was killed before its first part was whole may have left in the output."""
_MOST_LOOKED_AT = 100_000
"""Names in an output without a part: more of them are shards without a marker."""

Phase = Literal["scan", "caption", "encode", "finish"]
PHASES: tuple[Phase, ...] = ("scan", "caption", "encode", "finish")


@dataclass(frozen=True)
class Task:
    """One of several jobs that share the parts: an array's task.

    Attributes:
        number: From 0.
        count: Of all.
    """

    number: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True)
class Report:
    """What `prepare` did.

    Attributes:
        path: Of the set.
        finished: The set can be read.
        samples: Rows of the finished set.
        parts: Of the plan.
        parts_written, parts_kept: By this call, and before it.
        parts_left: That other tasks have to write.
        skipped: Pictures that were left out, by kind.
        truncated: Captions that were cut.
        seconds: That this call took.
        page: The finished set's page, as text.
    """

    path: str
    finished: bool
    samples: int
    parts: int
    parts_written: int
    parts_kept: int
    parts_left: int
    skipped: dict[str, int]
    truncated: int
    seconds: float
    page: str = ""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "page"}

    def __str__(self) -> str:
        did = f"{self.parts_written} parts written, {self.parts_kept} kept, in {duration(self.seconds)}"
        if not self.finished and not self.parts_left:
            return f"{did}; another process has the end of {self.path} in hand"
        if not self.finished:
            return f"{did}; {self.parts_left} of {self.parts} parts are left to do for {self.path}"
        lines = [f"{self.samples} samples in {self.path}: {did}"]
        broken, filtered, silent = (self.skipped.get(kind, 0) for kind in ("broken", "filtered", "caption"))
        if broken:
            lines.append(f"{broken} broken pictures were left out; they are listed in {self.path}/skipped.jsonl")
        if filtered or silent:
            lines.append(f"left out as well, and listed there: {filtered} by the filters, {silent} without a caption")
        if self.truncated:
            lines.append(f"{self.truncated} captions were longer than the recipe's max_tokens and were cut")
        lines.append(f"look at it: {self.path}/summary.html")
        return "\n".join(lines)


def work_folder(config: PrepareConfig) -> Path:
    """Where lists, plan and captions are kept while the set is made."""
    return Path(config.output) / ".work" if config.work is None else Path(config.work)


def ratios_of(config: PrepareConfig) -> tuple[float, ...]:
    return PAPER_RATIOS if config.ratios == "paper" else tuple(config.ratios)


def prepare(
    config: PrepareConfig,
    *,
    only: Phase | None = None,
    task: Task | None = None,
    processes: int = 1,
    device: str = "cpu",
) -> Report:
    """Does what is not done yet: all of it, one phase, or one task's share; whoever writes the last part finishes the set.

    Args:
        config: The recipe.
        only: One phase, for all parts or the task's.
        task: Which share of captions and parts; what is before and after is left to others.
        processes: That encode; on a machine with GPUs each takes the next one.
        device: `cpu` or `cuda`.

    Raises:
        DataError: The source is empty or incomplete, every picture is broken, or the output holds another set.
        ConfigError: An encoder is missing, or a size does not fit the VAE.
        MachineError: Another process has this share of the work in hand, or the disk is full.
    """
    try:
        return _prepare(config, only, task, processes, device)
    except OSError as error:
        if (said := files.disk_error(error, Path(config.output))) is not None:
            raise said from error
        raise


def _prepare(config: PrepareConfig, only: Phase | None, task: Task | None, processes: int, device: str) -> Report:
    began = time.monotonic()
    workers.check(config)
    work = work_folder(config)
    _check_output(config, work)
    _check_recipe(config, work)
    fresh = not (work / "plan/plan.json").exists()
    if fresh:
        if task is not None or only not in (None, "scan"):
            raise DataError(
                "there is no plan yet of which pictures make which part",
                where=work,
                remedy="run `pixart-ds prepare RECIPE --only scan` first, once",
            )
        plan_of(config, work, processes)
    elif task is None and only in (None, "scan"):
        _scan(config, work, processes)  # no more than a look whether the source is still the same
    plan = Plan.open(work / "plan")
    _check_parts(config, plan)
    written = 0 if only == "finish" else _write(config, work, plan, only, task, processes, device)
    return _finish(config, work, plan, only, written, device, began, fresh)


def plan_of(config: PrepareConfig, work: Path, processes: int = 1) -> Plan:
    """Scans the source as far as that is not done, and assigns its pictures to parts."""
    with _in_hand(work, "scan", "list of pictures"):
        if (work / "plan/plan.json").exists():
            return Plan.open(work / "plan")
        if (note := work / "recipe.json").exists() and files.read_json(note) != decisions(config):
            raise DataError(
                "another process has begun this set with another recipe",
                where=note,
                remedy="start again to see what differs, or choose another output and work folder",
            )
        found = _scan(config, work, processes)
        _say(f"plans which of {found.pictures} pictures make which part")
        source = open_source(config.source)
        keys = list(found.class_keys)
        return make_plan(
            work / "plan",
            found.tables,
            ratios=ratios_of(config),
            rows_per_group=config.rows_per_group,
            seed=config.seed,
            random_access=source.random_access,
            about={
                "pictures": found.pictures,
                "skipped": found.rejected,
                "class_keys": keys,
                "classes": source.titles(keys),
                "ratios": list(ratios_of(config)),
            },
        )


def _say(text: str) -> None:
    Log("prepare", sys.stderr).event(text)


def _scan(config: PrepareConfig, work: Path, processes: int) -> Scan:
    # of a store that may take a while, before there is something to count
    _say(f"lists the files of {config.source.path}")
    with ExitStack() as shown:
        work_shown: Work | None = None

        def tell(done: int, total: int) -> None:
            nonlocal work_shown
            if work_shown is None:
                work_shown = shown.enter_context(Work("scan", total, "chunks", done=done))
            else:
                work_shown.advance()

        return scan(config, work, processes, tell)


def dry_run(config: PrepareConfig, processes: int = 1) -> dict[str, Any]:
    """What a plan would be, without writing into the output."""
    workers.check(config)
    work = work_folder(config)
    _check_output(config, work)
    if (work / "plan/plan.json").exists():
        _check_same(files.read_json(work / "recipe.json"), decisions(config), work / "recipe.json")
        return summary_of(Plan.open(work / "plan"))
    with tempfile.TemporaryDirectory(prefix="pixart_ds-prepare-") as folder:
        return summary_of(plan_of(config, Path(folder), processes))


def summary_of(plan: Plan) -> dict[str, Any]:
    """Counts of a plan, for programs."""
    ratios = plan.about["ratios"]
    by_ratio = dict.fromkeys(map(str, ratios), 0)
    for partition, count in zip(plan.partitions, plan.counts, strict=True):
        by_ratio[str(ratios[partition])] += count
    skipped = plan.about["skipped"]
    return {
        "pictures": plan.about["rows"],
        "skipped": skipped,
        "classes": len(plan.about["classes"]),
        "parts": plan.num_parts,
        "pictures_by_ratio": by_ratio,
    }


def words_of(summary: dict[str, Any]) -> str:
    """The same for people."""
    left_out = ", ".join(f"{count} {kind}" for kind, count in summary["skipped"].items() if count) or "none"
    by_ratio = ", ".join(f"{ratio}: {count}" for ratio, count in summary["pictures_by_ratio"].items() if count)
    return (
        f"{summary['pictures']} pictures of {summary['classes']} classes in {summary['parts']} parts; left out: {left_out}\n"
        f"by ratio {by_ratio}"
    )


# ---- what is there already ----------------------------------------------------------------------------------------------


def _check_output(config: PrepareConfig, work: Path) -> None:
    """Raises DataError if the output holds anything but what a beginning with this work folder may have left there."""
    if not is_remote(config.output) and not Path(config.output).is_dir():
        return
    if parts_done(open_target(config.output)):
        return  # `_check_parts` looks whose they are
    names = list(itertools.islice(_names_in(config.output), _MOST_LOOKED_AT))
    begun = (work / "recipe.json").exists()  # after the names, among which may be what another process has just begun
    inside = re.escape(os.path.relpath(work.resolve(), Path(config.output).resolve()))
    ours = re.compile(f"{inside}/|{_LEFT_OVER}" if begun else rf"{inside}/(locks/|\.[^/]*\.tmp$)")
    if foreign := next((name for name in names if not ours.match(name)), None):
        raise DataError(
            f"the output is not empty and holds no set of this recipe that could go on, but {foreign}",
            where=config.output if is_remote(config.output) else Path(config.output).resolve(),
            remedy="choose another output, for example the next version; nothing was changed in this one",
        )


def _names_in(output: str) -> Iterator[str]:
    """The files of an output but for the scratch folders, which come and go."""
    store = open_store(output)
    if is_remote(output):
        yield from (name for name, _ in store.names())
        return
    for entry in sorted(os.scandir(output), key=lambda entry: entry.name):
        if not entry.is_dir(follow_symlinks=False):
            yield entry.name
        elif entry.name != ".scratch":
            yield from (name for name, _ in store.names(f"{entry.name}/"))


def _check_recipe(config: PrepareConfig, work: Path) -> None:
    """Notes the recipe, or raises DataError if parts were planned with another one. A scan alone is simply made anew."""
    note, about = work / "recipe.json", decisions(config)
    foreign = _foreign(work)
    before = files.read_json(note) if note.exists() else None
    if before is None and foreign is not None:
        raise DataError(
            f"the folder for lists, plan and captions of this set holds other things: {foreign}",
            where=work.resolve(),
            remedy="name an empty or a new folder as `work` in the prepare recipe; nothing was changed in this one",
        )
    if before == about:
        return
    if not (work / "plan/plan.json").exists():
        with _in_hand(work, "scan", "list of pictures"):
            if not (work / "plan/plan.json").exists():  # which another process may have made meanwhile
                shutil.rmtree(work / "scan", ignore_errors=True)
                files.write_json(note, about)
                return
        before = files.read_json(note)
    _check_same(before, about, note)


def _foreign(work: Path) -> str | None:
    """What lies in a work folder that no recipe was noted in, other than what comes before the note."""
    there = sorted(os.listdir(work)) if work.is_dir() else []
    return next((name for name in there if name != "locks" and not re.fullmatch(r"\..*\.tmp", name)), None)


def _check_same(before: Any, about: dict[str, Any], note: Path) -> None:
    """Raises DataError if a set was begun with another recipe."""
    changed = [f"{key} was {_short(old)} and is {_short(new)}" for key, old, new in _differences(before, about)]
    if changed:
        raise DataError(
            f"this set was begun with another recipe: {'; '.join(changed)}",
            where=note,
            remedy="set these back, or choose another output and work folder, for example of the next version; nothing was changed",
        )


def _check_parts(config: PrepareConfig, plan: Plan) -> None:
    """Raises DataError if the output holds parts of another plan or recipe; the work folder that knew of them may be gone."""
    names = [name for name in open_target(config.output).names("parts") if name.endswith(".json")]
    if not names:
        return
    name = f"parts/{names[0]}"
    marker = files.parse_json(open_store(config.output).read(name), Path(name))
    if marker.get("plan") != plan.key(config):
        raise DataError(
            "the output holds parts of other pictures, of another recipe, or of another version of this program",
            where=config.output,
            remedy="choose another output, for example the next version; nothing was changed in this one",
        )


def _differences(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted({*before, *after}):
            yield from _differences(before.get(name), after.get(name), f"{key}.{name}".lstrip("."))
    elif before != after:
        yield key, before, after


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


@contextmanager
def _in_hand(work: Path, label: str, what: str) -> Iterator[None]:
    """Takes a share of the work, which the kernel gives back whatever becomes of this process."""
    with files.held(work / "locks" / label, f"the {what} of this set"):
        yield


def _remove_left_overs(made: PreparedSet, work: Path) -> None:
    """Removes what killed processes left under temporary names where a set and its work are written; a store has none."""
    folders = [work, work / "scan", work / "captions"]
    if not is_remote(made.path):
        inside = ("", "parts", "captions", *map(latents_folder, made.description.latents))
        folders += [Path(made.path, name) for name in inside]
    for folder in folders:
        files.remove_left_overs(folder)


# ---- captions and parts -------------------------------------------------------------------------------------------------


def _write(
    config: PrepareConfig, work: Path, plan: Plan, only: Phase | None, task: Task | None, processes: int, device: str
) -> int:
    """Captions and parts, all or a task's; how many parts were written."""
    parts = share(plan.num_parts, *((task.number, task.count) if task else (0, 1)))
    # captions are needed of whatever part, as long as one is to be encoded
    if not _unwritten(config, range(plan.num_parts) if only == "caption" else parts):
        return 0
    label = f"task-{task.number}-of-{task.count}" if task else "all"
    if only in (None, "caption") and config.captions.captioner != "source":
        if only is None:
            _check_told(config, work, plan, but=parts)  # before hours are spent on this share's
        with _in_hand(work, f"caption-{label}", f"captions of share {task or 'all'}"):
            _caption(config, work, plan, parts, processes, device)
    if only in (None, "encode"):
        _check_told(config, work, plan)
    if not _not_told(config, work, plan):
        _find_repeated(config, work, plan)
    if only not in (None, "encode"):
        return 0
    with _in_hand(work, f"encode-{label}", f"parts of share {task or 'all'}"):
        return _encode(config, work, plan, parts, processes, device, label)


def _unwritten(config: PrepareConfig, parts: range) -> list[int]:
    written = parts_done(open_target(config.output))
    return [part for part in parts if part not in written]


def _caption(config: PrepareConfig, work: Path, plan: Plan, parts: range, processes: int, device: str) -> None:
    if todo := CaptionFiles(work / "captions").missing(parts):
        begin = workers.Begin(config, work, device, "caption", processes, "caption")
        _run(begin, todo, plan, parts, "caption", lambda done: None)


def _not_told(config: PrepareConfig, work: Path, plan: Plan) -> list[int]:
    """The parts whose captions a model has not written yet."""
    if config.captions.captioner == "source":
        return []
    return CaptionFiles(work / "captions").missing(range(plan.num_parts))


def _check_told(config: PrepareConfig, work: Path, plan: Plan, but: range = range(0)) -> None:
    """Raises DataError if parts have no captions yet, other than those of `but`."""
    if missing := [part for part in _not_told(config, work, plan) if part not in but]:
        raise DataError(
            f"{len(missing)} parts have no captions yet, the first is part {missing[0]}",
            where=work / "captions",
            remedy="run the same command with --only caption first, all tasks if there are several: a caption that comes in "
            "several parts is encoded once for all",
        )


def _find_repeated(config: PrepareConfig, work: Path, plan: Plan) -> None:
    """Lists the captions that several pictures share, or waits for the process that does."""
    if (work / REPEATED).exists():
        return
    written = CaptionFiles(work / "captions")

    def captions_of(part: int) -> list[str]:
        if config.captions.captioner == "source":
            return plan.captions(part)
        return list(written.read(part)[0].values())

    def wait(told: str) -> None:
        _say(f"waiting: {told}")

    with files.held(work / "locks/repeated", "the list of repeated captions", waiting=wait):
        if not (work / REPEATED).exists():
            with Work("compare captions", plan.num_parts, "parts") as shown:
                write_repeated(work / REPEATED, captions_of, plan.num_parts, config.batch_size, shown.advance)


def _encode(
    config: PrepareConfig, work: Path, plan: Plan, parts: range, processes: int, device: str, label: str
) -> int:
    """How many parts were written."""
    todo = _unwritten(config, parts)
    if not todo:
        return 0
    others = 0

    def count(done: workers.Done) -> None:
        nonlocal others
        others += not done.first

    begin = workers.Begin(config, work, device, "encode", processes, label)
    _run(begin, todo, plan, parts, "encode", count)
    return len(todo) - others


def _run(
    begin: workers.Begin,
    todo: Sequence[int],
    plan: Plan,
    parts: range,
    subject: str,
    then: Callable[[workers.Done], None],
) -> None:
    counts = plan.counts
    total, left = sum(counts[part] for part in parts), sum(counts[part] for part in todo)
    with Work(subject, total, "pictures", done=total - left) as shown:
        for done in workers.run(begin, todo):
            then(done)
            shown.advance(done.pictures)


# ---- the end ------------------------------------------------------------------------------------------------------------


def _finish(
    config: PrepareConfig,
    work: Path,
    plan: Plan,
    only: Phase | None,
    written: int,
    device: str,
    began: float,
    fresh: bool,
) -> Report:
    done = len(parts_done(open_target(config.output)))
    made: PreparedSet | None = None
    page = ""
    if done == plan.num_parts and only in (None, "finish"):
        with ExitStack() as held:
            try:
                held.enter_context(_in_hand(work, "finish", "end"))
            except MachineError:
                if only == "finish":
                    raise
            else:
                if not exists(open_store(config.output), MANIFEST):
                    workers.agree(workers.Begin(config, work, device, "encode", 1, "finish"))
                    _say(f"joins {plan.num_parts} parts")
                    finish.finish(config, work, plan)
                shutil.rmtree(work / "features", ignore_errors=True)  # the rows hold them now
                made = PreparedSet.open(config.output)
                _remove_left_overs(made, work)
                alone = fresh and written == plan.num_parts  # else the page would tell of a part of the work as of all
                page = finish.write_summary(config, made, time.monotonic() - began if alone else None, device)
    elif only == "finish":
        raise DataError(
            f"{plan.num_parts - done} of {plan.num_parts} parts are not written yet",
            where=config.output,
            remedy="run `pixart-ds prepare RECIPE` until all tasks are done",
        )
    counts = finish.counts_of(made) if made is not None else finish.Counts({}, 0)
    return Report(
        path=config.output,
        finished=made is not None,
        samples=made.num_samples if made is not None else 0,
        parts=plan.num_parts,
        parts_written=written,
        parts_kept=done - written,
        parts_left=plan.num_parts - done,
        skipped=counts.skipped,
        truncated=counts.truncated,
        seconds=time.monotonic() - began,
        page=page,
    )
