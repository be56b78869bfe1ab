"""A TCP proxy that breaks each connection in the way that its script names.

    with BrokenProxy(receiver.url, ["reset", "pass"]) as proxy:
        post(proxy.url)

    pass      the request and its response go through
    refused   no connection is accepted
    reset     the connection is reset before the response
    timeout   the connection is accepted, and no response comes
    drip      the head of the response comes a byte at a time, and never ends
    4xx, 5xx  403 and 503, without a request to the server behind the proxy
    garbage   bytes that are no HTTP, and the end of the connection
    lost      the server gets the request and responds; the response is lost

The last step of the script is repeated for ever. With a TLS context the proxy's clients use TLS,
and the proxy uses plain HTTP towards the server.
"""

import socket
import ssl
import struct
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

Fault = Literal["pass", "refused", "reset", "timeout", "drip", "4xx", "5xx", "garbage", "lost"]

FAULTS: tuple[Fault, ...] = (
    "refused",
    "reset",
    "timeout",
    "drip",
    "4xx",
    "5xx",
    "garbage",
    "lost",
)

DRIP_S = 0.02
ANSWERS = {
    "4xx": b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "5xx": b"HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "garbage": b"\x00\xff\x17 this is no HTTP \r\n\r\n",
}

#: The addresses of all connections that this process has tried.
_connects: list[Any] = []


def _note_connect(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        _connects.append(args[1])


# A port that refuses connections cannot count them, but the interpreter can.
sys.addaudithook(_note_connect)


class BrokenProxy:
    """The proxy, for use in a `with` statement; `tries` counts the connections that were tried."""

    def __init__(
        self, upstream: str, script: Iterable[Fault], tls: ssl.SSLContext | None = None
    ) -> None:
        self._upstream, self._script, self._tls = urlsplit(upstream), list(script), tls
        self._closing = threading.Event()
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._before = len(_connects)

    @property
    def tries(self) -> int:
        return sum(address[1] == self.port for address in _connects[self._before :])

    def __enter__(self) -> Self:
        if self._script != ["refused"]:
            self._socket.listen()
            threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                fault = self._script.pop(0) if len(self._script) > 1 else self._script[0]
                threading.Thread(target=self._serve, args=(client, fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: Fault) -> None:
        with suppress(OSError), client:
            if self._tls and fault not in ("reset", "timeout"):
                with self._tls.wrap_socket(client, server_side=True) as secure:
                    self._play(secure, fault)
            else:
                self._play(client, fault)

    def _play(self, client: socket.socket, fault: Fault) -> None:
        match fault:
            case "timeout":
                self._closing.wait()
            case "drip":
                self._drip(client)
            case "pass" | "lost":
                self._forward(client, is_lost=fault == "lost")
            case "4xx" | "5xx" | "garbage":
                _request(client)
                client.sendall(ANSWERS[fault])
            case _:
                _break(client)

    def _drip(self, client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nX-Drip: ")
        while not self._closing.wait(DRIP_S):
            client.sendall(b"x")

    def _forward(self, client: socket.socket, is_lost: bool) -> None:
        """Pass one request on, and its response back unless it is lost."""
        address = (self._upstream.hostname, self._upstream.port)
        with socket.create_connection(address) as upstream:
            upstream.sendall(_request(client))
            upstream.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: upstream.recv(65536), b""))
        if is_lost:
            _break(client)
        else:
            client.sendall(answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))


def _request(client: socket.socket) -> bytes:
    """A complete request, changed to ask for the connection to be closed after it."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += client.recv(65536) or _closed()
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    length = next((int(line[15:]) for line in lines if line.lower()[:15] == b"content-length:"), 0)
    while len(body) < length:
        body += client.recv(65536) or _closed()
    return b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body


def _closed() -> bytes:
    raise ConnectionError


def _break(client: socket.socket) -> None:
    # Closing with a linger of zero sends RST; an orderly shutdown would send FIN.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.socket.close(client)
