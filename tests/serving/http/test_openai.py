"""OpenAI's own client against the HTTP service."""

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.storage.inline import InlineStorage
from ourvidz_serverless.serving.http import replies, responses
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_chat import EndlessChat, FakeChat
from tests.fakes.local_worker import LocalWorker
from tests.fakes.tiny_chat import tiny_chat
from tests.patience import PATIENCE_S
from tests.servers.http_service import ServedHttp
from tests.servers.supabase import CallbackReceiver

RAIN: Any = [{"role": "user", "content": "What is rain?"}]
KEY = "hush-hush"


@pytest.fixture
def fake_chat() -> FakeChat:
    return FakeChat("Water ", "that ", "falls.")


@pytest.fixture
def local(tmp_path: Path, fake_chat: FakeChat) -> LocalWorker:
    """A worker with a key that serves pictures and replies."""
    settings = Settings(families=("sdxl", "chat"), chat_base_model="base", worker_api_key=KEY)
    made = LocalWorker(tmp_path, settings=settings, models={"chat": fake_chat})
    made.models["sdxl"] = made.fake_sdxl
    return made


@pytest.fixture
def service(local: LocalWorker) -> Iterator[ServedHttp]:
    with ServedHttp(local.settings, local.worker) as served:
        yield served


def client_of(service: ServedHttp, key: str = KEY) -> OpenAI:
    return OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)


@pytest.fixture
def client(service: ServedHttp) -> OpenAI:
    return client_of(service)


def ask(client: OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "qwen_instruct", "messages": RAIN, **options})


def text_of(chunks: Any) -> str:
    deltas = (chunk.choices[0].delta.content for chunk in chunks if chunk.choices)
    return "".join(filter(None, deltas))


# --- texts ---


def test_openais_client_gets_a_reply(client: OpenAI) -> None:
    reply = ask(client)

    assert reply.choices[0].message.content == "Water that falls."
    assert (reply.choices[0].finish_reason, reply.usage.total_tokens) == ("stop", 12)


def test_openais_client_reads_a_stream(client: OpenAI) -> None:
    chunks = list(ask(client, stream=True))

    assert text_of(chunks) == "Water that falls."
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.usage for chunk in chunks} == {None}


def test_a_stream_counts_its_tokens_last_if_it_is_asked_to(client: OpenAI) -> None:
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})

    assert text_of(chunks) == "Water that falls."
    assert (last.choices, last.usage.completion_tokens) == ([], 5)


def test_openais_asynchronous_client_gets_a_reply_and_a_stream(service: ServedHttp) -> None:
    async def both() -> tuple[str | None, str]:
        async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key=KEY) as client:
            create = client.chat.completions.create
            reply = await create(model="qwen_instruct", messages=RAIN)
            stream = await create(model="qwen_instruct", messages=RAIN, stream=True)
            return reply.choices[0].message.content, text_of([chunk async for chunk in stream])

    assert asyncio.run(both()) == ("Water that falls.", "Water that falls.")


def test_the_base_model_continues_a_text(client: OpenAI, fake_chat: FakeChat) -> None:
    create = client.completions.create
    whole = create(model="qwen_base", prompt="Rain is")
    streamed = create(model="qwen_base", prompt="Rain is", stream=True)

    assert whole.choices[0].text == "Water that falls."
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Water that falls."
    assert {call.model for call in fake_chat.calls} == {"qwen_base"}


def test_a_quiet_stream_has_a_comment_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "HEARTBEAT_S", 0.001)
    settings, endless = Settings(families=("chat",)), EndlessChat()
    made = LocalWorker(tmp_path, settings=settings, models={"chat": endless})
    body = {"messages": RAIN, "stream": True}
    with (
        ServedHttp(settings, made.worker) as service,
        service.post("/v1/chat/completions", body, stream=True) as answer,
    ):
        lines = answer.iter_lines()
        assert next(line for line in lines if line.startswith(b":")) == b": still here"
        assert next(line for line in lines if b"word" in line).startswith(b"data: {")


def test_a_reply_is_stopped_when_its_stream_is_closed(tmp_path: Path) -> None:
    settings, endless = Settings(families=("chat",)), EndlessChat()
    made = LocalWorker(tmp_path, settings=settings, models={"chat": endless})
    with ServedHttp(settings, made.worker) as service:
        stream = ask(client_of(service), stream=True)
        next(stream)
        stream.close()

        assert endless.stopped.wait(PATIENCE_S)


# --- pictures ---


def test_openais_client_gets_pictures(client: OpenAI, local: LocalWorker) -> None:
    answer = client.images.generate(
        prompt="a red circle", n=2, size="64x128", extra_body={"seed": 7}
    )

    files = [base64.b64decode(each.b64_json or "") for each in answer.data or ()]
    sizes = [Image.open(io.BytesIO(file)).size for file in files]
    assert sizes == [(64, 128), (64, 128)]
    assert [each.model_extra for each in answer.data or ()] == [{"seed": 7}, {"seed": 8}]
    assert local.stored() == []


def test_the_client_may_ask_for_another_format_and_for_a_url(tmp_path: Path) -> None:
    settings = Settings(storage_url="inline:")
    made = LocalWorker(tmp_path, settings=settings, storage=InlineStorage())
    with ServedHttp(settings, made.worker) as service:
        answer = client_of(service).images.generate(
            prompt="a red circle", size="64x64", output_format="webp", response_format="url"
        )

    assert answer.data and (answer.data[0].url or "").startswith("data:image/webp;base64,")
    assert answer.output_format == "webp"


