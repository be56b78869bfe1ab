"""Chat jobs: their payloads, their documents, their streams, and what the content floor refuses."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from ourvidz_serverless.context import Stop
from ourvidz_serverless.document import Document
from ourvidz_serverless.errors import ContentRefused, InvalidPrompt
from ourvidz_serverless.guard import content_floor
from ourvidz_serverless.job import CheckedText
from ourvidz_serverless.jobs import chat as chat_jobs
from ourvidz_serverless.jobs.chat import ChatJob
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.chat.request import ChatRequest, SamplingParams
from ourvidz_serverless.settings import CacheSalt, Settings
from tests.fakes.clock import Clock
from tests.fakes.fake_chat import FakeChat
from tests.fakes.local_worker import LocalWorker, chat_payload
from tests.fakes.tiny_chat import (
    rest_of,
    tiny_chat,
    until,
)
from tests.files import ROOT
from tests.models.chat.test_grammar import PATTERN, deep_schema
from tests.patience import PATIENCE_S, start

MakeLocal = Callable[..., LocalWorker]


def parse(payload: dict[str, Any]) -> ChatJob:
    job = Envelope.of({"id": "rp-1", "input": payload}).job(Settings())
    assert isinstance(job, ChatJob)
    return job


def refusal(**changes: Any) -> str:
    with pytest.raises(InvalidPrompt) as refused:
        parse(chat_payload(**changes))
    return refused.value.message


def messages_of(job: ChatJob) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in job.conversation]


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_the_test_input_of_make_chat_is_a_valid_job() -> None:
    event = json.loads((ROOT / "test_input.chat.json").read_text())

    assert parse(event["input"]).type == "chat_conversation"


# --- the two payload shapes ---

PAIRS = [
    (
        {"messages": [user("Hello")]},
        {"prompt": "Hello"},
    ),
    (
        {"messages": [system("Be brief."), user("Hello")]},
        {"prompt": "Hello", "config": {"system_prompt": "Be brief.", "quality": "high"}},
    ),
    (
        {"messages": [user("Hello")], "temperature": 0, "max_tokens": 9, "stop": ["."]},
        {"prompt": "Hello", "config": {"temperature": 0, "max_tokens": 9, "stop": "."}},
    ),
    (
        {"messages": [system("Be brief."), user("Hello")], "model": "qwen_base"},
        {
            "messages": [user("Hello")],
            "config": {"system_prompt": "Be brief.", "model": "qwen_base"},
        },
    ),
    (
        {"messages": [user("Hello")], "top_k": 7, "seed": 1},
        {"prompt": "Hello", "top_k": 7, "config": {"top_k": 9, "seed": 1}},
    ),
]


@pytest.mark.parametrize(("newer", "older"), PAIRS)
def test_both_payload_shapes_mean_the_same(newer: dict[str, Any], older: dict[str, Any]) -> None:
    one, other = (parse({"type": "chat_enhance", **each}) for each in (newer, older))

    assert messages_of(one) == messages_of(other)
    shape = {"messages", "prompt", "config"}
    assert one.model_dump(exclude=shape) == other.model_dump(exclude=shape)


def test_messages_replace_a_prompt() -> None:
    assert messages_of(parse(chat_payload(prompt="Something else")))[-1] == (
        "user",
        "What is rain?",
    )


def test_the_older_shape_may_have_its_type_in_config() -> None:
    payload = {"prompt": "Hello", "config": {"job_type": "chat_unrestricted"}}

    assert parse(payload).type == "chat_unrestricted"


def test_a_conversation_without_a_system_prompt_gets_none() -> None:
    assert parse({"type": "chat_conversation", "prompt": "Hello"}).system_prompt is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"messages": []}, "messages: Field required, with some text"),
        ({"messages": [user(" ")]}, "messages: Field required, with some text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: "),
        ({"messages": [user("x"), {"role": "user"}]}, "messages.1.content: Field required"),
        ({"messages": [user("x" * 100_001)]}, "messages.0.content: "),
        ({"messages": "hello"}, "messages: "),
        ({"max_tokens": 2049}, "max_tokens: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"temperature": -0.1}, "temperature: "),
        ({"temperature": 2.1}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"top_k": -1}, "top_k: "),
        ({"logit_bias": [5]}, "logit_bias: "),
        ({"logit_bias": {"five": 1}}, "logit_bias.five.[key]: "),
        ({"logit_bias": {"5": 101}}, "logit_bias.5: "),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5: "),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias: "),
        ({"presence_penalty": 2.5}, "presence_penalty: "),
        ({"frequency_penalty": -2.5}, "frequency_penalty: "),
        ({"repetition_penalty": 0}, "repetition_penalty: "),
        ({"stop": [""]}, "stop.0: "),
        ({"stop": ["x"] * 9}, "stop: "),
        ({"seed": -1}, "seed: "),
        ({"model": "gpt"}, "model: "),
        ({"truncate": "newest"}, "truncate: "),
        ({"stream": "maybe"}, "stream: "),
        ({"thinking": 1}, "thinking: "),
        ({"response_format": "xml"}, "response_format.type: "),
        ({"response_format": {"type": "json_schema"}}, "response_format: json_schema: "),
        ({"config": {"temperature": 9}}, "config.temperature: "),
    ],
)
def test_a_payload_is_refused_with_the_name_of_its_field(
    changes: dict[str, Any], field: str
) -> None:
    message = refusal(**changes)

    assert message.startswith(field)
    assert "inf" not in message and "nan" not in message


BOUNDS = {
    "max_tokens": (1, 2048),
    "temperature": (0, 2),
    "top_p": (0.001, 1),
    "top_k": (0, 1000),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.1, 2),
    "seed": (0, 2**63 - 1),
}


@pytest.mark.parametrize("field", BOUNDS)
def test_a_sampling_field_may_have_any_value_within_its_bounds(field: str) -> None:
    least, most = BOUNDS[field]
    step = 1 if field in ("max_tokens", "top_k", "seed") else 0.001

    for value in (least, most):
        assert getattr(parse(chat_payload(**{field: value})).request.sampling, field) == value
    for value in (least - step, most + step):
        assert refusal(**{field: value}).startswith(f"{field}: ")


def test_eight_texts_may_end_a_reply_each_of_a_hundred_characters() -> None:
    stop = ["x" * 100] * 8

    assert parse(chat_payload(stop=stop)).request.sampling.stop == tuple(stop)
    assert refusal(stop=["x" * 101]).startswith("stop.0: ")


@pytest.mark.parametrize(
    ("name", "max_tokens"),
    [("chat_enhance", 200), ("chat_conversation", 512), ("chat_unrestricted", 512)],
)
def test_a_job_that_sets_no_sampling_gets_the_defaults(name: str, max_tokens: int) -> None:
    job = parse({"type": name, "prompt": "Hello"})

    assert job.request == ChatRequest(
        (("user", "Hello"),),
        SamplingParams(max_tokens=max_tokens, temperature=0.7, top_p=0.9),
        "qwen_instruct",
        user="anonymous",
    )


# --- the document ---


def code(document: Document) -> str | None:
    return document.failure.code if document.failure else None


@pytest.fixture
def talk(local: MakeLocal) -> Callable[..., tuple[Document, LocalWorker]]:
    """Runs a job whose model replies with given pieces, each later than a stream's interval."""

    def run(
        *pieces: str, piece_s: float = 2 * chat_jobs.STREAM_INTERVAL_S, **changes: Any
    ) -> tuple[Document, LocalWorker]:
        clock = Clock()
        fake_chat = FakeChat(*pieces, piece_s=piece_s, clock=clock)
        at = local(models={"chat": fake_chat}, clock=clock)
        return at.run(chat_payload(**changes)), at

    return run


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("chat_enhance", "enhanced_prompt"),
        ("chat_conversation", "response"),
        ("chat_unrestricted", "response"),
    ],
)
def test_the_reply_is_a_text_asset_and_a_field_of_the_document(
    talk: Any, name: str, field: str
) -> None:
    document, at = talk("Rain ", "is water.", type=name)

    result = document.result()
    assert result[field] == "Rain is water."
    (asset,) = result["assets"]
    assert asset["type"] == "text"
    assert asset["url"] == "data:text/plain;charset=utf-8,Rain%20is%20water."
    assert at.stored() == []
    assert result["usage"]["total_tokens"] == 12
    assert result["finish_reason"] == "stop"


