"""What a machine does under one leader: starts the ranks that it asks for, passes signals on, tells how they end."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixart_ds.cluster import wire as words
from pixart_ds.cluster.launchers import LaunchRequest, LocalLauncher, LocalRanks, Part
from pixart_ds.cluster.requests import Requests
from pixart_ds.cluster.wire import Wire, WireError
from pixart_ds.errors import EXIT_STOPPED, MachineError
from pixart_ds.layout import AttemptLayout, RunLayout
from pixart_ds.log import Log

_POLL_SECONDS = 0.05


@dataclass
class Service:
    """All ranks are started in the thread that calls `serve`: the kernel ends them with it.

    Args:
        run, stage: What the leader trains.
        wire: The connection to it.
        launcher: Starts this machine's ranks.
        requests: What has asked this process to stop.
        log: For people.
        grace_s: For ranks to save when the leader is lost, before they are killed.
        folder_s: For the folder of a new attempt to be seen here: network file systems are late by up to half a minute.
    """

    run: Path
    stage: str
    wire: Wire
    launcher: LocalLauncher
    requests: Requests
    log: Log
    grace_s: float = 60.0
    folder_s: float = 60.0
    _inbox: queue.SimpleQueue[dict[str, Any] | OSError] = field(default_factory=queue.SimpleQueue)
    _ranks: LocalRanks | None = None
    _launch: int = 0
    _failure_told: bool = False
    _leaves: bool = False

    def serve(self) -> int | None:
        """The exit code, or None if the leader was lost."""
        threading.Thread(target=self._listen, name="leader", daemon=True).start()
        try:
            return self._serve()
        except BaseException as error:  # such as a full disk: the leader goes on without this machine, and says why
            self._tell("leaves", why=str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise
        finally:
            self._end(0.0)
            self.wire.close()

    def _listen(self) -> None:
        try:
            while True:
                self._inbox.put(self.wire.receive())
        except OSError as error:
            self._inbox.put(error)

    def _serve(self) -> int | None:
        while True:
            try:
                message = self._inbox.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                message = None
            try:
                if isinstance(message, OSError):
                    raise WireError(str(message)) from message
                if message is not None and (code := self._obey(message)) is not None:
                    return code
            except WireError as error:
                self.log.event(f"the leader is lost: {error}")
                self._end(self.grace_s)
                return None
            self._report()
            if self.requests.names and not self._leaves:
                self._leave()
            if self._leaves and self._ranks is None:
                return EXIT_STOPPED

    def _obey(self, message: dict[str, Any]) -> int | None:
        """Does what a message says; the exit code if it is the last one."""
        kind = message["kind"]
        if kind == "start":
            self._start(message)
        elif kind == "signal":
            if self._ranks is not None and words.field(message, "launch", int) == self._launch:
                self._ranks.send(signal.Signals(words.field(message, "number", int)))
        elif kind == "over":
            code = words.field(message, "code", int)
            self.log.event(f"the leader has ended with exit code {code}")
            return code
        return None

    def _start(self, message: dict[str, Any]) -> None:
        number, launch = words.field(message, "attempt", int), words.field(message, "launch", int)
        attempt = RunLayout(self.run).stage(self.stage).attempt(number)
        self._wait_for(attempt)
        first, count, world_size = (words.field(message, name, int) for name in ("first", "count", "world_size"))
        meeting = words.field(message, "master_addr", str), words.field(message, "master_port", int)
        part = Part(first, count, world_size, *meeting)
        self._launch, self._failure_told = launch, False
        request = LaunchRequest(self.run, self.stage, attempt, self._launch, words.field(message, "device", str))
        self.launcher.extra = [str(word) for word in words.field(message, "extra", list)]
        which = f"rank {first}" if count == 1 else f"ranks {first} to {first + count - 1}"
        self.log.event(f"attempt {attempt.number}, launch {self._launch}: starts {which} of {world_size}")
        try:
            self._ranks = self.launcher.start_part(request, sys.stdout, part)
        except OSError as cause:
            raise MachineError(
                f"the ranks cannot be started: {cause.strerror or cause}",
                where=cause.filename or attempt.root,
                remedy="mend this machine, then join again: the others go on without it meanwhile",
            ) from cause

    def _wait_for(self, attempt: AttemptLayout) -> None:
        until = time.monotonic() + self.folder_s
        while not attempt.root.is_dir():
            if time.monotonic() > until:
                raise MachineError(
                    f"the folder of attempt {attempt.number} is not seen on this machine",
                    where=attempt.root,
                    remedy="put the run into a folder that all machines share",
                )
            time.sleep(0.1)
            with suppress(OSError):
                os.listdir(attempt.root.parent)  # makes a network file system look again

    def _report(self) -> None:
        """Tells the leader of the first rank that failed, and when all have left."""
        if self._ranks is None:
            return
        alive = self._ranks.alive()
        failed = self._ranks.failed()
        if failed is not None and not self._failure_told:
            self._failure_told = True
            self.log.event(str(failed))
            self._tell("failed", launch=self._launch, rank=failed.rank, code=failed.code)
        if not alive:
            self._ranks = None
            self.log.event(f"launch {self._launch}: all ranks have left")
            self._tell("left", launch=self._launch)

    def _leave(self) -> None:
        """This machine is asked to stop: its ranks, and so all, save; the others go on without it."""
        self._leaves = True
        why = self.requests.names[0]
        self.log.event(f"leaves ({why})")
        self._tell("leaves", why=why)
        if self._ranks is not None:
            self._ranks.send(signal.SIGTERM)

    def _tell(self, kind: str, **values: object) -> None:
        with suppress(OSError):  # that the leader is lost is heard in the inbox
            self.wire.send(kind, **values)

    def _end(self, grace_s: float) -> None:
        """Ends the ranks: asks them to save, and kills them after the grace, or when a person hurries."""
        if self._ranks is None:
            return
        until, asked = time.monotonic() + grace_s, len(self.requests.names)
        if grace_s:
            self._ranks.send(signal.SIGTERM)
        while self._ranks.alive():
            if time.monotonic() > until or len(self.requests.names) > asked:
                self._ranks.send(signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        self._ranks = None
        self.log.event("all ranks have left")
