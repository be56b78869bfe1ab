"""The checks before a route reads the body: hosts, origins, lengths, framing, room."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from ourvidz_serverless import settings
from ourvidz_serverless.errors import InvalidPrompt, ModelLoadError
from ourvidz_serverless.serving.http import connections, request_body, request_checks
from ourvidz_serverless.serving.http.request_checks import is_own_host
from ourvidz_serverless.serving.http.service import HttpService
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_chat import FakeChat
from tests.fakes.local_worker import LocalWorker, chat_payload, sdxl_payload
from tests.patience import PATIENCE_S
from tests.servers.http_service import ServedHttp

KEY = {"Authorization": "Bearer a-key"}


def make_service(folder: Path, **changes: Any) -> ServedHttp:
    """A service for pictures and replies."""
    config = Settings(families=("sdxl", "chat"), host="127.0.0.1", **changes)
    made = LocalWorker(folder, settings=config, models={"chat": FakeChat("Rain.")})
    made.models["sdxl"] = made.fake_sdxl
    return ServedHttp(config, made.worker)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServedHttp]:
    """A worker without a key."""
    with make_service(tmp_path) as served:
        yield served


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[ServedHttp]:
    """A worker with a key."""
    with make_service(tmp_path, worker_api_key="a-key") as served:
        yield served


def connect(service: ServedHttp) -> socket.socket:
    host, port = service.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def exchange(service: ServedHttp, raw: bytes) -> bytes:
    """The response to these bytes, until the worker closes the connection."""
    with connect(service) as client:
        client.sendall(raw)
        return b"".join(iter(lambda: client.recv(65536), b""))


def begin(service: ServedHttp, raw: bytes) -> bytes:
    """The first bytes of the response to the beginning of a request."""
    with connect(service) as client:
        client.sendall(raw)
        return client.recv(65536)


# --- a worker without a key, and web pages ---

EVERY_ROUTE = [
    ("GET", "/"),
    ("GET", "/ping"),
    ("GET", "/health"),
    ("GET", "/status"),
    ("GET", "/debug/env"),
    ("GET", "/openapi.json"),
    ("GET", "/job/job-1"),
    ("GET", "/assets/user-1/job-1/0.png"),
    ("GET", "/nowhere"),
    ("POST", "/chat"),
    ("POST", "/jobs"),
    ("POST", "/job/job-1/cancel"),
    ("POST", "/memory/unload"),
    ("OPTIONS", "/jobs"),
]


def ask(service: ServedHttp, method: str, path: str, **headers: str) -> Any:
    body = {"json": {"input": sdxl_payload()}} if method == "POST" else {}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.request(method, service.url + path, headers=named, timeout=PATIENCE_S, **body)


@pytest.mark.parametrize(("method", "path"), EVERY_ROUTE)
def test_without_a_key_every_route_refuses_a_foreign_host_name(
    service: ServedHttp, method: str, path: str
) -> None:
    answer = ask(service, method, path, Host="evil.example")

    assert (answer.status_code, answer.json()["success"]) == (403, False)
    assert answer.json()["error"].startswith("Host: ")


@pytest.mark.parametrize(("method", "path"), EVERY_ROUTE)
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_without_a_key_every_route_refuses_a_foreign_origin(
    service: ServedHttp, method: str, path: str, origin: str
) -> None:
    answer = ask(service, method, path, Origin=origin)

    assert (answer.status_code, answer.json()["success"]) == (403, False)
    assert answer.json()["error"].startswith("Origin: ")


@pytest.mark.parametrize("path", ["/chat", "/jobs", "/job/job-1/cancel", "/memory/unload"])
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_without_a_key_a_body_that_is_not_json_is_refused(
    service: ServedHttp, path: str, kind: str
) -> None:
    answer = ask(service, "POST", path, Content_Type=kind)

    assert answer.status_code == 415
    assert answer.json()["error"] == "Content-Type: Input should be application/json"


def test_without_a_key_a_body_of_unknown_length_must_be_json_too(service: ServedHttp) -> None:
    answer = service.post("/jobs", data=iter([b"{}"]), headers={"Content-Type": "text/plain"})

    assert answer.status_code == 415


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8000", "localhost.", "localhost.:8000"),
        *("127.0.0.1", "127.8.8.8:1", "[::1]", "[::1]:8000", "[0:0::1]"),
    ],
)
def test_without_a_key_every_loopback_name_is_answered(service: ServedHttp, host: str) -> None:
    assert ask(service, "GET", "/status", Host=host).status_code == 200


@pytest.mark.parametrize("host", ["worker.example", "WORKER.example.", "worker.example:8000"])
@pytest.mark.parametrize("allowed", ["worker.example", "Worker.Example."])
def test_an_allowed_host_is_recognized_in_every_spelling(host: str, allowed: str) -> None:
    assert is_own_host(host, (allowed,))


@pytest.mark.parametrize(
    "host", ["localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::2]", "[", "@", ""]
)
def test_a_name_that_resembles_loopback_is_refused(service: ServedHttp, host: str) -> None:
    assert ask(service, "GET", "/status", Host=host).status_code == 403


def test_a_page_of_the_workers_own_origin_is_answered(service: ServedHttp) -> None:
    own = ask(service, "POST", "/jobs?wait=150", Origin=service.url)
    behind_tls = ask(service, "GET", "/status", Host="localhost", Origin="https://localhost:443")

    assert (own.status_code, behind_tls.status_code) == (200, 200)


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        ("Worker.Example", "worker.example:8000", 200),
        ("worker.example,10.0.0.1", "10.0.0.1", 200),
        ("worker.example", "localhost", 200),
        ("worker.example", "other.worker.example", 403),
        ("*", "whoever.example", 200),
    ],
)
def test_allowed_hosts_are_answered_without_a_key(
    tmp_path: Path, allowed: str, host: str, status: int
) -> None:
    with make_service(tmp_path, allowed_hosts=allowed) as service:
        assert ask(service, "GET", "/status", Host=host).status_code == status
        assert ask(service, "GET", "/", Host=host).status_code == status


@pytest.mark.parametrize("text", ["https://worker.example", "worker.example/", "a b", "box:80"])
def test_an_invalid_allowed_host_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("ALLOWED_HOSTS", text)

    with pytest.raises(ModelLoadError, match="ALLOWED_HOSTS: Input should be host names"):
        settings.read()


def test_a_worker_answers_to_the_address_that_it_registers(tmp_path: Path) -> None:
    registered = {
        "register_worker": True,
        "worker_url": "https://Worker.example:8443",
        "supabase_url": "http://127.0.0.1:1",
        "supabase_service_key": "key",
    }
    service = HttpService(Settings(**registered))

    assert service.own_hosts == {"worker.example"}


def test_a_load_balancer_may_ping_by_address(service: ServedHttp) -> None:
    assert ask(service, "GET", "/ping", Host="10.1.2.3:8000").status_code == 200


def test_with_a_key_the_host_and_origin_do_not_matter(locked: ServedHttp) -> None:
    call = {"data": b'{"messages": [{"role": "user", "content": "Rain?"}]}'}
    headers = {**KEY, "Host": "worker.example", "Origin": "https://app.example"}

    answer = locked.post("/chat", headers={**headers, "Content-Type": "text/plain"}, **call)

    assert answer.status_code == 200


# --- the length of a body ---


def head(length: int, path: str = "/jobs", **headers: str) -> bytes:
    """The head of a request, without its body."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


