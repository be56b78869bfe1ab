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
from ourvidz_serverless.delivery.callback import signatures, webhook_id
from ourvidz_serverless.settings import Settings
from tests.clients.spoken import DOCUMENT, PIECES, Spoken
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

#: Endpoints at which nobody works: what is submitted there stays in the queue.
EMPTY = {"sdxl": "pictures", "chat": "talk", "wan": "films"}
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

    said = call("deno", "submit", client=caller(platform, endpoints=EMPTY), job=payload)

    family = jobs.FAMILY_OF[name]
    assert said["value"]["endpoint"] == EMPTY.get(family, EMPTY["sdxl"])
    queued = platform.queued(said["value"]["endpoint"])[-1]
    assert queued["id"] == said["value"]["id"]
    assert queued["input"] == {**payload, "api_key": "worker-key"}


@pytest.mark.parametrize("field", ["type", "job_type"])
@pytest.mark.parametrize("name", jobs.SYNONYMS)
def test_the_applications_own_names_are_known(platform: Platform, name: str, field: str) -> None:
    job = {"id": "named", field: name}

    said = call("deno", "submit", client=caller(platform, endpoints=EMPTY), job=job)

    assert said["value"]["endpoint"] == "films"


def test_node_routes_likewise(platform: Platform) -> None:
    job = chat_payload()

    said = call("node", "submit", client=caller(platform, endpoints=EMPTY), job=job)

    assert said["value"]["endpoint"] == "talk"


def test_an_administrators_job_goes_where_it_is_about(platform: Platform) -> None:
    job = {
        "type": "admin_utilities",
        "config": {"operation": "health", "target_worker": "wan_worker"},
    }

    said = call("deno", "submit", client=caller(platform, endpoints=EMPTY), job=job)

    assert said["value"]["endpoint"] == "films"


def test_an_administrators_job_is_known_by_either_field_of_its_type(platform: Platform) -> None:
    job = {"job_type": "admin_utilities", "target_worker": "chat_worker"}

    said = call("deno", "submit", client=caller(platform, endpoints=EMPTY), job=job)

    assert said["value"]["endpoint"] == "talk"


def test_an_empty_type_leaves_the_word_to_the_other_field(platform: Platform) -> None:
    job = {"id": "", "job_id": "named", "type": "", "job_type": "video_fast"}

    said = call("deno", "submit", client=caller(platform, endpoints=EMPTY), job=job)

    assert said["value"]["endpoint"] == "films"
    assert platform.queued("films")[-1]["input"]["id"] == "named"


def test_an_administrators_job_goes_to_a_family_that_has_an_endpoint(platform: Platform) -> None:
    job = {"type": "admin_utilities", "config": {"operation": "health"}}

    client = caller(platform, endpoints={"sdxl": "", "chat": "talk"})

    assert call("deno", "submit", client=client, job=job)["value"]["endpoint"] == "talk"


def test_a_family_without_an_endpoint_is_the_callers_mistake(
    platform: Platform, runtime: str
) -> None:
    said = call(runtime, "submit", client=caller(platform), job={"type": "video_fast"})

    assert said["error"]["message"] == "no endpoint serves wan"


def test_of_several_endpoints_the_one_with_the_least_to_do_is_chosen(
    platform: Platform, runtime: str
) -> None:
    busy, free = f"busy-{runtime}", f"free-{runtime}"
    for _ in range(3):
        platform.submit(sdxl_payload(), endpoint=busy)
    platform.submit(sdxl_payload(), endpoint=free)

    endpoints = {"sdxl": [busy, free]}
    said = call(runtime, "submit", client=caller(platform, endpoints=endpoints), job=sdxl_payload())

    assert said["value"]["endpoint"] == free


# --- from job to result, by the real loop ---


@pytest.mark.usefixtures("worker")
def test_a_picture_is_waited_for(platform: Platform, runtime: str, outputs: Path) -> None:
    said = call(runtime, "run", client=caller(platform), job=sdxl_payload(id=f"run-{runtime}"))

    (asset,) = said["value"]["assets"]
    assert (outputs / asset["url"]).exists()


@pytest.mark.usefixtures("worker")
def test_a_reply_comes_in_one_request(platform: Platform, runtime: str) -> None:
    said = call(runtime, "runsync", client=caller(platform), job=chat_payload())

    assert said["value"]["usage"]["completion_tokens"] > 0