def test_the_metadata_of_a_reply_repeats_what_the_job_asked_for(talk: Any) -> None:
    flags = {"unrestricted_mode": True, "nsfw_optimization": True}

    document, _ = talk("A lake.", type="chat_enhance", metadata=flags, truncate="oldest")

    expected = {
        **flags,
        "system_prompt_used": "Be brief.",
        "enhancement_source": "qwen_instruct",
        "messages_dropped": 2,
        "sfw_mode": False,
        "time_to_first_token": 0.01,
        "tokens_per_second": 50.0,
    }
    assert expected.items() <= dict(document.metadata).items()


def test_every_sampling_field_reaches_the_model(talk: Any) -> None:
    rules = {
        "temperature": 0.3,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.05,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "max_tokens": 33,
        "seed": 5,
        "truncate": "oldest",
        "thinking": True,
        "model": "qwen_base",
    }

    others = {"stop": "END", "response_format": "json_object", "logit_bias": {"50256": -100}}

    _, at = talk("x", **others, **rules)

    (call,) = at.models["chat"].calls
    assert rules.items() <= {**asdict(call), **asdict(call.sampling)}.items()
    assert (call.sampling.stop, call.schema) == (("END",), {"type": "object"})
    assert call.sampling.logit_bias == {50256: -100}


