"""Lists all pictures of a source once, chunk by chunk, so that a killed scan goes on where it stopped.

scan/source.json               what is scanned, and in the end what was found
scan/chunk-00000.rejected.jsonl   pictures of the first chunk that are left out
scan/chunk-00000.parquet          the others; it is written last
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.config.schema import FilterConfig, PrepareConfig
from pixart_ds.errors import DataError, MachineError
from pixart_ds.prepare.items import Item, Rejected, is_unicode
from pixart_ds.prepare.processes import end_with_parent
from pixart_ds.prepare.repeated import repeated_texts
from pixart_ds.prepare.sources import Chunk, Source, open_source

NUMBER = "number."
"""Begins the names of columns of what the source says in numbers."""
_NOTE = "source.json"
_FIRST = 3
"""Of what is wrong, so many are named."""
_AHEAD = 4
"""Chunks that wait for each process."""


@dataclass(frozen=True)
class Scan:
    """A finished scan.

    Attributes:
        folder: Of its files.
        listing: The source's hash.
        num_chunks: Files of pictures.
        pictures: How many can be prepared.
        rejected: How many are left out, by kind.
        class_keys: Of their classes, in the sequence in which they are numbered.
        numbers: Names of what the source says in numbers.
        skip_bare: Pictures without a caption are left out.
    """

    folder: Path
    listing: str
    num_chunks: int
    pictures: int
    rejected: dict[str, int]
    class_keys: tuple[str, ...]
    numbers: tuple[str, ...]
    skip_bare: bool

    @property
    def tables(self) -> Tables:
        """The pictures: a pyarrow.Table of each chunk, all of one schema; can be gone through repeatedly."""
        return Tables(self)

    def rejections(self) -> Iterator[Rejected]:
        """What is left out, with the reason."""
        for number in range(self.num_chunks):
            for line in files.read_json_lines(_rejected_file(self.folder, number)):
                yield Rejected(line["picture"], line["kind"], line["reason"])
            if self.skip_bare:
                table = _read(self.folder, number, "name", "caption")
                for name in table.filter(table["caption"].is_null())["name"].to_pylist():
                    yield Rejected(name, "caption", "it has none")


@dataclass(frozen=True)
class Tables:
    """Tables of a scan's chunks: name, container, start, length, height, width, caption, class_key, and number.… for each number
    that the source knows anywhere.
    """

    scan: Scan

    def __len__(self) -> int:
        return self.scan.num_chunks

    def __iter__(self) -> Iterator[Any]:
        schema = _schema(self.scan.numbers)
        for number in range(self.scan.num_chunks):
            table = _unified(_read(self.scan.folder, number), schema)
            yield table.filter(table["caption"].is_valid()) if self.scan.skip_bare else table


def scan(
    config: PrepareConfig, work: Path, processes: int = 1, report: Callable[[int, int], None] | None = None
) -> Scan:
    """Reads the headers of all pictures that are not scanned yet, applies the recipe's filters, and notes what there is.

    Args:
        config: The recipe.
        work: Folder for what is made on the way.
        processes: That scan.
        report: Is told how many chunks are done, and of how many.

    Raises:
        DataError: There is nothing to prepare, captions are missing, a filter asks for an unknown number, a picture is listed
            twice; or the source or the recipe is another one than at the finished scan that is there.
        StoreError: The disk or store fails.
    """
    source = open_source(config.source)
    chunks = source.chunks()
    about = {
        "listing": source.listing(),
        "chunks": len(chunks),
        "source": config.source.model_dump(mode="json"),
        "filter": config.filter.model_dump(mode="json"),
        "captions": _caption_policy(config),
    }
    folder = work / "scan"
    if _is_finished(folder, about, source):
        return read_scan(work)
    todo = [number for number in range(len(chunks)) if not _chunk_file(folder, number).exists()]
    done = len(chunks) - len(todo)
    tell = report or (lambda done, total: None)
    tell(done, len(chunks))
    for _ in _scan_chunks(config, source, chunks, todo, folder, processes):
        done += 1
        tell(done, len(chunks))
    found = _summary(config, source, folder, len(chunks))
    files.write_json(folder / _NOTE, {**about, "found": found})
    return read_scan(work)


def read_scan(work: Path) -> Scan:
    """The finished scan in a work folder.

    Raises:
        DataError: There is none.
    """
    note = files.read_json(work / "scan" / _NOTE, remedy="run `pixart-ds prepare` with the same recipe")
    if "found" not in note:
        raise DataError(
            "the scan of the source is not finished", where=work, remedy="run `pixart-ds prepare` with the same recipe"
        )
    found = note["found"]
    return Scan(
        work / "scan",
        note["listing"],
        note["chunks"],
        found["pictures"],
        found["rejected"],
        tuple(found["class_keys"]),
        tuple(found["numbers"]),
        note["captions"] == "skip",
    )


def class_sequence(keys: Iterable[str]) -> list[str]:
    """The sequence in which classes are numbered: by their numbers if all keys are such, else by their letters."""
    keys = sorted(keys)
    return sorted(keys, key=int) if all(key.isascii() and key.isdigit() for key in keys) else keys


def _caption_policy(config: PrepareConfig) -> str:
    return config.captions.missing if config.captions.captioner == "source" else "keep"


def _is_finished(folder: Path, about: dict[str, Any], source: Source) -> bool:
    """Whether the same was scanned to its end. An unfinished scan of something else is begun anew: nothing was made of it."""
    note = folder / _NOTE
    before = files.read_json(note) if note.exists() else {}
    changed = [name for name, value in about.items() if before.get(name) != value]
    if not changed:
        return "found" in before
    if "found" in before:
        words = {
            "listing": "names or sizes of its files",
            "chunks": f"{before['chunks']} chunks are now {about['chunks']}",
            "source": "`source` in the recipe",
            "filter": "`filter` in the recipe",
            "captions": "`captions` in the recipe",
        }
        raise DataError(
            f"the source is not what was scanned (changed: {', '.join(words[name] for name in changed)})",
            where=source.root,
            remedy=f"choose another output (and work) for what is there now; {folder} was not changed",
        )
    folder.mkdir(parents=True, exist_ok=True)
    if changed != ["captions"]:  # which are judged when all chunks are there
        for path in [*folder.glob("chunk-*"), *folder.glob(".*.tmp")]:
            path.unlink(missing_ok=True)
    files.write_json(note, about)
    return False


def _chunk_file(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:05d}.parquet"


def _rejected_file(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:05d}.rejected.jsonl"


def _read(folder: Path, number: int, *columns: str) -> Any:
    """A chunk's table, or some of its columns."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(_chunk_file(folder, number)) as file:
        return file.read(columns=list(columns) or None)