def test_a_call_for_a_picture_posts_its_callback_and_one_for_a_chat_posts_none(
    tmp_path: Path, receiver: CallbackReceiver
) -> None:
    callback = Callback(receiver.callback_url, receiver.secret)
    made = LocalWorker(tmp_path, models={"chat": FakeChat("Rain.")}, callback=callback)
    made.models["sdxl"] = made.fake_sdxl
    made.settings = Settings(families=("sdxl", "chat"))
    with ServedHttp(made.settings, made.worker) as service:
        ask(client_of(service), user="user-1", extra_body={"id": "chat"})
        client_of(service).images.generate(
            prompt="a red circle", size="64x64", user="user-1", extra_body={"id": "picture"}
        )

    assert [each.document["job_id"] for each in receiver.received] == ["picture"]


# --- models ---


def test_openais_client_lists_and_finds_the_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["qwen_instruct", "qwen_base", "sdxl"]
    assert client.models.retrieve("sdxl").id == "sdxl"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/gpt-4o-mini")


# --- refusals ---


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, model="gpt-4o-mini")

    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_tools_are_refused_by_their_name(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, tools=[{"type": "function", "function": {"name": "f"}}])

    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "tools")


def test_a_value_that_is_out_of_bounds_is_refused_by_the_callers_name_of_the_field(
    client: OpenAI,
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a red circle", n=7)

    assert refused.value.param == "n"


@pytest.mark.parametrize("stream", [True, False])
def test_the_content_floor_holds_in_openais_protocol(client: OpenAI, stream: bool) -> None:
    messages = [{"role": "user", "content": "explicit story, she is 15"}]

    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, messages=messages, stream=stream, extra_body={"content_tier": "nsfw"})

    assert refused.value.code == "content_policy_violation"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/models"),
        ("GET", "/models/sdxl"),
        ("POST", "/chat/completions"),
        ("POST", "/images/generations"),
    ],
)
def test_openais_client_needs_a_key_of_the_worker(
    service: ServedHttp, method: str, path: str
) -> None:
    client = client_of(service, key="wrong")

    with pytest.raises(openai.AuthenticationError) as refused:
        client.get(path, cast_to=object) if method == "GET" else client.post(
            path, cast_to=object, body={"model": "unknown"}
        )

    assert refused.value.code == "invalid_api_key"


def test_a_user_over_the_limit_is_told_when_to_come_back(tmp_path: Path) -> None:
    settings = Settings.model_validate({"families": "chat", "rate_limit_user": "1/hour"})
    made = LocalWorker(tmp_path, settings=settings, models={"chat": FakeChat("Water.")})
    with ServedHttp(settings, made.worker) as service:
        client = client_of(service)
        ask(client, user="user-1")
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client, user="user-1")

    assert refused.value.code == "rate_limit_exceeded"
    assert int(refused.value.response.headers["Retry-After"]) > 0
    assert refused.value.response.headers["x-should-retry"] == "true"


def test_a_picture_that_takes_too_long_is_a_timeout_that_no_client_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "PICTURE_TIMEOUT_S", 0.1)
    made = LocalWorker(tmp_path)
    made.fake_sdxl.hold()
    with ServedHttp(made.settings, made.worker) as service:
        with pytest.raises(openai.InternalServerError) as late:
            client_of(service).images.generate(prompt="a red circle", size="64x64")
        made.fake_sdxl.go_on.set()

    assert (late.value.status_code, late.value.code) == (504, "timeout_error")
    assert late.value.response.headers["x-should-retry"] == "false"


def test_a_loading_worker_is_unavailable_in_openais_shape() -> None:
    with (
        ServedHttp(Settings(families=("chat",))) as service,
        pytest.raises(openai.InternalServerError) as refused,
    ):
        ask(client_of(service))

    assert (refused.value.status_code, refused.value.code) == (503, "worker_unavailable")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/responses", 404),
        ("POST", "/v1/images/edits", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
    ],
)
def test_what_is_not_served_below_v1_is_an_error_in_openais_shape(
    service: ServedHttp, method: str, path: str, status: int
) -> None:
    send = service.post if method == "POST" else service.get
    answer = send(path, headers={"Authorization": f"Bearer {KEY}"})

    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_each_answer_has_an_id_that_the_log_has_too(
    client: OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    whole = ask(client)
    with client.chat.completions.with_streaming_response.create(
        model="qwen_instruct", messages=RAIN, stream=True
    ) as stream:
        streamed = stream.headers["x-request-id"]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, temperature=9)

    ids = {whole._request_id, streamed, refused.value.request_id}
    assert len(ids) == 3 and None not in ids
    assert whole.id == f"chatcmpl-{whole._request_id}"
    assert f"chat_conversation({whole._request_id})" in caplog.text


def test_a_prompt_that_is_too_long_has_openais_own_code(tmp_path: Path) -> None:
    settings = Settings(families=("chat",))
    made = LocalWorker(tmp_path, settings=settings, models={"chat": tiny_chat(context=64)})
    with (
        ServedHttp(settings, made.worker) as service,
        pytest.raises(openai.BadRequestError) as refused,
    ):
        ask(client_of(service), max_tokens=60)

    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    assert "tokens, where the context has room for" in refused.value.message
