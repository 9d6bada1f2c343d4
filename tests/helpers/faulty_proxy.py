"""A proxy before a real server that now and then answers 500, or resets the connection in the middle of an answer."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal

Fault = Literal["pass", "500", "reset"]


class FaultyProxy:
    """Listens on a free port of this machine; GET requests only, one connection to the server for each.

    Args:
        port: Of the real server.
        fault: What happens to the n-th request, counted from 0.
    """

    def __init__(self, port: int, fault: Callable[[int], Fault]) -> None:
        self._upstream, self._fault = port, fault
        self._lock, self.counts = threading.Lock(), {"pass": 0, "500": 0, "reset": 0}
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            request = b""
            while b"\r\n\r\n" not in request:
                piece = client.recv(65536)
                if not piece:
                    return
                request += piece
            with self._lock:
                kind = self._fault(sum(self.counts.values()))
                self.counts[kind] += 1
            if kind == "500":
                client.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", self._upstream)) as server:
                server.sendall(request.replace(b"Connection: keep-alive", b"Connection: close"))
                self._relay(server, client, 600 if kind == "reset" else None)

    def _relay(self, server: socket.socket, client: socket.socket, upto: int | None) -> None:
        """The answer, or its first bytes and then a reset."""
        server.settimeout(5)
        sent, length, whole = 0, None, b""
        while length is None or sent < length:
            piece = server.recv(65536)
            if not piece:
                return
            if upto is not None and sent + len(piece) > upto:
                client.sendall(piece[: upto - sent])
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            client.sendall(piece)
            sent += len(piece)
            if length is None:
                whole += piece
                head, blank, _ = whole.partition(b"\r\n\r\n")
                if blank:
                    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
                    length = len(head) + 4 + int(fields[b"content-length"])
