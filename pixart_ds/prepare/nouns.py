"""How rich captions are in nouns, as the paper measures it (Table 1): distinct nouns, those that come often, nouns per image."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pixart_ds import files
from pixart_ds.errors import ConfigError, DataError, MachineError
from pixart_ds.log import Work
from pixart_ds.prepare.caption_files import open_captions
from pixart_ds.prepare.noun_counts import MAX_HELD, NounCounts, merge_counts
from pixart_ds.prepare.noun_table import NounReport, statistics

NOUN_TAGS = frozenset({"NN", "NNS", "NNP", "NNPS"})
"""Of the Penn Treebank: common and proper nouns, in the singular and in the plural."""

_DATA = "averaged_perceptron_tagger_eng"
_DATA_FILES = tuple(f"{_DATA}.{part}.json" for part in ("weights", "tagdict", "classes"))
_BATCH_CAPTIONS = 500


class NounTagger:
    """Finds the nouns of a caption with NLTK's averaged perceptron tagger.

    Sentences are cut by Punkt's rules without its trained abbreviations, words by NLTK's tokenizer; the tagger sees the whole
    caption, in its own case.

    Args:
        folder: With the tagger's data; None for where NLTK looks.

    Raises:
        ConfigError: The folder does not hold the data.
        DataError: The data is damaged.
        MachineError: NLTK does not find the data.
    """

    def __init__(self, folder: Path | None = None) -> None:
        from nltk.tokenize import NLTKWordTokenizer
        from nltk.tokenize.punkt import PunktSentenceTokenizer

        self._tag = _load_tagger(folder).tag
        self._sentences = PunktSentenceTokenizer().tokenize
        self._words = NLTKWordTokenizer().tokenize

    def nouns(self, caption: str) -> list[str]:
        """The nouns in their sequence, in lower case, in the form that they have in the caption."""
        words = [word for sentence in self._sentences(caption) for word in self._words(sentence)]
        return [word.lower() for word, tag in self._tag(words) if tag in NOUN_TAGS]


def _load_tagger(folder: Path | None) -> Any:
    from nltk.tag.perceptron import PerceptronTagger

    if folder is None:
        try:
            return PerceptronTagger()
        except (LookupError, OSError) as cause:
            raise MachineError(
                f"NLTK does not find the data of its tagger, {_DATA}",
                where="NLTK_DATA, ~/nltk_data and NLTK's other folders",
                remedy=f"python -m nltk.downloader {_DATA}; where there is no internet, do so elsewhere, copy the folder "
                f"taggers/{_DATA} and name it with --tagger",
            ) from cause
    if missing := [name for name in _DATA_FILES if not (folder / name).is_file()]:
        raise ConfigError(
            f"the folder does not hold the tagger's data: {', '.join(missing)} missing",
            where=folder,
            remedy=f"name the folder taggers/{_DATA} as `python -m nltk.downloader {_DATA}` lays it down",
        )
    # Read here, since the newer NLTK opens no file outside its own data folders.
    parts = [files.read_json(folder / name, remedy=f"download {_DATA} again") for name in _DATA_FILES]
    if [type(part) for part in parts] != [dict, dict, list]:
        raise DataError("the tagger's data has another form", where=folder, remedy=f"download {_DATA} again")
    return PerceptronTagger.decode_json_obj(tuple(parts))


def count_nouns(
    places: Sequence[str],
    *,
    column: str | None = None,
    tagger: Path | None = None,
    processes: int = 1,
    max_held: int = MAX_HELD,
    stream: TextIO | None = None,
) -> NounReport:
    """Counts the nouns of all captions of each place. The answer does not depend on `processes` or `max_held`.

    Args:
        places: As `open_captions` takes them.
        column: Of files with columns.
        tagger: Folder of the tagger's data; None for where NLTK looks.
        processes: That tag captions.
        max_held: Distinct nouns in memory; the others wait in a temporary folder.
        stream: Where progress is shown; None: `sys.stderr`.

    Raises:
        ConfigError: A place, a column or the tagger's data is not there.
        DataError: A set or a file is damaged.
        MachineError: NLTK has no data, a process was ended from outside, or the disk is full.
    """
    nouns = NounTagger(tagger)
    opened = [open_captions(place, column) for place in places]
    totals = [each.total for each in opened if each.total is not None]
    total = sum(totals) if len(totals) == len(opened) else None
    found, counted = [], []
    with (
        tempfile.TemporaryDirectory(prefix="pixart-ds-nouns-") as temporary,
        _Pool(nouns, processes) as pool,
        Work("count", total, "captions", program="nouns", stream=stream) as work,
    ):
        for number, each in enumerate(opened):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            counts = NounCounts(folder, max_held)
            captions = without = 0
            for lot in pool.counted(_lots(each.read())):
                counts.add(lot.nouns)
                captions += lot.captions
                without += lot.without
                work.advance(lot.captions + lot.without)
            found.append(statistics(each.where, captions, without, counts.items()))
            if len(opened) > 1:
                counts.spill()  # no more than one place's is in memory at a time
                counted.append(counts)
        together = None
        if len(found) > 1:
            sums = sum(each.captions for each in found), sum(each.without for each in found)
            together = statistics("together", *sums, merge_counts(each.items() for each in counted))
    return NounReport(tuple(found), together, str(tagger) if tagger else _DATA)


@dataclass(frozen=True)
class _Lot:
    """Some captions' nouns."""

    nouns: Counter[str]
    captions: int
    without: int


def _lots(captions: Iterable[str | None]) -> Iterator[list[str | None]]:
    lot = []
    for caption in captions:
        lot.append(caption)
        if len(lot) == _BATCH_CAPTIONS:
            yield lot
            lot = []
    if lot:
        yield lot


def _count_lot(tagger: NounTagger, lot: Sequence[str | None]) -> _Lot:
    nouns: Counter[str] = Counter()
    there = [caption for caption in lot if caption and not caption.isspace()]
    for caption in there:
        nouns.update(tagger.nouns(caption))
    return _Lot(nouns, len(there), len(lot) - len(there))


_worker: dict[str, NounTagger] = {}


def _prepare_worker(tagger: NounTagger) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that collects
    _worker["tagger"] = tagger


def _count_in_worker(lot: Sequence[str | None]) -> _Lot:
    return _count_lot(_worker["tagger"], lot)


class _Pool:
    """Counts lots of captions here or in other processes."""

    def __init__(self, tagger: NounTagger, processes: int) -> None:
        self._tagger, self._processes = tagger, processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Pool:
        if self._processes > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self._processes, mp_context=context, initializer=_prepare_worker, initargs=(self._tagger,)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def counted(self, lots: Iterator[list[str | None]]) -> Iterator[_Lot]:
        """The counts of each lot; a few lots are on their way at a time."""
        if self._pool is None:
            yield from (_count_lot(self._tagger, lot) for lot in lots)
            return
        waiting: deque[Future[_Lot]] = deque()
        try:
            for lot in lots:
                waiting.append(self._pool.submit(_count_in_worker, lot))
                if len(waiting) > 2 * self._processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as cause:
            raise MachineError(
                "a process that tagged captions was ended from outside",
                where="this machine",
                remedy="look whether it ran out of memory (dmesg), then start again with fewer --processes",
            ) from cause
