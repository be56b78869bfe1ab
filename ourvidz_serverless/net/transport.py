"""An HTTP client for the services that a worker uses: storage, callbacks, Redis, registration.

Each request ends by a deadline. Connections are kept for the next requests. Proxies, `.netrc`,
cookies and redirects are ignored, because each could send secrets to another host. A response is
read up to a limit. With a gate, no connection is made to an address that the gate refuses.
"""

from __future__ import annotations

import base64
import json
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ourvidz_serverless import deadline as deadlines
from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.net.addresses import PORTS, Gate, look_up
from ourvidz_serverless.net.connection import (
    USER_AGENT,
    Connection,
    Request,
    ResponseTooLarge,
    default_tls,
    read_body,
)
from ourvidz_serverless.net.retries import Fault

#: How many idle connections to one server are kept: as many as chat jobs run at once.
MAX_IDLE = 64

#: The largest response, unless the caller allows more.
MAX_BYTES = 1_000_000

#: Bytes of one read of a streamed body, at most.
READ_BYTES = 1 << 16

#: What a URL's path and query may hold unquoted, and `%`, which begins what is quoted already.
URL_MARKS = "!#$%&'()*+,/:;=?@[]~"


@dataclass(frozen=True, slots=True)
class Answer:
    """A response with a 2xx status. The names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body's JSON; raises Fault if it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError as exc:
            raise Fault(None) from exc


@dataclass(frozen=True, slots=True)
class Server:
    """The other end of a connection; `scheme` is http or https."""

    scheme: str
    host: str
    port: int


class Stream:
    """A response with a 2xx status whose body is read as it arrives.

    `close` ends it early, by closing its connection, which the server notices.
    """

    def __init__(self, response: HTTPResponse, connection: Connection) -> None:
        self._response, self._connection = response, connection

    def lines(self, max_bytes: int = MAX_BYTES) -> Iterator[bytes]:
        """The body's lines, without their line breaks. The connection is closed after the last one.

        Raises Fault if the body breaks off, or if a line is longer than `max_bytes`. What the
        request's deadline raises ends the iteration.
        """
        rest = b""
        try:
            # `read1`, as in `read_body`: it returns what has arrived.
            while piece := self._response.read1(READ_BYTES):
                *lines, rest = (rest + piece).split(b"\n")
                if len(rest) > max_bytes:
                    raise ResponseTooLarge
                yield from lines
            if self._response.length:  # bytes that were announced and did not arrive
                raise ConnectionError
            if rest:
                yield rest
        except (OSError, HTTPException, ValueError) as exc:
            raise Fault(None) from exc
        finally:
            self.close()

    def close(self) -> None:
        self._connection.close()


class Transport:
    """A client with headers of its own. With a `gate` it connects only where the gate allows."""

    def __init__(self, headers: Mapping[str, str] | None = None, gate: Gate | None = None) -> None:
        usual = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT}
        self._headers, self._gate = {**usual, **(headers or {})}, gate
        self._idle: dict[Server, deque[Connection]] = {}

    def send(
        self,
        method: str,
        url: str,
        *,
        within_s: float,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> Answer:
        """One request, over in `within_s` seconds and by the current deadline.

        Raises Fault: with the status and body of a response that is not 2xx, or without a status
        if no complete response came. Raises Refused if the gate refuses an address of the host.
        """
        deadline = deadlines.current().within(within_s)
        # A body of no bytes is announced too, except where a body is unusual.
        has_length = data is not None or method not in ("GET", "HEAD")
        length = {"Content-Length": str(len(data or b""))} if has_length else {}
        try:
            server, target, from_url = parse_url(url)
            all_headers = _merged(self._headers, headers or {}, length, from_url)
            request = Request(method, target, all_headers, data or b"")
            response, body = self._exchange(server, request, deadline, max_bytes)
        except (OSError, HTTPException, ValueError) as exc:
            raise Fault(None) from exc
        if not 200 <= response.status < 300:
            raise Fault(response.status, response.getheader("Retry-After"), body)
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, body)

    def stream(self, method: str, url: str, *, data: bytes, deadline: Deadline) -> Stream:
        """The response to one request, as soon as its head is there, on a connection of its own.

        The deadline ends the request and each read of the body; an error that its `remaining_s`
        raises passes through. Raises Fault as `send` does.
        """
        try:
            server, target, from_url = parse_url(url)
            length = {"Content-Length": str(len(data)), "Connection": "close"}
            headers = _merged(self._headers, length, from_url)
            connection = self._connect(server, deadline)
            try:
                response = connection.exchange(Request(method, target, headers, data), deadline)
                if not 200 <= response.status < 300:
                    body = read_body(response, MAX_BYTES)
                    raise Fault(response.status, response.getheader("Retry-After"), body)
            except BaseException:
                connection.close()
                raise
        except (OSError, HTTPException, ValueError) as exc:
            raise Fault(None) from exc
        return Stream(response, connection)

    def _exchange(
        self, server: Server, request: Request, deadline: Deadline, max_bytes: int
    ) -> tuple[HTTPResponse, bytes]:
        connection = self._connection(server, deadline)
        try:
            response = connection.exchange(request, deadline)
            body = read_body(response, max_bytes)
        except BaseException:
            connection.close()
            raise
        idle = self._idle.setdefault(server, deque())
        if response.will_close or len(idle) >= MAX_IDLE:
            connection.close()
        else:
            idle.append(connection)
        return response, body

    def _connection(self, server: Server, deadline: Deadline) -> Connection:
        """An idle connection to a server, or a new one."""
        idle = self._idle.get(server, deque[Connection]())
        with suppress(IndexError):
            while (connection := idle.pop()).is_dropped:
                connection.close()
            return connection
        return self._connect(server, deadline)

    def _connect(self, server: Server, deadline: Deadline) -> Connection:
        addresses = look_up(server.host, deadline, self._gate)
        connection = Connection.open(addresses, server.port, deadline)
        if server.scheme == "https":
            connection.start_tls(default_tls(), server.host, deadline)
        return connection


def parse_url(url: str) -> tuple[Server, str, dict[str, str]]:
    """The server, the request target and the headers of a URL.

    Raises ValueError for what is not an http or https URL with a host.
    """
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise ValueError("not an http or https URL with a host")
    host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
    default_port = PORTS[parts.scheme]
    server = Server(parts.scheme, host, parts.port or default_port)
    name = f"[{host}]" if ":" in host else host
    headers = {"Host": name if server.port == default_port else f"{name}:{server.port}"}
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    query = f"?{quote(parts.query, URL_MARKS)}" if parts.query else ""
    return server, quote(parts.path or "/", URL_MARKS) + query, headers


def _merged(*groups: Mapping[str, str]) -> dict[str, str]:
    """The headers of all groups; of those with the same name in any case, the last one."""
    merged = {name.lower(): (name, value) for group in groups for name, value in group.items()}
    return dict(merged.values())
