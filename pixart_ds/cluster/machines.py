"""The launcher of several machines without Slurm: this one, which leads, and those that have joined it."""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from pixart_ds.cluster.hosts import SSH_FAILED, Hosts, parse_hosts
from pixart_ds.cluster.join import this_machine
from pixart_ds.cluster.launchers import LaunchRequest, LocalLauncher, Part
from pixart_ds.cluster.machines_ranks import MachinesRanks
from pixart_ds.cluster.rendezvous import Member, Rendezvous
from pixart_ds.cluster.requests import Requests
from pixart_ds.cluster.wire import Address
from pixart_ds.engine.environment import free_port
from pixart_ds.errors import EXIT_BUG, ConfigError, MachineError, PixArtError
from pixart_ds.layout import StageLayout
from pixart_ds.log import Log
from pixart_ds.train.attempt import refuse_others

_POLL_SECONDS = 0.1
_WORD_SECONDS = 10.0
_AGAIN_SECONDS = 10.0
"""Between two calls of a host that ssh cannot reach: it may be starting."""
_BACK_SECONDS = 15.0
"""For machines that were lost and are called again before the next launch."""


@dataclass
class MachinesLauncher:
    """Ranks on this machine and on all that have joined; at each launch those that are there then.

    Args:
        local: Starts this machine's ranks, the first ones.
        layout: The stage.
        device: cpu or cuda.
        address: Where the others find this machine.
        log: For people.
        hosts: Starts the others' agents; None where people do.
        machines: How many make a first launch, this one included; `hosts` says it otherwise.
        patience_s: How long they are waited for before the first launch.
    """

    local: LocalLauncher
    layout: StageLayout
    device: str
    address: Address
    log: Log
    hosts: Hosts | None = None
    machines: int = 1
    patience_s: float = 600.0
    unreachable: set[str] = field(default_factory=set)
    _rendezvous: Rendezvous | None = None
    _called: dict[str, float] = field(default_factory=dict)
    _said: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        others = self.members() if self._rendezvous is not None else None
        if others is None:
            count = 1 + len(self.hosts.names) if self.hosts else self.machines
            return f"{count} machines, {self.local} on this one"
        listed = [f"{socket.gethostname()} ({self.local.processes})", *(f"{m.name} ({m.processes})" for m in others)]
        return f"{len(listed)} machine{'s' if others else ''}: {', '.join(listed)}"

    def members(self) -> list[Member]:
        """The other machines that are there: those of the list in its sequence, then in that of joining."""
        names = list(self.hosts.names) if self.hosts else []
        found = self._rendezvous.members() if self._rendezvous else []
        return sorted(found, key=lambda each: names.index(each.name) if each.name in names else len(names))

    def lead(self, requests: Requests, attempt: Callable[[], int]) -> int:
        """Lets the others join, runs the attempt, and sends them away with its exit code."""
        if self.layout.done.exists():
            return attempt()  # which says so
        code = EXIT_BUG
        try:
            refuse_others(self.layout, self.log)  # whose secret would be overwritten
            self.open()
            self.gather(lambda: bool(requests.names) or os.path.lexists(self.layout.stop_request))
            code = attempt()
            return code
        except PixArtError as error:
            code = error.exit_code
            raise
        finally:
            self.close(code)

    def open(self) -> None:
        """Listens, and calls the hosts."""
        own = this_machine(self.local.processes, self.device)
        self._rendezvous = Rendezvous(self.layout, self.address, own, self.log)
        self.address = self._rendezvous.address
        if self.hosts is None:
            self.log.event(f"{self._missing() or 'no other machine'} can join at {self.address}")
        else:
            self._call(self.hosts.names)

    def gather(self, over: Callable[[], object]) -> None:
        """Waits until all machines have joined, or something asks for a stop.

        Raises:
            MachineError: Some have not within the patience; or an agent that was started by ssh has failed.
        """
        until, next_word = time.monotonic() + self.patience_s, time.monotonic() + _WORD_SECONDS
        while not over() and (missing := self._missing()):
            now = time.monotonic()
            self._look_after_calls()
            if now > until:
                raise MachineError(
                    f"{len(self.members()) + 1} of {self._wanted()} machines have joined within {self.patience_s:.0f} s; "
                    f"missing: {missing}",
                    where=f"the rendezvous at {self.address}",
                    remedy="see that they reach this address and share the run's folder; or name fewer machines",
                )
            if now > next_word:
                next_word = now + _WORD_SECONDS
                self.log.event(f"{len(self.members()) + 1} of {self._wanted()} machines are here; missing: {missing}")
            time.sleep(_POLL_SECONDS)

    def _wanted(self) -> int:
        return 1 + len(self.hosts.names) if self.hosts else self.machines

    def _missing(self) -> str:
        """Those that have not joined, for people; empty if all have."""
        if self.hosts is None:
            count = self.machines - 1 - len(self.members())
            return f"{count} other machine{'s' if count > 1 else ''} (pixart-ds join)" if count > 0 else ""
        said = []
        for host in self._absent():
            words = self._last_word(host)
            said.append(f"{host} ({words})" if words else host)
        return ", ".join(said)

    def _last_word(self, host: str) -> str:
        """Why the host's call failed; of a call that runs, why the one before did."""
        assert self.hosts is not None
        return self.hosts.last_words(host, 1) if self.hosts.ended(host) else self._said.get(host, "")

    def _absent(self) -> list[str]:
        here = {each.name for each in self.members()}
        return [host for host in self.hosts.names if host not in here] if self.hosts else []

    def _call(self, names: Sequence[str]) -> None:
        assert self.hosts is not None
        for host in names:
            self._called[host], self._said[host] = time.monotonic(), self._last_word(host)
            self.hosts.call(host, self.address)

    def _look_after_calls(self) -> None:
        """Calls hosts again that could not be reached; an agent's own error comes again, and is told."""
        for host in self._absent():
            assert self.hosts is not None
            code = self.hosts.ended(host)
            if code is not None and code != SSH_FAILED:
                raise MachineError(
                    f"the agent on {host} ended with exit code {code}:\n{self.hosts.last_words(host, 6)}",
                    where=self.layout.machine_log(host),
                    remedy="mend what it says, or leave the host out of --hosts",
                )
            if code is not None and time.monotonic() > self._called[host] + _AGAIN_SECONDS:
                self._call([host])

    def _call_back(self) -> None:
        """Calls hosts that were lost once more, and waits a little: often the machine is well, and only a process was killed."""
        if self.hosts is None:
            return
        again = [host for host in self._absent() if self.hosts.ended(host) is not None]
        self._call(again)
        until = time.monotonic() + _BACK_SECONDS
        while time.monotonic() < until:
            if not [host for host in again if host in self._absent() and self.hosts.ended(host) is None]:
                return
            time.sleep(_POLL_SECONDS)

    def start(self, request: LaunchRequest, output: TextIO) -> MachinesRanks:
        """See `Launcher`."""
        if request.launch > 1:
            self._call_back()
        members = self.members()
        world_size = self.local.processes + sum(each.processes for each in members)
        meeting = (self.address.host if members else "127.0.0.1", free_port())
        local = self.local.start_part(request, output, Part(0, self.local.processes, world_size, *meeting))
        first = self.local.processes
        for each in members:
            each.start(request, Part(first, each.processes, world_size, *meeting), list(self.local.extra))
            first += each.processes
        return MachinesRanks(self.layout, request, local, members, world_size)

    def close(self, code: int) -> None:
        """Sends all machines away; nothing that was started on them or for them stays."""
        if self._rendezvous is not None:
            self._rendezvous.close(code)
        if self.hosts is not None:
            self.hosts.close()


