"""The TypeScript client in real Deno and Node, against the platform and the real worker's loop."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from jsonschema import Draft202012Validator as Validator

from builder.contract import FOLDER
from ourvidz_serverless import jobs
from ourvidz_serverless.delivery.callback import webhook_id
from ourvidz_serverless.job_types import SYNONYMS
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.signatures import signatures
from tests.clients.streaming_platform import DOCUMENT, PIECES, StreamingPlatform
from tests.fakes.fake_chat import EndlessChat, FakeChat
from tests.fakes.local_worker import LocalWorker, chat_payload, sdxl_payload, wan_payload
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.http_service import ServedHttp
from tests.servers.javascript import (
    DENO,
    RUNTIMES,
    SECRET,
    call,
    deno_environment,
    edge_function,
    url_of,
)
from tests.servers.local_server import Answer, LocalServer, Request
from tests.servers.runpod import Platform
from tests.servers.worker_process import WorkerProcess

#: Endpoints without workers: jobs stay in the queue.
EMPTY = {"sdxl": "pictures", "chat": "chats", "wan": "videos"}
SERVED = {"sdxl": "local", "chat": "local"}
QUICK = {"tries": 4, "baseMs": 10, "maxMs": 50}


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def caller(platform: Platform, **changes: Any) -> dict[str, Any]:
    options = {
        "apiKey": platform.caller_key,
        "baseUrl": platform.caller_url,
        "endpoints": SERVED,
        "workerKey": "worker-key",
        "retry": QUICK,
    }
    return {**options, **changes}


# --- routing ---


@pytest.mark.parametrize("name", jobs.FAMILY_OF)
def test_a_job_type_goes_to_its_familys_endpoint(platform: Platform, name: str) -> None:
    payload = json.loads((FOLDER / f"examples/jobs/{name}.json").read_text())

    result = call("deno", "submit", client=caller(platform, endpoints=EMPTY), job=payload)

    family = jobs.FAMILY_OF[name]
    assert result["value"]["endpoint"] == EMPTY.get(family, EMPTY["sdxl"])
    queued = platform.queued(result["value"]["endpoint"])[-1]
    assert queued["id"] == result["value"]["id"]
    assert queued["input"] == {**payload, "api_key": "worker-key"}


@pytest.mark.parametrize("field", ["type", "job_type"])
@pytest.mark.parametrize("name", SYNONYMS)
def test_the_applications_names_of_job_types_are_accepted(
    platform: Platform, name: str, field: str
) -> None:
    job = {"id": "named", field: name}

    result = call("deno", "submit", client=caller(platform, endpoints=EMPTY), job=job)

    assert result["value"]["endpoint"] == "videos"


def test_a_job_type_goes_to_its_familys_endpoint_on_node(platform: Platform) -> None:
    job = chat_payload()

    result = call("node", "submit", client=caller(platform, endpoints=EMPTY), job=job)

    assert result["value"]["endpoint"] == "chats"


def test_an_admin_job_goes_to_its_targets_endpoint(platform: Platform) -> None:
    job = {
        "type": "admin_utilities",
        "config": {"operation": "health", "target_worker": "wan_worker"},
    }

    result = call("deno", "submit", client=caller(platform, endpoints=EMPTY), job=job)

    assert result["value"]["endpoint"] == "videos"


def test_an_admin_job_is_recognized_by_either_field_of_its_type(platform: Platform) -> None:
    job = {"job_type": "admin_utilities", "target_worker": "chat_worker"}

    result = call("deno", "submit", client=caller(platform, endpoints=EMPTY), job=job)

    assert result["value"]["endpoint"] == "chats"


def test_an_empty_type_is_read_from_the_other_field(platform: Platform) -> None:
    job = {"id": "", "job_id": "named", "type": "", "job_type": "video_fast"}

    result = call("deno", "submit", client=caller(platform, endpoints=EMPTY), job=job)

    assert result["value"]["endpoint"] == "videos"
    assert platform.queued("videos")[-1]["input"]["id"] == "named"


def test_an_admin_job_goes_to_a_family_that_has_an_endpoint(platform: Platform) -> None:
    job = {"type": "admin_utilities", "config": {"operation": "health"}}

    client = caller(platform, endpoints={"sdxl": "", "chat": "chats"})

    assert call("deno", "submit", client=client, job=job)["value"]["endpoint"] == "chats"


def test_a_job_of_a_family_without_an_endpoint_throws_an_error(
    platform: Platform, runtime: str
) -> None:
    result = call(runtime, "submit", client=caller(platform), job={"type": "video_fast"})

    assert result["error"]["message"] == "no endpoint serves wan"


def test_a_job_without_a_type_goes_to_the_only_family(platform: Platform) -> None:
    client = caller(platform, endpoints={"wan": "videos", "admin": "chats", "sdxl": ""})

    result = call("deno", "submit", client=client, job={"prompt": "Hello World"})

    assert result["value"]["endpoint"] == "videos"


def test_a_client_of_several_families_needs_a_type(platform: Platform) -> None:
    client = caller(platform, endpoints=EMPTY)

    result = call("deno", "submit", client=client, job={"prompt": "Hello World"})

    assert result["error"]["message"] == "type: needed by a client of several families"


def test_a_job_goes_to_the_endpoint_with_the_least_load(platform: Platform, runtime: str) -> None:
    busy, free = f"busy-{runtime}", f"free-{runtime}"
    for _ in range(3):
        platform.submit(sdxl_payload(), endpoint=busy)
    platform.submit(sdxl_payload(), endpoint=free)

    endpoints = {"sdxl": [busy, free]}
    client = caller(platform, endpoints=endpoints)
    result = call(runtime, "submit", client=client, job=sdxl_payload())

    assert result["value"]["endpoint"] == free


# --- from job to result, by the real loop ---


@pytest.mark.usefixtures("worker")
def test_a_picture_is_submitted_and_its_document_returned(
    platform: Platform, runtime: str, outputs: Path
) -> None:
    result = call(runtime, "run", client=caller(platform), job=sdxl_payload(id=f"run-{runtime}"))

    (asset,) = result["value"]["assets"]
    assert (outputs / asset["url"]).exists()


@pytest.mark.usefixtures("worker")
def test_a_reply_comes_in_one_request(platform: Platform, runtime: str) -> None:
    result = call(runtime, "runsync", client=caller(platform), job=chat_payload())

    assert result["value"]["usage"]["completion_tokens"] > 0


@pytest.mark.usefixtures("worker")
def test_a_reply_is_streamed_and_ends_with_its_result(platform: Platform, runtime: str) -> None:
    job = chat_payload(id=f"stream-{runtime}", stream=True, max_tokens=400)

    result = call(runtime, "stream", client=caller(platform), job=job)

    assert "".join(result["value"]["pieces"]) == result["value"]["result"]["response"]
    assert len(result["value"]["pieces"]) > 0


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("action", ["run", "runsync", "stream"])
def test_a_job_that_fails_throws_its_failure(platform: Platform, runtime: str, action: str) -> None:
    job = sdxl_payload(id="fails", config={"num_images": 7})

    error = call(runtime, action, client=caller(platform), job=job)["error"]

    assert error["name"] == "JobFailed"
    assert error["failure"] == {
        "code": "INVALID_PROMPT",
        "message": "config.num_images: Input should be less than or equal to 6",
        "retryable": False,
    }


@pytest.mark.usefixtures("worker")
def test_a_wrong_key_of_the_workers_is_a_failure_of_the_job(
    platform: Platform, runtime: str
) -> None:
    client = caller(platform, workerKey="another")

    error = call(runtime, "runsync", client=client, job=chat_payload())["error"]

    assert error["failure"]["code"] == "UNAUTHORIZED"


@pytest.mark.usefixtures("worker")
def test_another_process_can_read_a_jobs_status_and_cancel_it(
    platform: Platform, runtime: str
) -> None:
    job = platform.submit(chat_payload(id=f"cancel-{runtime}"), endpoint="nobody")
    name = {"endpoint": "nobody", "id": job}

    before = call(runtime, "status", client=caller(platform), name=name)["value"]
    call(runtime, "cancel", client=caller(platform), name=name)
    after = call(runtime, "status", client=caller(platform), name=name)["value"]

    assert before == {"done": False, "status": "IN_QUEUE"}
    assert (after["ok"], after["failure"]["code"]) == (False, "CANCELLED")


@pytest.mark.usefixtures("worker")
def test_health_is_returned_by_endpoint(platform: Platform, runtime: str) -> None:
    result = call(runtime, "health", client=caller(platform), family="chat")

    assert result["value"]["local"]["workers"]["idle"] == 1


#: The job types of the contract that the application uses.
TYPES = {path.name.removesuffix(".schema.json") for path in FOLDER.glob("jobs/*.schema.json")}
PAYLOADS = {"sdxl": sdxl_payload, "chat": chat_payload, "wan": wan_payload}

#: The assets of each, by the first word of its name.
MAKES = {
    **{name: ["image"] for name in ("sdxl", "image", "image7b")},
    **{name: ["video"] for name in ("video", "video7b")},
    "chat": ["text"],
    "admin": [],
}


def small_job(name: str) -> dict[str, Any]:
    """A job of this type that a tiny model does at once."""
    if name == "admin_utilities":
        return {"id": name, "type": name, "config": {"operation": "health"}}
    return PAYLOADS[jobs.FAMILY_OF[name]](id=f"each-{name}", type=name)


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_every_job_type_is_submitted_from_deno_and_done_by_the_real_loop(
    platform: Platform, outputs: Path
) -> None:
    everywhere = caller(platform, endpoints={**SERVED, "wan": "local"})
    names = sorted(TYPES)

    result = call("deno", "runAll", client=everywhere, jobs=[small_job(name) for name in names])

    results = dict(zip(names, result["value"], strict=True))
    assert set(results) == set(jobs.FAMILY_OF) and len(results) == 14
    for name, result in results.items():
        Validator(json.loads((FOLDER / "result.schema.json").read_text())).validate(result)
        assert [asset["type"] for asset in result["assets"]] == MAKES[name.split("_")[0]]
        for asset in result["assets"]:
            assert asset["type"] == "text" or (outputs / asset["url"]).stat().st_size > 0


# --- tries ---


@pytest.mark.parametrize(
    "steps", [[429], [503, 502], ["reset"], [(429, {"Retry-After": "1"}), 500]]
)
def test_a_transient_failure_is_tried_again(
    scripted: Platform, runtime: str, steps: list[Any]
) -> None:
    scripted.script(steps)

    result = call(runtime, "submit", client=caller(scripted), job=chat_payload())

    assert [job["id"] for job in scripted.queued()] == [result["value"]["id"]]


def test_a_try_waits_for_retry_after(scripted: Platform, runtime: str) -> None:
    scripted.script([(429, {"Retry-After": "2"})])
    client = caller(scripted, retry={**QUICK, "maxMs": 10_000})

    began = time.monotonic()
    call(runtime, "submit", client=client, job=chat_payload())

    assert time.monotonic() - began >= 2


@pytest.mark.parametrize(("status", "tries"), [(400, 1), (404, 1), (503, 4), (429, 4)])
def test_a_failure_that_does_not_end_is_raised_after_its_tries(
    scripted: Platform, runtime: str, status: int, tries: int
) -> None:
    scripted.script([status] * 4)

    error = call(runtime, "submit", client=caller(scripted), job=chat_payload())["error"]

    assert (error["name"], error["status"]) == ("RequestFailed", status)
    assert len(scripted.script_left) == 4 - tries


def test_a_job_whose_answer_was_lost_is_sent_again_under_the_same_id(
    scripted: Platform, runtime: str
) -> None:
    scripted.slow_seconds = 3
    scripted.script(["slow"])
    job = chat_payload()
    del job["id"]

    call(runtime, "submit", client=caller(scripted, timeoutMs=1500), job=job)

    first, second = scripted.queued()
    assert first["input"]["id"] == second["input"]["id"]


def test_a_job_whose_answer_was_cut_is_sent_again_under_the_same_id(
    scripted: Platform, runtime: str
) -> None:
    scripted.script(["cut"])
    job = chat_payload()
    del job["id"]

    result = call(runtime, "submit", client=caller(scripted), job=job)

    first, second = scripted.queued()
    assert first["input"]["id"] == second["input"]["id"]
    assert result["value"]["id"] == second["id"]


def test_a_refusal_whose_text_was_cut_is_still_a_refusal(scripted: Platform, runtime: str) -> None:
    scripted.script([Answer(400, b'{"error": "no input"}', cut_at=12)])

    error = call(runtime, "submit", client=caller(scripted), job=chat_payload())["error"]

    assert (error["name"], error["status"], scripted.queued()) == ("RequestFailed", 400, [])


# --- polls ---


@pytest.fixture
def streaming_platform() -> Iterator[StreamingPlatform]:
    with StreamingPlatform(hold=0.05) as server:
        yield server


def name_of(job: str) -> dict[str, str]:
    return {"endpoint": "local", "id": job}


#: A proxy's answer that ends too soon, although its length is right.
HALF = Answer(200, b'{"id": "a", "status": "COMP', {"Content-Type": "application/json"})


@pytest.mark.parametrize(
    "steps",
    [["cut"], [HALF], [Answer(200, b"{}")], [503] * 5],
    ids=["cut", "half a document", "an empty document", "an outage longer than a request's tries"],
)
def test_a_job_is_polled_again_after_an_answer_that_failed(
    streaming_platform: StreamingPlatform, runtime: str, steps: list[Any]
) -> None:
    job = streaming_platform.completed_job()
    streaming_platform.script_path = "/status/"
    streaming_platform.script(steps)

    result = call(runtime, "result", client=caller(streaming_platform), name=name_of(job))

    assert result["value"] == DOCUMENT
    assert streaming_platform.script_left == []


def test_a_poll_that_is_refused_is_not_tried_again(
    streaming_platform: StreamingPlatform, runtime: str
) -> None:
    result = call(runtime, "result", client=caller(streaming_platform), name=name_of("forgotten"))

    assert (result["error"]["name"], result["error"]["status"]) == ("RequestFailed", 404)


@pytest.mark.parametrize("action", ["result", "streamOn"])
def test_a_job_that_waits_in_its_queue_is_under_way_when_the_time_is_over(
    streaming_platform: StreamingPlatform, runtime: str, action: str
) -> None:
    job = streaming_platform.submit(chat_payload())

    error = call(
        runtime, action, client=caller(streaming_platform), name=name_of(job), timeoutMs=50
    )["error"]

    assert error["message"] == "the job is still under way after 50 ms"
    assert error["failure"]["code"] == "TIMEOUT_ERROR"


@pytest.mark.parametrize("action", ["result", "streamOn"])
def test_a_platform_that_does_not_answer_until_the_time_is_over_is_reported(
    streaming_platform: StreamingPlatform, action: str
) -> None:
    job = streaming_platform.completed_job()
    streaming_platform.script_path = f"/{job}"
    streaming_platform.script([503] * 9)

    error = call(
        "deno", action, client=caller(streaming_platform), name=name_of(job), timeoutMs=50
    )["error"]

    assert (error["name"], error["status"]) == ("RequestFailed", 503)


@pytest.mark.parametrize("step", [200, 429], ids=["none", "one that the platform refused"])
def test_without_a_lost_answer_a_stream_has_the_pieces_of_the_reply(
    streaming_platform: StreamingPlatform, runtime: str, step: int
) -> None:
    job = streaming_platform.completed_job()
    streaming_platform.script_path = "/stream/"
    streaming_platform.script([step])

    result = call(runtime, "streamOn", client=caller(streaming_platform), name=name_of(job))

    assert result["value"] == {"pieces": PIECES, "result": DOCUMENT}


def test_the_pieces_of_a_lost_answer_come_at_the_end_of_the_stream(
    streaming_platform: StreamingPlatform, runtime: str
) -> None:
    job = streaming_platform.completed_job()
    streaming_platform.script_path = "/stream/"
    streaming_platform.script([200, "cut"])

    result = call(runtime, "streamOn", client=caller(streaming_platform), name=name_of(job))

    assert result["value"] == {
        "pieces": [PIECES[0], "".join(PIECES[1:])],
        "result": DOCUMENT,
    }


BUCKET = {"accessId": "a", "accessSecret": "s", "bucketName": "b", "endpointUrl": "https://s3.test"}


@pytest.mark.parametrize(
    ("action", "wait"), [("run", {"timeoutMs": 1}), ("runsync", {"waitMs": 1})]
)
def test_a_jobs_own_bucket_is_sent_as_s3_config(
    scripted: Platform, runtime: str, action: str, wait: dict[str, int]
) -> None:
    call(runtime, action, client=caller(scripted), job=chat_payload(), s3Config=BUCKET, **wait)

    assert scripted.queued()[0]["s3Config"] == BUCKET


# --- reading answers ---


@pytest.mark.parametrize("name", ["completed", "chat"])
@pytest.mark.parametrize("as_list", [True, False])
def test_the_example_results_of_the_contract_are_read(
    runtime: str, name: str, as_list: bool
) -> None:
    document = json.loads((FOLDER / f"examples/result.{name}.json").read_text())
    output = [{"delta": "Rain"}, document] if as_list else document

    result = call(runtime, "parse", answer={"id": "a", "status": "COMPLETED", "output": output})

    assert result["value"] == {"done": True, "ok": True, "result": document}


@pytest.mark.parametrize(
    ("answer", "code", "retryable"),
    [
        (
            {
                "status": "FAILED",
                "error": '{"code": "OOM_ERROR", "message": "m", "retryable": true}',
            },
            "OOM_ERROR",
            True,
        ),
        ({"status": "FAILED", "error": "the worker died"}, "INTERNAL_ERROR", True),
        ({"status": "FAILED"}, "INTERNAL_ERROR", True),
        ({"status": "COMPLETED"}, "INTERNAL_ERROR", True),
        ({"status": "TIMED_OUT"}, "TIMEOUT_ERROR", True),
        ({"status": "CANCELLED"}, "CANCELLED", False),
    ],
)
def test_every_failed_status_of_the_platform_is_a_failure(
    answer: dict[str, Any], code: str, retryable: bool
) -> None:
    outcome = call("deno", "parse", answer={"id": "a", **answer})["value"]

    assert (outcome["done"], outcome["ok"]) == (True, False)
    assert (outcome["failure"]["code"], outcome["failure"]["retryable"]) == (code, retryable)


def test_progress_is_read_from_a_status(runtime: str) -> None:
    output = {"stage": "generate", "step": 3, "steps": 10, "progress": 0.3}

    result = call(runtime, "parse", answer={"id": "a", "status": "IN_PROGRESS", "output": output})

    assert result["value"] == {"done": False, "status": "IN_PROGRESS", "progress": output}


# --- callbacks ---

BODY = (FOLDER / "examples/callback.completed.json").read_text()
MESSAGE = webhook_id("job-1", "completed")


def signed(secret: str = SECRET, age_s: int = 0, **changes: str | None) -> dict[str, str]:
    headers = {
        "webhook-id": MESSAGE,
        **signatures(secret, BODY.encode(), MESSAGE, int(time.time()) - age_s),
    }
    return {name: value for name, value in {**headers, **changes}.items() if value is not None}


NO_TRIO = {"webhook-id": None, "webhook-timestamp": None, "webhook-signature": None}

Sign = Callable[[], dict[str, str]]


@pytest.mark.parametrize(
    ("sign", "secret"),
    [(signed, SECRET), (lambda: signed("plain"), "plain"), (lambda: signed("old"), ["new", "old"])],
    ids=["both", "plain secret", "rotated"],
)
def test_a_signed_callback_is_read(runtime: str, sign: Sign, secret: str) -> None:
    result = call(runtime, "verify", headers=sign(), body=BODY, secret=secret)

    assert result["value"] == json.loads(BODY)


@pytest.mark.parametrize(
    ("sign", "body", "secret"),
    [
        (dict, BODY, SECRET),
        (signed, BODY + " ", SECRET),
        (lambda: signed("another"), BODY, SECRET),
        (signed, BODY, ""),
        (signed, BODY, []),
        (lambda: signed(**{"X-Callback-Signature": None}), BODY, SECRET),
        (lambda: signed(**{"X-Callback-Signature": "sha256=" + "0" * 64}), BODY, SECRET),
        (lambda: signed(**{"webhook-signature": "v1,AAAA"}), BODY, SECRET),
        (lambda: signed(**{"webhook-signature": None}), BODY, SECRET),
        (lambda: signed(**{"webhook-id": webhook_id("job-2", "completed")}), BODY, SECRET),
        (lambda: signed(**{"webhook-timestamp": "soon"}), BODY, SECRET),
        (lambda: signed(age_s=301), BODY, SECRET),
    ],
)
def test_a_callback_with_a_wrong_signature_is_refused(sign: Sign, body: str, secret: str) -> None:
    result = call("deno", "verify", headers=sign(), body=body, secret=secret)

    assert result["error"]["name"] == "BadSignature"


def test_a_recorded_callback_without_its_webhook_headers_is_refused(runtime: str) -> None:
    result = call(runtime, "verify", headers=signed(**NO_TRIO), body=BODY, secret=SECRET)

    assert result["error"]["name"] == "BadSignature"


OLD_SENDERS = {"requireWebhook": False}


def test_a_callback_without_webhook_headers_is_read_if_the_receiver_allows_it(runtime: str) -> None:
    result = call(
        runtime, "verify", headers=signed(**NO_TRIO), body=BODY, secret=SECRET, options=OLD_SENDERS
    )

    assert result["value"] == json.loads(BODY)


@pytest.mark.parametrize(
    "sign",
    [
        lambda: signed(age_s=301),
        lambda: signed(**{"webhook-timestamp": None}),
        lambda: signed(**{**NO_TRIO, "X-Callback-Signature": None}),
    ],
    ids=["too old", "a part of the three", "not signed at all"],
)
def test_webhook_headers_are_checked_even_if_the_receiver_does_not_require_them(sign: Sign) -> None:
    result = call("deno", "verify", headers=sign(), body=BODY, secret=SECRET, options=OLD_SENDERS)

    assert result["error"]["name"] == "BadSignature"


# --- the HTTP service ---


def chat_service(tmp_path: Path, model: Any) -> ServedHttp:
    settings = Settings(families=("chat",), worker_api_key="worker-key")
    return ServedHttp(
        settings, LocalWorker(tmp_path, settings=settings, models={"chat": model}).worker
    )


def service_options(service: ServedHttp, key: str = "worker-key") -> dict[str, str]:
    return {"url": service.url, "apiKey": "of-the-gateway", "workerKey": key}


CALL = {"messages": [{"role": "user", "content": "What is rain?"}]}


@pytest.mark.parametrize(
    ("method", "field"),
    [("chat", "response"), ("chatUnrestricted", "response"), ("enhance", "enhanced_prompt")],
)
def test_a_reply_over_http_has_the_models_text(
    tmp_path: Path, runtime: str, method: str, field: str
) -> None:
    with chat_service(tmp_path, FakeChat("Water ", "that falls.")) as service:
        result = call(runtime, "reply", service=service_options(service), method=method, call=CALL)

    assert result["value"][field] == "Water that falls."


def test_a_streamed_reply_over_http_has_the_models_text(tmp_path: Path, runtime: str) -> None:
    with chat_service(tmp_path, FakeChat("Wätér ", "that falls.")) as service:
        result = call(runtime, "streamReply", service=service_options(service), call=CALL)

    assert "".join(result["value"]["pieces"]) == "Wätér that falls."
    assert result["value"]["result"]["response"] == "Wätér that falls."


def test_a_refusal_over_http_is_request_failed_with_its_text(tmp_path: Path, runtime: str) -> None:
    with chat_service(tmp_path, FakeChat()) as service:
        error = call(
            runtime, "reply", service=service_options(service, "wrong"), method="chat", call=CALL
        )["error"]

    assert (error["name"], error["status"]) == ("RequestFailed", 401)
    assert error["message"].startswith("api_key: ")


class CuttingServer(LocalServer):
    """A chat worker whose connection breaks in the middle of each answer."""

    def answer(self, request: Request) -> Answer:
        body = b'data: {"delta": "Rain"}\n\ndata: {"delta": "falls"}\n\n'
        return Answer(200, body, cut_at=30)


@pytest.mark.parametrize(
    ("action", "message"),
    [("reply", "no whole answer"), ("streamReply", "the stream broke off")],
)
def test_a_reply_over_http_that_breaks_off_is_request_failed(
    runtime: str, action: str, message: str
) -> None:
    with CuttingServer() as worker:
        service = {"url": worker.url, "apiKey": "of-the-gateway"}
        error = call(runtime, action, service=service, method="chat", call=CALL)["error"]

    assert (error["name"], error["status"]) == ("RequestFailed", 0)
    assert error["message"].startswith(message)


# --- edge functions, as the guide shows them ---


@pytest.mark.usefixtures("worker")
def test_an_edge_function_receives_what_the_real_loop_posts(
    platform: Platform, receiver: WorkerProcess
) -> None:
    for payload in (
        sdxl_payload(id="callback-picture", api_key="worker-key"),
        chat_payload(id="callback-reply", api_key="worker-key"),
        sdxl_payload(id="callback-refusal", api_key="worker-key", config={"num_images": 7}),
    ):
        platform.result(platform.submit(payload), 60)

    log = receiver.wait_for_log('"callback-refusal"')
    lines = [json.loads(line) for line in log.splitlines() if line.startswith('{"job":"callback-')]
    picture = {"job": "callback-picture", "type": "image", "url": "user-1/callback-picture/0.png"}
    assert picture.items() <= lines[0].items()
    assert (lines[1]["job"], lines[1]["type"]) == ("callback-reply", "text")
    assert lines[2] == {
        "job": "callback-refusal",
        "failed": "config.num_images: Input should be less than or equal to 6",
    }


@pytest.mark.parametrize(
    "sign",
    [lambda: signed("a guess"), lambda: signed(**NO_TRIO)],
    ids=["forged", "recorded, and sent again without its time"],
)
def test_an_edge_function_refuses_a_callback_with_a_wrong_signature(
    receiver: WorkerProcess, sign: Sign
) -> None:
    answer = requests.post(url_of(receiver), data=BODY, headers=sign(), timeout=PATIENCE_S)

    assert (answer.status_code, answer.json()["success"]) == (401, False)


@pytest.mark.usefixtures("worker")
def test_an_edge_function_queues_a_job(platform: Platform) -> None:
    env = {
        "RUNPOD_API_KEY": platform.caller_key,
        "RUNPOD_BASE_URL": platform.caller_url,
        "SDXL_ENDPOINT_ID": "local",
        "WORKER_API_KEY": "worker-key",
    }
    with edge_function("queue-job", **env) as function:
        answer = requests.post(
            url_of(function), json=sdxl_payload(id="queued"), timeout=PATIENCE_S
        ).json()
        unknown = requests.post(url_of(function), json={"type": "poem"}, timeout=PATIENCE_S)

    assert (answer["jobId"], answer["status"]) == ("queued", "queued")
    result = platform.result(answer["runpod"]["id"], 60)["output"][-1]
    assert result["assets"][0]["url"] == "user-1/queued/0.png"
    assert (unknown.status_code, unknown.json()["error"]) == (400, "poem is no job type")


def test_an_edge_function_answers_a_chat_and_streams_one(tmp_path: Path) -> None:
    with chat_service(tmp_path, FakeChat("Water ", "that falls.")) as service:
        env = {"CHAT_WORKER_URL": service.url, "WORKER_API_KEY": "worker-key"}
        with edge_function("chat", **env) as function:
            reply = requests.post(url_of(function), json=CALL, timeout=PATIENCE_S).json()
            streamed = requests.post(
                url_of(function), json={**CALL, "stream": True}, timeout=PATIENCE_S
            )

    assert reply["response"] == "Water that falls."
    assert streamed.text == "Water that falls."


def test_a_caller_who_leaves_a_streaming_edge_function_stops_the_model(tmp_path: Path) -> None:
    endless = EndlessChat()
    with chat_service(tmp_path, endless) as service:
        env = {"CHAT_WORKER_URL": service.url, "WORKER_API_KEY": "worker-key"}
        with edge_function("chat", **env) as function:
            payload = {**CALL, "stream": True}
            with requests.post(
                url_of(function), json=payload, stream=True, timeout=PATIENCE_S
            ) as answer:
                assert next(answer.iter_content(4))

            assert endless.stopped.wait(PATIENCE_S)


# --- the code ---


@pytest.mark.parametrize("check", [["check", "mod.ts", "examples/"], ["fmt", "--check"], ["lint"]])
def test_the_client_is_typed_formatted_and_linted(check: list[str]) -> None:
    done = subprocess.run(
        [DENO, *check], cwd=ROOT / "clients/typescript", capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr


#: The payload that the application's `queue-job` builds, with its types.
QUEUE_PAYLOAD = """
  const payload = {
    id: row.id,
    type: request.job_type.replace("wan_video_", "video_"),
    prompt: request.prompt,
    user_id: row.user_id,
    config: { num_images: request.count <= 1 ? 1 : 3, seed: request.seed, resolution: "1024x1024" },
    metadata: { ...request.metadata, reference_type: request.metadata.reference_type || "style" },
    negative_prompt: request.copies ? undefined : request.negative_prompt,
    job_type: request.job_type,
    format: request.job_type.includes("image") ? "image" : "video",
  };
