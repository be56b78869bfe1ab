"""One HTTP connection, whose every operation ends by a deadline.

A socket's own timeout starts again at every byte, so a server that sends one byte at a time could
hold a request for ever. Here each operation on a socket waits in short steps until the deadline,
which a stop of the job brings forward.
"""

from __future__ import annotations

import functools
import io
import re
import select
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPResponse
from types import TracebackType
from typing import Self, TypeVar, cast

from requests.utils import DEFAULT_CA_BUNDLE_PATH

from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.net.addresses import Address

T = TypeVar("T")

#: How long one address may take to accept a connection, in seconds.
CONNECT_S = 5.0

#: How soon a waiting operation notices that its deadline is over, in seconds.
POLL_S = 0.05

#: How many addresses of a host are tried.
MAX_ADDRESSES = 4

USER_AGENT = "ourvidz-serverless"

_HEAD_LINE = re.compile(r"[^\r\n\0]*")


class ResponseTooLarge(OSError):
    """Raised for a response that is larger than it may be."""


@functools.cache
def default_tls() -> ssl.SSLContext:
    """TLS that checks names, with the authorities of the system and those of `requests`."""
    context = ssl.create_default_context()
    context.load_verify_locations(DEFAULT_CA_BUNDLE_PATH)
    context.set_alpn_protocols(["http/1.1"])
    return context


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent to a server, unchanged; `headers` include Host."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""

    def encoded(self) -> bytes:
        """The request as HTTP/1.1; raises ValueError if a line of its head holds a line break."""
        lines = [f"{self.method} {self.target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if not all(map(_HEAD_LINE.fullmatch, lines)):
            raise ValueError("a line of the request's head holds a line break")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body


class Connection:
    """One connection to a server.

    Its methods raise OSError, and TimeoutError once the deadline is over.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    def open(cls, addresses: Sequence[Address], port: int, deadline: Deadline) -> Self:
        """A connection to the first of a host's addresses that accepts one."""
        failure: OSError = ConnectionError()
        for address in addresses[:MAX_ADDRESSES]:
            # The address as text: no name is looked up again.
            place = (str(address), port)
            try:
                sock = socket.create_connection(place, deadline.timeout_s(CONNECT_S))
            except OSError as exc:
                failure = exc
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return cls(sock)
        raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    @property
    def is_dropped(self) -> bool:
        """Whether the server closed an idle connection, or sent bytes that are no response."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def start_tls(self, tls: ssl.SSLContext, host: str, deadline: Deadline) -> None:
        """Encrypt the connection, and check that the server's certificate is one of `host`."""
        # A certificate holds its name without a final dot.
        name = host.removesuffix(".")
        try:
            sock = tls.wrap_socket(self._sock, server_hostname=name, do_handshake_on_connect=False)
            self._sock = sock
            _in_steps(sock, deadline, sock.do_handshake)
        except BaseException:
            self.close()
            raise

    def exchange(self, request: Request, deadline: Deadline) -> HTTPResponse:
        """Send a request, and read the head of its response; the body has the same deadline.

        Raises HTTPException if the response is not HTTP.
        """
        # A server may respond before it has read the whole request, and then close.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._send(request.encoded(), deadline)
        reader = cast(socket.socket, _Reader(self._sock, deadline))
        response = HTTPResponse(reader, method=request.method)
        response.begin()
        return response

    def _send(self, data: bytes, deadline: Deadline) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[_in_steps(self._sock, deadline, functools.partial(self._sock.send, rest)) :]


class _Reader(io.RawIOBase):
    """The bytes that arrive on a socket by the deadline."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock, self._deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        receive = functools.partial(self._sock.recv_into, buffer)
        return _in_steps(self._sock, self._deadline, receive)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What HTTPResponse asks a socket for."""
        return io.BufferedReader(self)


def _in_steps(sock: socket.socket, deadline: Deadline, operation: Callable[[], T]) -> T:
    """The result of a socket's operation, which is repeated while it times out."""
    while True:
        sock.settimeout(deadline.timeout_s(POLL_S))
        with suppress(TimeoutError):
            return operation()


def read_body(response: HTTPResponse, max_bytes: int) -> bytes:
    """The body of a response.

    Raises ResponseTooLarge, and OSError or HTTPException if the connection ends before the body.
    """
    if (response.length or 0) > max_bytes:
        raise ResponseTooLarge
    body = bytearray()
    # `read1`, since `read` takes a chunk of size -1 as leave to read without end.
    while piece := response.read1(1 << 16):
        body += piece
        if len(body) > max_bytes:
            raise ResponseTooLarge
    if response.length:  # bytes that were announced and did not arrive
        raise ConnectionError
    return bytes(body)