def _scan_chunks(
    config: PrepareConfig, source: Source, chunks: list[Chunk], todo: list[int], folder: Path, processes: int
) -> Iterator[None]:
    """Yields after each chunk; the first error ends it."""
    if processes == 1 or len(todo) < 2:
        for number in todo:
            _scan_chunk(config, source, chunks[number], folder, number)
            yield
        return
    rest = iter(todo)
    with ProcessPoolExecutor(
        min(processes, len(todo)), multiprocessing.get_context("spawn"), _begin_process, (config, folder)
    ) as pool:
        running: set[Future[None]] = set()
        try:
            while True:
                for number in itertools.islice(rest, _AHEAD * processes - len(running)):
                    running.add(pool.submit(_scan_in_process, chunks[number], number))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    yield
        except BrokenProcessPool as cause:
            raise MachineError(
                "a process that scans was killed",
                where=folder,
                remedy="if memory ran out, use fewer --processes (each reads a .json list whole: a .jsonl needs less), then start "
                "again; what is scanned is kept",
            ) from cause
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_process: tuple[PrepareConfig, Source, Path]


def _begin_process(config: PrepareConfig, folder: Path) -> None:
    global _process  # noqa: PLW0603
    end_with_parent()
    _process = config, open_source(config.source), folder


def _scan_in_process(chunk: Chunk, number: int) -> None:
    config, source, folder = _process
    _scan_chunk(config, source, chunk, folder, number)


