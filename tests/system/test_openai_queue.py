"""OpenAI's own client against RunPod's `/openai/v1`, with the real loop of the SDK behind it."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from tests.fakes import slow_handler
from tests.fakes.slow_handler import Slowdown
from tests.fakes.tiny_chat import tiny_folder
from tests.patience import PATIENCE_S
from tests.servers.runpod import Platform
from tests.servers.worker_process import WorkerProcess

pytestmark = pytest.mark.slow

HELLO: Any = [{"role": "user", "content": "Hello"}]
GREEDY: Any = {"model": "qwen_instruct", "messages": HELLO, "temperature": 0, "max_tokens": 40}
KEY = "hush-hush"


@pytest.fixture(scope="module")
def slowdown(tmp_path_factory: pytest.TempPathFactory) -> Slowdown:
    return Slowdown(tmp_path_factory.mktemp("slowdown") / "slowdown")


@pytest.fixture(scope="module", autouse=True)
def worker(
    platform: Platform,
    slowdown: Slowdown,
    outputs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[WorkerProcess]:
    model = tiny_folder(tmp_path_factory.mktemp("chat"))
    env = {
        "FAMILIES": "chat,sdxl",
        "CHAT_INSTRUCT_MODEL": model,
        "CHAT_BASE_MODEL": model,
        "STORAGE_URL": f"file:{outputs}",
        "OPENAI_MODEL_NAMES": "gpt-4o-mini=qwen_instruct",
    }
    with slow_handler.start(platform, slowdown, **env) as process:
        yield process


@pytest.fixture(scope="module")
def base_url(platform: Platform) -> str:
    return f"{platform.caller_url}/local/openai/v1"


@pytest.fixture(scope="module")
def client(platform: Platform, base_url: str) -> OpenAI:
    return OpenAI(base_url=base_url, api_key=platform.caller_key, max_retries=0, timeout=PATIENCE_S)


def text_of(chunks: Any) -> str:
    deltas = (chunk.choices[0].delta.content for chunk in chunks if chunk.choices)
    return "".join(filter(None, deltas))


def test_a_stream_on_the_queue_is_the_reply_that_comes_without_a_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY)
    *chunks, last = client.chat.completions.create(
        **GREEDY, stream=True, stream_options={"include_usage": True}
    )

    assert whole.usage and whole.usage.completion_tokens == 40
    assert text_of(chunks) == whole.choices[0].message.content
    assert (last.choices, last.usage.total_tokens) == ([], whole.usage.total_tokens)


def test_the_asynchronous_client_streams_from_the_queue(platform: Platform, base_url: str) -> None:
    async def streamed() -> str:
        async with AsyncOpenAI(base_url=base_url, api_key=platform.caller_key) as client:
            stream = await client.chat.completions.create(**GREEDY, stream=True)
            return text_of([chunk async for chunk in stream])

    assert len(asyncio.run(streamed())) == 40


def test_the_client_reads_a_stream_of_the_queue_while_its_job_runs(
    client: OpenAI, slowdown: Slowdown
) -> None:
    long = {**GREEDY, "max_tokens": 1200}
    with slowdown.on():
        stream = client.chat.completions.create(**long, stream=True)
        first = [next(stream), next(stream)]

    rest = list(stream)
    assert text_of(first)
    assert rest[-1].choices[0].finish_reason == "length"


def test_the_base_model_answers_on_the_queue(client: OpenAI) -> None:
    answer = client.completions.create(model="qwen_base", prompt="Hello", temperature=0)

    assert answer.usage and answer.usage.completion_tokens == 16


def test_a_picture_from_the_queue_comes_in_the_answer(client: OpenAI, outputs: Path) -> None:
    answer = client.images.generate(
        prompt="green hills", size="64x64", extra_body={"num_inference_steps": 10}
    )

    assert answer.data
    file = base64.b64decode(answer.data[0].b64_json or "")
    assert Image.open(io.BytesIO(file)).size == (64, 64)
    assert not list(outputs.rglob("*.png"))


def test_the_client_lists_the_models_behind_the_queue(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]

    assert names == ["qwen_instruct", "qwen_base", "sdxl", "gpt-4o-mini"]
    assert client.models.retrieve("gpt-4o-mini").id == "gpt-4o-mini"


def test_a_call_that_is_refused_fails_its_job_with_openais_error(platform: Platform) -> None:
    call = {"openai_route": "/v1/chat/completions", "openai_input": {**GREEDY, "temperature": 9}}
    job = platform.submit(call)

    platform.result(job)

    status = platform.status(job)
    assert status["status"] == "FAILED"
    assert json.loads(status["error"]) == {
        "message": "temperature: Input should be less than or equal to 2",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": "invalid_value",
    }


@pytest.mark.parametrize(
    "change", [{"model": "gpt-5"}, {"tools": [{"type": "function"}]}, {"temperature": 9}]
)
def test_a_stream_that_is_refused_on_the_queue_raises_openais_error(
    client: OpenAI, change: dict[str, Any]
) -> None:
    with pytest.raises(openai.APIError) as refused:
        list(client.chat.completions.create(**{**GREEDY, **change}, stream=True))

    assert refused.value.param == next(iter(change))


@pytest.mark.parametrize(
    ("call", "param"),
    [
        ({"openai_route": "/v1/embeddings", "openai_input": {"input": "x"}}, None),
        ({"openai_route": 5, "openai_input": {"input": "x"}}, None),
        ({"openai_input": {}}, "messages"),
        ({"openai_input": "x"}, "messages"),
        ({"openai_route": "/v1/models/gpt-5", "openai_input": {}}, "model"),
    ],
)
def test_a_call_that_makes_no_sense_fails_and_the_worker_goes_on(
    platform: Platform, call: dict[str, Any], param: str | None
) -> None:
    job = platform.submit(call)

    platform.result(job)

    assert json.loads(platform.status(job)["error"])["param"] == param


def test_a_cancelled_stream_leaves_the_worker(
    platform: Platform, worker: WorkerProcess, slowdown: Slowdown
) -> None:
    long = {**GREEDY, "max_tokens": 1200, "stream": True, "user": "user-1", "id": "cancelled-call"}
    with slowdown.on():
        job = platform.submit({"openai_route": "/v1/chat/completions", "openai_input": long})
        platform.wait_until(lambda: platform.stream(job))
        platform.cancel(job)

        worker.wait_for_log("(cancelled-call) CANCELLED")
