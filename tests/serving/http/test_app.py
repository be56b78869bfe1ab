"""The HTTP service: the application's chat calls, jobs by id, health routes, and the process."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from ourvidz_serverless import errors
from ourvidz_serverless.delivery.storage.choose import open_storage
from ourvidz_serverless.job import Identity
from ourvidz_serverless.jobs import admin
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.chat.request import ChatReply, ChatRequest
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.serving.http import (
    connections,
    job_store,
    openai_routes,
    openapi,
    replies,
    request_body,
    request_checks,
    responses,
    routes,
)
from ourvidz_serverless.serving.http import (
    service as http_service,
)
from ourvidz_serverless.serving.http.job_store import JobRecord
from ourvidz_serverless.settings import Settings
from tests.fakes.devices import FakeMemory
from tests.fakes.fake_chat import EndlessChat, FakeChat
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import QUICK, LocalWorker, chat_payload, sdxl_payload
from tests.fakes.tiny_chat import tiny_folder
from tests.files import ROOT
from tests.patience import PATIENCE_S, start, wait_until
from tests.servers.handler import HANDLER
from tests.servers.http_service import ServedHttp, events
from tests.servers.local_server import free_port
from tests.servers.supabase import CallbackReceiver
from tests.servers.worker_process import WorkerProcess

#: What the application's chat function sends.
CALL = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is rain?"},
    ],
    "model": "qwen_instruct",
    "max_tokens": 64,
    "temperature": 0.7,
    "top_p": 0.9,
    "sfw_mode": False,
    "content_tier": "sfw",
    "conversation_id": "c-1",
}

#: The specification's older shape of the same.
OLD_CALL = {
    "prompt": "What is rain?",
    "config": {"system_prompt": "Be brief.", "job_type": "chat_conversation", "quality": "high"},
    "metadata": {"unrestricted_mode": False, "nsfw_optimization": True},
}


@pytest.fixture
def fake_chat() -> FakeChat:
    return FakeChat("Water ", "that ", "falls.")


@pytest.fixture
def local(tmp_path: Path, fake_chat: FakeChat) -> LocalWorker:
    """A worker for pictures and replies."""
    made = LocalWorker(
        tmp_path, settings=Settings(families=("sdxl", "chat")), models={"chat": fake_chat}
    )
    made.models["sdxl"] = made.fake_sdxl
    return made


@pytest.fixture
def service(local: LocalWorker) -> Iterator[ServedHttp]:
    with ServedHttp(local.settings, local.worker) as served:
        yield served


def connect(service: ServedHttp) -> socket.socket:
    """A connection, for requests that no client sends."""
    host, port = service.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def raw_post(path: str, body: Any) -> bytes:
    """A request as bytes."""
    data = json.dumps(body).encode()
    return raw_head(path, len(data)) + data


def raw_head(path: str, length: int, *lines: str) -> bytes:
    """The head of a request whose body is JSON."""
    kind = "Content-Type: application/json"
    head = [f"POST {path} HTTP/1.1", "Host: localhost", kind, f"Content-Length: {length}", *lines]
    return "\r\n".join([*head, "", ""]).encode()


# --- the application's chat calls ---


@pytest.mark.parametrize("call", [CALL, OLD_CALL], ids=["messages", "prompt"])
@pytest.mark.parametrize("path", ["/chat", "/chat/unrestricted"])
def test_chat_answers_with_success_and_response(
    service: ServedHttp, fake_chat: FakeChat, path: str, call: dict[str, Any]
) -> None:
    answer = service.post(path, call)

    assert answer.status_code == 200
    assert answer.json()["success"] is True
    assert answer.json()["response"] == "Water that falls."
    assert fake_chat.calls[0].messages == (("system", "Be brief."), ("user", "What is rain?"))


@pytest.mark.parametrize(
    "call",
    [CALL, {"prompt": "rain", "config": {"job_type": "video_fast"}}],
    ids=["messages", "wan"],
)
def test_enhance_answers_with_success_and_enhanced_prompt(
    service: ServedHttp, call: dict[str, Any]
) -> None:
    answer = service.post("/enhance", call)

    assert answer.status_code == 200
    assert answer.json()["success"] is True
    assert answer.json()["enhanced_prompt"] == "Water that falls."


@pytest.mark.parametrize(
    ("path", "changes", "unrestricted"),
    [
        ("/chat", {}, False),
        ("/chat", {"config": {"job_type": "chat_unrestricted"}}, True),
        ("/chat", {"type": "sdxl_image_fast"}, False),
        ("/chat/unrestricted", {"type": "chat_conversation"}, True),
    ],
)
def test_the_route_decides_the_type(
    service: ServedHttp, path: str, changes: dict[str, Any], unrestricted: bool
) -> None:
    answer = service.post(path, {**CALL, **changes})

    assert answer.json()["metadata"]["unrestricted_mode"] is unrestricted


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"messages": []}, 400, "messages: Field required"),
        ({**CALL, "temperature": 9}, 400, "temperature: "),
        ([], 400, "body: Input should be an object"),
        (None, 400, "body: Input should be JSON"),
    ],
)
def test_a_refusal_is_a_status_and_a_text(
    service: ServedHttp, body: Any, status: int, says: str
) -> None:
    answer = service.post("/chat", body)

    assert answer.status_code == status
    assert answer.json()["success"] is False
    assert answer.json()["error"].startswith(says)


@pytest.mark.parametrize("raw", [b"{", b'{"prompt": NaN}', b"[" * 100_000, b"\xff"])
def test_a_body_that_is_no_json_is_refused(service: ServedHttp, raw: bytes) -> None:
    answer = service.post("/chat", data=raw, headers={"Content-Type": "application/json"})

    assert (answer.status_code, answer.json()["success"]) == (400, False)


def test_only_a_refusal_on_content_says_content_policy(service: ServedHttp) -> None:
    call = {**CALL, "messages": [{"role": "user", "content": "explicit story, she is 15"}]}

    answer = service.post("/chat/unrestricted", call)

    assert answer.status_code == 403
    assert "content policy" in answer.json()["error"]


def test_every_error_code_has_its_status() -> None:
    codes = {error.code for error in errors.JobError.__subclasses__()}

    assert set(responses.STATUS_OF) == codes
    assert all(status >= 400 for status in responses.STATUS_OF.values())


def test_a_family_that_is_not_served_is_unavailable(tmp_path: Path) -> None:
    pictures = LocalWorker(tmp_path)
    with ServedHttp(pictures.settings, pictures.worker) as service:
        answer = service.post("/chat", CALL)

    assert answer.status_code == 503
    assert answer.json()["code"] == "WORKER_UNAVAILABLE"
    assert answer.json()["retryable"] is True


def test_a_chat_call_posts_no_callback_and_a_job_does(
    tmp_path: Path, receiver: CallbackReceiver
) -> None:
    from ourvidz_serverless.delivery.callback import Callback

    callback = Callback(receiver.callback_url, receiver.secret, policy=QUICK)
    chatty = LocalWorker(tmp_path, models={"chat": FakeChat("Rain.")}, callback=callback)
    with ServedHttp(chatty.settings, chatty.worker) as service:
        service.post("/chat", CALL)
        service.post("/jobs?wait=150", {"input": chat_payload(id="told")})

    assert [each.document["job_id"] for each in receiver.received] == ["told"]


# --- streams ---


def test_a_streamed_reply_is_deltas_and_then_the_answer(service: ServedHttp) -> None:
    answer = service.post("/chat", {**CALL, "stream": True})

    *deltas, (name, last) = events(answer)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert "".join(json.loads(data)["delta"] for _, data in deltas) == "Water that falls."
    assert (name, json.loads(last)["response"]) == ("done", "Water that falls.")


def test_a_reply_that_ends_before_its_stream_begins_is_still_sent_as_a_stream(
    tmp_path: Path,
) -> None:
    silent = LocalWorker(tmp_path, models={"chat": FakeChat()})
    with ServedHttp(silent.settings, silent.worker) as service:
        answer = service.post("/chat", {**CALL, "stream": True})

    ((name, last),) = events(answer)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert (name, json.loads(last)["response"]) == ("done", "")


@pytest.mark.parametrize("asked", ["true", "yes", 1])
def test_only_the_value_true_asks_for_a_stream_over_http_as_on_the_queue(
    service: ServedHttp, asked: object
) -> None:
    call = {**CALL, "stream": asked}

    answers = [
        service.post("/chat", call),
        service.post("/jobs", {"input": chat_payload(stream=asked)}),
    ]

    assert [answer.status_code for answer in answers] == [400, 400]
    assert {answer.json()["error"] for answer in answers} == {
        "stream: Input should be a valid boolean"
    }


def test_a_stream_that_cannot_begin_gets_an_error_status(service: ServedHttp) -> None:
    answer = service.post("/chat", {**CALL, "stream": True, "max_tokens": 0})

    assert answer.status_code == 400
    assert answer.json()["error"].startswith("max_tokens: ")


@pytest.fixture
def endless() -> EndlessChat:
    return EndlessChat()


def serve_endless(path: Path, endless: EndlessChat, **settings: Any) -> ServedHttp:
    chatty = LocalWorker(
        path, settings=Settings(families=("chat",), **settings), models={"chat": endless}
    )
    return ServedHttp(chatty.settings, chatty.worker)


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_is_stopped_when_its_caller_disconnects(
    tmp_path: Path, endless: EndlessChat, stream: bool
) -> None:
    with serve_endless(tmp_path, endless) as service:
        with connect(service) as caller:
            caller.sendall(raw_post("/chat", {**CALL, "stream": stream}))
            assert endless.is_writing.wait(PATIENCE_S)

        assert endless.stopped.wait(PATIENCE_S)


def test_a_reply_that_takes_too_long_is_a_timeout_before_its_caller_gives_up(
    tmp_path: Path, endless: EndlessChat
) -> None:
    with serve_endless(tmp_path, endless, http_reply_timeout_s=2.3) as service:
        answer = service.post("/chat", CALL)

    assert (answer.status_code, answer.json()["code"]) == (504, "TIMEOUT_ERROR")
    # On a slow machine the time is over before the reply begins.
    assert endless.stopped.is_set() or not endless.is_writing.is_set()


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ({"max_tokens": 512}, 43),
        ({"max_tokens": 513}, 88),
        ({"max_tokens": 513.0}, 88),
        ({"max_tokens": None, "config": {"max_tokens": 513}}, 88),
        ({"max_tokens": None}, 43),
    ],
)
def test_a_long_reply_may_take_twice_as_long(asked: dict[str, Any], seconds: float) -> None:
    job = Envelope.of({"input": chat_payload(**asked)}).job(Settings())

    assert replies.reply_timeout_s(Settings(), job) == seconds


# --- any job ---


def test_a_job_is_accepted_at_once_and_found_by_its_id(
    service: ServedHttp, local: LocalWorker
) -> None:
    local.fake_sdxl.hold()
    taken = service.post("/jobs", {"input": sdxl_payload(id="picture")})
    assert local.fake_sdxl.at_step.wait(PATIENCE_S)
    running = service.get("/job/picture?user_id=user-1").json()
    local.fake_sdxl.go_on.set()
    service.get("/job/picture/events?user_id=user-1")

    ended = service.get("/job/picture?user_id=user-1").json()

    assert (taken.status_code, taken.json()["job_id"]) == (202, "picture")
    assert running["status"] == "processing"
    assert (ended["success"], ended["status"]) == (True, "completed")
    assert ended["assets"][0]["url"] == "user-1/picture/0.png"


def test_a_job_can_be_waited_for(service: ServedHttp) -> None:
    answer = service.post("/jobs?wait=150", {"input": sdxl_payload()})

    assert answer.status_code == 200
    assert answer.json()["status"] == "completed"


def test_a_failed_job_is_an_error_status_for_wait_and_a_document_for_its_status_route(
    service: ServedHttp, local: LocalWorker
) -> None:
    local.fake_sdxl.fails = [errors.UploadError("storage is full")]

    answer = service.post("/jobs?wait=150", {"input": sdxl_payload()})
    told = service.get("/job/job-1?user_id=user-1")

    assert (answer.status_code, told.status_code) == (502, 200)
    assert answer.json() == told.json()
    assert (told.json()["status"], told.json()["error"]) == ("failed", "storage is full")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input": sdxl_payload(config={"num_images": 7})}, "config.num_images: "),
        ({"input": sdxl_payload(), "s3Config": {"bucketName": "b"}}, "s3Config.bucketName: "),
        ({}, "input: Input should be an object"),
    ],
)
def test_an_invalid_payload_is_refused_before_the_job_is_accepted(
    service: ServedHttp, body: Any, says: str
) -> None:
    answer = service.post("/jobs", body)

    assert answer.status_code == 400
    assert answer.json()["error"].startswith(says)
    assert service.get("/job/job-1?user_id=user-1").status_code == 404


def test_a_jobs_progress_and_end_are_sent_as_events(
    service: ServedHttp, local: LocalWorker
) -> None:
    local.fake_sdxl.hold()
    service.post("/jobs", {"input": sdxl_payload()})
    assert local.fake_sdxl.at_step.wait(PATIENCE_S)
    stream = service.get("/job/job-1/events?user_id=user-1", stream=True)
    local.fake_sdxl.go_on.set()

    (first, status), *progress, (name, last) = events(stream)

    assert (first, json.loads(status)) == ("status", {"status": "processing"})
    steps = [json.loads(data)["step"] for _, data in progress]
    assert {name for name, _ in progress} == {"progress"}
    assert steps == sorted(steps) and steps[-1] == 10
    assert (name, json.loads(last)["status"]) == ("done", "completed")


def test_a_quiet_stream_of_events_has_a_comment_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(responses, "HEARTBEAT_S", 0.01)

    async def first_event() -> str:
        return await anext(responses.events_of(JobRecord("job-1"), with_status=False))

    async def in_time() -> str:
        return await asyncio.wait_for(first_event(), PATIENCE_S)

    assert asyncio.run(in_time()).startswith(":")


def test_the_first_events_of_a_late_reader_are_the_status_and_the_newest_progress() -> None:
    async def late() -> list[str]:
        record = JobRecord("job-1")
        record.update(status="processing")
        record.update(progress={"step": 3})
        stream = responses.events_of(record)
        return [await anext(stream), await anext(stream)]

    assert asyncio.run(late()) == [
        'event: status\ndata: {"status": "processing"}\n\n',
        'event: progress\ndata: {"step": 3}\n\n',
    ]


def test_a_job_that_begins_to_compute_is_told_before_its_first_step() -> None:
    async def both() -> list[str]:
        record = JobRecord("job-1")
        stream = responses.events_of(record)
        queued = await anext(stream)
        record.update(status="processing")
        return [queued, await anext(stream)]

    assert asyncio.run(both()) == [
        'event: status\ndata: {"status": "queued"}\n\n',
        'event: status\ndata: {"status": "processing"}\n\n',
    ]


def test_a_job_can_be_cancelled(service: ServedHttp, local: LocalWorker) -> None:
    local.fake_sdxl.hold()
    service.post("/jobs", {"input": sdxl_payload()})
    assert local.fake_sdxl.at_step.wait(PATIENCE_S)

    answer = service.post("/job/job-1/cancel?user_id=user-1")

    assert answer.status_code == 202
    (*_, (name, last)) = events(service.get("/job/job-1/events?user_id=user-1"))
    assert (name, json.loads(last)["code"]) == ("error", "CANCELLED")


def test_a_job_that_arrives_twice_is_cancelled_as_one(tmp_path: Path) -> None:
    small = LocalWorker(tmp_path, settings=Settings(concurrency=1))
    small.fake_sdxl.hold()
    with ServedHttp(small.settings, small.worker) as service:
        service.post("/jobs", {"input": sdxl_payload()})
        assert small.fake_sdxl.at_step.wait(PATIENCE_S)
        again = service.post("/jobs", {"input": sdxl_payload()})
        assert again.json()["status"] == "processing"

        service.post("/job/job-1/cancel?user_id=user-1")

        (*_, (name, last)) = events(service.get("/job/job-1/events?user_id=user-1"))
        assert (name, json.loads(last)["code"]) == ("error", "CANCELLED")
    assert (len(small.fake_sdxl.requests), small.stored()) == (1, [])


@pytest.mark.parametrize(
    ("other", "user", "headers"),
    [
        ({"user_id": "user-2"}, "user-2", {}),
        ({"api_key": "another"}, "user-1", {"X-API-Key": "another"}),
    ],
)
def test_another_callers_job_of_the_same_id_is_another_job(
    tmp_path: Path, other: dict[str, str], user: str, headers: dict[str, str]
) -> None:
    small = LocalWorker(tmp_path, settings=Settings(concurrency=1))
    small.fake_sdxl.hold()
    with ServedHttp(small.settings, small.worker) as service:
        service.post("/jobs", {"input": sdxl_payload()})
        assert small.fake_sdxl.at_step.wait(PATIENCE_S)
        answer = service.post("/jobs", {"input": sdxl_payload(**other)})
        small.fake_sdxl.go_on.set()
        stream = service.get(f"/job/job-1/events?user_id={user}", headers=headers)

    assert answer.json()["status"] == "queued"
    assert events(stream)[-1][0] == "done"
    assert len(small.fake_sdxl.requests) == 2


def test_only_its_own_user_sees_and_stops_a_job(service: ServedHttp, local: LocalWorker) -> None:
    local.fake_sdxl.hold()
    service.post("/jobs", {"input": sdxl_payload()})
    assert local.fake_sdxl.at_step.wait(PATIENCE_S)

    for query in ("", "?user_id=", "?user_id=user-2", "?user_id=anonymous"):
        assert service.get(f"/job/job-1{query}").status_code == 404
        assert service.get(f"/job/job-1/events{query}").status_code == 404
        assert service.post(f"/job/job-1/cancel{query}").status_code == 404
    local.fake_sdxl.go_on.set()

    (*_, (name, _)) = events(service.get("/job/job-1/events?user_id=user-1"))
    assert name == "done"


def test_a_job_of_another_user_does_not_replace_a_running_job_with_its_id(
    service: ServedHttp, local: LocalWorker
) -> None:
    local.fake_sdxl.hold()
    service.post("/jobs", {"input": sdxl_payload()})
    assert local.fake_sdxl.at_step.wait(PATIENCE_S)
    service.post("/jobs", {"input": sdxl_payload(user_id="user-2", prompt="")})

    seen = service.get("/job/job-1?user_id=user-1").json()
    service.post("/job/job-1/cancel?user_id=user-1")
    local.fake_sdxl.go_on.set()

    (*_, (_, mine)) = events(service.get("/job/job-1/events?user_id=user-1"))
    (*_, (_, others)) = events(service.get("/job/job-1/events?user_id=user-2"))
    assert seen["status"] == "processing"
    assert (json.loads(mine)["code"], json.loads(others)["status"]) == ("CANCELLED", "completed")


def test_a_job_is_found_only_with_the_key_that_submitted_it(locked: ServedHttp) -> None:
    locked.post("/jobs?wait=150", {"input": chat_payload()}, headers=bearer("new-key"))

    answers = [
        locked.get("/job/job-1?user_id=user-1", headers=bearer(key))
        for key in ("new-key", "old-key")
    ]

    assert [answer.status_code for answer in answers] == [200, 404]


def anonymous(**changes: Any) -> dict[str, Any]:
    """A chat without a user, with an id that other callers use too."""
    payload = chat_payload(id="hello", **changes)
    del payload["user_id"]
    return payload


class HeldParrot(FakeChat):
    """A `FakeChat` that streams nothing until `go_on` is set."""

    def __init__(self) -> None:
        super().__init__("Water.")
        self.is_asked, self.go_on = threading.Event(), threading.Event()

    def generate(self, request: ChatRequest, check: Callable[[], None]) -> ChatReply:
        speech = super().generate(request, check)
        self.is_asked.set()
        assert self.go_on.wait(PATIENCE_S)
        return speech


@pytest.fixture
def single(tmp_path: Path) -> Iterator[tuple[ServedHttp, HeldParrot]]:
    """A service with one thread for chats, busy until `go_on`, and two places in the backlog."""
    settings, fake_chat = Settings(families=("chat",), concurrency=1, http_backlog=2), HeldParrot()
    small = LocalWorker(tmp_path, settings=settings, models={"chat": fake_chat})
    with ServedHttp(small.settings, small.worker) as service:
        service.post("/jobs", {"input": chat_payload(id="speaks")})
        assert fake_chat.is_asked.wait(PATIENCE_S)
        yield service, fake_chat
        fake_chat.go_on.set()


@pytest.mark.parametrize("named", [{}, {"user_id": "anonymous"}])
def test_a_job_without_a_user_is_found_by_the_workers_own_id(
    single: tuple[ServedHttp, HeldParrot], named: dict[str, str]
) -> None:
    service, fake_chat = single
    payload = {**anonymous(), **named}

    taken = [service.post("/jobs", {"input": payload}).json()["job_id"] for _ in range(2)]
    fake_chat.go_on.set()
    ended = [events(service.get(f"/job/{name}/events"))[-1] for name in taken]

    assert len({*taken, "hello"}) == 3
    assert [json.loads(data)["job_id"] for _, data in ended] == ["hello", "hello"]
    assert service.get("/job/hello").status_code == 404


def test_two_anonymous_chats_with_one_id_do_not_affect_each_other(
    tmp_path: Path, endless: EndlessChat
) -> None:
    with serve_endless(tmp_path, endless, concurrency=2) as service, connect(service) as first:
        first.sendall(raw_post("/chat", anonymous(stream=True)))
        assert endless.is_writing.wait(PATIENCE_S)
        with service.post("/chat", anonymous(stream=True), stream=True) as second:
            next(second.iter_lines())
        assert endless.stopped.wait(PATIENCE_S)

        endless.is_writing.clear()
        assert endless.is_writing.wait(PATIENCE_S), "the first reply was stopped too"


def test_a_job_runs_on_when_a_waiting_caller_disconnects(
    service: ServedHttp, local: LocalWorker
) -> None:
    local.fake_sdxl.hold()
    with connect(service) as caller:
        caller.sendall(raw_post("/jobs?wait=150", {"input": sdxl_payload()}))
        assert local.fake_sdxl.at_step.wait(PATIENCE_S)

    assert service.get("/job/job-1?user_id=user-1").json()["status"] == "processing"
    local.fake_sdxl.go_on.set()
    (*_, (name, _)) = events(service.get("/job/job-1/events?user_id=user-1"))
    assert name == "done"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/job/nobody", 404),
        ("POST", "/job/nobody/cancel", 404),
        ("GET", "/nowhere", 404),
        ("GET", "/chat", 405),
        ("POST", "/jobs?wait=x", 400),
        ("POST", "/jobs?wait=301", 400),
    ],
)
def test_every_failure_has_the_same_form(
    service: ServedHttp, method: str, path: str, status: int
) -> None:
    answer = requests.request(method, service.url + path, json={}, timeout=PATIENCE_S)

    assert answer.status_code == status
    assert answer.json()["success"] is False
    assert isinstance(answer.json()["error"], str)


# --- administration ---

#: The keys that the specification shows for each.
SAID = {
    "/status": ["worker_type", "model", "batch_support", "quality_tiers"],
    "/worker/info": ["families", "job_types"],
    "/enhancement/info": ["worker_type", "models_available", "capabilities", "model_info"],
    "/memory/status": ["model_loaded", "memory_usage", "device", "compilation_status"],
    "/memory/report": ["pressure_level", "available_vram", "worker_status", "recommendations"],
    "/debug/env": ["wan_generate_path", "model_paths"],
}


@pytest.mark.parametrize("path", SAID)
def test_the_specifications_routes_answer_with_its_keys(service: ServedHttp, path: str) -> None:
    answer = service.get(path)

    assert (answer.status_code, answer.json()["success"]) == (200, True)
    assert set(SAID[path]) <= set(answer.json())


def test_every_admin_operation_but_health_and_job_status_has_a_route() -> None:
    asked = {*routes.OPERATION_OF.values(), *openapi.EMERGENCIES}

    assert asked | {"health", "job_status"} == set(admin.OPERATIONS)


def test_an_admin_request_is_answered_while_the_backlog_is_full(tmp_path: Path) -> None:
    small = LocalWorker(tmp_path, settings=Settings(concurrency=1, http_backlog=0))
    small.fake_sdxl.hold()
    with ServedHttp(small.settings, small.worker) as service:
        service.post("/jobs", {"input": sdxl_payload()})
        answer = service.post("/emergency/operation", {"operation": "pressure_check"})
        small.fake_sdxl.go_on.set()

    assert answer.json()["pressure_level"] == "low"


def test_an_unknown_emergency_operation_is_refused(service: ServedHttp) -> None:
    answer = service.post("/emergency/operation", {"operation": "health"})

    assert answer.status_code == 400
    assert answer.json()["error"].startswith("operation: Input should be one of force_unload")


def test_a_model_that_cannot_be_moved_is_a_conflict_with_its_reason(service: ServedHttp) -> None:
    answer = service.post("/memory/unload", {"target_worker": "chat_worker"})

    assert (answer.status_code, answer.json()["success"]) == (409, False)
    assert answer.json()["error"] == "there is nothing to move"


# --- the key ---


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[ServedHttp]:
    settings = Settings(families=("sdxl", "chat"), worker_api_key="new-key,old-key")
    made = LocalWorker(tmp_path, settings=settings, models={"chat": FakeChat("Rain.")})
    made.models["sdxl"] = made.fake_sdxl
    with ServedHttp(settings, made.worker) as served:
        yield served


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("headers", "changes", "status"),
    [
        ({}, {}, 401),
        (bearer("wrong"), {}, 401),
        ({"Authorization": "Basic new-key"}, {}, 401),
        (bearer("new-key"), {}, 200),
        (bearer("old-key"), {"api_key": None}, 200),
        # The gateway's key in the usual header, the worker's key in the other.
        ({**bearer("of-the-gateway"), "X-API-Key": "new-key"}, {}, 200),
        (bearer("of-the-gateway"), {"api_key": "new-key"}, 200),
    ],
)
@pytest.mark.parametrize("path", ["/chat", "/jobs?wait=150"])
def test_a_worker_with_a_key_refuses_requests_without_it(
    locked: ServedHttp, path: str, headers: dict[str, str], changes: dict[str, Any], status: int
) -> None:
    call = chat_payload(**changes)

    answer = locked.post(path, {"input": call} if "jobs" in path else call, headers=headers)

    assert answer.status_code == status
    assert answer.json()["success"] is (status == 200)


def test_a_refusal_for_the_key_says_how_to_send_it(locked: ServedHttp) -> None:
    answer = locked.post("/chat", CALL)

    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["code"] == "UNAUTHORIZED"


@pytest.mark.parametrize("path", ["/ping", "/health"])
def test_health_is_answered_without_a_key(locked: ServedHttp, path: str) -> None:
    assert locked.get(path).status_code == 200


@pytest.mark.parametrize("path", SAID)
def test_admin_routes_need_the_key(locked: ServedHttp, path: str) -> None:
    assert locked.get(path).status_code == 401
    assert locked.get(path, headers=bearer("new-key")).status_code == 200


def test_a_jobs_status_and_cancel_need_the_key(locked: ServedHttp) -> None:
    locked.post("/jobs?wait=150", {"input": chat_payload()}, headers=bearer("new-key"))

    for headers, status in ((bearer("wrong"), 401), (bearer("new-key"), 200)):
        assert locked.get("/job/job-1?user_id=user-1", headers=headers).status_code == status
        assert locked.get("/job/job-1/events?user_id=user-1", headers=headers).status_code == status
    assert locked.post("/job/job-1/cancel?user_id=user-1").status_code == 401


# --- limits ---


def test_a_full_backlog_is_429_with_the_time_to_wait(tmp_path: Path) -> None:
    small = LocalWorker(tmp_path, settings=Settings(concurrency=1, http_backlog=1))
    small.fake_sdxl.hold()
    with ServedHttp(small.settings, small.worker) as service:
        taken = [
            service.post("/jobs", {"input": sdxl_payload(id=name)}) for name in ("a", "b", "c")
        ]
        small.fake_sdxl.go_on.set()
        service.get("/job/b/events?user_id=user-1")
        again = service.post("/jobs?wait=150", {"input": sdxl_payload(id="c")})

    assert [answer.status_code for answer in taken] == [202, 202, 429]
    assert taken[2].headers["Retry-After"] == "2"
    assert taken[2].json()["code"] == "RATE_LIMITED"
    assert again.status_code == 200


def test_a_caller_who_disconnects_frees_a_place_in_the_backlog(
    single: tuple[ServedHttp, HeldParrot],
) -> None:
    service, fake_chat = single
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(connect(service)).sendall(raw_post("/chat", CALL))
        wait_until(lambda: service.service.job_store.counts["queued"] == 2)
        full = service.post("/jobs", {"input": chat_payload(id="next")})
    wait_until(lambda: service.service.job_store.counts["queued"] == 0)

    taken = service.post("/jobs", {"input": chat_payload(id="next")})

    assert (full.status_code, taken.status_code) == (429, 202)
    assert len(fake_chat.calls) == 1, "only the chat that was answered all the while"


def test_a_job_that_is_stopped_while_it_waits_ends_at_once_with_a_callback(
    tmp_path: Path, receiver: CallbackReceiver
) -> None:
    from ourvidz_serverless.delivery.callback import Callback

    callback = Callback(receiver.callback_url, receiver.secret, policy=QUICK)
    small = LocalWorker(tmp_path, settings=Settings(concurrency=1), callback=callback)
    small.fake_sdxl.hold()
    with ServedHttp(small.settings, small.worker) as service:
        service.post("/jobs", {"input": sdxl_payload()})
        assert small.fake_sdxl.at_step.wait(PATIENCE_S)
        service.post("/jobs", {"input": sdxl_payload(id="waits")})

        service.post("/job/waits/cancel?user_id=user-1")

        (*_, (_, last)) = events(service.get("/job/waits/events?user_id=user-1"))
        told = [each.document["job_id"] for each in receiver.received]
        small.fake_sdxl.go_on.set()
    assert (json.loads(last)["code"], told) == ("CANCELLED", ["waits"])


class StuckLedger(Ledger):
    """A ledger whose device does not answer until it is `freed`."""

    def __init__(self) -> None:
        super().__init__(FakeMemory(10))
        self.asked, self.freed = threading.Semaphore(0), threading.Event()

    def report(self) -> list[Any]:
        self.asked.release()
        assert self.freed.wait(PATIENCE_S)
        return super().report()


def test_admin_requests_that_wait_do_not_delay_other_requests(
    tmp_path: Path, fake_chat: FakeChat
) -> None:
    ledger = StuckLedger()
    chatty = LocalWorker(
        tmp_path, settings=Settings(families=("chat",)), models={"chat": fake_chat}, ledger=ledger
    )
    with ServedHttp(chatty.settings, chatty.worker) as service, ExitStack() as stack:
        for _ in range(2 * http_service.ADMIN_THREADS):
            asks = stack.enter_context(connect(service))
            asks.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(http_service.ADMIN_THREADS):
            assert ledger.asked.acquire(timeout=PATIENCE_S)

        answer = service.post("/chat", CALL)
        ledger.freed.set()

    assert answer.json()["response"] == "Water that falls."


def test_admin_requests_beyond_the_limit_are_refused(
    tmp_path: Path, fake_chat: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_service, "ADMIN_THREADS", 1)
    ledger = StuckLedger()
    chatty = LocalWorker(
        tmp_path, settings=Settings(families=("chat",)), models={"chat": fake_chat}, ledger=ledger
    )
    with ServedHttp(chatty.settings, chatty.worker) as service, ExitStack() as stack:
        for _ in range(2):
            asks = stack.enter_context(connect(service))
            asks.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: service.service.administrators.is_full)

        answer = service.get("/status")
        ledger.freed.set()

    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")


def test_only_the_last_jobs_are_remembered(
    service: ServedHttp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ourvidz_serverless.serving.http.job_store.MAX_ENDED", 2)

    for name in ("a", "b", "c", "d"):
        service.post("/jobs?wait=150", {"input": sdxl_payload(id=name)})

    assert [service.get(f"/job/{name}?user_id=user-1").status_code for name in "abcd"] == [
        404,
        200,
        200,
        200,
    ]


def test_documents_with_large_pictures_are_remembered_within_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(storage_url="inline:")
    at = LocalWorker(tmp_path, settings=settings, storage=open_storage(settings))
    with ServedHttp(settings, at.worker) as service:
        first = service.post("/jobs?wait=150", {"input": sdxl_payload(id="a")}).json()
        num_chars = len(first["assets"][0]["url"])
        monkeypatch.setattr(job_store, "MAX_ENDED_CHARS", 2 * num_chars)
        for name in ("b", "c", "d"):
            service.post("/jobs?wait=150", {"input": sdxl_payload(id=name)})

        remembered = {name: service.get(f"/job/{name}?user_id=user-1") for name in "abcd"}

    assert [each.status_code for each in remembered.values()] == [404, 200, 200, 200]
    assert remembered["d"].json()["assets"] == first["assets"]


def test_a_body_that_is_too_long_is_refused(
    service: ServedHttp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_checks, "MAX_BODY_BYTES", 1000)

    answer = service.post("/chat", {**CALL, "prompt": "x" * 1000})

    assert (answer.status_code, answer.json()["success"]) == (413, False)


def test_a_body_that_does_not_arrive_is_refused_after_a_time(
    service: ServedHttp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_body, "BODY_TIMEOUT_S", 0.2)

    with connect(service) as slow:
        slow.sendall(raw_head("/chat", 10) + b"{")
        answer = slow.recv(1000)

    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_disconnect_during_a_body_is_not_logged_as_a_bug(
    local: LocalWorker, caplog: pytest.LogCaptureFixture
) -> None:
    with ServedHttp(local.settings, local.worker) as service, connect(service) as client:
        client.sendall(raw_head("/jobs", 10, "Expect: 100-continue"))
        assert client.recv(65536).startswith(b"HTTP/1.1 100")
        client.sendall(b"{")

    assert "met a bug" not in caplog.text


# --- loading, ready, closing ---


HEAD = b"GET /ping HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("piece", [b"X-Many: headers\r\n" * 1000, b"x" * 10_000])
def test_a_head_without_end_is_refused(service: ServedHttp, piece: bytes) -> None:
    with connect(service) as client:
        client.sendall(HEAD)

        with pytest.raises(ConnectionError):
            for _ in range(2000):
                client.sendall(piece)


@pytest.mark.parametrize("said", [b"", b"GET /ping HT", HEAD])
def test_a_connection_whose_head_does_not_arrive_is_closed(
    monkeypatch: pytest.MonkeyPatch, service: ServedHttp, said: bytes
) -> None:
    monkeypatch.setattr(connections, "KEEP_ALIVE_S", 0.2)

    with connect(service) as client:
        client.sendall(said)

        assert client.recv(65536) == b""


def test_a_connection_whose_head_arrives_too_slowly_is_closed(
    monkeypatch: pytest.MonkeyPatch, service: ServedHttp
) -> None:
    # The first head takes less. The time of the next one begins with the end of the reply.
    monkeypatch.setattr(connections, "KEEP_ALIVE_S", 3)
    with connect(service) as client:
        client.sendall(HEAD + b"\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")

        with pytest.raises(ConnectionError):
            for _ in range(round(PATIENCE_S / 0.02)):
                client.sendall(b"G")
                threading.Event().wait(0.02)


def test_a_connection_stays_open_while_its_job_takes_longer_than_a_head_may(
    monkeypatch: pytest.MonkeyPatch, service: ServedHttp, local: LocalWorker
) -> None:
    # Longer than any head takes to arrive, and shorter than the job.
    monkeypatch.setattr(connections, "KEEP_ALIVE_S", 2)
    local.fake_sdxl.hold()

    with connect(service) as client:
        client.sendall(raw_post("/jobs?wait=150", {"input": sdxl_payload()}))
        threading.Event().wait(2.5)
        local.fake_sdxl.go_on.set()

        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_while_models_load_ping_answers_204_and_other_routes_503() -> None:
    with ServedHttp(Settings()) as service:
        ping, health = service.get("/ping"), service.get("/health")
        call = service.post("/chat", CALL)

    assert ping.status_code == 204
    assert (health.status_code, health.json()["model_loaded"]) == (503, False)
    assert (call.status_code, call.headers["Retry-After"]) == (503, "5")
    assert call.json()["code"] == "WORKER_UNAVAILABLE"


def test_ping_and_health_of_a_ready_service_answer_200(service: ServedHttp) -> None:
    health = service.get("/health").json()

    assert (service.get("/ping").status_code, health["status"]) == (200, "healthy")
    assert health["families"] == ["sdxl", "chat"]
    assert {"model_loaded", "device", "jobs"} <= set(health)


def test_a_closing_service_finishes_running_jobs(local: LocalWorker) -> None:
    local.fake_sdxl.hold()
    with ServedHttp(local.settings, local.worker) as service:
        answer = start(service.post, "/jobs?wait=150", {"input": sdxl_payload()})
        assert local.fake_sdxl.at_step.wait(PATIENCE_S)
        service.stop()
        local.fake_sdxl.go_on.set()
        assert answer.result(PATIENCE_S).json()["status"] == "completed"


def test_a_closing_service_answers_503_and_job_status_until_the_last_job_has_ended(
    local: LocalWorker,
) -> None:
    local.fake_sdxl.hold()
    with ServedHttp(local.settings, local.worker) as service:
        service.post("/jobs", {"input": sdxl_payload()})
        assert local.fake_sdxl.at_step.wait(PATIENCE_S)
        service.stop()
        # Longer than the server runs without a job.
        threading.Event().wait(0.5)

        ping, health = service.get("/ping"), service.get("/health")
        job = service.get("/job/job-1?user_id=user-1")
        local.fake_sdxl.go_on.set()

    assert (ping.status_code, health.status_code) == (503, 503)
    assert health.json()["status"] == "shutting_down"
    assert job.json()["status"] == "processing"


def test_a_job_that_runs_longer_than_the_grace_ends_as_worker_unavailable(tmp_path: Path) -> None:
    impatient = LocalWorker(tmp_path, settings=Settings(shutdown_grace_s=0.1))
    impatient.fake_sdxl.hold()
    with ServedHttp(impatient.settings, impatient.worker) as service:
        service.post("/jobs", {"input": sdxl_payload()})
        assert impatient.fake_sdxl.at_step.wait(PATIENCE_S)

    ended = service.service.job_store.find(Identity.of("user-1", None, "job-1"))
    assert ended and ended.document and ended.document.failure
    assert ended.document.failure.code == "WORKER_UNAVAILABLE"


# --- OpenAPI ---


def test_every_route_is_described_with_its_body_and_its_failures(service: ServedHttp) -> None:
    paths = service.get("/openapi.json").json()["paths"]

    both = [*routes.router.routes, *openai_routes.router.routes]
    served = {re.sub(":path", "", route.path) for route in both}
    assert set(paths) == served
    assert set(openapi.BODIES) <= served
    for path, operations in paths.items():
        for method, operation in operations.items():
            assert "5XX" in operation["responses"]
            has_body = "requestBody" in operation
            assert has_body is (method == "post" and not path.endswith("/cancel"))


#: Which checks of schemathesis some routes cannot pass.
CHECKS = """
[[operations]]
# The contract has the rules of a payload, by job type.
include-path-regex = "^/(jobs$|v1/(?!images))"
[operations.checks]
positive_data_acceptance.enabled = false

