"""OpenAI's calls: the payload that each makes, the answer of a document, and what is refused."""

from typing import Any, get_args

import pytest

from ourvidz_serverless import setting_checks
from ourvidz_serverless.document import Asset, Document, Failure
from ourvidz_serverless.errors import Code
from ourvidz_serverless.job import Job
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.serving.openai import failures, served
from ourvidz_serverless.serving.openai.calls import CALLS, Call
from ourvidz_serverless.serving.openai.chunks import Chunks
from ourvidz_serverless.serving.openai.failures import ApiError
from ourvidz_serverless.serving.openai.served import Served
from ourvidz_serverless.settings import Settings

CHAT, TEXT, IMAGES = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"

SETTINGS = Settings(families=("sdxl", "chat"), chat_base_model="base", asset_url_style="public")
SERVED = Served.of(SETTINGS)
RAIN = {"messages": [{"role": "user", "content": "What is rain?"}]}
CIRCLE = {"prompt": "a red circle"}

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_reused": 3}
REPLY = Document(
    "job-1",
    "worker-1",
    "completed",
    reply={"response": "Water.", "finish_reason": "stop", "usage": USAGE},
)


def call(route: str, **body: Any) -> Call:
    base: dict[str, Any] = {CHAT: RAIN, TEXT: {"prompt": "Rain is"}, IMAGES: CIRCLE}[route]
    return CALLS[route]({**base, **body}, SERVED)


def job(route: str, **body: Any) -> Any:
    """The job of a call's payload, as the worker parses it."""
    event = {"id": "rp-1", "input": call(route, **body).payload}
    made: Job = Envelope.of(event, SETTINGS.families).job(SETTINGS)
    return made


def error(route: str, **body: Any) -> dict[str, Any]:
    """The error of a call that is refused before it becomes a job."""
    with pytest.raises(ApiError) as refused:
        call(route, **body)
    return refused.value.error


def picture(url: str) -> Document:
    metadata = {"width": 64, "height": 32, "seed": 7, "format": "png"}
    asset = Asset("image", url, None, metadata)
    return Document("job-1", "worker-1", "completed", (asset,), {"batch_size": 1})


# --- chat ---


def test_a_chat_call_is_a_conversation_with_the_instruct_model() -> None:
    made = job(CHAT, model="qwen_instruct", temperature=0, stop=["."], seed=7)

    assert (made.type, made.model) == ("chat_conversation", "qwen_instruct")
    assert (made.temperature, made.stop, made.seed) == (0, (".",), 7)
    assert [each.content for each in made.messages] == ["What is rain?"]


def test_a_developer_message_is_a_system_prompt() -> None:
    made = job(CHAT, messages=[{"role": "developer", "content": "Be brief."}, *RAIN["messages"]])

    assert made.system_prompt == "Be brief."


def test_parts_of_the_type_text_are_lines_of_one_message() -> None:
    parts = [{"type": "text", "text": "What"}, {"type": "text", "text": "is rain?"}]

    made = job(CHAT, messages=[{"role": "user", "content": parts}])

    assert made.messages[0].content == "What\nis rain?"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_most_tokens_of_a_reply_have_two_names(name: str) -> None:
    assert job(CHAT, **{name: 9}).max_tokens == 9


def test_both_names_of_the_most_tokens_at_once_are_refused() -> None:
    assert error(CHAT, max_tokens=9, max_completion_tokens=9)["param"] == "max_tokens"


def test_a_json_schema_is_that_of_the_reply() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}

    assert job(CHAT, response_format=wanted).response_format.reply_schema == schema


def test_our_own_fields_may_stand_beside_openais() -> None:
    made = job(CHAT, top_k=5, min_p=0.1, truncate="oldest", content_tier="nsfw")

    assert (made.top_k, made.min_p, made.truncate) == (5, 0.1, "oldest")
    assert made.adult


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_a_bias_of_tokens_is_that_of_the_reply(route: str) -> None:
    assert job(route, logit_bias={"50256": -100}).request.sampling.logit_bias == {50256: -100}


@pytest.mark.parametrize("name", ["type", "prompt", "config"])
def test_a_chat_call_cannot_become_another_job(name: str) -> None:
    body = {"type": "chat_enhance", "prompt": "no", "config": {"system_prompt": "no"}}

    made = job(CHAT, **{name: body[name]})

    assert made.type == "chat_conversation"
    assert [each.content for each in made.conversation] == ["What is rain?"]