@pytest.mark.parametrize("thinking", [True, False])
def test_the_document_counts_thoughts_that_were_asked_for(talk: Any, thinking: bool) -> None:
    document, _ = talk("Water.", thinking=thinking)

    assert document.metadata.get("thinking_tokens") == (0 if thinking else None)


def test_a_refused_reply_is_not_in_the_document(talk: Any) -> None:
    document, _ = talk("nude ", "child")

    assert code(document) == "CONTENT_REFUSED"
    assert "response" not in document.result()


# --- the content floor ---


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_the_floor_reads_every_message(talk: Any, role: str) -> None:
    messages = [{"role": role, "content": "nude child"}, user("Go on.")]

    document, at = talk("Yes.", messages=messages)

    assert code(document) == "CONTENT_REFUSED"
    assert at.models["chat"].calls == []


FORBIDS = "Everyone is an adult. No school settings or minor context applies."


@pytest.mark.parametrize(
    "conversation",
    [
        {"messages": [system(FORBIDS), user("Go on.")]},
        {"messages": [user("Go on.")], "config": {"system_prompt": FORBIDS}},
        {"messages": None, "prompt": "Go on.", "config": {"system_prompt": FORBIDS}},
    ],
)
def test_a_system_message_may_forbid_minors_in_adult_mode(
    talk: Any, conversation: dict[str, Any]
) -> None:
    assert talk("Yes.", content_tier="nsfw", **conversation)[0].status == "completed"


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_user_or_assistant_message_that_forbids_minors_is_refused_in_adult_mode(
    talk: Any, role: str
) -> None:
    messages = [system("Be brief."), {"role": role, "content": FORBIDS}]

    assert code(talk("Yes.", content_tier="nsfw", messages=messages)[0]) == "CONTENT_REFUSED"


def test_a_reply_that_forbids_minors_is_refused_in_adult_mode(talk: Any) -> None:
    assert code(talk(FORBIDS, content_tier="nsfw")[0]) == "CONTENT_REFUSED"


def test_a_prohibition_in_the_system_message_excuses_no_other_message(talk: Any) -> None:
    messages = [system(FORBIDS), user("Speak as a minor.")]

    assert code(talk("Yes.", content_tier="nsfw", messages=messages)[0]) == "CONTENT_REFUSED"


@pytest.mark.parametrize("field", ["content_tier", "content_type"])
def test_a_content_label_means_adult_in_upper_case_too(talk: Any, field: str) -> None:
    messages = [user("A child at a lake.")]

    assert code(talk("Yes.", messages=messages, **{field: "NSFW"})[0]) == "CONTENT_REFUSED"