[[operations]]
# Pictures take numbers as texts.
include-path-regex = "^/v1/images"
[operations.checks]
positive_data_acceptance.enabled = false
negative_data_rejection.enabled = false
"""


@pytest.fixture
def asked_all(tmp_path: Path, fake_chat: FakeChat) -> Iterator[ServedHttp]:
    """A service whose worker has models that can be moved."""
    settings = Settings(families=("sdxl", "chat"))
    models = {"sdxl": FakeSdxl(), "chat": fake_chat}
    made = LocalWorker(tmp_path, settings=settings, models=models, ledger=Ledger(FakeMemory(10)))
    with ServedHttp(settings, made.worker) as served:
        yield served


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_schemathesis_finds_no_difference_between_openapi_and_the_worker(
    asked_all: ServedHttp, tmp_path: Path
) -> None:
    """It sends requests that the OpenAPI schema allows, and requests that it forbids."""
    (tmp_path / "checks.toml").write_text(CHECKS)

    run = subprocess.run(
        [
            Path(sys.executable).parent / "schemathesis",
            *("--config-file=checks.toml", "run", f"{asked_all.url}/openapi.json"),
            *("--phases=examples,coverage,fuzzing", "--max-examples=10", "--workers=1"),
            *("--seed=1", "--generation-deterministic", "--request-timeout=20", "--no-color"),
            "--suppress-health-check=all",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )

    assert run.returncode == 0, run.stdout[-6000:]


def test_openapi_names_both_headers_for_the_key(service: ServedHttp, locked: ServedHttp) -> None:
    open_to_all, with_key = (each.get("/openapi.json").json() for each in (service, locked))

    schemes = with_key["components"]["securitySchemes"]
    assert {"type": "apiKey", "in": "header", "name": "X-API-Key"} in schemes.values()
    assert with_key["paths"]["/chat"]["post"]["security"] == [{"bearer": []}, {"key": []}]
    assert {} in open_to_all["paths"]["/chat"]["post"]["security"]
    assert "security" not in with_key["paths"]["/ping"]["get"]


@pytest.mark.parametrize("path", ["/ping", "/health"])
def test_health_routes_answer_head_requests(service: ServedHttp, path: str) -> None:
    head = service.head(path)

    assert (head.status_code, head.content) == (200, b"")


# --- the process ---


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    env = {
        "FAMILIES": "chat",
        "CHAT_INSTRUCT_MODEL": tiny_folder(tmp_path_factory.mktemp("chat")),
        "STORAGE_URL": f"file:{tmp_path_factory.mktemp('outputs')}",
        "HOST": "127.0.0.1",
        "PORT": "0",
        "PORT_HEALTH": str(free_port()),
        "SERVE": "http",
        "OMP_NUM_THREADS": "1",
    }
    with WorkerProcess(None, str(HANDLER), env=env, cwd=ROOT) as running:
        running.wait_for_log("ready")
        yield running


def ports(process: WorkerProcess) -> list[str]:
    return [f"http://127.0.0.1:{port}" for port in re.findall(r"port (\d+)", process.log)]


def test_a_real_model_answers_the_applications_call(process: WorkerProcess) -> None:
    url, _ = ports(process)

    answer = requests.post(f"{url}/chat", json=CALL, timeout=PATIENCE_S)

    assert answer.json()["success"] is True
    assert answer.json()["usage"]["completion_tokens"] > 0


def test_a_real_model_is_unloaded_and_loaded_over_http(process: WorkerProcess) -> None:
    url, _ = ports(process)

    unloaded = requests.post(
        f"{url}/memory/unload", json={"force": False}, timeout=PATIENCE_S
    ).json()
    loaded = requests.post(f"{url}/memory/load", json={"force": False}, timeout=PATIENCE_S).json()
    status = requests.get(f"{url}/memory/status", timeout=PATIENCE_S).json()

    assert set(unloaded["models"].values()) <= {"host", "disk", "device"}
    assert loaded["success"] is True
    assert status["model_loaded"] is True


def test_the_health_port_answers_pings_too(process: WorkerProcess) -> None:
    assert [
        requests.get(f"{url}/ping", timeout=PATIENCE_S).status_code for url in ports(process)
    ] == [
        200,
        200,
    ]


def test_many_callers_are_answered_at_once(process: WorkerProcess) -> None:
    url, _ = ports(process)

    def ask() -> Any:
        return requests.post(f"{url}/chat", json=CALL, timeout=PATIENCE_S).json()["success"]

    answers = [start(ask) for _ in range(20)]

    assert [answer.result(PATIENCE_S) for answer in answers] == [True] * 20


def test_a_disconnect_stops_a_real_model_and_no_prompt_is_logged(process: WorkerProcess) -> None:
    url, _ = ports(process)
    messages = [{"role": "user", "content": "an unmistakable zebra"}]
    long = {"messages": messages, "max_tokens": 2048, "temperature": 0}
    with requests.post(
        f"{url}/chat", json={**long, "stream": True}, stream=True, timeout=PATIENCE_S
    ) as got:
        next(got.iter_lines())

    log = process.wait_for_log("CANCELLED")

    assert "zebra" not in log


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sigterm_ends_the_process_with_code_0(tmp_path: Path) -> None:
    env = {"SERVE": "http", "STORAGE_URL": f"file:{tmp_path}", "PORT": "0", "HOST": "127.0.0.1"}
    with WorkerProcess(None, str(HANDLER), env=env, cwd=ROOT) as running:
        running.wait_for_log("ready")
        url = ports(running)[0]
        answer = requests.post(
            f"{url}/jobs?wait=150", json={"input": sdxl_payload()}, timeout=PATIENCE_S
        )
        running.terminate()

        assert answer.json()["status"] == "completed"
        assert running.wait() == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_failed_start_ends_with_one_clear_line() -> None:
    env = {"SERVE": "http", "SDXL_MODEL": "/no/such/model", "PORT": "0", "HOST": "127.0.0.1"}
    with WorkerProcess(None, str(HANDLER), env=env, cwd=ROOT) as failing:
        assert failing.wait() == 1

    assert failing.log.strip().splitlines()[-1].startswith("cannot start: SDXL_MODEL: ")
    assert "Traceback" not in failing.log
