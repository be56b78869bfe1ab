"""One trace for each job: its spans, whose trace it continues, and what it does not hold."""

import json
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest

from ourvidz_serverless.delivery.callback import Callback
from tests.fakes.fake_chat import FakeChat
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import LocalWorker, chat_payload, sdxl_payload, wan_payload
from tests.patience import PATIENCE_S, start, wait_until
from tests.servers.collector import Collector, Span
from tests.servers.supabase import CallbackReceiver

Observe = Callable[..., LocalWorker]

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


def spans_of(at: LocalWorker, collector: Collector, payload: Any, **top: Any) -> list[Span]:
    """The spans of one job."""
    at.run(payload, **top)
    at.worker.flush()
    return collector.spans()


def parents(spans: list[Span]) -> set[tuple[str, str]]:
    """Each span's name, and its parent's; an empty name is a parent outside."""
    names = {span.id: span.name for span in spans}
    return {(span.name, names.get(span.parent_id, "")) for span in spans}


def test_a_picture_is_one_trace_with_a_span_for_each_part(
    observed: Observe, collector: Collector, receiver: CallbackReceiver, sdxl: Any
) -> None:
    at = observed(models={"sdxl": sdxl}, callback=Callback(receiver.callback_url, receiver.secret))

    spans = spans_of(at, collector, sdxl_payload())

    assert parents(spans) == {
        ("job", ""),
        *((part, "job") for part in ("admit", "wait", "fetch", "generate", "deliver")),
        ("decode", "generate"),
        *((part, "job") for part in ("upload", "callback")),
    }
    assert len({span.trace_id for span in spans}) == 1
    (job,) = collector.spans("job")
    assert all(job.began <= span.began <= span.ended <= job.ended for span in spans)


def test_a_videos_decoding_is_one_span(observed: Observe, collector: Collector, wan: Any) -> None:
    at = observed({"families": "wan"}, models={"wan": wan})

    spans_of(at, collector, wan_payload())

    (decode,), (generate,) = collector.spans("decode"), collector.spans("generate")
    assert decode.parent_id == generate.id


def test_a_jobs_span_says_what_was_made(observed: Observe, collector: Collector) -> None:
    at = observed({"gpu_price_per_second": 0.5})

    document = at.run(sdxl_payload(config={"num_images": 3, "resolution": "64x128"}))
    at.worker.flush()

    (job,) = collector.spans("job")
    sizes = [asset.metadata["file_size_bytes"] for asset in document.assets]
    assert job.facts == {
        "ourvidz.job.id": "job-1",
        "ourvidz.job.type": "sdxl_image_fast",
        "ourvidz.job.status": "completed",
        "ourvidz.family": "sdxl",
        "ourvidz.model": "pocket",
        "ourvidz.width": 64,
        "ourvidz.height": 128,
        "ourvidz.steps": 10,
        "ourvidz.format": "png",
        "ourvidz.assets": 3,
        "ourvidz.bytes": sum(sizes),
        "ourvidz.warnings": 0,
        "ourvidz.cost": document.metadata["cost"],
    }


def test_a_chats_span_says_its_model_and_its_tokens(
    observed: Observe, collector: Collector
) -> None:
    at = observed({"families": "chat"}, models={"chat": FakeChat("Water.")})

    (job, *_) = spans_of(at, collector, chat_payload())

    assert job.facts["ourvidz.model"] == "qwen_instruct"
    assert {"ourvidz.prompt_tokens", "ourvidz.completion_tokens"} <= job.facts.keys()


def test_the_resource_names_the_worker(observed: Observe, collector: Collector) -> None:
    spans_of(observed(), collector, None)

    assert collector.resource["service.name"] == "ourvidz_serverless"
    assert collector.resource["service.instance.id"] == "worker-1"