"""

ROW = "row: { id: string; user_id: string }"
REQUEST = (
    "request: { prompt: string; job_type: 'sdxl_image_fast' | 'wan_video_fast'; count: number; "
    "seed?: number; copies: boolean; negative_prompt?: string; metadata: any }"
)


USES = ("await client.submit(payload);", "await client.run(payload);", "familyOf(payload);")
MINIMAL_JOBS = ('{ prompt: "Hello World" }', '{ type: "video_fast", prompt: "Hello World" }')
WRONG_JOBS = (
    '{ type: "sdxl_image_fast", user_id: "u", prompt: 1 }',
    '{ type: "poem", user_id: "u" }',
    '{ type: "sdxl_image_fast", prompt: "a red sun", config: { num_images: "3" } }',
    "{ prompt: 1 }",
)


@pytest.fixture(scope="module")
def type_errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The messages of Deno's compiler for a function that makes each use or submits each job."""
    folder, client = tmp_path_factory.mktemp("callers"), ROOT / "clients/typescript/mod.ts"
    bodies = {use: f"{QUEUE_PAYLOAD}\n{use}" for use in USES}
    bodies |= {job: f"await client.submit({job});" for job in (*MINIMAL_JOBS, *WRONG_JOBS)}
    files = {key: folder / f"caller-{number}.ts" for number, key in enumerate(bodies)}
    for key, file in files.items():
        file.write_text(
            f'import {{ type Client, familyOf }} from "{client}";\n'
            f"export async function call(client: Client, {ROW}, {REQUEST}) {{{bodies[key]}}}\n"
            "export { familyOf };\n"
        )
    done = subprocess.run(
        [DENO, "check", *files.values()], capture_output=True, text=True, env=deno_environment()
    )
    messages = done.stderr.split("\n\n")
    return {
        key: "\n".join(each for each in messages if f"at {file.as_uri()}:" in each)
        for key, file in files.items()
    }


@pytest.mark.parametrize("use", USES)
def test_the_applications_payload_compiles_without_a_cast(
    type_errors: dict[str, str], use: str
) -> None:
    assert type_errors[use] == ""


@pytest.mark.parametrize("job", MINIMAL_JOBS)
def test_a_minimal_payload_compiles(type_errors: dict[str, str], job: str) -> None:
    assert type_errors[job] == ""


@pytest.mark.parametrize("job", WRONG_JOBS)
def test_a_wrong_job_whose_type_is_known_does_not_compile(
    type_errors: dict[str, str], job: str
) -> None:
    assert "TS2769" in type_errors[job]
