"""What the supervisors of several machines say to each other: JSON lines over TCP, and how two of them get to trust each other.

The leader greets first; the machine that joins answers, and shows that it can read the secret in the stage's folder; the leader
does the same, and welcomes it or says why not. The secret itself is never sent. What follows is neither encrypted nor signed, as
little as what the ranks exchange: it is for a network that strangers are not in.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pixart_ds.errors import ConfigError

PROTOCOL = 1
"""Raise it when the words change. The first two lines and a refusal keep their form, so that both sides can tell."""
MAX_LINE_BYTES = 1 << 16
HELLO_SECONDS = 10.0
"""For each line until a machine has joined."""
SILENCE_SECONDS = 30.0
"""Without a line from it, the other side is lost."""
BEAT_SECONDS = 5.0

_Value = TypeVar("_Value", str, int, bool, list)


class WireError(OSError):
    """The other side has left, or says what cannot be understood: like a broken connection, and ended like one."""


class Refused(Exception):
    """The leader does not want this machine.

    Args:
        why: For people.
        final: Whether it would be so at the next try.
    """

    def __init__(self, why: str, *, final: bool) -> None:
        super().__init__(why)
        self.why, self.final = why, final


@dataclass(frozen=True)
class Address:
    """`HOST:PORT`, an IPv6 address in brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ConfigError if it is none."""
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(
                f"{text!r} is no HOST:PORT", where="--rendezvous", remedy="name both, for example node1:29400"
            )
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def only_here(self) -> bool:
        """Whether no other machine can mean this one by it."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


@dataclass(frozen=True)
class Hello:
    """What a machine says of itself.

    Attributes:
        name: How the leader is to call it.
        pid: Of its agent.
        processes: Ranks that it will start.
        device: cpu or cuda.
        version, code: Of this package, and the hash of all its files.
    """

    name: str
    pid: int
    processes: int
    device: str
    version: str
    code: str

    @property
    def ranks(self) -> str:
        """For people."""
        return f"{self.processes} process" + ("es" if self.processes > 1 else "")


class Wire:
    """One connection: a message is a JSON object with a `kind`, on a line.

    Args:
        connection: Connected.
        silence_s: After so long without a line the other side is taken for lost.
    """

    def __init__(self, connection: socket.socket, silence_s: float = HELLO_SECONDS) -> None:
        self._socket, self._pending = connection, b""
        self._closed, self._lock = threading.Event(), threading.Lock()
        connection.settimeout(silence_s)

    def send(self, kind: str, **values: object) -> None:
        """Raises OSError where the other side is gone."""
        line = json.dumps({"kind": kind, **values}).encode() + b"\n"
        with self._lock:
            self._socket.sendall(line)

    def receive(self) -> dict[str, Any]:
        """The next message; waits for it, and passes over those that only say that the other side is alive.

        Raises:
            OSError: The other side has left, is silent, or sends no messages.
        """
        while True:
            message = _parsed(self._line())
            if message["kind"] != "alive":
                return message

    def _line(self) -> bytes:
        while b"\n" not in self._pending:
            if len(self._pending) > MAX_LINE_BYTES:
                raise WireError(f"a line is longer than {MAX_LINE_BYTES} bytes")
            try:
                piece = self._socket.recv(MAX_LINE_BYTES)
            except TimeoutError as cause:
                raise WireError(f"no word for {self._socket.gettimeout():.0f} s") from cause
            if not piece:
                raise WireError("the connection was closed")
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        if len(line) > MAX_LINE_BYTES:
            raise WireError(f"a line is longer than {MAX_LINE_BYTES} bytes")
        return line

    def keep(self, silence_s: float = SILENCE_SECONDS, beat_s: float = BEAT_SECONDS) -> None:
        """From now on says every `beat_s` that this side is alive, in a thread, and waits `silence_s` for the other."""
        self._socket.settimeout(silence_s)
        threading.Thread(target=self._beat, args=(beat_s,), name="wire", daemon=True).start()

    def _beat(self, every_s: float) -> None:
        while not self._closed.wait(every_s):
            try:
                self.send("alive")
            except OSError:
                self.close()  # whoever receives hears of it

    def close(self) -> None:
        """Ends the connection, and the waiting of whoever receives."""
        self._closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError as cause:
        raise WireError(f"this is no message: {line[:60]!r}") from cause
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise WireError(f"this is no message: {line[:60]!r}")
    return message