def _scan_chunk(config: PrepareConfig, source: Source, chunk: Chunk, folder: Path, number: int) -> None:
    """Writes the two files of a chunk."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    items: list[Item] = []
    rejected: list[Rejected] = []
    names: set[str] = set()
    for found in source.scan(chunk):
        made = _writable(found)
        if isinstance(made, Item):
            names.update(made.numbers)
            made = _filtered(made, config.filter)
        if isinstance(made, Item):
            items.append(made)
        else:
            rejected.append(made)
    lines = (
        json.dumps({"picture": one.name, "kind": one.kind, "reason": one.reason}, ensure_ascii=False) + "\n"
        for one in rejected
    )
    files.write_text(_rejected_file(folder, number), "".join(lines))
    seen = {"label": chunk.label, "numbers": sorted(names)}
    sink = pa.BufferOutputStream()
    table = _table(items, names).replace_schema_metadata({"pixart_ds": json.dumps(seen)})
    pq.write_table(table, sink, compression="zstd")
    files.write_durable(_chunk_file(folder, number), [memoryview(sink.getvalue())])


def _writable(found: Item | Rejected) -> Item | Rejected:
    """With names and captions that are Unicode."""
    if not is_unicode(found.name):
        name = found.name.encode("utf-8", "backslashreplace").decode()
        return Rejected(name, "broken", "its name is not UTF-8")
    if isinstance(found, Rejected):
        return replace(found, reason=found.reason.encode("utf-8", "backslashreplace").decode())
    if not is_unicode(found.place.container):
        return Rejected(found.name, "broken", "the name of its file is not UTF-8")
    if not is_unicode(found.caption or "") or not is_unicode(found.class_key or ""):
        return Rejected(found.name, "caption", "its caption or class is not UTF-8")
    return found


def _filtered(item: Item, config: FilterConfig) -> Item | Rejected:
    """The picture, or why the recipe's filters leave it out."""
    ratio, side = item.height / item.width, min(item.height, item.width)
    reasons = []
    if config.min_ratio is not None and ratio < config.min_ratio:
        reasons.append(f"height / width is {ratio:.3g}, less than {config.min_ratio:g}")
    if config.max_ratio is not None and ratio > config.max_ratio:
        reasons.append(f"height / width is {ratio:.3g}, more than {config.max_ratio:g}")
    if config.min_side is not None and side < config.min_side:
        reasons.append(f"its shorter side has {side} pixels, less than {config.min_side}")
    if item.height * item.width > config.max_pixels:
        reasons.append(f"it has {item.height * item.width} pixels, more than {config.max_pixels}")
    for name, least in config.minimum.items():
        value = item.numbers.get(name)
        if value is None or value < least:
            reasons.append(f"it has no {name}" if value is None else f"its {name} is {value:g}, less than {least:g}")
    for name, most in config.maximum.items():
        value = item.numbers.get(name)
        if value is None or value > most:
            reasons.append(f"it has no {name}" if value is None else f"its {name} is {value:g}, more than {most:g}")
    return Rejected(item.name, "filtered", reasons[0]) if reasons else item


def _schema(numbers: Iterable[str]) -> Any:
    import pyarrow as pa

    columns = [
        ("name", pa.string()),
        ("container", pa.string()),
        ("start", pa.int64()),
        ("length", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("caption", pa.string()),
        ("class_key", pa.string()),
    ]
    return pa.schema([*columns, *((NUMBER + name, pa.float64()) for name in sorted(numbers))])


def _table(items: list[Item], numbers: Iterable[str]) -> Any:
    import pyarrow as pa

    rows = [
        {
            "name": item.name,
            "container": item.place.container,
            "start": item.place.start,
            "length": item.place.length,
            "height": item.height,
            "width": item.width,
            "caption": item.caption,
            "class_key": item.class_key,
            **{NUMBER + name: value for name, value in item.numbers.items()},
        }
        for item in items
    ]
    return pa.Table.from_pylist(rows, schema=_schema(numbers))


def _unified(table: Any, schema: Any) -> Any:
    """With a column of nulls for what this chunk does not know."""
    import pyarrow as pa

    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type) for field in schema
    ]
    return pa.table(columns, schema=schema)