@pytest.mark.parametrize("path", ["/jobs", "/chat", "/memory/load", "/job/x/cancel", "/nowhere"])
def test_a_content_length_beyond_the_limit_is_refused_before_the_body(
    service: ServedHttp, path: str
) -> None:
    answer = begin(service, head(30_000_001, path))

    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("headers", [{}, {"X_API_Key": "wrong"}, {"Authorization": "Bearer no"}])
@pytest.mark.parametrize("path", ["/jobs", "/chat", "/memory/load"])
def test_a_body_without_a_key_in_a_header_is_refused_above_one_megabyte(
    locked: ServedHttp, path: str, headers: dict[str, str]
) -> None:
    answer = begin(locked, head(1_000_001, path, **headers))

    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"in a header" in answer


def test_a_body_without_a_length_or_a_key_may_have_one_megabyte(locked: ServedHttp) -> None:
    read = 0

    def pieces() -> Iterator[bytes]:
        nonlocal read
        for _ in range(2000):
            read += 1000
            yield b" " * 1000

    answer = locked.post("/jobs", data=pieces())

    assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHORIZED")
    assert read > 1_000_000


@pytest.mark.parametrize("headers", [KEY, {"X-API-Key": "a-key"}])
def test_with_a_key_in_a_header_a_large_body_is_read(
    locked: ServedHttp, headers: dict[str, str]
) -> None:
    call = {"ignored": "x" * 2_000_000, **chat_payload()}

    assert locked.post("/chat", call, headers=headers).status_code == 200


def test_a_small_body_may_have_the_key(locked: ServedHttp) -> None:
    assert locked.post("/chat", chat_payload(api_key="a-key")).status_code == 200