def field(message: Mapping[str, Any], name: str, kind: type[_Value]) -> _Value:
    """A value of a message; WireError if it is absent or of another type."""
    value = message.get(name)
    if type(value) is not kind:
        raise WireError(f"in a message {message.get('kind')!r} {name!r} is {value!r}, no {kind.__name__}")
    return value


def greet(wire: Wire, token: str, own: Hello) -> Hello:
    """The leader's side: who has connected. `welcome` it then, or `refuse` it.

    Raises:
        Refused: It shows another secret, or runs another protocol, code or device; it has been told.
        OSError: It left, or said something else.
    """
    nonce = secrets.token_hex(16)
    wire.send("hello", protocol=PROTOCOL, nonce=nonce)
    said = wire.receive()
    if said["kind"] != "hello":
        raise WireError(f"it began with {said['kind']!r}")
    protocol = field(said, "protocol", int)
    if protocol != PROTOCOL:
        refuse(wire, f"it speaks protocol {protocol}, the leader {PROTOCOL}: both need the same code", final=True)
    theirs = field(said, "nonce", str)
    if not hmac.compare_digest(_proof(token, "joins", nonce, theirs), field(said, "proof", str).encode()):
        refuse(wire, "it does not know the secret of this run's leader: it reads another run's folder", final=False)
    hello = Hello(
        *(field(said, "name", str), field(said, "pid", int), field(said, "processes", int)),
        *(field(said, "device", str), field(said, "version", str), field(said, "code", str)),
    )
    for what in ("version", "code", "device"):
        if getattr(hello, what) != getattr(own, what):
            refuse(wire, f"its {what} is {getattr(hello, what)}, the leader's {getattr(own, what)}", final=True)
    if hello.processes < 1:
        refuse(wire, f"it offers {hello.processes} processes", final=True)
    wire.send("proof", proof=_proof(token, "leads", nonce, theirs).decode())
    return hello


def refuse(wire: Wire, why: str, *, final: bool) -> None:
    """Tells the machine, and raises the same."""
    wire.send("refused", why=why, final=final)
    raise Refused(why, final=final)


def ask_to_join(wire: Wire, token: str, own: Hello) -> None:
    """The other side: returns when the leader has this machine among its own.

    Raises:
        Refused: The leader does not want it, or does not know the secret itself.
        OSError: It left, or it is no leader.
    """
    said = wire.receive()
    if said["kind"] != "hello":
        raise WireError(f"it began with {said['kind']!r}: another service has this port")
    theirs, nonce = field(said, "nonce", str), secrets.token_hex(16)
    proof = _proof(token, "joins", theirs, nonce).decode()
    wire.send("hello", protocol=PROTOCOL, nonce=nonce, proof=proof, **vars(own))
    answer = _not_refused(wire.receive())
    shown = field(answer, "proof", str).encode()
    if not hmac.compare_digest(_proof(token, "leads", theirs, nonce), shown):
        raise Refused("the leader does not know the secret in the stage's folder", final=False)
    _not_refused(wire.receive())


def _not_refused(message: dict[str, Any]) -> dict[str, Any]:
    if message["kind"] == "refused":
        raise Refused(field(message, "why", str), final=field(message, "final", bool))
    return message


def _proof(token: str, role: str, leader: str, other: str) -> bytes:
    return hmac.new(token.encode(), f"{role} {leader} {other}".encode(), "sha256").hexdigest().encode()
