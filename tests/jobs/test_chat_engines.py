"""What a chat job may expect of every engine: the worker's own, and a server.

The server is a small one of the tests, or the one at `PROVE_CHAT_SERVER`, as `tests.prove_vllm`
sets it: it has to have a context of 512 tokens, and to serve its one model under both names.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from ourvidz_serverless.context import Stop
from ourvidz_serverless.document import Document
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.chat.server import loader as server_loader
from ourvidz_serverless.settings import Settings
from tests.fakes.local_worker import LocalWorker, chat_payload
from tests.fakes.tiny_chat import tiny_chat
from tests.patience import PATIENCE_S, start
from tests.servers.chat_server import ChatServer
from tests.servers.http_service import ServedHttp

CONTEXT = 512
REAL_SERVER = os.environ.get("PROVE_CHAT_SERVER")
STORY = [{"role": "user", "content": "Tell a long story about rain."}]
#: Tokens of the pocket model, and bytes.
TOO_LONG = "rain " * 2000

KEYS_OF_REPLIES = {"response", "finish_reason", "usage"}


def server_settings(url: str, **changes: Any) -> Settings:
    name = os.environ.get("PROVE_CHAT_MODEL", "tiny")
    names = {"chat_server_model": name, "chat_server_base_model": name}
    return Settings(
        families=("chat",), chat_engine="openai", chat_server_url=url, **{**names, **changes}
    )


@pytest.fixture(params=["builtin", "openai"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def chat(engine: str) -> Iterator[Any]:
    """The chat models of one engine, with a context of 512 tokens."""
    if engine == "builtin":
        yield tiny_chat(context=CONTEXT)
    elif REAL_SERVER:
        yield server_loader.load(server_settings(REAL_SERVER))
    else:
        with ChatServer(context=CONTEXT, pace_s=0.002) as server:
            yield server_loader.load(server_settings(server.url))


@pytest.fixture
def local(tmp_path: Path, chat: Any) -> LocalWorker:
    settings = server_settings("http://127.0.0.1:1")
    return LocalWorker(tmp_path, settings=settings, models={"chat": chat})


@pytest.fixture
def ask(local: LocalWorker) -> Callable[..., Document]:
    """Runs a greedy job of a few tokens; the changes are fields of its payload."""

    def run(**changes: Any) -> Document:
        payload = {"messages": STORY, "temperature": 0, "max_tokens": 12, **changes}
        return local.run(chat_payload(**payload))

    return run


def text_of(document: Document) -> str:
    assert document.status == "completed", document.failure
    text: str = document.reply["response"]
    return text


def refusal_of(document: Document) -> str:
    assert document.failure and document.failure.code == "INVALID_PROMPT", document
    return document.failure.message


def test_a_reply_ends_at_max_tokens_and_counts_them(ask: Any) -> None:
    document = ask(max_tokens=6)

    assert text_of(document)
    usage = document.reply["usage"]
    assert (document.reply["finish_reason"], usage["completion_tokens"]) == ("length", 6)
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6 > 6


def test_only_the_metadata_tell_which_engine_has_answered(ask: Any, engine: str) -> None:
    document = ask()

    result = document.result()
    assert result["metadata"]["engine"] == engine
    assert result.keys() - {"job_id", "worker_id", "status", "assets", "metadata"} == (
        KEYS_OF_REPLIES
    )
    assert document.metadata["model"] == "qwen_instruct"
    assert document.metadata["time_to_first_token"] >= 0
    assert document.metadata["tokens_per_second"] > 0


def test_a_greedy_request_gets_the_same_reply_again(ask: Any) -> None:
    assert text_of(ask()) == text_of(ask())


def test_a_seed_chooses_the_reply(ask: Any) -> None:
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 24}
    first, again, other = (text_of(ask(seed=seed, **sampling)) for seed in (7, 7, 8))

    assert first == again != other


def test_every_sampling_field_is_accepted(ask: Any) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "seed": 2**63 - 1,
        "stop": ["never written", "nor this"],
    }

    assert text_of(ask(**fields))


def test_a_stop_text_ends_the_reply_and_is_no_part_of_it(ask: Any) -> None:
    whole = text_of(ask(max_tokens=24))
    stop = whole[len(whole) // 2 :][:3]

    document = ask(max_tokens=24, stop=stop)

    assert text_of(document) == whole[: whole.find(stop)]
    assert document.reply["finish_reason"] == "stop"


def test_a_reply_by_a_schema_fits_the_schema(ask: Any) -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}

    assert json.loads(text_of(ask(response_format=schema))) in ("yes", "no")


def test_a_schema_that_is_not_supported_is_refused_by_its_name(ask: Any) -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "zebra"}}}

    assert refusal_of(ask(response_format=schema)).startswith("response_format")


@pytest.mark.parametrize(
    "changes",
    [{"messages": [{"role": "user", "content": TOO_LONG}]}, {"max_tokens": CONTEXT}],
    ids=["the conversation", "with its reply"],
)
def test_what_is_longer_than_the_context_is_refused(ask: Any, changes: dict[str, Any]) -> None:
    document = ask(**changes)

    assert refusal_of(document).startswith("messages: ")
    assert document.failure.is_too_long


def test_the_oldest_messages_go_if_the_job_says_so(ask: Any) -> None:
    messages = [{"role": "user", "content": "rain " * 18}] * 24

    document = ask(messages=[*messages, *STORY], truncate="oldest", max_tokens=60)

    assert text_of(document)
    assert 0 < document.metadata["messages_dropped"] < 24
    assert document.reply["usage"]["prompt_tokens"] <= CONTEXT - 60


def test_the_base_model_continues_a_text(ask: Any) -> None:
    document = ask(model="qwen_base", messages=None, prompt="Rain falls and")

    assert text_of(document)
    assert document.metadata["model"] == "qwen_base"


def test_the_deltas_of_a_stream_are_the_reply(ask: Any, local: LocalWorker) -> None:
    document = ask(stream=True, max_tokens=40)

    assert "".join(item["delta"] for item in local.streamed) == text_of(document)


def run_until_first_delta(local: LocalWorker, job_id: str) -> Document:
    """A long job that is cancelled at the first words of its reply."""
    stop = Stop()
    payload = chat_payload(messages=STORY, id=job_id, temperature=0, max_tokens=400, stream=True)
    envelope = Envelope.of({"id": job_id, "input": payload}, local.settings.families)
    return local.worker.run(envelope, stop, local.progress.append, lambda item: stop.set())


def test_a_cancelled_job_ends_while_its_reply_grows(ask: Any, local: LocalWorker) -> None:
    document = run_until_first_delta(local, "cancelled")

    assert document.failure and document.failure.code == "CANCELLED"
    assert text_of(ask())


def test_a_deadline_ends_a_job_while_its_reply_grows(tmp_path: Path, chat: Any) -> None:
    settings = server_settings("http://127.0.0.1:1", job_timeout_s=0.05)
    at = LocalWorker(tmp_path, settings=settings, models={"chat": chat})

    document = at.run(chat_payload(messages=STORY, temperature=0, max_tokens=400))

    assert document.failure and document.failure.code == "TIMEOUT_ERROR"


def test_many_jobs_at_once_get_the_replies_that_each_gets_alone(local: LocalWorker) -> None:
    def run(job_id: str, name: str) -> str:
        messages = [{"role": "user", "content": f"Say hello to {name}."}]
        payload = chat_payload(id=job_id, messages=messages, temperature=0, max_tokens=8)
        return text_of(local.run(payload, Stop()))

    names = ["Ada", "Grace", "Alan", "Edsger", "Barbara", "Donald"]
    crowd = [start(run, f"crowd-{name}", name) for name in names]

    assert [each.result(PATIENCE_S) for each in crowd] == [run(name, name) for name in names]


def test_openais_client_speaks_with_either_engine(local: LocalWorker) -> None:
    with ServedHttp(local.settings, local.worker) as service:
        client = OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
        call: Any = {"model": "qwen_instruct", "messages": STORY, "temperature": 0, "max_tokens": 9}
        whole = client.chat.completions.create(**call)
        *chunks, last = client.chat.completions.create(
            **call, stream=True, stream_options={"include_usage": True}
        )
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**{**call, "max_tokens": CONTEXT})

    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == whole.choices[0].message.content
    # The second call may read its prompt from pages that the first one left.
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [getattr(last.usage, each) for each in counts] == [
        getattr(whole.usage, each) for each in counts
    ]
    assert refused.value.code == "context_length_exceeded"
