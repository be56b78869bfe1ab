"""A request ends by its deadline, and goes only to the host in its URL."""

import base64
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.net import transport as transport_module
from ourvidz_serverless.net.connection import Connection
from ourvidz_serverless.net.retries import Fault, Refused, is_transient
from ourvidz_serverless.net.transport import MAX_BYTES, Answer, Transport, parse_url
from tests.patience import PATIENCE_S, start
from tests.servers.broken_proxy import BrokenProxy
from tests.servers.https_server import HttpsServer
from tests.servers.local_server import Answer as WebAnswer
from tests.servers.local_server import LocalServer, Request

AGES_S = PATIENCE_S
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n"
Act = Callable[[socket.socket], None]


class Echo(LocalServer):
    """Answers with the body of the request."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Request] = []

    def answer(self, request: Request) -> WebAnswer:
        with self.changed:
            self.seen.append(request)
        return WebAnswer(200, request.body)


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        yield server


@contextmanager
def server(act: Act) -> Iterator[str]:
    """A server that calls `act` with each connection, after its request."""

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=play, args=(client,), daemon=True).start()

    def play(client: socket.socket) -> None:
        with suppress(OSError), client:
            client.recv(65536)
            act(client)

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def forever(head: bytes, piece: bytes, pause_s: float = 0.0) -> Act:
    def act(client: socket.socket) -> None:
        client.sendall(head)
        while True:
            client.sendall(piece)
            pause.wait(pause_s)

    pause = threading.Event()
    return act


def get(url: str, within_s: float = AGES_S) -> Answer:
    return Transport().send("GET", url, within_s=within_s)


def test_a_response_has_its_status_and_its_whole_body(echo: Echo) -> None:
    answer = Transport().send("POST", echo.url, data=b"\x00words", within_s=AGES_S)

    assert (answer.status, answer.body) == (200, b"\x00words")


@pytest.mark.parametrize(
    "act",
    [
        forever(b"", b"H", 0.05),
        forever(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.05),
        forever(HEAD, b"x", 0.05),
        forever(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", 0.05),
    ],
    ids=["status", "head", "body", "chunks"],
)
def test_a_response_that_drips_ends_at_the_deadline(act: Act) -> None:
    with server(act) as url:
        fault = start(get, url, within_s=0.4).exception(PATIENCE_S)

    assert isinstance(fault, Fault) and fault.status is None
    assert is_transient(fault)


@pytest.mark.parametrize(
    "act",
    [
        forever(HEAD, b"x" * 65536),
        forever(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536),
        forever(b"HTTP/1.1 200 OK\r\n", b"X: " + b"x" * 1000 + b"\r\n"),
    ],
    ids=["length", "no length", "headers"],
)
def test_a_response_without_end_is_read_up_to_a_limit(act: Act) -> None:
    with server(act) as url:
        fault = start(get, url).exception(PATIENCE_S)

    assert isinstance(fault, Fault) and fault.status is None


def test_a_response_of_exactly_the_limit_is_accepted(echo: Echo) -> None:
    answer = Transport().send("POST", echo.url, data=b"x" * MAX_BYTES, within_s=AGES_S)

    assert len(answer.body) == MAX_BYTES


def lines_of(url: str, check: Callable[[], float] = lambda: AGES_S) -> Iterator[bytes]:
    return Transport().stream("POST", url, data=b"{}", deadline=Deadline(check)).lines()


def test_the_lines_of_a_stream_are_read_as_they_arrive() -> None:
    sent = threading.Event()

    def act(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\na\nb\nc\r\n")
        sent.wait(PATIENCE_S)
        client.sendall(b"2\r\nd\n\r\n0\r\n\r\n")

    with server(act) as url:
        lines = lines_of(url)
        first = [next(lines), next(lines)]
        sent.set()

        assert [*first, *lines] == [b"a", b"b", b"cd"]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\na\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\na\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000002\r\n\r\n" + b"x" * 1_000_002,
    ],
    ids=["a failure", "chunks without an end", "a body without an end", "a long line"],
)
def test_a_stream_that_fails_or_breaks_off_is_a_fault(answer: bytes) -> None:
    with server(lambda client: client.sendall(answer)) as url, pytest.raises(Fault) as fault:
        list(lines_of(url))

    assert fault.value.status == (500 if b"oops" in answer else None)


def test_what_the_deadline_of_a_stream_raises_closes_its_connection() -> None:
    closed, stopped = threading.Event(), threading.Event()

    def act(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\na\n")
        client.recv(1)
        closed.set()

    def check() -> float:
        if stopped.is_set():
            raise LookupError
        return AGES_S

    with server(act) as url:
        lines = lines_of(url, check)
        assert next(lines) == b"a"
        stopped.set()
        with pytest.raises(LookupError):
            next(lines)

        assert closed.wait(PATIENCE_S)


def test_a_request_ends_when_its_job_has_no_time_left() -> None:
    asked, left_s = threading.Event(), [AGES_S]

    def silence(client: socket.socket) -> None:
        asked.set()
        client.recv(1)

    def stop_once_asked() -> None:
        asked.wait(PATIENCE_S)
        left_s[0] = 0.0

    threading.Thread(target=stop_once_asked, daemon=True).start()
    deadline = Deadline(lambda: left_s[0])

    def get_by_the_deadline(url: str) -> Answer:
        with deadline.applied():
            return get(url)

    with server(silence) as url:
        fault = start(get_by_the_deadline, url).exception(PATIENCE_S)

    assert isinstance(fault, Fault)


def test_without_time_left_no_request_is_sent(echo: Echo) -> None:
    with Deadline(lambda: 0.0).applied(), pytest.raises(Fault):
        get(echo.url)

    assert echo.seen == []


def test_many_requests_over_one_connection_all_end_well(echo: Echo) -> None:
    transport = Transport()

    for _ in range(20):
        assert transport.send("GET", echo.url, within_s=AGES_S).status == 200


def test_a_connection_is_used_again(echo: Echo) -> None:
    transport = Transport()
    for _ in range(5):
        transport.send("GET", echo.url, within_s=AGES_S)

    assert len({each.client for each in echo.seen}) == 1


@pytest.mark.parametrize(
    ("method", "data", "length"),
    [("GET", None, None), ("HEAD", None, None), ("POST", None, "0"), ("PUT", b"", "0")],
)
def test_a_request_without_a_body_says_so_where_a_body_is_usual(
    echo: Echo, method: str, data: bytes | None, length: str | None
) -> None:
    Transport().send(method, echo.url, data=data, within_s=AGES_S)

    assert echo.seen[0].headers["Content-Length"] == length


def test_a_cookie_is_not_kept(echo: Echo) -> None:
    transport = Transport()
    echo.script([WebAnswer(200, b"", {"Set-Cookie": "a=b; Path=/"})])

    for _ in range(2):
        transport.send("GET", echo.url, within_s=AGES_S)

    assert echo.seen[-1].headers["Cookie"] is None


def test_many_requests_at_once_log_nothing(echo: Echo, caplog: pytest.LogCaptureFixture) -> None:
    transport = Transport()

    def send_three() -> list[int]:
        return [transport.send("GET", echo.url, within_s=AGES_S).status for _ in range(3)]

    for sending in [start(send_three) for _ in range(32)]:
        assert sending.result(PATIENCE_S) == [200] * 3

    assert caplog.text == ""


def test_a_redirect_is_a_fault_and_is_not_followed(echo: Echo) -> None:
    with Echo() as elsewhere:
        echo.script([(307, {"Location": elsewhere.url})])

        with pytest.raises(Fault, match="HTTP 307"):
            get(echo.url)

        assert elsewhere.seen == []


def test_a_proxy_in_the_environment_is_ignored(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    with BrokenProxy("http://127.0.0.1:9", ["reset"]) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)

        assert get(echo.url).status == 200
        assert proxy.tries == 0


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "2130706433", "127.1"])
def test_no_connection_is_made_to_an_address_that_the_gate_refuses(echo: Echo, name: str) -> None:
    asked: list[str] = []
    gated = Transport(gate=lambda address: asked.append(str(address)) is not None)

    with pytest.raises(Refused) as fault:
        gated.send("GET", echo.url.replace("127.0.0.1", name), within_s=AGES_S)

    assert not is_transient(fault.value)
    assert set(asked) <= {"127.0.0.1", "::1"}
    assert asked and not echo.seen


def test_a_connection_is_made_to_an_address_that_the_gate_allows(echo: Echo) -> None:
    assert Transport(gate=lambda address: True).send("GET", echo.url, within_s=AGES_S).status == 200


def test_a_host_without_an_address_is_a_fault() -> None:
    with pytest.raises(Fault, match="no answer"):
        get("http://nowhere.invalid/")


@pytest.mark.parametrize(
    "url", ["", "nothing", "http://", "http://[", "ftp://127.0.0.1/", "http://a b/"]
)
def test_an_invalid_url_is_a_fault(url: str) -> None:
    with pytest.raises(Fault):
        get(url)


def test_a_request_that_the_server_does_not_read_ends_at_the_deadline() -> None:
    done = threading.Event()

    with server(lambda client: bool(done.wait(2 * PATIENCE_S))) as url:
        sending = start(Transport().send, "POST", url, data=bytes(50_000_000), within_s=0.4)
        fault = sending.exception(PATIENCE_S)
    done.set()

    assert isinstance(fault, Fault) and fault.status is None


@pytest.mark.parametrize(
    ("url", "host", "target"),
    [
        ("http://a.example", "a.example", "/"),
        ("HTTP://A.example:80/B?c#d", "a.example", "/B?c"),
        ("https://a.example:8443?x=y", "a.example:8443", "/?x=y"),
        ("http://[::1]:9/", "[::1]:9", "/"),
        ("http://bücher.example/ä b", "xn--bcher-kva.example", "/%C3%A4%20b"),
        ("http://a.example/b%20c/../~d;e?f=%2F&g=[h]", "a.example", "/b%20c/../~d;e?f=%2F&g=[h]"),
    ],
)
def test_a_url_is_sent_as_it_is_written_but_for_what_must_be_quoted(
    url: str, host: str, target: str
) -> None:
    _, sent_target, headers = parse_url(url)

    assert (headers, sent_target) == ({"Host": host}, target)


def test_a_user_in_a_url_logs_in_with_basic_authentication(echo: Echo) -> None:
    transport = Transport({"authorization": "Bearer other"})

    transport.send("GET", echo.url.replace("//", "//ada:pass%3Aword@"), within_s=AGES_S)

    login = base64.b64encode(b"ada:pass:word").decode()
    assert echo.seen[0].headers.get_all("Authorization") == [f"Basic {login}"]


@pytest.mark.parametrize("user", ["ada", "ada:"])
def test_a_user_without_a_password_logs_in_with_an_empty_one(echo: Echo, user: str) -> None:
    Transport().send("GET", echo.url.replace("//", f"//{user}@"), within_s=AGES_S)

    login = base64.b64encode(b"ada:").decode()
    assert echo.seen[0].headers["Authorization"] == f"Basic {login}"


@pytest.mark.parametrize("value", ["a\r\nX: b", "a\nb", "a\0b"])
def test_a_header_with_a_line_break_is_not_sent(echo: Echo, value: str) -> None:
    with pytest.raises(Fault, match="no answer"):
        Transport().send("GET", echo.url, headers={"X-Value": value}, within_s=AGES_S)

    assert echo.seen == []


def test_an_idle_connection_that_the_server_has_closed_is_dropped() -> None:
    ours, theirs = socket.socketpair()
    with Connection(ours) as connection:
        assert not connection.is_dropped
        theirs.close()
        assert connection.is_dropped


def test_an_idle_connection_with_bytes_of_no_response_is_dropped() -> None:
    ours, theirs = socket.socketpair()
    with Connection(ours) as connection, theirs:
        theirs.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        assert connection.is_dropped


def test_a_connection_is_used_again_after_a_chunked_response() -> None:
    connections = []

    def act(client: socket.socket) -> None:
        connections.append(client)
        while True:
            client.sendall(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"2\r\nab\r\n1\r\nc\r\n0\r\nX-Trailer: y\r\n\r\n"
            )
            client.recv(65536)

    transport = Transport()
    with server(act) as url:
        bodies = [transport.send("GET", url, within_s=AGES_S).body for _ in range(3)]

    assert bodies == [b"abc"] * 3
    assert len(connections) == 1


def test_a_connection_that_the_server_will_close_is_not_used_again() -> None:
    connections = []

    def act(client: socket.socket) -> None:
        connections.append(client)
        client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        # It stays open until the client closes it, so only the head says that it will close.
        client.recv(1)

    transport = Transport()
    with server(act) as url:
        for _ in range(2):
            transport.send("GET", url, within_s=AGES_S)

    assert len(connections) == 2


def test_idle_connections_beyond_the_limit_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "MAX_IDLE", 1)
    both, connections, closed = threading.Barrier(2), [], threading.Event()

    def act(client: socket.socket) -> None:
        connections.append(client)
        if len(connections) <= 2:
            both.wait(PATIENCE_S)
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        if client.recv(1) == b"":
            closed.set()

    transport = Transport()
    with server(act) as url:
        for sending in [
            start(transport.send, "GET", url, within_s=AGES_S),
            start(transport.send, "GET", url, within_s=AGES_S),
        ]:
            sending.result(PATIENCE_S)
        assert closed.wait(PATIENCE_S)


def test_an_https_server_of_an_unknown_authority_gets_no_request(authority: Path) -> None:
    https = HttpsServer(authority)

    with closing(https), pytest.raises(Fault, match="no answer") as fault:
        get(f"https://127.0.0.1:{https.port}/")

    assert isinstance(fault.value.__cause__, ssl.SSLCertVerificationError)
    assert https.heads == []
