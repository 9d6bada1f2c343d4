"""What machines say to each other before and while they train together, over real sockets."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pixart_ds.cluster import wire as words
from pixart_ds.cluster.wire import Address, Hello, Refused, Wire, WireError, ask_to_join, field, greet
from pixart_ds.errors import ConfigError

OWN = Hello("n1", 7, 2, "cpu", "1.0", "abc")


@pytest.fixture
def ends() -> Iterator[tuple[Wire, socket.socket]]:
    """A wire, and the bare socket at its other end."""
    one, other = socket.socketpair()
    wire = Wire(one, silence_s=5.0)
    yield wire, other
    wire.close()
    other.close()


def test_a_message_is_a_line_however_it_is_cut(ends: tuple[Wire, socket.socket]) -> None:
    wire, other = ends
    for piece in (b'{"kind": "al', b'ive"}\n{"kind": "start", "n": 1}\n{"kind"', b': "left"}\n'):
        other.sendall(piece)
    assert wire.receive() == {"kind": "start", "n": 1}, "that the other side is alive is not news"
    assert wire.receive() == {"kind": "left"}
    wire.send("hello", name="ü")
    assert json.loads(other.recv(100)) == {"kind": "hello", "name": "ü"}


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"GET / HTTP/1.1\r\n", "this is no message: b'GET / HTTP/1.1"),
        (b"\xff\xfe\n", "this is no message"),
        (b"[1]\n", "this is no message"),
        (b'{"say": 1}\n', "this is no message"),
        (b"x" * (2 * words.MAX_LINE_BYTES), "a line is longer than 65536 bytes"),
        (b"x" * (words.MAX_LINE_BYTES + 1) + b"\n", "a line is longer than 65536 bytes"),
        (b'{"kind": "torn', "the connection was closed"),
        (b"", "the connection was closed"),
    ],
)
def test_what_is_no_message_ends_the_connection(ends: tuple[Wire, socket.socket], sent: bytes, told: str) -> None:
    wire, other = ends
    writer = threading.Thread(target=lambda: (other.sendall(sent), other.close()), daemon=True)
    writer.start()
    with pytest.raises(WireError, match=told):
        wire.receive()
    wire.close()
    writer.join()


def test_silence_is_a_loss_and_a_beat_is_none(ends: tuple[Wire, socket.socket]) -> None:
    wire, other = ends
    wire.keep(silence_s=1.0, beat_s=0.05)
    peer = Wire(other)
    peer.keep(silence_s=5.0, beat_s=0.05)
    heard: list[Any] = []

    def listen() -> None:
        try:
            wire.receive()
        except OSError as error:
            heard.append(str(error))

    listener = threading.Thread(target=listen)
    listener.start()
    listener.join(1.5)
    assert not heard, "it beats"
    peer._closed.set()  # its process hangs: the connection stays
    listener.join()
    assert heard == ["no word for 1 s"]


def test_a_field_of_another_type_is_named() -> None:
    assert field({"kind": "left", "launch": 2}, "launch", int) == 2
    for value in ("2", True, None):
        with pytest.raises(WireError, match=f"in a message 'left' 'launch' is {value!r}, no int"):
            field({"kind": "left", "launch": value}, "launch", int)


def handshake(leader: Callable[[Wire], object], other: Callable[[Wire], object]) -> tuple[object, object]:
    """What both sides return or raise."""
    found: dict[str, object] = {}
    sockets = socket.socketpair()

    def run(name: str, side: Callable[[Wire], object], end: socket.socket) -> None:
        wire = Wire(end)
        try:
            found[name] = side(wire)
        except (Refused, OSError) as error:
            found[name] = error
        finally:
            wire.close()

    threads = [
        threading.Thread(target=run, args=(name, side, end))
        for name, side, end in zip(("leader", "other"), (leader, other), sockets, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found["leader"], found["other"]


def welcomes(token: str = "secret") -> Callable[[Wire], object]:
    def side(wire: Wire) -> object:
        hello = greet(wire, token, OWN)
        wire.send("welcome")
        return hello

    return side


def joins(token: str = "secret", **other: Any) -> Callable[[Wire], object]:
    return lambda wire: ask_to_join(wire, token, dataclasses.replace(OWN, name="n2", **other))


def test_two_that_know_the_secret_trust_each_other() -> None:
    assert handshake(welcomes(), joins(processes=8)) == (dataclasses.replace(OWN, name="n2", processes=8), None)


@pytest.mark.parametrize(
    ("other", "why", "final"),
    [
        ({"token": "another"}, "it does not know the secret of this run's leader", False),
        ({"version": "0.9"}, "its version is 0.9, the leader's 1.0", True),
        ({"code": "def"}, "its code is def, the leader's abc", True),
        ({"device": "cuda"}, "its device is cuda, the leader's cpu", True),
        ({"processes": 0}, "it offers 0 processes", True),
    ],
)
def test_a_machine_that_does_not_fit_is_refused_and_told_why(other: dict[str, Any], why: str, final: bool) -> None:
    for said in handshake(welcomes(), joins(**other)):
        assert isinstance(said, Refused)
        assert why in said.why
        assert said.final is final


def test_another_protocol_is_refused() -> None:
    def newer(wire: Wire) -> object:
        wire.receive()
        wire.send("hello", protocol=2, more="words")
        return wire.receive()

    refused, told = handshake(welcomes(), newer)
    assert isinstance(refused, Refused)
    assert refused.final
    assert told == {
        "kind": "refused",
        "why": "it speaks protocol 2, the leader 1: both need the same code",
        "final": True,
    }


def test_who_only_knows_the_port_is_not_taken_for_the_leader() -> None:
    def pretender(wire: Wire) -> None:
        wire.send("hello", protocol=1, nonce="1")
        wire.receive()
        wire.send("proof", proof="0" * 64)
        wire.send("start", launch=1)

    _, told = handshake(pretender, joins())
    assert isinstance(told, Refused)
    assert told.why == "the leader does not know the secret in the stage's folder"


@pytest.mark.parametrize("lines", [[], ["hello"], ["start"], ["hello", "proof"]])
def test_who_leaves_before_the_welcome_has_not_joined(lines: list[str]) -> None:
    """Or says something else, or half of it."""

    def leaves(wire: Wire) -> None:
        for kind in lines:
            wire.send(kind, protocol=1, nonce="1")

    for leader, other in ((welcomes(), leaves), (leaves, joins())):
        said = handshake(leader, other)
        assert any(isinstance(each, OSError) for each in said), said


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("n1:29400", Address("n1", 29400)),
        ("[fe80::1]:5", Address("fe80::1", 5)),
        ("127.0.0.1:0", Address("127.0.0.1", 0)),
    ],
)
def test_an_address(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert str(address) == text
    assert address.only_here is text.startswith("127.")


@pytest.mark.parametrize("text", ["n1", ":5", "n1:", "n1:x", "n1:70000"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no HOST:PORT"):
        Address.parse(text)