@pytest.mark.usefixtures("worker")
def test_a_reply_is_streamed_and_ends_with_its_result(platform: Platform, runtime: str) -> None:
    job = chat_payload(id=f"stream-{runtime}", stream=True, max_tokens=400)

    said = call(runtime, "stream", client=caller(platform), job=job)

    assert "".join(said["value"]["pieces"]) == said["value"]["result"]["response"]
    assert len(said["value"]["pieces"]) > 0


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("action", ["run", "runsync", "stream"])
def test_a_job_that_fails_throws_its_failure(platform: Platform, runtime: str, action: str) -> None:
    job = sdxl_payload(id="fails", config={"num_images": 2})

    error = call(runtime, action, client=caller(platform), job=job)["error"]

    assert error["name"] == "JobFailed"
    assert error["failure"] == {
        "code": "INVALID_PROMPT",
        "message": "config.num_images: Input should be 1, 3 or 6",
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
def test_another_process_can_ask_on_and_cancel(platform: Platform, runtime: str) -> None:
    job = platform.submit(chat_payload(id=f"cancel-{runtime}"), endpoint="nobody")
    name = {"endpoint": "nobody", "id": job}

    before = call(runtime, "status", client=caller(platform), name=name)["value"]
    call(runtime, "cancel", client=caller(platform), name=name)
    after = call(runtime, "status", client=caller(platform), name=name)["value"]

    assert before == {"done": False, "status": "IN_QUEUE"}
    assert (after["ok"], after["failure"]["code"]) == (False, "CANCELLED")


@pytest.mark.usefixtures("worker")
def test_health_is_told_by_endpoint(platform: Platform, runtime: str) -> None:
    said = call(runtime, "health", client=caller(platform), family="chat")

    assert said["value"]["local"]["workers"]["idle"] == 1


#: What the application may ask for, as the contract has it.
TYPES = {path.name.removesuffix(".schema.json") for path in FOLDER.glob("jobs/*.schema.json")}
PAYLOADS = {"sdxl": sdxl_payload, "chat": chat_payload, "wan": wan_payload}

#: What each comes to, by its name's first word.
MAKES = {
    **{name: ["image"] for name in ("sdxl", "image", "image7b")},
    **{name: ["video"] for name in ("video", "video7b")},
    "chat": ["text"],
    "admin": [],
}


def small_job(name: str) -> dict[str, Any]:
    """A job of this type that a model of a few weights does in a moment."""
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

    said = call("deno", "runAll", client=everywhere, jobs=[small_job(name) for name in names])

    results = dict(zip(names, said["value"], strict=True))
    assert set(results) == set(jobs.FAMILY_OF) and len(results) == 14
    for name, result in results.items():
        Validator(json.loads((FOLDER / "result.schema.json").read_text())).validate(result)
        assert [asset["type"] for asset in result["assets"]] == MAKES[name.split("_")[0]]
        for asset in result["assets"]:
            assert asset["type"] == "text" or (outputs / asset["url"]).stat().st_size > 0


# --- trying again ---


@pytest.mark.parametrize(
    "steps", [[429], [503, 502], ["reset"], [(429, {"Retry-After": "1"}), 500]]
)
def test_what_may_pass_is_tried_again(shaky: Platform, runtime: str, steps: list[Any]) -> None:
    shaky.script(steps)

    said = call(runtime, "submit", client=caller(shaky), job=chat_payload())

    assert [job["id"] for job in shaky.queued()] == [said["value"]["id"]]


def test_retry_after_is_waited_for(shaky: Platform, runtime: str) -> None:
    shaky.script([(429, {"Retry-After": "2"})])
    client = caller(shaky, retry={**QUICK, "maxMs": 10_000})

    began = time.monotonic()
    call(runtime, "submit", client=client, job=chat_payload())

    assert time.monotonic() - began >= 2


@pytest.mark.parametrize(("status", "tries"), [(400, 1), (404, 1), (503, 4), (429, 4)])
def test_what_does_not_pass_is_given_up(
    shaky: Platform, runtime: str, status: int, tries: int
) -> None:
    shaky.script([status] * 4)

    error = call(runtime, "submit", client=caller(shaky), job=chat_payload())["error"]

    assert (error["name"], error["status"]) == ("RequestFailed", status)
    assert len(shaky.script_left) == 4 - tries


def test_a_job_whose_answer_was_lost_is_sent_again_under_the_same_id(
    shaky: Platform, runtime: str
) -> None:
    shaky.slow_seconds = 3
    shaky.script(["slow"])
    job = chat_payload()
    del job["id"]

    call(runtime, "submit", client=caller(shaky, timeoutMs=1500), job=job)

    first, second = shaky.queued()
    assert first["input"]["id"] == second["input"]["id"]


def test_a_job_whose_answer_was_cut_is_sent_again_under_the_same_id(
    shaky: Platform, runtime: str
) -> None:
    shaky.script(["cut"])
    job = chat_payload()
    del job["id"]

    said = call(runtime, "submit", client=caller(shaky), job=job)

    first, second = shaky.queued()
    assert first["input"]["id"] == second["input"]["id"]
    assert said["value"]["id"] == second["id"]


def test_a_refusal_whose_text_was_cut_is_still_a_refusal(shaky: Platform, runtime: str) -> None:
    shaky.script([Answer(400, b'{"error": "no input"}', cut_at=12)])

    error = call(runtime, "submit", client=caller(shaky), job=chat_payload())["error"]

    assert (error["name"], error["status"], shaky.queued()) == ("RequestFailed", 400, [])


# --- asking for a job ---


@pytest.fixture
def spoken() -> Iterator[Spoken]:
    with Spoken(hold=0.05) as server:
        yield server


def name_of(job: str) -> dict[str, str]:
    return {"endpoint": "local", "id": job}


#: A proxy's answer that ends too soon, though its length is right.
HALF = Answer(200, b'{"id": "a", "status": "COMP', {"Content-Type": "application/json"})


@pytest.mark.parametrize(
    "steps",
    [["cut"], [HALF], [Answer(200, b"{}")], [503] * 5],
    ids=["cut", "half a document", "an empty document", "an outage longer than a request's tries"],
)
def test_a_job_is_asked_for_again_after_an_answer_that_is_none(
    spoken: Spoken, runtime: str, steps: list[Any]
) -> None:
    job = spoken.done()
    spoken.script_path = "/status/"
    spoken.script(steps)

    said = call(runtime, "result", client=caller(spoken), name=name_of(job))

    assert said["value"] == DOCUMENT
    assert spoken.script_left == []


def test_a_job_that_nobody_may_ask_for_is_given_up(spoken: Spoken, runtime: str) -> None:
    said = call(runtime, "result", client=caller(spoken), name=name_of("forgotten"))

    assert (said["error"]["name"], said["error"]["status"]) == ("RequestFailed", 404)


@pytest.mark.parametrize("action", ["result", "streamOn"])
def test_a_job_that_waits_in_its_queue_is_under_way_when_the_time_is_over(
    spoken: Spoken, runtime: str, action: str
) -> None:
    job = spoken.submit(chat_payload())

    error = call(runtime, action, client=caller(spoken), name=name_of(job), timeoutMs=50)["error"]

    assert error["message"] == "the job is still under way after 50 ms"
    assert error["failure"]["code"] == "TIMEOUT_ERROR"


@pytest.mark.parametrize("action", ["result", "streamOn"])
def test_a_platform_that_does_not_answer_till_the_time_is_over_is_told(
    spoken: Spoken, action: str
) -> None:
    job = spoken.done()
    spoken.script_path = f"/{job}"
    spoken.script([503] * 9)

    error = call("deno", action, client=caller(spoken), name=name_of(job), timeoutMs=50)["error"]

    assert (error["name"], error["status"]) == ("RequestFailed", 503)


@pytest.mark.parametrize("step", [200, 429], ids=["none", "one that the platform refused"])
def test_without_a_lost_answer_a_stream_is_told_as_it_was_spoken(
    spoken: Spoken, runtime: str, step: int
) -> None:
    job = spoken.done()
    spoken.script_path = "/stream/"
    spoken.script([step])

    said = call(runtime, "streamOn", client=caller(spoken), name=name_of(job))

    assert said["value"] == {"pieces": PIECES, "result": DOCUMENT}


def test_the_pieces_of_an_answer_that_was_cut_come_at_the_streams_end(
    spoken: Spoken, runtime: str
) -> None:
    job = spoken.done()
    spoken.script_path = "/stream/"
    spoken.script([200, "cut"])

    said = call(runtime, "streamOn", client=caller(spoken), name=name_of(job))

    assert said["value"] == {
        "pieces": [PIECES[0], "".join(PIECES[1:])],
        "result": DOCUMENT,
    }


BUCKET = {"accessId": "a", "accessSecret": "s", "bucketName": "b", "endpointUrl": "https://s3.test"}


@pytest.mark.parametrize(
    ("action", "wait"), [("run", {"timeoutMs": 1}), ("runsync", {"waitMs": 1})]
)
def test_a_bucket_of_the_jobs_own_goes_beside_its_input(
    shaky: Platform, runtime: str, action: str, wait: dict[str, int]
) -> None:
    call(runtime, action, client=caller(shaky), job=chat_payload(), s3Config=BUCKET, **wait)

    assert shaky.queued()[0]["s3Config"] == BUCKET


# --- reading answers ---


@pytest.mark.parametrize("name", ["completed", "chat"])
@pytest.mark.parametrize("as_list", [True, False])
def test_the_contracts_results_are_read(runtime: str, name: str, as_list: bool) -> None:
    document = json.loads((FOLDER / f"examples/result.{name}.json").read_text())
    output = [{"delta": "Rain"}, document] if as_list else document

    said = call(runtime, "parse", answer={"id": "a", "status": "COMPLETED", "output": output})

    assert said["value"] == {"done": True, "ok": True, "result": document}


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
def test_every_way_to_end_badly_is_a_failure(
    answer: dict[str, Any], code: str, retryable: bool
) -> None:
    outcome = call("deno", "parse", answer={"id": "a", **answer})["value"]

    assert (outcome["done"], outcome["ok"]) == (True, False)
    assert (outcome["failure"]["code"], outcome["failure"]["retryable"]) == (code, retryable)


def test_progress_is_told(runtime: str) -> None:
    output = {"stage": "generate", "step": 3, "steps": 10, "progress": 0.3}

    said = call(runtime, "parse", answer={"id": "a", "status": "IN_PROGRESS", "output": output})

    assert said["value"] == {"done": False, "status": "IN_PROGRESS", "progress": output}


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
def test_a_callback_that_is_signed_is_read(runtime: str, sign: Sign, secret: str) -> None:
    said = call(runtime, "verify", headers=sign(), body=BODY, secret=secret)

    assert said["value"] == json.loads(BODY)


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
def test_a_callback_that_is_not_is_thrown_out(sign: Sign, body: str, secret: str) -> None:
    said = call("deno", "verify", headers=sign(), body=body, secret=secret)

    assert said["error"]["name"] == "BadSignature"


def test_a_recorded_callback_without_its_webhook_headers_is_thrown_out(runtime: str) -> None:
    said = call(runtime, "verify", headers=signed(**NO_TRIO), body=BODY, secret=SECRET)

    assert said["error"]["name"] == "BadSignature"


OLD_SENDERS = {"requireWebhook": False}


def test_a_callback_of_an_old_sender_is_read_where_the_receiver_says_so(runtime: str) -> None:
    said = call(
        runtime, "verify", headers=signed(**NO_TRIO), body=BODY, secret=SECRET, options=OLD_SENDERS
    )

    assert said["value"] == json.loads(BODY)


@pytest.mark.parametrize(
    "sign",
    [
        lambda: signed(age_s=301),
        lambda: signed(**{"webhook-timestamp": None}),
        lambda: signed(**{**NO_TRIO, "X-Callback-Signature": None}),
    ],
    ids=["too old", "a part of the three", "not signed at all"],
)
def test_where_old_senders_are_taken_what_is_there_must_hold(sign: Sign) -> None:
    said = call("deno", "verify", headers=sign(), body=BODY, secret=SECRET, options=OLD_SENDERS)

    assert said["error"]["name"] == "BadSignature"


# --- the HTTP service ---


def chat_service(tmp_path: Path, model: Any) -> ServedHttp:
    settings = Settings(families=("chat",), worker_api_key="worker-key")
    return ServedHttp(
        settings, LocalWorker(tmp_path, settings=settings, models={"chat": model}).worker
    )


def at(service: ServedHttp, key: str = "worker-key") -> dict[str, str]:
    return {"url": service.url, "apiKey": "of-the-gateway", "workerKey": key}


CALL = {"messages": [{"role": "user", "content": "What is rain?"}]}


@pytest.mark.parametrize(
    ("method", "field"),
    [("chat", "response"), ("chatUnrestricted", "response"), ("enhance", "enhanced_prompt")],
)
def test_a_reply_over_http(tmp_path: Path, runtime: str, method: str, field: str) -> None:
    with chat_service(tmp_path, FakeChat("Water ", "that falls.")) as service:
        said = call(runtime, "reply", service=at(service), method=method, call=CALL)

    assert said["value"][field] == "Water that falls."


def test_a_streamed_reply_over_http(tmp_path: Path, runtime: str) -> None:
    with chat_service(tmp_path, FakeChat("Wätér ", "that falls.")) as service:
        said = call(runtime, "streamReply", service=at(service), call=CALL)

    assert "".join(said["value"]["pieces"]) == "Wätér that falls."
    assert said["value"]["result"]["response"] == "Wätér that falls."


def test_a_refusal_over_http_is_its_text(tmp_path: Path, runtime: str) -> None:
    with chat_service(tmp_path, FakeChat()) as service:
        error = call(runtime, "reply", service=at(service, "wrong"), method="chat", call=CALL)[
            "error"
        ]

    assert (error["name"], error["status"]) == ("RequestFailed", 401)
    assert error["message"].startswith("api_key: ")


class Cutting(LocalServer):
    """A chat worker whose connection breaks in the middle of each answer."""

    def answer(self, request: Request) -> Answer:
        body = b'data: {"delta": "Rain"}\n\ndata: {"delta": "falls"}\n\n'
        return Answer(200, body, cut_at=30)


@pytest.mark.parametrize(
    ("action", "message"),
    [("reply", "no whole answer"), ("streamReply", "the stream broke off")],
)
def test_a_reply_over_http_that_breaks_off_is_a_request_that_failed(
    runtime: str, action: str, message: str
) -> None:
    with Cutting() as worker:
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
        sdxl_payload(id="told-picture", api_key="worker-key"),
        chat_payload(id="told-reply", api_key="worker-key"),
        sdxl_payload(id="told-refusal", api_key="worker-key", config={"num_images": 2}),
    ):
        platform.result(platform.submit(payload), 60)

    log = receiver.wait_for_log('"told-refusal"')
    lines = [json.loads(line) for line in log.splitlines() if line.startswith('{"job":"told')]
    picture = {"job": "told-picture", "type": "image", "url": "user-1/told-picture/0.png"}
    assert picture.items() <= lines[0].items()
    assert (lines[1]["job"], lines[1]["type"]) == ("told-reply", "text")
    assert lines[2] == {
        "job": "told-refusal",
        "failed": "config.num_images: Input should be 1, 3 or 6",
    }


