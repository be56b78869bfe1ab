"""The Python client against the platform and the real worker's loop."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.contract import FOLDER
from ourvidz_serverless import errors, jobs
from ourvidz_serverless.client import Client, SubmittedJob, read_outcome
from ourvidz_serverless.job_types import SYNONYMS
from ourvidz_serverless.net.retries import Fault, Retry
from tests.clients.streaming_platform import DOCUMENT, PIECES, StreamingPlatform
from tests.fakes.local_worker import chat_payload, sdxl_payload
from tests.servers.local_server import Answer
from tests.servers.runpod import Platform

#: Endpoints without workers: jobs stay in the queue.
EMPTY = {"sdxl": "pictures", "chat": "chats", "wan": "videos"}
QUICK = Retry(tries=4, base_s=0.01, max_s=0.05)


def client(platform: Platform, **changes: Any) -> Client:
    options: dict[str, Any] = {
        "endpoints": {"sdxl": "local", "chat": "local"},
        "api_key": platform.caller_key,
        "worker_key": "worker-key",
        "base_url": platform.caller_url,
        "policy": QUICK,
    }
    return Client(**{**options, **changes})


# --- routing ---


@pytest.mark.parametrize("name", [*jobs.FAMILY_OF, *SYNONYMS])
def test_a_job_type_goes_to_its_familys_endpoint(platform: Platform, name: str) -> None:
    job = client(platform, endpoints=EMPTY).submit(sdxl_payload(type=name))

    family = jobs.FAMILY_OF[SYNONYMS.get(name, name)]
    assert job.endpoint == platform.endpoint_of(job.id) == EMPTY.get(family, EMPTY["sdxl"])


def test_an_admin_job_goes_to_its_targets_endpoint(platform: Platform) -> None:
    payload = {"type": "admin_utilities", "config": {"target_worker": "wan_worker"}}

    assert client(platform, endpoints=EMPTY).submit(payload).endpoint == "videos"


def test_an_admin_job_may_have_its_target_outside_its_config(
    platform: Platform,
) -> None:
    payload = {"job_type": "admin_utilities", "target_worker": "chat_worker"}

    assert client(platform, endpoints=EMPTY).submit(payload).endpoint == "chats"


def test_an_admin_job_goes_to_a_family_that_has_an_endpoint(platform: Platform) -> None:
    endpoints = {"sdxl": "", "chat": "chats"}

    job = client(platform, endpoints=endpoints).submit({"type": "admin_utilities"})

    assert job.endpoint == "chats"


@pytest.mark.parametrize(
    ("name", "says"), [("video_fast", "no endpoint serves wan"), ("poem", "poem is no job type")]
)
def test_a_job_without_an_endpoint_raises_value_error(
    platform: Platform, name: str, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        client(platform).submit({"type": name})


def test_a_job_without_a_type_goes_to_the_only_family(platform: Platform) -> None:
    one = client(platform, endpoints={"wan": "videos", "admin": "chats", "sdxl": ""})

    assert one.submit({"prompt": "Hello World"}).endpoint == "videos"


def test_a_client_of_several_families_needs_a_type(platform: Platform) -> None:
    with pytest.raises(ValueError, match="type: needed by a client of several families"):
        client(platform, endpoints=EMPTY).submit({"prompt": "Hello World"})


def test_the_endpoint_with_the_shortest_queue_gets_the_job(platform: Platform) -> None:
    for _ in range(2):
        platform.submit(sdxl_payload(), endpoint="long")
    platform.submit(sdxl_payload(), endpoint="short")
    chooser = client(platform, endpoints={"sdxl": ["long", "short"]})

    chosen = [chooser.submit(sdxl_payload()).endpoint for _ in range(3)]

    # After the first job the queues are equal, and the first endpoint gets the job.
    assert chosen == ["short", "long", "short"]


@pytest.mark.usefixtures("worker")
def test_an_endpoint_with_workers_is_preferred_to_one_without(
    platform: Platform,
) -> None:
    platform.submit(sdxl_payload(), endpoint="deserted")
    chooser = client(platform, endpoints={"chat": ["deserted", "local"]})

    assert chooser.submit(chat_payload()).endpoint == "local"


def test_an_endpoint_that_does_not_answer_is_the_last_choice(platform: Platform) -> None:
    chooser = client(platform, endpoints={"sdxl": ["lost", "found"]})
    platform.script_path = "/lost/health"
    platform.script([404])

    chosen = chooser.submit(sdxl_payload()).endpoint

    platform.script_path = Platform.script_path
    assert chosen == "found"


# --- from job to document, by the real loop ---


@pytest.mark.usefixtures("worker")
def test_a_picture_is_submitted_and_its_document_returned(
    platform: Platform, outputs: Path
) -> None:
    document = client(platform).run(sdxl_payload(id="python-run"))

    assert (outputs / document["assets"][0]["url"]).exists()


@pytest.mark.usefixtures("worker")
def test_a_reply_comes_in_one_request(platform: Platform) -> None:
    assert client(platform).runsync(chat_payload())["usage"]["completion_tokens"] > 0


@pytest.mark.usefixtures("worker")
def test_a_reply_is_streamed_and_ends_with_its_document(platform: Platform) -> None:
    job = client(platform).submit(chat_payload(stream=True, max_tokens=300))

    assert "".join(job.stream()) == job.result()["response"]


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("way", ["run", "runsync"])
def test_a_failed_job_raises_the_workers_error(platform: Platform, way: str) -> None:
    payload = sdxl_payload(config={"num_images": 7})

    with pytest.raises(errors.InvalidPrompt, match=r"config\.num_images: Input should be less"):
        getattr(client(platform), way)(payload)


@pytest.mark.usefixtures("worker")
def test_a_wrong_key_of_the_workers_is_unauthorized(platform: Platform) -> None:
    with pytest.raises(errors.Unauthorized):
        client(platform, worker_key="another").run(chat_payload())


def test_a_job_is_found_and_cancelled_by_its_endpoint_and_id(platform: Platform) -> None:
    submitted = client(platform, endpoints=EMPTY).submit(chat_payload())
    again = client(platform).job(submitted.endpoint, submitted.id)

    before = again.status()
    again.cancel()

    assert before.status == "queued"
    assert isinstance(again.status().error, errors.Cancelled)
    with pytest.raises(errors.Cancelled):
        list(again.stream())


def test_a_job_that_outlasts_its_callers_time_is_reported_as_under_way(platform: Platform) -> None:
    submitted = client(platform, endpoints=EMPTY).submit(chat_payload())

    with pytest.raises(errors.DeadlinePassed, match=r"still under way after 0\.5 seconds"):
        submitted.result(timeout_s=0.5)


@pytest.mark.usefixtures("worker")
def test_health_is_returned_by_endpoint(platform: Platform) -> None:
    assert client(platform).health("chat")["local"]["workers"]["idle"] == 1


# --- tries ---


@pytest.mark.parametrize(
    "steps", [[429], [503, 502], ["reset"], [(429, {"Retry-After": "1"}), 500]]
)
def test_a_transient_failure_is_tried_again(scripted: Platform, steps: list[Any]) -> None:
    scripted.script(steps)

    job = client(scripted).submit(chat_payload())

    assert [queued["id"] for queued in scripted.queued()] == [job.id]


@pytest.mark.parametrize(("status", "tries"), [(400, 1), (401, 1), (503, 4), (429, 4)])
def test_a_failure_that_does_not_end_is_raised_after_its_tries(
    scripted: Platform, status: int, tries: int
) -> None:
    scripted.script([status] * 4)

    with pytest.raises(Fault) as fault:
        client(scripted).submit(chat_payload())

    assert fault.value.status == status
    assert len(scripted.script_left) == 4 - tries


def test_a_job_without_an_id_gets_one_before_it_is_sent(scripted: Platform) -> None:
    payload = chat_payload()
    del payload["id"]

    client(scripted).submit(payload)

    assert scripted.queued()[0]["input"]["id"]


# --- polls ---


@pytest.fixture
def streaming_platform() -> Iterator[StreamingPlatform]:
    with StreamingPlatform(hold=0.05) as server:
        yield server


def read_stream(job: SubmittedJob, **options: Any) -> tuple[list[str], Any]:
    """The pieces of a stream, and the document after its end."""
    return list(job.stream(**options)), job.result()


#: A proxy's answer that ends too soon, although its length is right.
TRUNCATED = Answer(200, b'{"id": "a", "status": "COMP', {"Content-Type": "application/json"})


@pytest.mark.parametrize(
    "steps",
    [["cut"], [TRUNCATED], [Answer(200, b"{}")], [Answer(200, b"[]")], [503] * 5],
    ids=["cut", "half a document", "empty", "a list", "an outage longer than a request's tries"],
)
def test_a_job_is_polled_again_after_an_answer_that_failed(
    streaming_platform: StreamingPlatform, steps: list[Any]
) -> None:
    job = client(streaming_platform).job("local", streaming_platform.completed_job())
    streaming_platform.script_path = "/status/"
    streaming_platform.script(steps)

    assert job.result() == DOCUMENT
    assert streaming_platform.script_left == []


def test_a_poll_that_is_refused_is_not_tried_again(streaming_platform: StreamingPlatform) -> None:
    with pytest.raises(Fault, match="HTTP 404"):
        client(streaming_platform).job("local", "forgotten").result()


def test_the_stream_of_a_job_that_waits_in_its_queue_ends_when_the_time_is_over(
    streaming_platform: StreamingPlatform,
) -> None:
    job = client(streaming_platform).submit(chat_payload())

    with pytest.raises(errors.DeadlinePassed, match=r"still under way after 0\.05 seconds"):
        read_stream(job, timeout_s=0.05)


def test_a_platform_that_does_not_answer_until_the_time_is_over_is_reported(
    streaming_platform: StreamingPlatform,
) -> None:
    job = client(streaming_platform).job("local", streaming_platform.completed_job())
    streaming_platform.script_path = "/status/"
    streaming_platform.script([503] * 9)

    with pytest.raises(Fault, match="HTTP 503"):
        job.result(timeout_s=0.05)


def test_without_a_lost_answer_a_stream_has_the_pieces_of_the_reply(
    streaming_platform: StreamingPlatform,
) -> None:
    job = client(streaming_platform).job("local", streaming_platform.completed_job())

    assert read_stream(job) == (PIECES, DOCUMENT)


def test_the_pieces_of_a_lost_answer_come_at_the_end_of_the_stream(
    streaming_platform: StreamingPlatform,
) -> None:
    job = client(streaming_platform).job("local", streaming_platform.completed_job())
    streaming_platform.script_path = "/stream/"
    streaming_platform.script([200, "cut"])

    assert read_stream(job) == ([PIECES[0], "".join(PIECES[1:])], DOCUMENT)


@pytest.mark.parametrize(("way", "wait"), [("run", "timeout_s"), ("runsync", "wait_s")])
def test_a_jobs_own_bucket_is_sent_as_s3_config(scripted: Platform, way: str, wait: str) -> None:
    bucket = {
        "accessId": "a",
        "accessSecret": "s",
        "bucketName": "b",
        "endpointUrl": "https://s3.test",
    }

    with pytest.raises(errors.DeadlinePassed):
        getattr(client(scripted), way)(chat_payload(), s3_config=bucket, **{wait: 0.001})

    assert scripted.queued()[0]["s3Config"] == bucket


# --- reading answers ---


@pytest.mark.parametrize("name", ["completed", "chat"])
@pytest.mark.parametrize("as_list", [True, False])
def test_the_example_results_of_the_contract_are_read(name: str, as_list: bool) -> None:
    document = json.loads((FOLDER / f"examples/result.{name}.json").read_text())
    output = [{"delta": "Rain"}, document] if as_list else document

    outcome = read_outcome({"id": "a", "status": "COMPLETED", "output": output})

    assert (outcome.status, outcome.document, outcome.error) == ("completed", document, None)


@pytest.mark.parametrize("error", errors.JobError.__subclasses__(), ids=lambda error: error.code)
def test_every_error_code_becomes_its_class(error: type[errors.JobError]) -> None:
    text = json.dumps({"code": error.code, "message": "why", "retryable": error.retryable})

    outcome = read_outcome({"id": "a", "status": "FAILED", "error": text})

    assert type(outcome.error) is error


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"status": "FAILED", "error": "the worker died"}, errors.InternalError),
        ({"status": "FAILED", "error": '"text"'}, errors.InternalError),
        ({"status": "COMPLETED"}, errors.InternalError),
        ({"status": "COMPLETED", "output": []}, errors.InternalError),
        ({"status": "TIMED_OUT"}, errors.DeadlinePassed),
        ({"status": "CANCELLED"}, errors.Cancelled),
    ],
)
def test_every_failed_status_of_the_platform_is_an_error(
    answer: dict[str, Any], error: type[errors.JobError]
) -> None:
    assert type(read_outcome(answer).error) is error