@pytest.mark.parametrize("name", ["user", "safety_identifier"])
def test_openais_user_is_the_user_of_the_job(name: str) -> None:
    assert job(CHAT, **{name: "user-1"}).user_id == "user-1"


def test_a_user_that_fits_no_storage_key_has_a_digest_as_its_name() -> None:
    first, again, other = (job(CHAT, user=each).user_id for each in ("a@b.c", "a@b.c", "d@b.c"))

    assert first == again != other
    assert first.startswith("user-")
    assert "@" not in first


def test_null_means_absent_and_asks_for_nothing() -> None:
    made = job(CHAT, tools=None, n=None, temperature=None, stream_options=None)

    assert made.temperature == 0.7


@pytest.mark.parametrize("thinking", [True, False])
def test_the_switch_of_qwen3s_template_is_our_thinking(thinking: bool) -> None:
    assert job(CHAT, chat_template_kwargs={"enable_thinking": thinking}).thinking is thinking


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": None}])
def test_template_fields_without_a_value_ask_for_nothing(kwargs: Any) -> None:
    assert job(CHAT, chat_template_kwargs=kwargs).thinking is False


# --- what is refused ---


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"enable_thinking": True, "documents": []}, "chat_template_kwargs.documents"),
        ([], "chat_template_kwargs"),
    ],
)
def test_other_fields_of_a_template_are_refused_by_their_name(kwargs: Any, param: str) -> None:
    assert error(CHAT, chat_template_kwargs=kwargs)["param"] == param


def test_both_names_of_the_switch_for_thoughts_at_once_are_refused() -> None:
    kwargs = {"enable_thinking": True}

    assert error(CHAT, chat_template_kwargs=kwargs, thinking=False)["code"] == "invalid_value"


def test_a_refused_switch_for_thoughts_has_the_callers_name() -> None:
    made = call(CHAT, chat_template_kwargs={"enable_thinking": True})

    assert made.name_of("thinking") == "chat_template_kwargs.enable_thinking"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("n", 2),
        ("n", True),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("web_search_options", {}),
        ("store", True),
        ("guided_json", {"type": "object"}),
        ("cache_salt", "mine"),
    ],
)
def test_what_this_worker_cannot_do_in_a_chat_is_refused_by_its_name(name: str, value: Any) -> None:
    assert error(CHAT, **{name: value}) == {
        "message": f"{name}: not supported by this worker",
        "type": "invalid_request_error",
        "param": name,
        "code": "unsupported_parameter",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1),
        ("tools", []),
        ("tool_choice", "auto"),
        ("parallel_tool_calls", True),
        ("logprobs", False),
        ("modalities", ["text"]),
        ("service_tier", "auto"),
        ("store", False),
    ],
)
def test_a_value_that_asks_for_nothing_is_accepted(name: str, value: Any) -> None:
    assert job(CHAT, **{name: value}).type == "chat_conversation"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "tool_call_id": "1", "content": "5"}, "messages[0].tool_call_id"),
        ({"role": "tool", "content": "5"}, "messages[0].role"),
        ({"role": "user", "name": "Ann", "content": "Hi"}, "messages[0].name"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a"}}]},
            "messages[0].content[0].type",
        ),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
            "messages[0].content[0].type",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": ["Hi"]}, "messages[0].content[0].type"),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]},
            "messages[0].tool_calls",
        ),
    ],
)
def test_a_message_with_more_than_text_is_refused_by_its_place(message: Any, param: str) -> None:
    assert error(CHAT, messages=[message])["param"] == param


@pytest.mark.parametrize(
    "body", [{"stream_options": {"include_usage": True}}, {"stream_options": 1, "stream": True}]
)
def test_options_of_a_stream_need_a_stream(body: Any) -> None:
    assert error(CHAT, **body)["param"] == "stream_options"


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_a_call_without_a_text_lacks_a_parameter(route: str) -> None:
    with pytest.raises(ApiError) as refused:
        CALLS[route]({}, SERVED)

    assert refused.value.kind == failures.MISSING