def _summary(config: PrepareConfig, source: Source, folder: Path, count: int) -> dict[str, Any]:
    """What all chunks hold together, if it can be prepared."""
    import pyarrow.parquet as pq

    policy = _caption_policy(config)
    pictures, rejected = 0, Counter[str]()
    class_keys: set[str | None] = set()
    numbers: set[str] = set()
    bare: list[str] = []
    num_bare = 0
    first_rejected: list[str] = []
    for number in range(count):
        with pq.ParquetFile(_chunk_file(folder, number)) as file:
            numbers.update(json.loads(file.schema_arrow.metadata[b"pixart_ds"])["numbers"])
            table = file.read(columns=["name", "caption", "class_key"])
        captioned = table.filter(table["caption"].is_valid()) if policy == "skip" else table
        pictures += len(captioned)
        rejected["caption"] += len(table) - len(captioned)
        class_keys.update(captioned["class_key"].unique().to_pylist())
        if table["caption"].null_count:
            num_bare += table["caption"].null_count
            if len(bare) < _FIRST + 1:
                bare += table.filter(table["caption"].is_null())["name"].slice(0, _FIRST + 1).to_pylist()
        for line in files.read_json_lines(_rejected_file(folder, number)):
            rejected[line["kind"]] += 1
            if len(first_rejected) < _FIRST:
                first_rejected.append(f"{line['picture']} ({line['reason']})")
    _check_numbers(config, source, numbers)
    if not pictures:
        raise DataError(
            f"there is nothing to prepare: all {rejected.total()} pictures are left out: {'; '.join(first_rejected)}"
            + ("; …" if rejected.total() > _FIRST else ""),
            where=source.root,
            remedy="correct `source` or `filter` in the prepare recipe",
        )
    if num_bare and policy == "error":
        raise DataError(
            f"{num_bare} of {pictures} pictures have no caption: {_some(bare)}",
            where=source.root,
            remedy=_caption_remedy(config),
        )
    _check_twice(folder, count, source)
    return {
        "pictures": pictures,
        "rejected": {kind: rejected[kind] for kind in ("broken", "filtered", "caption")},
        "class_keys": class_sequence(key for key in class_keys if key is not None),
        "numbers": sorted(numbers),
    }


def _some(names: list[str]) -> str:
    return ", ".join(names[:_FIRST]) + (", …" if len(names) > _FIRST else "")


def _caption_remedy(config: PrepareConfig) -> str:
    if config.source.kind in ("folder", "webdataset"):
        how = f"write NAME{config.source.caption_suffix} beside each picture"
    else:
        how = "name what holds them in source.caption_key"
    return f"{how}, or set captions.missing=skip to leave these out, or captions.captioner to have captions written"


def _check_numbers(config: PrepareConfig, source: Source, numbers: set[str]) -> None:
    unknown = sorted({*config.filter.minimum, *config.filter.maximum} - numbers)
    if unknown:
        known = ", ".join(sorted(numbers)) or "none at all"
        raise DataError(
            f"the source gives no number {unknown[0]} to filter by; it gives {known}",
            where=source.root,
            remedy="correct filter.minimum and filter.maximum in the prepare recipe",
        )


def _check_twice(folder: Path, count: int, source: Source) -> None:
    """Every name is that of one picture."""

    def names(number: int) -> list[str]:
        listed: list[str] = _read(folder, number, "name")["name"].to_pylist()
        return listed

    if twice := repeated_texts(names, count):
        raise DataError(
            f"{len(twice)} pictures are listed more than once: {_some(twice)}",
            where=source.root,
            remedy="leave one entry for each in the list",
        )