@pytest.mark.parametrize(
    "sign",
    [lambda: signed("a guess"), lambda: signed(**NO_TRIO)],
    ids=["forged", "recorded, and sent again without its time"],
)
def test_an_edge_function_turns_a_callback_away(receiver: WorkerProcess, sign: Sign) -> None:
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
            url_of(function), json=sdxl_payload(id="asked"), timeout=PATIENCE_S
        ).json()
        unknown = requests.post(url_of(function), json={"type": "poem"}, timeout=PATIENCE_S)

    assert (answer["jobId"], answer["status"]) == ("asked", "queued")
    result = platform.result(answer["runpod"]["id"], 60)["output"][-1]
    assert result["assets"][0]["url"] == "user-1/asked/0.png"
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


def test_who_leaves_a_streaming_edge_function_stops_the_model(tmp_path: Path) -> None:
    endless = EndlessChat()
    with chat_service(tmp_path, endless) as service:
        env = {"CHAT_WORKER_URL": service.url, "WORKER_API_KEY": "worker-key"}
        with edge_function("chat", **env) as function:
            call_on = {**CALL, "stream": True}
            with requests.post(
                url_of(function), json=call_on, stream=True, timeout=PATIENCE_S
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


#: What `queue-job` of the application builds, as its compiler knows it.
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


def type_errors(folder: Path, body: str) -> str:
    """What Deno's compiler says of a function that has a client."""
    file = folder / "caller.ts"
    client = ROOT / "clients/typescript/mod.ts"
    file.write_text(
        f'import {{ type Client, familyOf }} from "{client}";\n'
        f"export async function call(client: Client, {ROW}, {REQUEST}) {{{body}}}\n"
        "export { familyOf };\n"
    )
    done = subprocess.run(
        [DENO, "check", file], capture_output=True, text=True, env=deno_environment()
    )
    return "" if done.returncode == 0 else done.stderr


@pytest.mark.parametrize(
    "use", ["await client.submit(payload);", "await client.run(payload);", "familyOf(payload);"]
)
def test_the_applications_payload_is_taken_without_a_cast(tmp_path: Path, use: str) -> None:
    assert type_errors(tmp_path, f"{QUEUE_PAYLOAD}\n{use}") == ""


@pytest.mark.parametrize(
    "job",
    [
        '{ type: "sdxl_image_fast", user_id: "u", prompt: 1 }',
        '{ type: "poem", user_id: "u" }',
        '{ type: "sdxl_image_fast", prompt: "a red circle" }',
    ],
)
def test_a_job_whose_type_is_known_is_checked(tmp_path: Path, job: str) -> None:
    assert "TS2769" in type_errors(tmp_path, f"await client.submit({job});")
