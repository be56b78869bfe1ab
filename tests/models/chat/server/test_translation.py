"""Our requests in the words of OpenAI's protocol, and what a server lacks."""

import dataclasses
from typing import Any

import pytest

from ourvidz_serverless.errors import InvalidPrompt
from ourvidz_serverless.models.chat import truncation
from ourvidz_serverless.models.chat.request import ChatRequest, SamplingParams
from ourvidz_serverless.models.chat.server.translation import (
    FIELDS_OF_OWNER,
    OPENAI_FIELDS,
    Served,
    check_texts,
    options_of,
    prompt_of,
)
from ourvidz_serverless.settings import SERVER_FIELDS

MESSAGES = (("system", "Be brief."), ("user", "What is rain?"))
PLAIN = Served("their-name", frozenset())
VLLM = Served("their-name", FIELDS_OF_OWNER["vllm"])


def request(**changes: Any) -> ChatRequest:
    sampling = {"max_tokens": 5, **changes.pop("sampling", {})}
    return ChatRequest(MESSAGES, SamplingParams(**sampling), **changes)


def test_a_conversation_is_sent_as_messages_and_a_text_for_the_base_model_as_a_prompt() -> None:
    conversation = [{"role": role, "content": text} for role, text in MESSAGES]

    assert prompt_of(request(), [0, 1]) == ("/v1/chat/completions", {"messages": conversation})
    assert prompt_of(request(model="qwen_base"), [0, 1]) == (
        "/v1/completions",
        {"prompt": "Be brief.\n\nWhat is rain?"},
    )


def test_a_server_of_openais_fields_gets_those_alone() -> None:
    sampling = {"temperature": 0.7, "presence_penalty": 0.5, "seed": 3, "stop": ("a", "b")}

    assert options_of(request(sampling=sampling), PLAIN) == {
        "model": "their-name",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
        "temperature": 0.7,
        "top_p": 1.0,
        "presence_penalty": 0.5,
        "seed": 3,
        "stop": ["a", "b"],
    }


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("top_k", {"sampling": {"top_k": 5}}),
        ("repetition_penalty", {"sampling": {"repetition_penalty": 1.1}}),
        ("response_format", {"model": "qwen_base", "schema": {"type": "object"}}),
    ],
)
def test_a_field_that_a_server_lacks_is_refused_by_its_name(
    field: str, changes: dict[str, Any]
) -> None:
    assert options_of(request(**changes), VLLM)
    with pytest.raises(InvalidPrompt, match=f"^{field}: not supported by this worker"):
        options_of(request(**changes), PLAIN)


def test_a_model_that_can_think_is_told_not_to() -> None:
    told = {"enable_thinking": False}

    assert options_of(request(), VLLM)["chat_template_kwargs"] == told
    assert "chat_template_kwargs" not in options_of(request(model="qwen_base"), VLLM)
    assert "chat_template_kwargs" not in options_of(request(), PLAIN)


@pytest.mark.parametrize("served", [PLAIN, VLLM])
def test_thoughts_are_refused(served: Served) -> None:
    with pytest.raises(InvalidPrompt, match=r"^thinking: not supported by this worker"):
        options_of(request(thinking=True), served)


def test_every_field_of_a_request_is_one_that_the_translation_knows() -> None:
    sampling = {field.name for field in dataclasses.fields(SamplingParams)}

    assert sampling <= OPENAI_FIELDS | set(SERVER_FIELDS)
    # A new field needs a line in `translation.py`, or a refusal there.
    assert {field.name for field in dataclasses.fields(ChatRequest)} == {
        *("messages", "sampling", "model", "truncate", "schema", "thinking", "user")
    }


def test_a_server_whose_cache_is_salted_gets_the_user_as_the_salt() -> None:
    salting = dataclasses.replace(VLLM, salts=True)

    assert options_of(request(user="ada"), salting)["cache_salt"] == "ada"
    assert "cache_salt" not in options_of(request(user="ada"), VLLM)


def test_vllm_is_told_what_is_off_since_it_would_take_the_checkpoints_own_values() -> None:
    off = options_of(request(), VLLM)

    assert (off["top_k"], off["repetition_penalty"]) == (-1, 1.0)
    assert options_of(request(sampling={"top_k": 5}), VLLM)["top_k"] == 5


@pytest.mark.parametrize(
    ("schema", "format_"),
    [
        ({"type": "object"}, {"type": "json_object"}),
        (
            {"enum": [1]},
            {"type": "json_schema", "json_schema": {"name": "reply", "schema": {"enum": [1]}}},
        ),
    ],
)
def test_a_schema_is_sent_in_openais_words(schema: dict[str, Any], format_: dict[str, Any]) -> None:
    assert options_of(request(schema=schema), PLAIN)["response_format"] == format_


@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "a<|im_start|>system", "<|eot_id|>", "<end_of_turn>", "[/INST]", "<｜User｜>"],
)
def test_a_message_with_a_control_token_is_refused(text: str) -> None:
    with pytest.raises(InvalidPrompt, match=r"^messages\.1\.content: Input should have no control"):
        check_texts([("system", "Be brief."), ("user", text)])


@pytest.mark.parametrize(
    "text", ["a <b> c", "x | y", "<|", "1 < 2 |> f", "[INSTALL]", "<s>old</s>"]
)
def test_a_message_with_other_signs_is_sent(text: str) -> None:
    check_texts([("user", text)])


# --- truncation ---


@pytest.mark.parametrize(
    ("roles", "groups"),
    [
        ("u", []),
        ("suau", [[1, 2]]),
        ("uaauu", [[0, 1, 2], [3]]),
        ("auu", [[0], [1]]),
        ("usau", [[0, 2]]),
    ],
)
def test_replies_go_with_the_message_before_them_and_system_prompts_stay(
    roles: str, groups: list[list[int]]
) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}

    assert truncation.droppable([(names[role], "x") for role in roles]) == groups


@pytest.mark.parametrize("most", range(9))
def test_the_least_number_of_messages_goes(most: int) -> None:
    for needed in range(most + 1):
        assert truncation.fewest(most, lambda count: count >= needed) == needed  # noqa: B023
    assert truncation.fewest(most, lambda count: False) is None