@pytest.mark.parametrize("path", ["/memory/load", "/memory/unload", "/emergency/operation"])
def test_a_route_that_takes_the_key_only_in_a_header_refuses_before_the_body(
    locked: ServedHttp, path: str
) -> None:
    assert begin(locked, head(10, path)).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("piece", [b"[],", b"{},", b"1,", b'{"a":1},'])
def test_json_with_too_many_values_is_refused_before_it_is_parsed(piece: bytes) -> None:
    text = b"[" + piece * request_body.MAX_JSON_MARKS + b"1]"

    with pytest.raises(InvalidPrompt, match="body: Input should have at most 250000 commas"):
        request_body.parse_json(text)


def test_large_json_with_few_values_is_parsed() -> None:
    assert request_body.parse_json(b'{"a": "' + b"x" * 29_000_000 + b'"}') == {
        "a": "x" * 29_000_000
    }


# --- framing ---

SMUGGLED = b"GET /debug/env HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        b"Transfer-Encoding: Chunked\r\nContent-Length: 0\r\n",
        b"Transfer-Encoding : chunked\r\nContent-Length: 4\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Content-Length: 4\r\nContent-Length: 5\r\n",
        b"Content-Length: +4\r\n",
    ],
)
def test_a_connection_is_closed_after_a_request_whose_end_is_ambiguous(
    service: ServedHttp, framing: bytes
) -> None:
    start = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    answer = exchange(service, start + framing + b"\r\n0\r\n\r\n" + SMUGGLED)

    assert answer.count(b"HTTP/1.1") == 1
    assert answer.split()[1] in (b"400", b"501")


def test_transfer_encoding_is_refused_in_http_1_0(service: ServedHttp) -> None:
    start = b"POST /jobs HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n"

    answer = exchange(service, start + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED)

    assert answer.count(b"HTTP/1.1") == 1
    assert answer.split()[1] == b"400"


def test_a_connection_stays_open_after_a_request_whose_end_is_clear(service: ServedHttp) -> None:
    closing = SMUGGLED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

    answer = exchange(service, SMUGGLED + closing)

    assert answer.count(b"HTTP/1.1 200 ") == 2


# --- room for new callers ---

PING = b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("said", [b"", b"GET /ping HT", PING])
def test_idle_connections_do_not_keep_a_new_caller_out(
    monkeypatch: pytest.MonkeyPatch, service: ServedHttp, said: bytes
) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 4)
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(service)) for _ in range(8)]
        for client in idle[4:]:
            client.sendall(said)
            if said == PING:
                assert client.recv(65536).startswith(b"HTTP/1.1 200 ")

        answers = [begin(service, PING) for _ in range(4)]

    assert [answer[:13] for answer in answers] == [b"HTTP/1.1 200 "] * 4


def test_the_connection_that_is_idle_longest_is_closed_first(
    monkeypatch: pytest.MonkeyPatch, service: ServedHttp
) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    with connect(service) as oldest, connect(service) as older, connect(service) as newest:
        assert oldest.recv(1) == b""

        for client in (older, newest):
            client.sendall(PING)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_connection_with_a_running_request_is_not_closed_for_a_new_caller(
    monkeypatch: pytest.MonkeyPatch, service: ServedHttp
) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    with connect(service) as busy:
        body = b'{"input": {}}'
        busy.sendall(head(len(body)) + body[:1])
        # This is answered on a later connection, so the worker has read the head by then.
        for _ in range(3):
            assert begin(service, PING).startswith(b"HTTP/1.1 200 ")
        busy.sendall(body[1:])

        assert busy.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_requests_beyond_the_limit_are_503_and_pings_are_answered(
    monkeypatch: pytest.MonkeyPatch, locked: ServedHttp
) -> None:
    monkeypatch.setattr(request_checks, "MAX_REQUESTS_WITHOUT_KEY", 1)
    with connect(locked) as slow:
        slow.sendall(head(10, Expect="100-continue"))
        assert slow.recv(65536).startswith(b"HTTP/1.1 100 ")

        late = locked.post("/chat", chat_payload(api_key="a-key"))

        assert (late.status_code, late.headers["Retry-After"]) == (503, "2")
        assert late.json()["code"] == "WORKER_UNAVAILABLE"
        assert locked.get("/ping").status_code == 200
        assert locked.post("/chat", chat_payload(), headers=KEY).status_code == 200


def test_all_requests_together_leave_room_for_new_connections() -> None:
    most = request_checks.MAX_REQUESTS + request_checks.MAX_REQUESTS_WITHOUT_KEY

    assert most < connections.MAX_CONNECTIONS