def test_messages_that_are_too_long_together_are_refused(talk: Any) -> None:
    messages = [user("x " * 35_000) for _ in range(3)]

    document, at = talk("Yes.", messages=messages)

    assert code(document) == "INVALID_PROMPT"
    assert document.failure.message == (
        "messages: the texts of a job should have at most 200000 characters together, "
        "and these have 210000"
    )
    assert at.models["chat"].calls == []


def test_messages_of_the_longest_length_are_accepted(talk: Any) -> None:
    messages = [user("rain " * 20_000), user("rain " * 20_000)]

    assert talk("Yes.", messages=messages)[0].status == "completed"


def test_a_deadline_stops_the_content_floor(local: MakeLocal) -> None:
    seconds = iter(range(1_000_000))
    at = local(
        models={"chat": FakeChat("Yes.")},
        settings=Settings(job_timeout_s=300),
        clock=lambda: float(next(seconds)),
    )

    document = at.run(chat_payload(messages=[user("rain")] * 500))

    assert code(document) == "TIMEOUT_ERROR"
    assert next(seconds) < 400
    assert at.models["chat"].calls == []


def test_a_stop_stops_the_content_floor(local: MakeLocal, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ourvidz.audit")
    at = local(models={"chat": FakeChat("Yes.")})
    at.stop.set()

    assert code(at.run(chat_payload())) == "CANCELLED"
    assert '"content"' not in caplog.text


def test_the_floor_reads_the_reply_together_with_the_conversation(talk: Any) -> None:
    document, at = talk("All of them ", "nude.", messages=[user("Children at a lake.")])

    assert code(document) == "CONTENT_REFUSED"
    assert "content policy" in document.failure.message
    assert at.stored() == []


def deltas(at: LocalWorker) -> list[str]:
    return [item["delta"] for item in at.streamed]


def test_the_floor_stops_a_stream_before_the_word_that_it_refuses(talk: Any) -> None:
    document, at = talk("A ", "child ", "nu", "de ", "in ", "oil.", stream=True)

    assert deltas(at) == ["A ", "child "]
    assert code(document) == "CONTENT_REFUSED"


def test_the_floor_reads_the_stream_of_an_adult_job_in_adult_mode(talk: Any) -> None:
    document, at = talk("A ", "child ", "in oil.", stream=True, type="chat_unrestricted")

    assert deltas(at) == ["A "]
    assert code(document) == "CONTENT_REFUSED"


def test_the_floor_reads_a_delta_together_with_the_sentence_before_it(talk: Any) -> None:
    between = "in rain " * 30
    pieces = ["A child ", between, "in the ", "nude ", "now."]

    document, at = talk(*pieces, stream=True)

    assert deltas(at) == ["A child ", between, "in the "]
    assert code(document) == "CONTENT_REFUSED"


@pytest.mark.parametrize(
    ("asked", "pieces"),
    [("A child at a lake.", ["A ", "nude ", "now."]), ("A nude.", ["A ", "child ", "now."])],
)
def test_the_floor_reads_a_stream_together_with_the_conversation(
    talk: Any, asked: str, pieces: list[str]
) -> None:
    document, at = talk(*pieces, messages=[user(asked)], stream=True)

    assert deltas(at) == ["A "]
    assert code(document) == "CONTENT_REFUSED"


@pytest.mark.parametrize("lead", ["", "a lake ", "a lake " * 9])
@pytest.mark.parametrize("words", ["nineteen", "23 years old"])
@pytest.mark.parametrize("num_letters", range(1, 13))
def test_the_floor_never_reads_a_part_of_a_word_in_a_stream(
    talk: Any, num_letters: int, words: str, lead: str
) -> None:
    filler = "r" * (chat_jobs.CHECKED_LETTERS - num_letters - 2)
    pieces = [f"{lead}{words}", f" {filler} ", "now."]

    document, _ = talk(*pieces, type="chat_unrestricted", stream=True)

    assert document.status == "completed"


def times_the_clock_is_read(local: MakeLocal, messages: list[dict[str, str]]) -> int:
    times = iter(range(1_000_000))
    at = local(
        models={"chat": FakeChat("Water.")},
        settings=Settings(job_timeout_s=1_000_000),
        clock=lambda: float(next(times)),
    )
    assert at.run(chat_payload(messages=messages)).status == "completed"
    return next(times)


def test_the_floor_does_not_read_the_conversation_again_with_the_reply(
    local: MakeLocal,
) -> None:
    readings: list[None] = []
    content_floor.judge([CheckedText("rain", "messages")], check_stop=lambda: readings.append(None))

    one, many = (times_the_clock_is_read(local, [user("rain")] * num) for num in (1, 101))

    assert many - one == 100 * len(readings)


def test_the_floor_reads_the_last_word_of_a_stream_before_it_is_emitted(talk: Any) -> None:
    document, at = talk("A child ", "is ", "nude", stream=True)

    assert deltas(at) == ["A child ", "is "]
    assert code(document) == "CONTENT_REFUSED"


def test_the_floor_reads_all_text_between_two_deltas(talk: Any) -> None:
    pieces = ["A ", *["lake "] * 9, "nude child ", *["lake "] * 9]

    _, at = talk(*pieces, piece_s=chat_jobs.STREAM_INTERVAL_S / 15.5, stream=True)

    assert deltas(at) == ["A "]


def test_sfw_mode_filters_explicit_words_and_no_other_words(talk: Any) -> None:
    document, _ = talk("A nu", "de in Essex, ", "sexy breasts.", sfw_mode=True)

    assert document.reply["response"] == "A [filtered] in Essex, [filtered] [filtered]."


def test_without_sfw_mode_no_word_is_filtered(talk: Any) -> None:
    assert talk("A nude in oil.")[0].reply["response"] == "A nude in oil."


# --- streams ---


@pytest.mark.parametrize("sfw_mode", [True, False])
def test_deltas_add_up_to_the_reply(talk: Any, sfw_mode: bool) -> None:
    document, at = talk("Na", "ked", " rocks, 下", "雨 ", "and mo", stream=True, sfw_mode=sfw_mode)

    assert len(deltas(at)) > 2
    assert "".join(deltas(at)) == document.reply["response"]


def test_a_stream_emits_a_delta_each_fifth_of_a_second(talk: Any) -> None:
    _, at = talk(*["word "] * 30, piece_s=chat_jobs.STREAM_INTERVAL_S / 7.5, stream=True)

    assert [delta.count("word") for delta in deltas(at)] == [1, 8, 8, 8, 5]


def test_letters_without_a_space_are_streamed_too(talk: Any) -> None:
    assert len(talk(*["abcdefghij"] * 10, stream=True)[1].streamed) == 7


def test_a_job_without_stream_emits_no_delta(talk: Any) -> None:
    assert talk("Rain ", "is water.")[1].streamed == []


# --- with a real model ---


def test_chat_jobs_run_at_once_and_share_a_prefix(local: MakeLocal) -> None:
    at = local(models={"chat": tiny_chat()})
    payloads = [chat_payload(id=f"job-{i}", temperature=0, max_tokens=40) for i in range(12)]
    running = [start(at.run, each, Stop()) for each in payloads]
    documents = [each.result(PATIENCE_S) for each in running]

    assert {document.status for document in documents} == {"completed"}
    assert len({document.reply["response"] for document in documents}) == 1
    assert sum(document.reply["usage"]["prompt_tokens_reused"] > 0 for document in documents) > 6


def test_a_stopped_job_is_cancelled(local: MakeLocal) -> None:
    at = local(models={"chat": tiny_chat()})
    at.stop.set()

    assert code(at.run(chat_payload())) == "CANCELLED"


def test_a_deadline_ends_a_job_while_its_reply_grows(local: MakeLocal) -> None:
    at = local(models={"chat": tiny_chat(context=4096)}, settings=Settings(job_timeout_s=0.1))

    assert code(at.run(chat_payload(max_tokens=2048, temperature=0))) == "TIMEOUT_ERROR"


def test_a_job_that_fails_while_its_reply_grows_frees_the_engine_and_the_model(
    local: MakeLocal,
) -> None:
    chat = tiny_chat(context=4096)
    at = local(models={"chat": chat})

    def refuse(item: object) -> None:
        raise ContentRefused("content policy")

    event = {"id": "rp-1", "input": chat_payload(max_tokens=2000, temperature=0, stream=True)}
    document = at.worker.run(Envelope.of(event), Stop(), at.progress.append, refuse)

    engine = chat.models["qwen_instruct"].engine
    until(lambda: engine.num_running == 0)
    assert code(document) == "CONTENT_REFUSED"
    assert [row.num_users for row in chat.ledger.report()] == [0]


# --- json ---


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"enum": ["\ud800"]}, "Input should be valid text, without lone surrogates"),
        ({"\udfff": {}}, "Input should be valid text, without lone surrogates"),
        ({"properties": {"\ud800": {}}}, "Input should be valid text, without lone surrogates"),
        ({"const": float("nan")}, "Input should hold finite numbers only"),
        ({"maximum": float("inf")}, "Input should hold finite numbers only"),
        ({"minimum": -(10**400)}, "Input should hold finite numbers only"),
        ({"const": 10**5000}, "Input should hold finite numbers only"),
        (deep_schema(70), "Input should be nested at most 64 levels deep"),
        (deep_schema(50_000), "Input should be nested at most 64 levels deep"),
    ],
    ids=[
        "a lone surrogate",
        "a lone surrogate as a key",
        "a lone surrogate in a nested key",
        "NaN",
        "infinity",
        "a large integer",
        "an integer of 5,000 digits",
        "70 levels",
        "50,000 levels",
    ],
)
def test_a_schema_that_is_not_plain_json_is_refused(schema: dict[str, Any], message: str) -> None:
    asked = {"type": "json_schema", "json_schema": {"schema": schema}}

    assert refusal(response_format=asked) == f"response_format.json_schema.schema: {message}"


