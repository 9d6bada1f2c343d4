"""`pixart-ds verify`: every byte, shape and value of a prepared set, with all that is wrong, not only the first."""

from __future__ import annotations

import io
import json
import math
import re
import tempfile
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import ValidationError

from pixart_ds import files
from pixart_ds.data.format import (
    CAPTION_COLUMNS,
    CAPTIONS,
    CONDITIONS,
    LATENT_COLUMNS,
    MANIFEST,
    PROMPTS,
    ROWS,
    SKIPPED,
    latents_folder,
    marker_name,
    part_name,
)
from pixart_ds.data.range_file import RangeFile
from pixart_ds.data.shards import PreparedSet, none_of_ours
from pixart_ds.data.writer import fingerprint_of, table_schema
from pixart_ds.log import duration, si
from pixart_ds.prepare.verify_rows import (
    SHOWN,
    Files,
    Found,
    Group,
    GroupChecker,
    Index,
    Problem,
    Problems,
    Skipped,
    entry_flaw,
    marker_of,
    short,
)
from pixart_ds.s3 import StoreError

_BUFFER_BYTES = 1 << 20
_TABLE_ROWS = 1 << 14
"""Lines of rows.parquet that are read at once."""


@dataclass(frozen=True)
class Verified:
    """What a look at every byte of a set found.

    Attributes:
        path: Of the set.
        rows, groups: That the set should have.
        bytes: Of the shards that were read.
        seconds: That it took.
        problems: The first of each kind.
        counts: Problems by kind, those that are not told among them.
        notes: What is unusual, but not wrong.
    """

    path: str
    rows: int
    groups: int
    bytes: int
    seconds: float
    problems: tuple[Problem, ...]
    counts: dict[str, int]
    notes: tuple[str, ...]

    @property
    def sound(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {"sound": self.sound, **asdict(self)}

    def __str__(self) -> str:
        notes = [f"note: {note}" for note in self.notes]
        read = f"{self.rows} rows in {self.groups} row groups, {si(self.bytes, 'B')} of shards read in {duration(self.seconds)}"
        if self.sound:
            return "\n".join([f"{self.path} is sound: {read}", *notes])
        lines = []
        for kind, count in self.counts.items():
            told = [problem for problem in self.problems if problem.kind == kind]
            lines += [f"{kind}: {problem.what}\n  where: {problem.where}" for problem in told]
            if count > len(told):
                lines.append(f"{kind}: and {count - len(told)} more")
        total = sum(self.counts.values())
        lines.append(f"{self.path} is not sound: {total} problem{'s' if total > 1 else ''}; {read}")
        lines += notes
        return "\n".join([*lines, "  to do: restore the files from a copy, or prepare the set again into a new folder"])


def verify(location: str | Path, *, threads: int = 2, report: Callable[[int, int], None] | None = None) -> Verified:
    """Reads a whole set and compares everything that can be compared. It goes on after a problem; nothing is changed.

    Args:
        location: Folder or s3:// address of a finished set.
        threads: That read and check row groups; each holds one shard in memory and, from a store, in the temporary folder.
        report: Is told how many rows are done, and of how many.

    Raises:
        DataError: There is no finished set, its manifest is none, or its store or disk fails.
    """
    began = time.monotonic()
    made, manifest = _opened(location)
    with tempfile.TemporaryDirectory(prefix="pixart_ds-verify-") as scratch:
        work = _Verification(made, manifest, Files(made, Path(scratch)))
        work.run(threads, report or (lambda done, total: None))
    return Verified(
        path=made.path,
        rows=int(work.counts.sum()),
        groups=len(work.counts),
        bytes=work.bytes,
        seconds=time.monotonic() - began,
        problems=tuple(work.problems.told),
        counts=dict(work.problems.counts),
        notes=tuple(work.notes),
    )


def _opened(location: str | Path) -> tuple[PreparedSet, dict[str, Any]]:
    """The set and its manifest, or DataError where nothing could be compared."""
    try:
        made = PreparedSet.open(location)
        manifest = files.parse_json(made.store.read(MANIFEST), Path(MANIFEST))
        about = made.description
        if not len(made.counts) or (made.counts < 1).any() or (made.parts < 0).any():
            raise ValueError("groups must have parts and rows")
        if ((made.partitions < 0) | (made.partitions >= len(about.ratios))).any():
            raise ValueError(f"a group has a partition that is none of {len(about.ratios)} ratios")
        if min(about.latent_channels, about.downsampling_factor, about.caption_channels, about.max_tokens) < 1:
            raise ValueError("channels, downsampling_factor and max_tokens must be at least 1")
        for name, info in about.latents.items():
            if min(side for size in info.sizes for side in size) < 1:
                raise ValueError(f"latents {name} have no size in {info.sizes}")
            if len(info.sizes) != (1 if info.square else len(about.ratios)):
                raise ValueError(f"latents {name} have {len(info.sizes)} sizes")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as cause:
        raise none_of_ours(location, MANIFEST, cause) from cause
    return made, manifest


class _Verification:
    """One look at one set."""

    def __init__(self, made: PreparedSet, manifest: dict[str, Any], given: Files) -> None:
        self.made, self.manifest, self.files, self.about = made, manifest, given, made.description
        self.url = made.path
        self.problems, self.notes = Problems(), list[str]()
        self.counts = made.counts
        self.bytes = 0
        self._plans: dict[str, list[str]] = {}
        self._plan_counts: Counter[str] = Counter()
        self._truncated: int | None = 0
        self._squares = self._squared_error = 0.0
        self._left_out = array("Q")

    def run(self, threads: int, report: Callable[[int, int], None]) -> None:
        indexes, raws = self._indexes()
        raws += self._conditions()
        if len(raws) == 1 + len(self.about.latents) + 2:
            self._compare("fingerprint", fingerprint_of(self.manifest["description"], raws), self.made.fingerprint)
        del raws
        self._compare("num_samples", int(self.counts.sum()), self.manifest.get("num_samples"))
        if (np.diff(self.made.parts) <= 0).any():
            self.problems.add("manifest", "the parts of its groups do not rise", f"{self.url}/{MANIFEST}")
        marked = self._listing(indexes)
        checker = GroupChecker(self.files, self.about, indexes)
        names = self._rows(checker, threads, report)
        self._other_markers(marked)
        self._compare_plans()
        self._unique(checker, names)
        skipped = self._skipped(names)
        self._totals(skipped)

    def _compare(self, key: str, made: Any, told: Any) -> None:
        """A value of the manifest with the same made anew."""
        if made != told:
            self.problems.add("manifest", f"{key} is {short(told)}, and {short(made)} of what is there", self._manifest)

    @property
    def _manifest(self) -> str:
        return f"{self.url}/{MANIFEST}"

    # ---- small files ---------------------------------------------------------------------------------------------------

    def _indexes(self) -> tuple[dict[str, Index], list[bytes]]:
        """The indexes that can be read, by folder, and what is in their files."""
        folders = {CAPTIONS: CAPTION_COLUMNS, **{latents_folder(n): LATENT_COLUMNS for n in self.about.latents}}
        indexes: dict[str, Index] = {}
        raws: list[bytes] = []
        samples = [self.made.counts]
        for folder, columns in folders.items():
            raw = self.files.read(f"{folder}/index.json", self.problems)
            if raw is None:
                continue
            raws.append(raw)
            read = self._index(folder, raw, columns)
            if read is not None:
                indexes[folder] = read[0]
                if len(read[1]) == len(self.made.counts):
                    samples.append(read[1])
        # Where they disagree about rows, most are believed, so that one wrong number does not make all rows wrong behind it.
        self.counts = np.median(np.stack(samples), axis=0).astype(np.int64)
        for where, told in zip([MANIFEST, *(f"{folder}/index.json" for folder in indexes)], samples, strict=False):
            self.problems.rows(
                "manifest" if where == MANIFEST else "index",
                told != self.counts,
                lambda group, a=told: f"row group {group} has {a[group]} rows instead of {self.counts[group]}",  # type: ignore[misc]
                f"{self.url}/{where}",
            )
        return indexes, raws

    def _index(self, folder: str, raw: bytes, columns: dict[str, str]) -> tuple[Index, npt.NDArray[np.int64]] | None:
        """One index, and the rows that it gives each row group."""
        where = f"{self.url}/{folder}/index.json"
        try:
            value = json.loads(raw)
            entries = value["shards"]
            if value["version"] != 2 or not isinstance(entries, list):
                raise ValueError("it is of another version")
        except (ValueError, KeyError, TypeError) as cause:
            self.problems.add("index", f"it is no index of MDS shards: {cause!r}", where)
            return None
        if len(entries) != len(self.made.counts):
            self.problems.add(
                "index", f"it has {len(entries)} shards, the manifest {len(self.made.counts)} row groups", where
            )
        index = Index(folder, [], [], [])
        samples = []
        for number, entry in enumerate(entries[: len(self.made.counts)]):
            flaw = entry_flaw(entry, columns)
            if flaw is not None:
                self.problems.add("index", f"shard {number}: {flaw}", where)
                index.names.append(None)
                index.sizes.append(0)
                index.hashes.append("")
                samples.append(int(self.made.counts[number]))
                continue
            about = entry["raw_data"]
            digest = about["hashes"]["xxh3_64"]
            wanted = f"{part_name(int(self.made.parts[number]))}-{digest}.mds"
            if about["basename"] != wanted:
                self.problems.add("index", f"shard {number} is called {about['basename']} instead of {wanted}", where)
            index.names.append(about["basename"])
            index.sizes.append(about["bytes"])
            index.hashes.append(digest)
            samples.append(entry["samples"])
        return index, np.array(samples, np.int64)

    def _conditions(self) -> list[bytes]:
        """Checks what the set holds beside its rows; returns the content of both files, if they are there."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        where = f"{self.url}/{CONDITIONS}"
        raws = [self.files.read(name, self.problems) for name in (CONDITIONS, PROMPTS)]
        there = [raw for raw in raws if raw is not None]
        raw, texts = raws[0], None if raws[1] is None else self._prompts(raws[1])
        if raw is None:
            return there
        try:
            tensors = load(raw)
        except (SafetensorError, ValueError, KeyError, TypeError) as cause:
            self.problems.add("conditions", f"it is no file of tensors: {cause}", where)
            return there
        prompts = {f"prompt.{number}" for number in range(len(texts or ()))}
        held = {name for name in tensors if name.startswith("prompt.")}
        if texts is not None and held != prompts:
            self.problems.add(
                "conditions",
                f"it holds {len(held)} prompts, {PROMPTS} {len(prompts)}: {sorted(held ^ prompts)[:3]}",
                where,
            )
        if odd := sorted(set(tensors) - held - {"null", "null_mask"}):
            self.problems.add("conditions", f"it holds {odd[0]}, which no set has", where)
        most, channels = self.about.max_tokens, self.about.caption_channels
        for name in ("null", *sorted(held)):
            rows = most if name == "null" else None
            if (flaw := _features_flaw(tensors.get(name), rows, most, channels)) is not None:
                self.problems.add("conditions", f"{name} {flaw}", where)
        if (flaw := _mask_flaw(tensors.get("null_mask"), most)) is not None:
            self.problems.add("conditions", f"null_mask {flaw}", where)
        return there

    def _prompts(self, raw: bytes) -> list[str] | None:
        where = f"{self.url}/{PROMPTS}"
        try:
            texts = json.loads(raw)
        except ValueError as cause:
            self.problems.add("conditions", f"it is not JSON: {cause}", where)
            return None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            self.problems.add("conditions", f"it is no list of prompts: {short(texts)}", where)
            return None
        return texts

    def _listing(self, indexes: dict[str, Index]) -> set[int]:
        """Numbers of the parts that have markers; notes files that nothing names."""
        known = {f"{folder}/{name}" for folder, index in indexes.items() for name in index.names}
        known |= {f"{folder}/index.json" for folder in (CAPTIONS, *map(latents_folder, self.about.latents))}
        marked: set[int] = set()
        count = size = 0
        for name, its_size in self.made.store.names():
            found = re.fullmatch(r"parts/part-(\d+)\.json", name)
            if found and name == marker_name(int(found[1])):
                marked.add(int(found[1]))
            elif name.startswith((f"{CAPTIONS}/", "latents-", "parts/", ".scratch/")) and name not in known:
                count, size = count + 1, size + its_size
        if count:
            files_are = "1 file is" if count == 1 else f"{count} files are"
            self.notes.append(
                f"{files_are} named by nothing: left over by a writer that was killed, {si(size, 'B')}; nobody reads them"
            )
        return marked

    # ---- rows ----------------------------------------------------------------------------------------------------------

    def _rows(self, checker: GroupChecker, threads: int, report: Callable[[int, int], None]) -> npt.NDArray[np.uint64]:
        """Checks all row groups, a few at once; returns (rows,) hashes of the pictures' names."""
        names = np.zeros(int(self.counts.sum()), np.uint64)
        waiting: deque[tuple[Group, Future[Found]]] = deque()
        done = 0
        report(0, len(names))
        pool = ThreadPoolExecutor(threads, "verify")
        try:
            for group, table in self._groups():
                waiting.append((group, pool.submit(checker.check, group, table)))
                while len(waiting) > 2 * threads or (waiting and group.number == len(self.counts) - 1):
                    ready, future = waiting.popleft()
                    found = future.result()
                    names[ready.first : ready.first + ready.count] = found.names
                    self._take(ready, found)
                    done += ready.count
                    report(done, len(names))
        finally:
            pool.shutdown(cancel_futures=True)
        return names

    def _take(self, group: Group, found: Found) -> None:
        self.problems.merge(found.problems)
        self.bytes += found.bytes
        self._left_out.extend(found.left_out)
        if found.truncated is None or self._truncated is None:
            self._truncated = None
        else:
            self._truncated += found.truncated
        if found.plan is not None:
            self._plan(found.plan, group.part)
            self._squares += found.squares
            self._squared_error += found.squared_error

    def _plan(self, plan: str, part: int) -> None:
        self._plan_counts[plan] += 1
        self._plans.setdefault(plan, [])
        if len(self._plans[plan]) < 3:
            self._plans[plan].append(marker_name(part))

    def _groups(self) -> Iterator[tuple[Group, Any | None]]:
        """All row groups with their lines of rows.parquet, as far as there are any."""
        table = _Table(self.made, self.problems, int(self.counts.sum()))
        first = 0
        for number, count in enumerate(self.counts.tolist()):
            about = Group(number, int(self.made.parts[number]), int(self.made.partitions[number]), count, first)
            yield about, table.take(count)
            first += count

    # ---- the whole -----------------------------------------------------------------------------------------------------

    def _other_markers(self, marked: set[int]) -> None:
        """Parts without a row have markers, too, and every part has one."""
        rows = set(self.made.parts.tolist())
        known = sorted(marked | rows)
        for before, part in pairwise([-1, *known]):
            for absent in range(before + 1, min(part, before + 1 + SHOWN)):
                where = f"{self.url}/{marker_name(absent)}"
                self.problems.add("marker", "the part has none, and others behind it have", where)
            if part - before - 1 > SHOWN:
                self.problems.counts["marker"] += part - before - 1 - SHOWN
        for part in sorted(marked - rows):
            where = f"{self.url}/{marker_name(part)}"
            raw = self.files.read(marker_name(part), self.problems)
            marker = None if raw is None else marker_of(raw, where, self.problems)
            if marker is None:
                continue
            self._plan(marker.plan, part)
            self._left_out.extend(line.hash for line in marker.skipped)
            if marker.count or marker.rows or marker.shards:
                self.problems.add("marker", f"its part has {marker.count} rows, and is in no index", where)
            elif marker.part != part:
                self.problems.add("marker", f"part is {marker.part} instead of {part}", where)
            elif marker.encoders != (wanted := self.made.description.encoders):
                self.problems.add("marker", f"encoders is {marker.encoders} instead of {wanted}", where)

    def _compare_plans(self) -> None:
        """One other plan among many is the wrong one."""
        for plan, count in self._plan_counts.most_common()[1:]:
            places = ", ".join(self._plans[plan])
            self.problems.add(
                "marker", f"{count} parts are of another plan, {plan!r}: {places}", f"{self.url}/{self._plans[plan][0]}"
            )

    def _unique(self, checker: GroupChecker, names: npt.NDArray[np.uint64]) -> None:
        """Whether two rows have one name."""
        rising = np.sort(names)
        twice = np.unique(rising[1:][(rising[1:] == rising[:-1]) & (rising[1:] != 0)])
        ends = self.counts.cumsum()
        for value in twice[:SHOWN].tolist():
            places = []
            name = "?"
            for row in np.flatnonzero(names == value).tolist()[:3]:
                number = int(np.searchsorted(ends, row, side="right"))
                begin = int(ends[number] - self.counts[number])
                group = Group(
                    number,
                    int(self.made.parts[number]),
                    int(self.made.partitions[number]),
                    int(self.counts[number]),
                    begin,
                )
                name = checker.name_of(group, row - begin)
                places.append(checker.place_of(group, row - begin))
            self.problems.add(
                "name", f"{len(places)} rows are called {short(name)}", f"{self.url}: {'; '.join(places)}"
            )
        if len(twice) > SHOWN:
            self.problems.counts["name"] += len(twice) - SHOWN

    def _skipped(self, names: npt.NDArray[np.uint64]) -> dict[str, int] | None:
        """Pictures that were left out, by kind."""
        where = f"{self.url}/{SKIPPED}"
        totals = self.manifest.get("totals")
        wanted = isinstance(totals, dict) and "skipped" in totals
        kinds: Counter[str] = Counter()
        rising, lines = np.sort(names), array("Q")
        try:
            with io.BufferedReader(RangeFile(self.made.store, SKIPPED), _BUFFER_BYTES) as file:
                for number, line in enumerate(file, 1):
                    try:
                        told = Skipped.model_validate_json(line)
                    except ValidationError as error:
                        first = error.errors(include_url=False)[0]
                        self.problems.add(
                            "skipped", f"line {number} is none: {first['msg']}", f"{where}, line {number}"
                        )
                        continue
                    kinds[told.kind] += 1
                    lines.append(told.hash)
                    value = np.uint64(xxhash.xxh3_64_intdigest(told.picture.encode()))
                    place = int(np.searchsorted(rising, value))
                    if place < len(rising) and rising[place] == value:
                        self.problems.add(
                            "skipped", f"{short(told.picture)} was left out, and is a row", f"{where}, line {number}"
                        )
        except StoreError as error:
            if not error.missing:
                raise
            if wanted or self._left_out:
                self.problems.add("missing", "the file is not there", where)
            return None
        absent = ~np.isin(np.array(self._left_out, np.uint64), np.array(lines, np.uint64))
        if absent.any():
            self.problems.add("skipped", f"{absent.sum()} lines of markers' `skipped` are not in it", where)
        return dict(sorted(kinds.items()))

    def _totals(self, skipped: dict[str, int] | None) -> None:
        totals = self.manifest.get("totals")
        if not isinstance(totals, dict):
            self._compare("totals", {}, totals)
            return
        if odd := sorted(totals.keys() - {"skipped", "truncated", "caption_error"}):
            self.problems.add("manifest", f"totals holds {odd[0]}, which no set has", self._manifest)
        if "skipped" in totals and skipped is not None:
            self._compare("totals.skipped", skipped, totals["skipped"])
        if "truncated" in totals and self._truncated is not None:
            self._compare("totals.truncated", self._truncated, totals["truncated"])
        if "caption_error" in totals and sum(self._plan_counts.values()) >= len(self.counts):
            made = (self._squared_error / self._squares) ** 0.5 if self._squares > 0 else None
            told = totals["caption_error"]
            if made is None or not isinstance(told, float) or not math.isclose(made, told, rel_tol=1e-6):
                self._compare("totals.caption_error", made, told)


class _Table:
    """rows.parquet, read from its begin to its end.

    Args:
        made: The set.
        problems: For what cannot be read.
        total: Lines that it must have.
    """

    def __init__(self, made: PreparedSet, problems: Problems, total: int) -> None:
        self._problems, self._where = problems, f"{made.path}/{ROWS}"
        self._held: Any | None = None
        self._batches: Iterator[Any] = iter(())
        with self._told():
            self._open(made, total)

    def _open(self, made: PreparedSet, total: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = pq.ParquetFile(RangeFile(made.store, ROWS))
        there = file.schema_arrow
        numbers = [name for name in there.names if name.startswith("number.")]
        wanted = table_schema(made.description.latents, numbers)
        if not there.remove_metadata().equals(wanted):
            odd = [str(field) for field in wanted if field.name not in there.names or there.field(field.name) != field]
            more = [name for name in there.names if name not in wanted.names]
            self._problems.add(
                "table", f"its columns are others: no {odd or ''}, but {more or 'another sequence'}", self._where
            )
            return
        if file.metadata.num_rows != total:
            self._problems.add("table", f"it has {file.metadata.num_rows} rows, the set {total}", self._where)
        self._batches = (pa.Table.from_batches([batch]) for batch in file.iter_batches(_TABLE_ROWS))

    def _told(self) -> Any:
        return _Unreadable(self._problems, self._where)

    def take(self, count: int) -> Any | None:
        """The next lines, or None if there are not so many."""
        import pyarrow as pa

        with self._told():
            while self._held is None or len(self._held) < count:
                batch = next(self._batches, None)
                if batch is None:
                    return None
                self._held = batch if self._held is None else pa.concat_tables([self._held, batch])
            taken, self._held = self._held.slice(0, count), self._held.slice(count)
            taken.validate(full=True)  # texts among it
            return taken
        self._batches, self._held = iter(()), None
        return None


class _Unreadable:
    """A context that makes a problem of a table that cannot be read."""

    def __init__(self, problems: Problems, where: str) -> None:
        self._problems, self._where = problems, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        import pyarrow as pa

        if isinstance(error, StoreError) and error.missing:
            self._problems.add("missing", "the file is not there", self._where)
            return True
        if isinstance(error, (pa.ArrowException, OSError)):
            self._problems.add("table", f"it cannot be read: {' '.join(str(error).split())[:200]}", self._where)
            return True
        return False


def _features_flaw(there: Any, rows: int | None, most: int, channels: int) -> str | None:
    """What is wrong with a tensor of caption features: (rows, channels), or (1…most, channels)."""
    if there is None:
        return "is not there"
    fits = there.ndim == 2 and there.shape[1] == channels and (len(there) == rows if rows else 1 <= len(there) <= most)
    if not fits or there.dtype != np.float16:
        return f"is {there.dtype} {there.shape}, not float16 {(rows or f'1 to {most}', channels)}"
    return None if np.isfinite(there).all() else "holds features that are no finite numbers"


def _mask_flaw(there: Any, most: int) -> str | None:
    if there is None:
        return "is not there"
    if there.dtype != np.uint8 or there.shape != (most,):
        return f"is {there.dtype} {there.shape}, not uint8 {(most,)}"
    if there[0] != 1 or not np.isin(there, (0, 1)).all() or (np.diff(there.astype(np.int8)) > 0).any():
        return "is not of ones and then zeros"
    return None
