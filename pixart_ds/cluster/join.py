"""The agent of a machine that trains with others and does not lead them: `pixart-ds join`."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from pixart_ds import __version__
from pixart_ds.cluster import wire as words
from pixart_ds.cluster.frozen import hash_here
from pixart_ds.cluster.launchers import LocalLauncher
from pixart_ds.cluster.requests import Requests
from pixart_ds.cluster.service import Service
from pixart_ds.cluster.wire import HELLO_SECONDS, Address, Hello, Refused, Wire, WireError, ask_to_join
from pixart_ds.errors import EXIT_DONE, EXIT_STOPPED, MachineError
from pixart_ds.layout import RunLayout, StageLayout
from pixart_ds.log import Log

_POLL_SECONDS = 0.05
_AGAIN_SECONDS = 1.0


def this_machine(processes: int, device: str, name: str | None = None) -> Hello:
    """What this process says of itself to the others."""
    return Hello(name or socket.gethostname(), os.getpid(), processes, device, __version__, hash_here())


@dataclass
class Agent:
    """One machine's part of a stage.

    Args:
        run, stage: What the leader trains.
        leader: Where it listens.
        own: What this machine says of itself.
        requests: What has asked this process to stop.
        log: For people.
        patience_s: How long a leader is waited for: the first one, and the next after one that was lost.
        once: End when the leader is lost.
        grace_s: For ranks to save when the leader is lost, before they are killed.
        folder_s: For the folder of a new attempt to be seen here: network file systems are late by up to half a minute.
        launcher: Starts this machine's ranks.
    """

    run: Path
    stage: str
    leader: Address
    own: Hello
    requests: Requests
    log: Log
    patience_s: float = 600.0
    once: bool = False
    grace_s: float = 60.0
    folder_s: float = 60.0
    launcher: LocalLauncher = field(default_factory=lambda: LocalLauncher(1))

    def work(self) -> int:
        """Joins, and does what the leader says until it says that the attempt is over; again with the next leader.

        Returns:
            The leader's exit code; 75 if this process was asked to stop, or is not to wait for another leader.

        Raises:
            MachineError: No leader within the patience, it refuses this machine, or the run's folder is not shared.
        """
        while True:
            if (joined := self._join()) is None:
                if self.requests.names:
                    return EXIT_STOPPED
                self.log.event("is done already; nothing to do")
                return EXIT_DONE
            service = Service(self.run, self.stage, joined, self.launcher, self.requests, self.log)
            service.grace_s, service.folder_s = self.grace_s, self.folder_s
            code = service.serve()
            if code is not None:
                return code
            if self.once or self.requests.names:
                return EXIT_STOPPED

    @property
    def _layout(self) -> StageLayout:
        return RunLayout(self.run).stage(self.stage)

    def _join(self) -> Wire | None:
        """The connection to a leader that has welcomed this machine; None if there is no need of it: the stage is done, or this
        process is asked to stop.
        """
        until, told = time.monotonic() + self.patience_s, None
        while not self.requests.names and not self._layout.done.exists():
            try:
                return self._ask()
            except Refused as refused:
                if refused.final:
                    raise MachineError(
                        f"the leader refuses this machine: {refused.why}",
                        where=f"the leader at {self.leader}",
                        remedy="run the same code in the same environment on all machines, with the same --device",
                    ) from refused
                why = refused.why
            except OSError as error:
                why = error.strerror or str(error)
            if why != told:
                self.log.event(f"waits up to {self.patience_s:.0f} s for a leader at {self.leader}: {why}")
                told = why
            if time.monotonic() > until:
                raise MachineError(
                    f"no leader has let this machine join within {self.patience_s:.0f} s: {why}",
                    where=f"the leader at {self.leader}",
                    remedy="start `pixart-ds train … --rendezvous` on that host; see that this one can reach the port",
                )
            time.sleep(_AGAIN_SECONDS)
        return None

    def _ask(self) -> Wire:
        address = (self.leader.host, self.leader.port)
        connection = Wire(socket.create_connection(address, timeout=HELLO_SECONDS))
        try:
            try:  # read anew each time: every leader makes its own
                token = self._layout.machines_token.read_text(encoding="utf-8")
            except FileNotFoundError as cause:
                raise WireError(
                    f"there is no {self._layout.machines_token}: the run's folder must be shared"
                ) from cause
            ask_to_join(connection, token, self.own)
        except BaseException:
            connection.close()
            raise
        connection.keep(words.SILENCE_SECONDS, words.BEAT_SECONDS)
        self.log.event(f"has joined the leader at {self.leader} with {self.own.ranks}")
        return connection