@pytest.mark.parametrize(
    "schema",
    [deep_schema(31), {"enum": ["é\U0001f600"]}, {"const": 1.7e308}, {"const": 2**70}],
    ids=["deep", "text", "a large number", "a large integer"],
)
def test_a_schema_of_plain_json_is_accepted_by_the_grammar_too(
    schema: dict[str, Any],
) -> None:
    asked = {"type": "json_schema", "json_schema": {"schema": schema}}
    job = parse(chat_payload(response_format=asked, max_tokens=3))

    reply = tiny_chat(context=256).generate(job.request)

    assert isinstance(rest_of(reply), str)


@pytest.mark.parametrize(
    "schema",
    [
        deep_schema(70),
        {"enum": ["\ud800"]},
        {"const": float("nan")},
        {"const": json.loads("1e999")},
        {"type": "string", "pattern": PATTERN},
    ],
    ids=["70 levels", "a lone surrogate", "NaN", "1e999", "too complex"],
)
def test_a_schema_that_is_not_supported_is_an_invalid_prompt(
    local: MakeLocal, schema: dict[str, Any]
) -> None:
    at = local(models={"chat": tiny_chat()})
    asked = {"type": "json_schema", "json_schema": {"schema": schema}}

    document = at.run(chat_payload(response_format=asked))

    assert code(document) == "INVALID_PROMPT"
    assert document.failure.message.startswith("response_format")


@pytest.mark.parametrize(("salt", "is_shared"), [("none", True), ("user", False)])
def test_users_share_what_is_computed_of_a_prompt_unless_the_cache_is_salted(
    local: MakeLocal, salt: CacheSalt, is_shared: bool
) -> None:
    at = local(models={"chat": tiny_chat(cache_salt=salt)}, settings=Settings(families=("chat",)))
    messages = [{"role": "user", "content": "Tell a story. " * 9}]

    def num_reused(job_id: str, user: str) -> int:
        document = at.run(chat_payload(id=job_id, user_id=user, messages=messages, max_tokens=2))
        count: int = document.reply["usage"]["prompt_tokens_reused"]
        return count

    first, other, again = num_reused("a", "ada"), num_reused("b", "grace"), num_reused("c", "ada")

    assert (first, other > 0, again > 0) == (0, is_shared, True)