def machines_launcher(
    local: LocalLauncher, layout: StageLayout, options: argparse.Namespace
) -> MachinesLauncher | None:
    """What the options of `train` ask for; None where they name no other machine.

    Raises:
        ConfigError: They do not go together.
    """
    hosts, machines, rendezvous = options.hosts, options.machines, options.rendezvous
    if hosts is None and machines is None:
        if rendezvous is not None:
            raise ConfigError(
                "--rendezvous is for several machines, and none is named",
                remedy="say how many there are, --machines 3, or which, --hosts nodeA,nodeB,nodeC",
            )
        return None
    if hosts is None and rendezvous is None:
        raise ConfigError(
            "--machines needs an address that the others can join", remedy="name it: --rendezvous THIS_HOST:29400"
        )
    address = Address.parse(rendezvous) if rendezvous else Address(socket.gethostname(), 0)
    if hosts is None and address.port == 0:
        raise ConfigError("port 0 is none that the others could know", where="--rendezvous", remedy="name another")
    called = None
    if hosts is not None:
        called = Hosts(parse_hosts(hosts), layout, options.device, options.processes, options.ssh)
    log, patience_s = Log(layout.root.name), float(options.patience)
    return MachinesLauncher(local, layout, options.device, address, log, called, machines or 1, patience_s)
