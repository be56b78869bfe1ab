"""OpenAI's calls in RunPod's handlers: their keys, their places, and what comes of them."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from ourvidz_serverless.serving import runpod_queue
from ourvidz_serverless.serving.job_output import Arrival
from ourvidz_serverless.serving.openai.served import Served
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_chat import FakeChat
from tests.fakes.local_worker import LocalWorker, chat_payload

KEY = "hush-hush"
RAIN = {"messages": [{"role": "user", "content": "What is rain?"}]}


def event(route: str, body: Any) -> dict[str, Any]:
    return {"id": "rp-1", "input": {"openai_route": route, "openai_input": body}}


def picture(**body: Any) -> dict[str, Any]:
    return event("/v1/images/generations", {"prompt": "a circle", "size": "64x64", **body})


def arrival(settings: Settings, given: dict[str, Any]) -> Arrival:
    return Arrival.of(given, settings, Served.of(settings))


def error_of(item: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(item["error"])
    return found


def test_a_handler_without_streams_gives_back_the_body_of_the_answer(local: Any) -> None:
    made: LocalWorker = local()
    handler = runpod_queue.make_handler(made.worker, made.settings)

    answer = asyncio.run(handler(picture(seed=7)))

    assert answer["data"][0]["seed"] == 7
    assert json.loads(json.dumps(answer)) == answer


@pytest.mark.parametrize("body", [{"n": 9}, {"stream": True}])
def test_a_handler_without_streams_gives_back_the_error_as_text(local: Any, body: Any) -> None:
    made: LocalWorker = local()
    handler = runpod_queue.make_handler(made.worker, made.settings)

    assert error_of(asyncio.run(handler(picture(**body))))["param"] == next(iter(body))


def test_a_call_on_the_queue_brings_its_key_in_the_body(tmp_path: Path) -> None:
    settings = Settings(families=("chat",), worker_api_key=KEY)
    made = LocalWorker(tmp_path, settings=settings, models={"chat": FakeChat("Water.")})
    handler = runpod_queue.make_handler(made.worker, settings)

    answer = asyncio.run(handler(event("/v1/chat/completions", {**RAIN, "api_key": KEY})))

    assert answer["choices"][0]["message"]["content"] == "Water."


@pytest.mark.parametrize("key", [{}, {"api_key": "wrong"}, {"api_key": 5}])
def test_a_call_without_the_key_learns_nothing_else_about_itself(key: Any) -> None:
    settings = Settings(families=("chat",), worker_api_key=KEY)
    body = {**RAIN, **key, "model": "unknown"}

    made = arrival(settings, event("/v1/chat/completions", body))

    assert made.items
    assert error_of(made.items[-1])["code"] == "invalid_api_key"


def test_a_call_for_a_picture_counts_as_a_job_that_needs_the_device_alone() -> None:
    share = runpod_queue.share_of(Settings(families=("sdxl", "chat")))

    assert share
    assert share.includes(picture())
    assert not share.includes(event("/v1/chat/completions", RAIN))


@pytest.mark.parametrize(
    "field", [{"policy": {"executionTimeout": 60_000}}, {"traceparent": "00-1-2-01"}]
)
def test_what_stands_beside_the_input_counts_for_a_call_too(field: dict[str, Any]) -> None:
    made = arrival(Settings(families=("chat",)), {**event("/v1/chat/completions", RAIN), **field})

    assert made.envelope.event.items() >= field.items()


def test_an_answer_that_the_platform_does_not_take_is_not_kept(local: Any) -> None:
    made: LocalWorker = local()

    kept = runpod_queue.keep_result(made.worker, picture(), {"output": ["data: [DONE]\n\n"]})

    assert kept is None


def test_a_job_of_our_own_still_ends_with_its_document() -> None:
    made = arrival(Settings(families=("chat",)), {"id": "rp-1", "input": chat_payload()})

    assert made.items is None
    assert list(made.output.piece("Wa")) == [{"delta": "Wa"}]
