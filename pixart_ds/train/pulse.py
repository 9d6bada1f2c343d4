"""A rank's signs of life: where it is, for how long, and where its time went, in a small file that a thread rewrites. No torch."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from pixart_ds import files
from pixart_ds.layout import AttemptLayout
from pixart_ds.train.times import Phase, Times

_OWN = ("data", "compute")
_LAST_WORD_S = 5.0
_DEADLINE: dict[str, str] = {"save": "save", "preview": "preview"}


class Pulse:
    """Writes `ranks/NNNNN.json` of an attempt every few seconds, in a thread: also while the rank waits in a collective.

    Args:
        attempt, launch: Whose.
        rank: Which.
        every_s: Seconds between two signs.
    """

    def __init__(self, attempt: AttemptLayout, launch: int, rank: int, every_s: float = 2.0) -> None:
        self._path, self._every_s = attempt.pulse(rank), every_s
        host = (
            os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        )  # as the scheduler calls it, where there is one
        self._about: dict[str, Any] = {"rank": rank, "launch": launch, "host": host, "pid": os.getpid()}
        self._about["began"] = round(time.time(), 3)
        self._energy: Callable[[], Mapping[str, Any]] | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._beats = 0
        self._phase: Phase = "start"
        self._since = time.monotonic()
        self._images_seen: int | None = None
        self._stepped = False
        self._times = Times(time.monotonic)
        self._own_s = 0.0
        self._mean_own_s: float | None = None
        self._thread = threading.Thread(target=self._beat_on, name="pulse", daemon=True)

    def start(self) -> Pulse:
        """Begins to write."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Writes once more, and no more; a file system that hangs holds nobody up."""
        self._over.set()
        self._thread.join(_LAST_WORD_S)

    def tell(self, energy: Callable[[], Mapping[str, Any]] | None = None, **about: Any) -> None:
        """Says more of the rank, such as what it computes on; and where one rank of a node reads what the node's devices use."""
        with self._lock:
            self._about |= about
            self._energy = energy or self._energy

    def enter(self, phase: Phase) -> None:
        """Says what comes now."""
        now = time.monotonic()
        with self._lock:
            self._times.enter(phase)
            if self._phase in _OWN:
                self._own_s += now - self._since
            self._phase, self._since = phase, now

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """`enter`, and back to what was before."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def stepped(self, images_seen: int) -> None:
        """A step has ended at this clock."""
        with self._lock:
            mean, own = self._mean_own_s, self._own_s
            if self._stepped:  # the first one is unlike the others
                self._mean_own_s = own if mean is None else 0.9 * mean + 0.1 * own
            self._own_s, self._images_seen, self._stepped = 0.0, images_seen, True

    def step_ended(self, *, data_wait_s: float, moved: bool, flops: float) -> None:
        """See `Times.step_ended`."""
        with self._lock:
            self._times.step_ended(data_wait_s=data_wait_s, moved=moved, flops=flops)

    def _state(self) -> dict[str, Any]:
        with self._lock:
            self._beats += 1
            energy = {} if self._energy is None else {"energy": self._energy()}
            return {
                **self._about,
                "beat": self._beats,
                "phase": self._phase,
                "for_s": round(time.monotonic() - self._since, 3),
                "deadline": _DEADLINE.get(self._phase, "step" if self._stepped else "start"),
                "images_seen": self._images_seen,
                "own_s": None if self._mean_own_s is None else round(self._mean_own_s, 4),
                "parts": self._times.parts(),
                "flops": self._times.flops,
                "over": self._over.is_set(),
                **energy,
            }

    def _beat_on(self) -> None:
        over = False
        while True:
            with suppress(OSError):  # a full disk ends the attempt where something is lost by it, not here
                files.replace_text(self._path, json.dumps(self._state()))
            if over:
                return
            over = self._over.wait(self._every_s)


def read_pulses(attempt: AttemptLayout, launch: int | None = None) -> list[dict[str, Any]]:
    """The newest sign of life of each rank of a launch, by rank; of the last launch without one."""
    found: list[dict[str, Any]] = []
    try:
        paths = sorted(attempt.pulses.glob("*.json"))
    except OSError:  # a network file system that hiccups: the next look will tell
        return []
    for path in paths:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # such as ESTALE, in the moment of a rename on a network file system
            continue
        found.append(values)
    wanted = launch if launch is not None else max((values["launch"] for values in found), default=0)
    return [values for values in found if values["launch"] == wanted]


def slow_ranks(pulses: list[dict[str, Any]], factor: float = 1.3) -> list[dict[str, Any]]:
    """The ranks whose own part of a step takes `factor` times the median, slowest first: the others wait for them."""
    known = sorted((each for each in pulses if each["own_s"] is not None), key=lambda each: float(each["own_s"]))
    if len(known) < 2:
        return []
    median = known[(len(known) - 1) // 2]["own_s"]
    return [{**each, "median_own_s": median} for each in reversed(known) if each["own_s"] > factor * median]


def slow_words(pulse: dict[str, Any]) -> str:
    """One of `slow_ranks`, for people."""
    return (
        f"rank {pulse['rank']} on {pulse['host']} takes {pulse['own_s']:.2f} s for its part of a step, "
        f"the median rank {pulse['median_own_s']:.2f} s: the others wait for it"
    )