def test_the_environment_names_the_service(
    observed: Observe, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=staging")

    spans_of(observed(), collector, None)

    assert collector.resource["service.name"] == "pictures"
    assert collector.resource["deployment.environment.name"] == "staging"


# --- failures ---


@pytest.mark.parametrize(
    ("payload", "span", "code"),
    [
        (sdxl_payload(prompt="nude child"), "admit", "CONTENT_REFUSED"),
        ({"type": "no such type", "user_id": "user-1"}, "admit", "INVALID_PROMPT"),
        (
            sdxl_payload(
                config={"reference_required": True},
                metadata={"reference_image_url": "user-library/other/a.png"},
            ),
            "fetch",
            "REFERENCE_FRAME_ERROR",
        ),
    ],
)
def test_the_span_of_a_failure_has_its_code(
    observed: Observe, collector: Collector, payload: Any, span: str, code: str
) -> None:
    spans_of(observed(), collector, payload)

    failed = {span.name: span.facts["error.type"] for span in collector.spans() if span.is_error}
    assert failed == {"job": code, span: code}


def test_a_job_of_no_known_type_is_unknown(observed: Observe, collector: Collector) -> None:
    (job, *_) = spans_of(observed(), collector, {"type": "a zebra's type"})

    assert job.facts["ourvidz.job.type"] == "unknown"


def test_nothing_that_a_caller_wrote_leaves(
    observed: Observe, collector: Collector, receiver: CallbackReceiver
) -> None:
    callback = Callback(None, receiver.secret, allowed_hosts=("127.0.0.1",))
    at = observed(
        {"families": "sdxl,chat", "worker_api_key": ("zebra-key",)},
        models={"sdxl": FakeSdxl(), "chat": FakeChat("a zebra")},
        callback=callback,
    )
    own = {
        "user_id": "zebra-user",
        "api_key": "zebra-key",
        "callback_url": f"{receiver.callback_url}?zebra=1",
    }
    at.run(
        sdxl_payload(
            prompt="a zebra",
            negative_prompt="no zebra",
            metadata={"reference_image_url": "https://127.0.0.1/zebra?zebra", "zebra": "zebra"},
            **own,
        )
    )
    at.run(sdxl_payload(config={"scheduler": "zebra"}, **own))
    at.run(sdxl_payload(**{**own, "api_key": "another zebra"}))
    messages = [
        {"role": "system", "content": "a zebra"},
        {"role": "user", "content": "Is that a zebra?"},
    ]
    at.run(chat_payload(messages=messages, **own))

    at.worker.flush()

    assert len(collector.spans("job")) == 4
    assert len(receiver.received) == 3
    assert "zebra" not in collector.text


# --- the caller's trace ---


def test_a_job_continues_the_trace_that_its_payload_names(
    observed: Observe, collector: Collector
) -> None:
    payload = sdxl_payload(metadata={"traceparent": TRACEPARENT})

    (job, *_) = spans_of(observed(), collector, payload)

    assert (job.trace_id, job.parent_id) == (TRACE, PARENT)


@pytest.mark.parametrize(
    "traceparent",
    [
        *("", "zebra", TRACE, f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01"),
        *(f"ff-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}", TRACEPARENT.upper(), 7, ["a"], None),
    ],
)
def test_a_job_with_an_invalid_parent_has_a_trace_of_its_own(
    observed: Observe, collector: Collector, traceparent: Any
) -> None:
    at = observed()

    (job, *_) = spans_of(at, collector, sdxl_payload(metadata={"traceparent": traceparent}))

    assert job.facts["ourvidz.job.status"] == "completed"
    assert job.trace_id != TRACE
    assert job.parent_id == ""


def test_the_callback_continues_the_jobs_trace(
    observed: Observe, collector: Collector, receiver: CallbackReceiver
) -> None:
    at = observed(
        {"callback_processing": True}, callback=Callback(receiver.callback_url, receiver.secret)
    )

    spans_of(at, collector, sdxl_payload(metadata={"traceparent": TRACEPARENT}))

    sent = [each.headers["traceparent"] for each in receiver.received]
    posts = collector.spans("callback")
    assert [post.facts["ourvidz.status"] for post in posts] == ["processing", "completed"]
    assert sent == [f"00-{TRACE}-{post.id}-01" for post in posts]


def test_a_job_that_is_not_sampled_is_not_sent(observed: Observe, collector: Collector) -> None:
    payload = sdxl_payload(metadata={"traceparent": TRACEPARENT.removesuffix("01") + "00"})

    assert spans_of(observed(), collector, payload) == []


def test_a_second_delivery_of_a_running_job_adds_no_trace(
    observed: Observe, collector: Collector
) -> None:
    at = observed()
    at.fake_sdxl.hold()
    first = start(at.run)
    wait_until(at.fake_sdxl.at_step.is_set)
    second = start(at.run)
    at.fake_sdxl.go_on.set()

    documents = [each.result(PATIENCE_S) for each in (first, second)]
    at.worker.flush()

    assert [document.status for document in documents] == ["completed", "completed"]
    assert len(collector.spans("job")) == len(at.fake_sdxl.requests)


def test_the_audit_line_has_the_id_of_the_trace(
    observed: Observe, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ourvidz.audit")

    (job, *_) = spans_of(observed(), collector, None)

    (line,) = [each.message for each in caplog.records if each.name == "ourvidz.audit"]
    assert json.loads(line)["trace_id"] == job.trace_id


def test_traces_differ_though_a_library_seeds_random_numbers(
    observed: Observe, collector: Collector
) -> None:
    at = observed()
    for number in range(3):
        random.seed(7)
        at.run(sdxl_payload(id=f"job-{number}"))

    at.worker.flush()

    assert len({span.trace_id for span in collector.spans()}) == 3
    assert len({span.id for span in collector.spans()}) == len(collector.spans())
