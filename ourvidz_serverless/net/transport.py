"""HTTP requests that end: whatever the other side does, each is over when its time is.

The timeouts of `requests` and botocore begin anew at every byte, so a slow drip holds them for
ever. Here a watch beside each request closes its connection once no time is left. Connections are
kept and used again; proxies, `.netrc` and redirects are not heard of, since all three would send
secrets elsewhere; and an answer is read up to a limit. Names are looked up here as well, which
urllib3 would wait for without end, and so would it for each of a name's addresses in turn.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NewConnectionError

from ourvidz_serverless import deadline as deadlines
from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.net.addresses import Address, look_up
from ourvidz_serverless.net.retries import Fault

#: Whether a connection may be made to an address.
Gate = Callable[[Address], bool]

#: How long to wait for a connection, and how soon a request hears that its time is up.
CONNECT_S = 5.0
POLL_S = 0.05

#: A name with many addresses gets a few of them tried.
MAX_ADDRESSES = 4

#: Kept to one other side: as many as jobs that chat runs at once.
CONNECTIONS = 64

#: More than any answer has that is no stored picture.
MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, with a 2xx status."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body's JSON; raises Fault where it is none."""
        try:
            return json.loads(self.body)
        except ValueError as exc:
            raise Fault(None) from exc


class Barred(Fault):
    """The other side has an address that the gate does not let through."""

    is_transient = False

    def __init__(self) -> None:
        super().__init__(None)
        self.args = ("the host's address is not public",)


class Transport:
    """Connections to one other side, kept for the next request.

    With a `gate` only to addresses that it is true of, whatever the name is looked up as by then.
    """

    def __init__(self, headers: Mapping[str, str] | None = None, gate: Gate | None = None) -> None:
        self._gate = gate
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers.clear()
        self._session.headers.update({"Accept-Encoding": "identity", **(headers or {})})
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, _Adapter(pool_maxsize=CONNECTIONS))

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

        Raises Fault: with the status and body of an answer that is no 2xx, or without a status
        where no whole answer came. Raises Barred where the gate is shut.
        """
        deadline = deadlines.current().within(within_s)
        try:
            with _watched(deadline, self._gate):
                answer = self._session.request(
                    method,
                    url,
                    data=data,
                    headers=headers,
                    timeout=(min(CONNECT_S, max(deadline.remaining_s(), POLL_S)), within_s),
                    allow_redirects=False,
                    stream=True,
                )
                body = _read(answer, max_bytes)
        # Of requests, of urllib3 below it, and of a URL or header that is none.
        except (OSError, HTTPError, ValueError) as exc:
            raise Fault(None) from exc
        if not 200 <= answer.status_code < 300:
            raise Fault(answer.status_code, answer.headers.get("Retry-After"), body)
        return Answer(answer.status_code, answer.headers, body)


def _read(answer: requests.Response, max_bytes: int) -> bytes:
    body: bytes = answer.raw.read(max_bytes + 1, decode_content=False)
    if len(body) > max_bytes:
        answer.close()
        raise OSError("the answer is too long")
    answer.raw.release_conn()
    return body


class _Watch:
    """The connection that this thread's request goes over, and how far it may go."""

    def __init__(self, deadline: Deadline, gate: Gate | None) -> None:
        self.deadline, self.gate = deadline, gate
        self.connection: HTTPConnection | None = None
        self.has_cut = False
        self._lock = threading.Lock()
        self._over = threading.Event()

    def cut_when_none_is_left(self) -> None:
        while not self._over.wait(POLL_S):
            with self._lock:
                if self.deadline.remaining_s() <= 0 and not self._over.is_set():
                    self._cut()

    def end(self) -> None:
        with self._lock:  # what is handed back to the pool is cut no more
            self._over.set()

    def _cut(self) -> None:
        self.has_cut = True
        sock = self.connection.sock if self.connection else None
        if isinstance(sock, socket.socket):
            with suppress(OSError):
                # Not an SSLSocket's own, which takes its TLS away from the thread that reads.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


_here = threading.local()


@contextmanager
def _watched(deadline: Deadline, gate: Gate | None) -> Iterator[None]:
    if deadline.remaining_s() <= 0:
        raise TimeoutError
    watch = _here.watch = _Watch(deadline, gate)
    threading.Thread(target=watch.cut_when_none_is_left, daemon=True).start()
    try:
        yield
    finally:
        watch.end()
        _here.watch = None
    if watch.has_cut:
        # Half a head, cut off, reads as a whole one.
        raise TimeoutError


class _Told:
    """A connection that tells the watch which one it is, and goes where its gate lets it."""

    def _new_conn(self) -> socket.socket:
        connection: Any = self
        try:
            sock = _connect(connection.host.strip("[]"), connection.port, _here.watch)
        except OSError as exc:
            # By this name, or urllib3 takes a reset for an answer that came early.
            raise NewConnectionError(connection, "no connection") from exc
        for option in connection.socket_options:
            sock.setsockopt(*option)
        return sock

    def request(self, *args: Any, **options: Any) -> None:
        _here.watch.connection = self
        super().request(*args, **options)  # type: ignore[misc]


def _connect(host: str, port: int, watch: _Watch) -> socket.socket:
    """A socket to the first address that takes one: to that very address, not to its name."""
    addresses = look_up(host, watch.deadline)
    if watch.gate and not all(map(watch.gate, addresses)):
        raise Barred
    failure: OSError = ConnectionError()
    for address in addresses[:MAX_ADDRESSES]:
        try:
            timeout_s = max(min(CONNECT_S, watch.deadline.remaining_s()), POLL_S)
            return socket.create_connection((str(address), port), timeout_s)
        except OSError as exc:
            failure = exc
    raise failure


class _Http(_Told, HTTPConnection):
    pass


class _Https(_Told, HTTPSConnection):
    pass


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
