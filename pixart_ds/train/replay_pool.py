"""A stage's steps recomputed and compared, in one process or several, with a line of progress. No torch."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import pairwise
from typing import Any

from pixart_ds.log import duration, si
from pixart_ds.plan.random import Words
from pixart_ds.train.replay import Outcome, Replay, compare

_QUIET_SECONDS = 1.0


class _Progress:
    """One line on stderr, where that is a terminal and it takes more than a second."""

    def __init__(self, subject: str, total: int) -> None:
        self.subject, self.total, self.done, self.began = subject, total, 0, time.monotonic()
        self._next = self.began + _QUIET_SECONDS if sys.stderr.isatty() else float("inf")
        self._shown = False

    def add(self, samples: int) -> bool:
        """Counts samples; never asks to stop."""
        self.at(self.done + samples)
        return False

    def at(self, done: int) -> None:
        self.done = done
        now = time.monotonic()
        if now > self._next and done:
            self._next, self._shown = now + 0.5, True
            rate = done / (now - self.began)
            left = duration((self.total - done) / rate)
            text = f"{self.subject}  {done / self.total:4.0%}  {si(done)} of {si(self.total)} samples  {si(rate)}/s  {left} left"
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def recompute(replay: Replay, first: int, logged: Words, num_ids: int, processes: int) -> Outcome:
    """`compare`, in this process or split among several; progress is shown on stderr.

    Args:
        replay: The stage.
        first: Step of the first digest.
        logged: (steps,) digests.
        num_ids: One more than the highest sample id.
        processes: How many.
    """
    progress = _Progress(f"audit of {replay.stage}", len(logged) * replay.batch)
    try:
        if processes == 1 or len(logged) < processes:
            return compare(replay, first, logged, num_ids, progress.add)
        return _in_processes(replay, first, logged, num_ids, processes, progress)
    finally:
        progress.clear()


def _in_processes(
    replay: Replay, first: int, logged: Words, num_ids: int, processes: int, progress: _Progress
) -> Outcome:
    """The same by consecutive ranges of steps, since a pass over the sets is planned once in each process."""
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("q", 0), context.Event()
    cuts = [len(logged) * number // processes for number in range(processes + 1)]
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=_prepare_worker, initargs=(replay, num_ids, done, stop)
    ) as pool:
        futures = [pool.submit(_compare_range, first + begin, logged[begin:end]) for begin, end in pairwise(cuts)]
        while (pending := [future for future in futures if not future.done()]) and not stop.is_set():
            wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            progress.at(done.value)
            if _is_settled(futures):
                stop.set()
        return _joined([future.result() for future in futures], [first + cut for cut in cuts])


def _is_settled(futures: Sequence[Future[Outcome]]) -> bool:
    """Whether the first fault is known: one was found, and all ranges before it are through."""
    for future in futures:
        if not future.done():
            return False
        if future.result().wrong is not None:
            return True
    return False


def _joined(outcomes: Sequence[Outcome], firsts: Sequence[int]) -> Outcome:
    whole = Outcome(outcomes[0].coverage)
    for number, outcome in enumerate(outcomes):
        if number and (sample := whole.coverage.join(outcome.coverage)) is not None:
            whole.wrong = firsts[number]
            whole.fault = f"the visits of sample {sample} do not go on from those of the steps before"
            return whole
        whole.steps += outcome.steps
        if outcome.wrong is not None:
            whole.wrong, whole.expected, whole.fault = outcome.wrong, outcome.expected, outcome.fault
            return whole
    return whole


_worker: dict[str, Any] = {}


def _prepare_worker(replay: Replay, size: int, done: Any, stop: multiprocessing.synchronize.Event) -> None:
    def tell(samples: int) -> bool:
        with done.get_lock():
            done.value += samples
        return stop.is_set()

    _worker.update(replay=replay, size=size, tell=tell)


def _compare_range(first: int, logged: Words) -> Outcome:
    tell: Callable[[int], bool] = _worker["tell"]
    return compare(_worker["replay"], first, logged, _worker["size"], tell)