@pytest.mark.parametrize(
    ("route", "message", "param"),
    [
        (CHAT, "max_tokens: Input should be at least 1", "max_completion_tokens"),
        (CHAT, "messages.1.content: Field required", "messages[1].content"),
        (CHAT, "user_id: Input should be a valid string", "user"),
        (TEXT, "messages.0.content: too long", "prompt"),
        (IMAGES, "config.num_images: too many", "n"),
        (IMAGES, "config.resolution: no", "size"),
        (IMAGES, "config.seed: no", "seed"),
        (IMAGES, "config.scheduler: no", "config.scheduler"),
    ],
)
def test_an_error_of_the_payload_names_the_callers_field(
    route: str, message: str, param: str
) -> None:
    bodies = {
        CHAT: {"max_completion_tokens": 0, "user": "u"},
        IMAGES: {"n": 9, "size": "1x1", "seed": -1, "config": {"scheduler": "x"}},
    }
    made = call(route, **bodies.get(route, {}))

    found = made.error(Failure("INVALID_PROMPT", message, retryable=False))

    assert found.param == param
    assert found.message == f"{param}: {message.partition(': ')[2]}"


def test_every_code_of_a_failure_has_its_status_and_type() -> None:
    assert set(failures.KINDS) == set(get_args(Code))


@pytest.mark.parametrize(
    ("code", "retryable", "header"),
    [
        ("OOM_ERROR", True, "true"),
        ("CONTENT_REFUSED", False, "false"),
        ("TIMEOUT_ERROR", True, "false"),
    ],
)
def test_a_client_repeats_only_what_may_succeed_soon(
    code: Code, retryable: bool, header: str
) -> None:
    found = failures.of_failure(Failure(code, "no", retryable))

    assert found.headers["x-should-retry"] == header


# --- completions ---


@pytest.mark.parametrize("prompt", ["Rain is", ["Rain is"]])
def test_a_completion_is_a_text_for_the_base_model(prompt: Any) -> None:
    made = job(TEXT, prompt=prompt)

    assert made.request.model == "qwen_base"
    assert made.request.messages == (("user", "Rain is"),)
    assert made.max_tokens == 16


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2], [[1, 2]], [], 5])
def test_several_prompts_and_tokens_are_refused(prompt: Any) -> None:
    assert error(TEXT, prompt=prompt)["param"] == "prompt"


@pytest.mark.parametrize(("name", "value"), [("echo", True), ("suffix", "end"), ("best_of", 3)])
def test_what_this_worker_cannot_do_in_a_completion_is_refused(name: str, value: Any) -> None:
    assert error(TEXT, **{name: value})["param"] == name


# --- images ---


def test_an_image_call_is_a_job_for_sdxl() -> None:
    made = job(IMAGES, n=2, size="512x256", output_format="webp", output_compression=80)

    config = made.config
    assert made.type == "sdxl_image_fast"
    assert (made.prompt, config.num_images, config.resolution) == ("a red circle", 2, (512, 256))
    assert (config.output_format, config.quality) == ("webp", 80)


@pytest.mark.parametrize(("quality", "steps"), [("low", 15), ("hd", 25), ("high", 25)])
def test_openais_quality_chooses_the_job_type(quality: str, steps: int) -> None:
    assert job(IMAGES, quality=quality).steps == steps


def test_our_fields_of_a_picture_may_stand_beside_the_prompt_or_in_config() -> None:
    made = job(
        IMAGES,
        negative_prompt="blurry",
        seed=7,
        steps=20,
        config={"scheduler": "euler", "seed": 1},
        metadata={"reference_type": "style"},
        content_type="nsfw",
    )

    assert (made.negative_prompt, made.config.seed, made.steps) == ("blurry", 7, 20)
    assert (made.config.scheduler, made.metadata.reference_type) == ("euler", "style")
    assert made.adult


def test_pictures_come_as_base64_unless_a_url_is_asked_for() -> None:
    assert job(IMAGES).is_inline
    assert not job(IMAGES, response_format="url").is_inline


def test_pictures_for_the_callers_own_urls_come_as_urls() -> None:
    made = job(IMAGES, config={"upload_urls": ["https://bucket.example/0.png?signature=1"]})

    assert not made.is_inline
    assert len(made.upload_urls) == 1


