"""A small threaded HTTP server with scripted answers, on which the tests' other servers build."""

import json
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests.patience import PATIENCE_S

_MISBEHAVIOURS = ("reset", "slow", "cut")


def free_port() -> int:
    """A port that is free now, for a program that needs a port number."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@dataclass(frozen=True)
class Request:
    """One request as it arrived. Names of headers are found in any case."""

    method: str
    path: str
    query: dict[str, str]
    headers: Message
    body: bytes
    at: float
    client: tuple[str, int]
    """The client's address and port, which differ for each connection."""


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_at: int | None = None
    """The connection is closed after so many bytes of the body."""


Step = int | str | tuple[int, Mapping[str, str]] | Answer


def json_answer(document: Any, status: int = 200) -> Answer:
    body = json.dumps(document).encode()
    return Answer(status, body, {"Content-Type": "application/json"})


class LocalServer:
    """An HTTP server on 127.0.0.1, for use in a `with` statement; its port is free unless given.

    A subclass implements `answer`. `changed` guards its state: change the state under it and
    notify, so that `wait_until` sees the change.
    """

    slow_seconds = 5.0

    def __init__(self, port: int = 0) -> None:
        self.changed = threading.Condition()
        self.closing = threading.Event()
        self.in_flight = self.most_in_flight = 0
        self._steps: deque[Step] = deque()
        self._http = _Http(("127.0.0.1", port), _handler_of(self))
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def answer(self, request: Request) -> Answer:
        raise NotImplementedError

    def note(self, request: Request, answer: Answer | None) -> None:
        """Called with each request and its answer (None for a reset) before the answer is sent."""

    def scripted(self, request: Request) -> bool:
        """Whether this request consumes a step of the script."""
        return True

    def script(self, steps: Iterable[Step]) -> None:
        """Set what happens to the next requests, one step each; later ones are answered as usual.

        200 answers as usual, and another status as it is (with headers as a pair: `(429,
        {"Retry-After": "1"})`). "reset" does nothing and breaks the connection. "slow" acts at once
        and answers after `slow_seconds`. "cut" acts and sends half of the answer.
        """
        steps = list(steps)
        for step in steps:
            if isinstance(step, str) and step not in _MISBEHAVIOURS:
                raise ValueError(f"unknown step {step!r}, one of {_MISBEHAVIOURS} was expected")
        with self.changed:
            self._steps.extend(steps)

    @property
    def script_left(self) -> list[Step]:
        """The steps of the script that no request has consumed yet."""
        return list(self._steps)

    def wait_until(
        self, true: Callable[[], Any], timeout: float = PATIENCE_S, what: str = ""
    ) -> Any:
        """Wait for a condition on this server's state and return its value."""
        with self.changed:
            value = self.changed.wait_for(true, timeout)
        if not value:
            raise TimeoutError(f"{what or 'a change'} did not come within {timeout} s")
        return value

    def __enter__(self) -> Self:
        serve = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        serve.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the server and all its connections, as if its process had died."""
        self.closing.set()
        with self.changed:
            self.changed.notify_all()
        self._http.shutdown()
        self._http.server_close()
        self._http.hang_up()

    def respond(self, request: Request) -> Answer | None:
        """The answer to a request by the script's next step; None means a reset."""
        with self.changed:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            step = self._steps.popleft() if self._steps and self.scripted(request) else 200
        try:
            answer = self._play(step, request)
            self.note(request, answer)
            if step == "slow":
                self.closing.wait(self.slow_seconds)
            return answer
        finally:
            with self.changed:
                self.in_flight -= 1
                self.changed.notify_all()

    def _play(self, step: Step, request: Request) -> Answer | None:
        if isinstance(step, Answer):
            return step
        if step == "reset":
            return None
        if step in (200, "slow"):
            return self.answer(request)
        if step == "cut":
            answer = self.answer(request)
            return replace(answer, cut_at=len(answer.body) // 2)
        status, headers = step if isinstance(step, tuple) else (step, {})
        return Answer(int(status), b"scripted", headers)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        self._open: set[Any] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        # Otherwise the threads of kept-alive connections go on answering after the stop.
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _handler_of(server: LocalServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        timeout = None

        def handle_one_request(self) -> None:
            # Some tests have clients that close the connection early.
            self.close_connection = True
            with suppress(OSError):
                super().handle_one_request()

        def serve(self) -> None:
            answer = server.respond(self._request())
            self._send(answer) if answer else self._reset()

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = serve

        def _request(self) -> Request:
            url = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            arrived = time.time()
            return Request(
                self.command,
                unquote(url.path),
                query,
                self.headers,
                self._body(),
                arrived,
                self.client_address,
            )

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                return b"".join(iter(self._chunk, b""))
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _chunk(self) -> bytes:
            data = self.rfile.read(int(self.rfile.readline().split(b";")[0], 16))
            self.rfile.readline()
            return data

        def _send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if answer.status != 204:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[: answer.cut_at])
            if answer.cut_at is not None:
                self.close_connection = True

        def _reset(self) -> None:
            # Closing with a linger of zero sends RST; an orderly shutdown would send FIN.
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
