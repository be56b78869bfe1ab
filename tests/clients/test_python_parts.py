"""The Python client's parts: callbacks, references, downloads, events, requests."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from pydantic import TypeAdapter

from ourvidz_serverless import document, errors
from ourvidz_serverless.client import (
    BadSignature,
    Client,
    Document,
    RequestFailed,
    StillUnderWay,
    assets,
    data_uri,
    verify_callback,
)
from ourvidz_serverless.client.events import EventReader
from ourvidz_serverless.client.outcome import ERRORS, read_http_outcome
from ourvidz_serverless.client.payload import MAX_REFERENCE_BYTES
from ourvidz_serverless.delivery.callback import Callback, Message
from ourvidz_serverless.net.policy import Policy
from ourvidz_serverless.signatures import signatures
from tests.clients.python_clients import QUICK
from tests.fakes.local_worker import chat_payload, sdxl_payload
from tests.servers.local_server import Answer, LocalServer, Request, json_answer

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
SECRET = "callback-secret"
BODY = b'{"job_id": "job-1", "status": "completed"}'


class Recorder(LocalServer):
    """Records each request, and answers as a test says."""

    def __init__(self, answer: Callable[[Request], Answer] = lambda request: Answer(204)) -> None:
        super().__init__()
        self._answer, self.requests = answer, list[Request]()

    def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        return self._answer(request)


# --- callbacks ---


@pytest.mark.parametrize("secret", [SECRET, "whsec_c2VjcmV0LWJ5dGVz"])
def test_a_callback_that_the_worker_posts_is_verified(secret: str) -> None:
    with Recorder() as receiver:
        Callback(f"{receiver.url}/callback", secret).deliver(Message(BODY, "job-1", "completed"))
    (sent,) = receiver.requests

    assert verify_callback(dict(sent.headers), sent.body, secret) == json.loads(BODY)
    assert verify_callback(dict(sent.headers), sent.body, ["next secret", secret])


def signed(body: bytes = BODY, at: float | None = None) -> dict[str, str]:
    timestamp = int(time.time() if at is None else at)
    return {"webhook-id": "msg_1"} | signatures(SECRET, body, "msg_1", timestamp)


@pytest.mark.parametrize(
    ("changes", "secret", "body"),
    [
        ({}, "another secret", BODY),
        ({}, "", BODY),
        ({}, SECRET, BODY + b" "),
        ({"X-Callback-Signature": "sha256="}, SECRET, BODY),
        ({"X-Callback-Signature": "sha256=ü"}, SECRET, BODY),
        ({"webhook-signature": "v1,AAAA"}, SECRET, BODY),
        ({"webhook-signature": ""}, SECRET, BODY),
        ({"webhook-id": "msg_2"}, SECRET, BODY),
        ({"webhook-timestamp": "²"}, SECRET, BODY),
        ({"webhook-timestamp": "1e9"}, SECRET, BODY),
    ],
)
def test_a_callback_that_is_not_signed_is_refused(
    changes: dict[str, str], secret: str, body: bytes
) -> None:
    with pytest.raises(BadSignature):
        verify_callback({**signed(), **changes}, body, secret)


@pytest.mark.parametrize("age_s", [301, -301])
def test_a_callback_of_another_time_is_refused(age_s: int) -> None:
    headers = signed(at=1_000_000)

    with pytest.raises(BadSignature):
        verify_callback(headers, BODY, SECRET, now=lambda: 1_000_000 + age_s)


def test_a_callback_without_a_time_is_accepted_only_on_demand() -> None:
    name = "X-Callback-Signature"
    plain = {name: signed()[name]}

    assert verify_callback(plain, BODY, SECRET, require_webhook=False)
    with pytest.raises(BadSignature):
        verify_callback(plain, BODY, SECRET)


# --- references ---


def test_a_file_becomes_a_data_uri_of_its_kind(tmp_path: Path) -> None:
    (tmp_path / "any.name").write_bytes(PNG)

    assert data_uri(tmp_path / "any.name").startswith("data:image/png;base64,iVBORw0KGgo")
    assert data_uri(b"\xff\xd8\xff\xe0").startswith("data:image/jpeg;")
    assert data_uri(b"RIFF\0\0\0\0WEBPVP8 ").startswith("data:image/webp;")


def test_a_file_that_no_worker_reads_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")

    with pytest.raises(ValueError, match=r"^notes\.png is no PNG, JPEG or WebP$"):
        data_uri(tmp_path / "notes.png")


def test_a_picture_larger_than_a_worker_reads_is_refused() -> None:
    assert Policy().max_bytes == MAX_REFERENCE_BYTES

    with pytest.raises(ValueError, match=r"the picture has 20\.0 MB"):
        data_uri(PNG + bytes(MAX_REFERENCE_BYTES))


def test_a_request_larger_than_runpod_takes_is_not_sent() -> None:
    client = Client({"sdxl": "a"}, "key", base_url="http://127.0.0.1:1")
    payload = sdxl_payload(config={"image": data_uri(PNG + bytes(8_000_000))})

    with pytest.raises(ValueError, match=r"the request has 10\.7 MB, and RunPod's /run takes 10"):
        client.submit(payload)


# --- downloads ---


def picture(url: str) -> Any:
    return {"type": "image", "url": url, "metadata": {"format": "png"}}


def test_an_asset_with_a_url_is_fetched_without_any_key() -> None:
    with Recorder(lambda request: Answer(200, b"pixels")) as bucket:
        client = Client.over_http("http://127.0.0.1:1", "bearer", "worker-key")

        assert client.fetch(picture(f"{bucket.url}/0.png?signature=1")) == b"pixels"

    (request,) = bucket.requests
    assert "Authorization" not in request.headers and "X-API-Key" not in request.headers


def test_the_path_of_an_asset_is_relative_to_the_place_of_the_assets(tmp_path: Path) -> None:
    (tmp_path / "user").mkdir()
    (tmp_path / "user/0.png").write_bytes(b"a file")
    with Recorder(lambda request: Answer(200, request.path.encode())) as bucket:
        remote = Client({}, "key", assets=f"{bucket.url}/bucket/")
        local = Client({}, "key", assets=tmp_path)

        assert remote.fetch(picture("user/0.png")) == b"/bucket/user/0.png"
        assert local.fetch(picture("user/0.png")) == b"a file"


@pytest.mark.parametrize(
    ("url", "data"),
    [
        ("data:image/png;base64,cGl4ZWxz", b"pixels"),
        ("data:image/png;base64,cGl4ZWw%3D", b"pixel"),
        ("data:text/plain;charset=utf-8,a%20reply", b"a reply"),
    ],
)
def test_an_asset_in_the_document_is_read_without_a_request(url: str, data: bytes) -> None:
    assert Client({}, "key").fetch(picture(url)) == data


def test_an_asset_without_a_known_place_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the client's `assets`"):
        Client({}, "key").fetch(picture("user/0.png"))
    with pytest.raises(ValueError, match="leads out of"):
        Client({}, "key", assets=tmp_path).fetch(picture("../secret"))


def test_a_key_is_not_sent_on_to_where_a_server_redirects() -> None:
    with Recorder() as other:
        moved = Answer(302, b"", {"Location": f"{other.url}/elsewhere"})
        with Recorder(lambda request: moved) as worker:
            client = Client.over_http(worker.url, "key", policy=QUICK)

            with pytest.raises(RequestFailed, match="HTTP 302"):
                client.fetch(picture("user/0.png"))

    assert other.requests == []


def test_files_are_named_by_their_place_and_never_by_the_server() -> None:
    one, two, three = picture("a/../../x.sh"), picture("b"), picture("c")
    two["metadata"]["format"] = "../x"
    three["metadata"]["format"] = "webp"
    made: Any = {"assets": [one, two, three]}

    assert [name for _, name in assets.files_of(made)] == ["0.png", "1.bin", "2.webp"]


# --- the HTTP service's events ---


def test_events_may_be_cut_anywhere_and_hold_any_separator() -> None:
    text = 'data: {"delta": "a\u2028b\u0085c"}\n\n: still here\n\nevent: done\ndata: {"x": 1}\n\n'
    reader = EventReader()

    events = [event for byte in text.encode() for event in reader.feed(bytes([byte]))]

    assert events == [("message", {"delta": "a\u2028b\u0085c"}), ("done", {"x": 1})]


def event(data: Any, name: str = "") -> str:
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


DONE = {"success": True, "job_id": "job-1", "status": "completed", "response": "Rain falls."}


@pytest.fixture
def breaking() -> Iterator[Recorder]:
    """A service whose first stream breaks off after a part of the reply."""
    streams = iter(
        [
            event({"delta": "Rain"}),
            event({"delta": "Rain fa"}) + event({"delta": "lls."}) + event(DONE, "done"),
        ]
    )

    def answer(request: Request) -> Answer:
        if request.method == "POST":
            return json_answer({"job_id": "job-1", "status": "queued"}, 202)
        return Answer(200, next(streams).encode(), {"Content-Type": "text/event-stream"})

    with Recorder(answer) as service:
        yield service


def test_a_stream_that_breaks_off_goes_on_where_it_was(breaking: Recorder) -> None:
    job = Client.over_http(breaking.url).submit(chat_payload())

    assert list(job.stream()) == ["Rain", " fa", "lls."]
    assert job.result()["response"] == "Rain falls."


def test_a_job_is_asked_for_by_its_user(breaking: Recorder) -> None:
    list(Client.over_http(breaking.url).submit(chat_payload(user_id="a b")).stream())

    assert breaking.requests[-1].query == {"user_id": "a b"}


# --- failures of the HTTP service ---


@pytest.mark.parametrize(("code", "error"), ERRORS.items(), ids=list(ERRORS))
def test_a_job_that_the_service_refuses_raises_the_class_of_its_code(
    code: str, error: type[errors.JobError]
) -> None:
    body = {"success": False, "error": "why", "code": code, "retry_after": 2}
    with Recorder(lambda request: json_answer(body, 503)) as service:
        client = Client.over_http(service.url, policy=QUICK)

        with pytest.raises(error, match="why") as refused:
            client.submit(sdxl_payload())

    assert type(refused.value) is error
    assert refused.value.retry_after == 2


def test_a_job_that_fails_while_its_request_waits_is_not_sent_again() -> None:
    body = {"success": False, "job_id": "a", "status": "failed", "error": "why"}
    failed = json_answer({**body, "code": "OOM_ERROR"}, 503)
    with Recorder(lambda request: failed) as service:
        with pytest.raises(errors.OutOfMemory, match="why"):
            Client.over_http(service.url, policy=QUICK).runsync(sdxl_payload())

        assert len(service.requests) == 1


def test_a_job_that_goes_on_after_its_callers_time_is_still_under_way() -> None:
    waiting = json_answer({"job_id": "a", "status": "processing"}, 202)
    with (
        Recorder(lambda request: waiting) as service,
        pytest.raises(StillUnderWay, match=r"after 0\.1 seconds"),
    ):
        Client.over_http(service.url).run(sdxl_payload(), timeout_s=0.1)


def test_an_error_repeats_the_servers_words_without_the_key() -> None:
    said = json_answer({"error": "no such key: rpa-secret"}, 401)
    with Recorder(lambda request: said) as platform:
        client = Client({"sdxl": "a"}, "rpa-secret", base_url=platform.url)

        with pytest.raises(RequestFailed, match=r"/a/run: HTTP 401: no such key: \*\*\*$"):
            client.submit(sdxl_payload())


# --- types ---


def test_the_typed_document_has_the_keys_of_the_workers() -> None:
    schema = TypeAdapter(document.Document).json_schema()
    reply = document.Reply.model_fields

    theirs = {*schema["properties"], *reply} - {"reply", "failure"}
    assert set(get_type_hints(Document)) == theirs


def test_the_document_of_a_stream_has_assets_too() -> None:
    found = read_http_outcome(DONE).document

    assert found and found["assets"] == [] and "success" not in found
