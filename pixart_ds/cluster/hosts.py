"""The agents that the leader starts on other machines by ssh, and what became of them."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from pixart_ds.cluster.launchers import tail_of
from pixart_ds.cluster.wire import Address
from pixart_ds.errors import ConfigError, MachineError
from pixart_ds.layout import StageLayout

SSH_VARIABLE = "PIXART_DS_SSH"
"""Another program than ssh, with its options; it is called as ssh is."""

SSH_FAILED = 255
"""ssh's own exit code where there was no connection; any other is the agent's."""

_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")
_PASSED_ON = ("PYTHON", "NCCL_", "GLOO_", "UCX_", "TORCH_", "OMP_")
"""Variables that an agent gets from the leader begin so; never those that hold credentials: a command line is seen by all."""
_NOT_PASSED_ON = "PYTHONSTARTUP"
_LEAVE_SECONDS = 10.0


def is_here(host: str) -> bool:
    """Whether a name of a host list means this machine: an address of it can be listened on."""
    if host in (socket.gethostname(), socket.getfqdn()):
        return True
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:  # ssh may know it by another name
        return False
    for family, kind, _, _, address in found:
        with suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(address)
            return True
    return False


def parse_hosts(text: str) -> list[str]:
    """The other machines of `nodeA,nodeB,nodeC`, in this sequence.

    Raises:
        ConfigError: One stands there twice, looks like an option of ssh, or is a path.
    """
    hosts = [each.strip() for each in text.split(",") if each.strip()]
    for host in hosts:
        if hosts.count(host) > 1:
            raise ConfigError(f"{host} stands in the list twice", where="--hosts", remedy="name each machine once")
        if host.startswith("-") or "/" in host:
            raise ConfigError(f"{host!r} is no name of a host", where="--hosts", remedy="name hosts as ssh takes them")
    return [host for host in hosts if not is_here(host)]


@dataclass
class Hosts:
    """One agent on each host of a list.

    Args:
        names: The hosts.
        layout: The stage.
        device: cpu or cuda.
        processes: Ranks of each; None for one for each GPU it has.
        program: What is called in the place of ssh.
        environment: Of the leader.
    """

    names: Sequence[str]
    layout: StageLayout
    device: str
    processes: int | None = None
    program: str | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    _calls: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def argv(self, host: str, leader: Address) -> list[str]:
        """The whole command line: ssh hands its last word to the host's shell."""
        program = shlex.split(self.program or self.environment.get(SSH_VARIABLE) or "ssh")
        root = self.layout.root.absolute()
        variables = [
            f"{name}={value}"
            for name, value in sorted(self.environment.items())
            if name in ("PATH", "LD_LIBRARY_PATH") or (name.startswith(_PASSED_ON) and name != _NOT_PASSED_ON)
        ]
        agent = [
            *("env", *variables, sys.executable, "-m", "pixart_ds", "join", str(root.parent), root.name),
            *("--rendezvous", str(leader), "--device", self.device, "--name", host, "--once", "--patience", "60"),
            *(("--processes", str(self.processes)) if self.processes else ()),
        ]
        log = shlex.quote(str(self.layout.machine_log(host).absolute()))
        there = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(agent)} >> {log} 2>&1 < /dev/null"
        return [*program, *_OPTIONS, host, there]

    def call(self, host: str, leader: Address) -> None:
        """Starts the agent on a host, in a session of its own: a terminal's Ctrl-C is not for ssh."""
        argv = self.argv(host, leader)
        with open(self.layout.machine_log(host), "ab") as log:
            try:
                self._calls[host] = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            except OSError as cause:
                raise MachineError(
                    f"{argv[0]} cannot be started: {cause.strerror}",
                    where=f"--hosts {host}",
                    remedy="install ssh, name another program with --ssh, or start the machines by hand with --machines",
                ) from cause

    def ended(self, host: str) -> int | None:
        """The exit code of a host's call that is over."""
        call = self._calls.get(host)
        return None if call is None else call.poll()

    def last_words(self, host: str, lines: int = 3) -> str:
        """The end of what ssh and the agent said."""
        return tail_of(self.layout.machine_log(host), lines)

    def close(self) -> None:
        """Waits until all calls are over, and ends those that are not."""
        until = time.monotonic() + _LEAVE_SECONDS
        for call in self._calls.values():
            with suppress(subprocess.TimeoutExpired):
                call.wait(max(0.0, until - time.monotonic()))
        for call in self._calls.values():
            if call.poll() is None:  # its agent ends when it finds the leader gone
                call.kill()
                call.wait()