def test_a_url_is_refused_where_an_asset_has_only_a_path() -> None:
    paths = Served.of(Settings(storage_url="s3://bucket", asset_url_style="path"))

    with pytest.raises(ApiError, match="ASSET_URL_STYLE=path"):
        CALLS[IMAGES]({**CIRCLE, "response_format": "url"}, paths)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("background", "transparent"),
        ("moderation", "low"),
        ("partial_images", 2),
        ("quality", "max"),
        ("stream", True),
        ("style", "vivid"),
        ("response_format", "tiff"),
    ],
)
def test_what_this_worker_cannot_do_with_a_picture_is_refused(name: str, value: Any) -> None:
    assert error(IMAGES, **{name: value})["param"] == name


# --- models ---


def test_the_protocols_models_are_those_of_the_setting() -> None:
    assert set(served.ROUTE_OF) == set(setting_checks.OPENAI_MODELS)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (Settings(families=("sdxl",)), ["sdxl"]),
        (Settings(families=("chat",)), ["qwen_instruct"]),
        (Settings(families=("chat",), chat_base_model="b"), ["qwen_instruct", "qwen_base"]),
        (Settings(families=("wan",)), []),
    ],
)
def test_a_worker_lists_the_models_that_it_serves(settings: Settings, names: list[str]) -> None:
    assert [each["id"] for each in Served.of(settings).listing()["data"]] == names


def test_a_worker_answers_to_further_names_of_the_models_that_it_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_MODEL_NAMES", "gpt-4o-mini=qwen_instruct, org/draw=sdxl")
    made = Served.of(Settings(families=("chat",)))

    assert made.model_for(CHAT, "gpt-4o-mini") == "qwen_instruct"
    assert [each["id"] for each in made.listing()["data"]] == ["qwen_instruct", "gpt-4o-mini"]


@pytest.mark.parametrize("name", ["gpt-4o-mini", "", 5, ["qwen_instruct"]])
def test_an_unknown_model_is_not_found_and_the_error_lists_the_known_ones(name: Any) -> None:
    found = error(CHAT, model=name)

    assert (found["code"], found["param"]) == ("model_not_found", "model")
    assert "qwen_instruct, qwen_base, sdxl" in found["message"]


def test_a_model_is_served_at_its_own_route_alone() -> None:
    assert "/v1/completions" in error(CHAT, model="qwen_base")["message"]


# --- answers ---


def test_a_reply_is_a_chat_completion_with_openais_usage() -> None:
    answer = call(CHAT).answer(REPLY)

    assert (answer["id"], answer["object"]) == ("chatcmpl-job-1", "chat.completion")
    assert answer["choices"][0]["message"]["content"] == "Water."
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_a_picture_comes_with_its_seed_and_the_jobs_metadata() -> None:
    answer = call(IMAGES).answer(picture("data:image/png;base64,QUJD"))

    assert answer["data"] == [{"b64_json": "QUJD", "seed": 7}]
    assert (answer["size"], answer["output_format"]) == ("64x32", "png")
    assert (answer["job_id"], answer["metadata"]) == ("job-1", {"batch_size": 1})


@pytest.mark.parametrize("url", ["https://bucket.example/0.png", "data:image/png;base64,QUJD"])
def test_a_picture_that_is_asked_for_as_a_url_has_its_assets_url(url: str) -> None:
    answer = call(IMAGES, response_format="url").answer(picture(url))

    assert answer["data"] == [{"url": url, "seed": 7}]


@pytest.mark.parametrize(
    ("route", "document"), [(CHAT, picture("a/0.png")), (IMAGES, picture("a/0.png"))]
)
def test_a_call_that_joined_a_job_of_another_kind_is_refused_by_its_id(
    route: str, document: Document
) -> None:
    found = call(route).error_of(document)

    assert found
    assert (found.kind, found.param) == (failures.ID_IN_USE, "id")


def test_a_stream_that_fails_ends_with_an_error() -> None:
    failed = Document(
        "job-1", "worker-1", "failed", failure=Failure("CONTENT_REFUSED", "content policy", False)
    )
    chunks = Chunks(call(CHAT, stream=True), "job-1")  # type: ignore[arg-type]

    assert chunks.piece("Wa").count("data: ") == 2
    assert '"code": "content_policy_violation"' in chunks.end(failed)
    assert chunks.end(failed).endswith("data: [DONE]\n\n")
