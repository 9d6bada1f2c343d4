"""Where machines join the leader: a port, a secret in the stage's folder, and a connection to each machine."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from pixart_ds import files
from pixart_ds.cluster import wire as words
from pixart_ds.cluster.launchers import Failed, LaunchRequest, Part
from pixart_ds.cluster.wire import Address, Hello, Refused, Wire, WireError, field, greet, refuse
from pixart_ds.errors import MachineError
from pixart_ds.layout import StageLayout
from pixart_ds.log import Log

_ACCEPT_SECONDS = 0.2
_LEAVE_SECONDS = 5.0


class Member:
    """A machine that has joined, and what its ranks of the newest launch do.

    Attributes:
        name, processes, ranks: Which, and how many ranks it starts; for people.
        gone: Why it is lost, if it is.
        leaves: Why it is about to leave, if it is.
        failures: Its ranks that failed: at most one, the first.
        left: Whether all its ranks have left.
    """

    def __init__(self, hello: Hello, wire: Wire) -> None:
        self.name, self.processes, self.ranks = hello.name, hello.processes, hello.ranks
        self.gone: str | None = None
        self.leaves: str | None = None
        self.failures: list[Failed] = []
        self.left = True
        self._launch = 0
        self._wire = wire

    def start(self, request: LaunchRequest, part: Part, extra: list[str]) -> None:
        """Has it start its ranks."""
        self._launch, self.failures, self.left = request.launch, [], False
        about = {"attempt": request.attempt.number, "launch": request.launch, "device": request.device}
        self.tell("start", **about, **vars(part), extra=extra)

    def signal(self, number: int) -> None:
        """Has it pass a signal to its ranks."""
        if not self.left:
            self.tell("signal", launch=self._launch, number=number)

    def tell(self, kind: str, **values: object) -> None:
        """Says something; where that fails, the machine is lost."""
        try:
            self._wire.send(kind, **values)
        except OSError as error:
            self.lose(error)

    def hear(self, message: dict[str, Any]) -> None:
        """Takes note of what it says; what belongs to an earlier launch counts no more."""
        if message["kind"] == "leaves":
            self.leaves = field(message, "why", str)
        elif message["kind"] not in ("failed", "left"):
            raise WireError(f"it said {message['kind']!r}")
        elif field(message, "launch", int) == self._launch:
            if message["kind"] == "left":
                self.left = True
            else:
                self.failures = [Failed(field(message, "rank", int), field(message, "code", int), self.name)]

    def lose(self, error: OSError) -> None:
        """Takes it for lost, and its ranks with it."""
        self.gone = self.gone or error.strerror or str(error)
        self._wire.close()

    def listen(self) -> None:
        """Hears it until it is lost."""
        try:
            while True:
                self.hear(self._wire.receive())
        except OSError as error:
            self.lose(error)


class Rendezvous:
    """The leader's port.

    Args:
        layout: The stage; the secret is written into its folder.
        address: Where the others find this machine; port 0 for any that is free.
        own: What a machine must be like.
        log: For people.

    Raises:
        MachineError: The port is taken, or the folder cannot be written.
    """

    def __init__(self, layout: StageLayout, address: Address, own: Hello, log: Log) -> None:
        self._layout, self._own, self._log = layout, own, log
        self._members: list[Member] = []
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._server = _listen(address)
        self.address = Address(address.host, self._server.getsockname()[1])
        self._token = secrets.token_hex(32)
        try:
            _write_secret(layout, self._token)
        except OSError as cause:
            self._server.close()
            raise MachineError(
                f"the run's folder cannot be written: {cause.strerror}",
                where=layout.machines,
                remedy="make it writable for this user, or free disk space and quota",
            ) from cause
        self._server.settimeout(_ACCEPT_SECONDS)
        self._thread = threading.Thread(target=self._accept, name="rendezvous", daemon=True)
        self._thread.start()

    def members(self) -> list[Member]:
        """The machines that are there and mean to stay, in the sequence in which they joined."""
        with self._lock:
            return [each for each in self._members if each.gone is None and each.leaves is None]

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, peer = self._server.accept()
            except TimeoutError:
                continue
            except OSError as error:  # such as too many open files: it may pass
                if not self._closed.wait(1.0):
                    self._log.event(f"a machine cannot join: {error.strerror or error}")
                continue
            threading.Thread(target=self._serve, args=(connection, peer[0]), name="machine", daemon=True).start()

    def _serve(self, connection: socket.socket, peer: str) -> None:
        wire = Wire(connection)
        try:
            member = self._welcome(wire)
        except (Refused, OSError) as error:
            if not self._closed.is_set():
                self._log.event(f"a machine that connected from {peer} has not joined: {error}")
            wire.close()
            return
        self._log.event(f"{member.name} has joined with {member.ranks}")
        member.listen()
        if not self._closed.is_set():
            self._log.event(
                f"{member.name} " + (f"has left ({member.leaves})" if member.leaves else f"is lost: {member.gone}")
            )

    def _welcome(self, wire: Wire) -> Member:
        hello = greet(wire, self._token, self._own)
        member = Member(hello, wire)
        with self._lock:
            if self._closed.is_set():
                refuse(wire, "the leader is ending", final=False)
            if any(each.name == hello.name and each.gone is None for each in self._members):
                refuse(wire, f"another machine called {hello.name} is there; give it another --name", final=False)
            wire.send("welcome")
            self._members.append(member)
        wire.keep(words.SILENCE_SECONDS, words.BEAT_SECONDS)
        return member

    def close(self, code: int) -> None:
        """Tells all machines that the attempt is over, and with which exit code; waits a moment until they have left."""
        self._closed.set()
        self._thread.join()
        self._server.close()
        with suppress(OSError):
            if self._layout.machines_token.read_text(encoding="utf-8") == self._token:
                self._layout.machines_token.unlink()
        with self._lock:
            members = [each for each in self._members if each.gone is None]
        for member in members:
            member.tell("over", code=code)
        until = time.monotonic() + _LEAVE_SECONDS
        while any(each.gone is None for each in members) and time.monotonic() < until:
            time.sleep(0.02)
        for member in members:
            member.lose(WireError("the leader has ended"))


def _listen(address: Address) -> socket.socket:
    """A port of this machine: of the loopback alone where no other can mean it, else of all its networks, since its own name may
    stand for the loopback here and for another address elsewhere.
    """
    where = (address.host if address.only_here else "", address.port)
    try:
        if address.only_here:
            return socket.create_server(where, family=socket.AF_INET6 if ":" in address.host else socket.AF_INET)
        if socket.has_dualstack_ipv6():
            return socket.create_server(where, family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(where)
    except OSError as cause:
        raise MachineError(
            f"the port {address.port} cannot be listened on: {cause.strerror}",
            where=f"--rendezvous {address}",
            remedy="name another port, or end what uses this one",
        ) from cause


def _write_secret(layout: StageLayout, token: str) -> None:
    """Only this user may read it, from its first byte on."""
    layout.machines.mkdir(exist_ok=True)
    temporary = files.temporary_name(layout.machines_token)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(token)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, layout.machines_token)
