"""Replies fit a JSON schema, or the schema is refused."""

import json
from typing import Any

import pytest

from ourvidz_serverless.errors import InvalidPrompt
from ourvidz_serverless.models.chat.model import Chat
from tests.fakes.tiny_chat import ask, rest_of, tiny_chat

MESSAGES = [("system", "You are brief."), ("user", "What is rain?")]

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}

#: A pattern with more states than a matcher supports.
PATTERN = "^(a?){500}a{500}$"


def deep_schema(levels: int) -> dict[str, Any]:
    """A schema of so many nested objects; its JSON has twice as many levels, and one more."""
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"properties": {"a": schema}}
    return schema


@pytest.fixture(scope="module")
def chat() -> Chat:
    return tiny_chat(context=256)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_reply_fits_its_schema_at_any_temperature(chat: Chat, temperature: float) -> None:
    made = ask(chat, *MESSAGES, schema=SCHEMA, max_tokens=100, temperature=temperature, seed=3)

    reply = json.loads(rest_of(made))

    assert reply["a"] in ("x", "y")
    assert isinstance(reply["b"], bool)
    assert made.stats.finish_reason == "stop"


def test_a_schema_that_the_grammars_parser_rejects_is_refused(chat: Chat) -> None:
    with pytest.raises(InvalidPrompt, match=r"^response_format: "):
        ask(chat, *MESSAGES, schema=deep_schema(200), max_tokens=9)


def test_json_that_is_not_a_schema_is_refused(chat: Chat) -> None:
    with pytest.raises(InvalidPrompt, match=r"^response_format: "):
        ask(chat, *MESSAGES, schema={"type": "objct"}, max_tokens=9)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"type": "string", "pattern": PATTERN},
        {
            "type": "array",
            "prefixItems": [{"const": 1}, {"type": "string", "pattern": PATTERN}],
            "minItems": 2,
        },
    ],
    ids=["before the first token", "at the first token", "at a later token"],
)
def test_a_schema_that_is_too_complex_ends_only_its_own_reply(
    chat: Chat, schema: dict[str, Any]
) -> None:
    other = ask(chat, *MESSAGES, schema=SCHEMA, max_tokens=100, temperature=0)
    too_complex = ask(chat, *MESSAGES, schema=schema, max_tokens=150, temperature=0)

    with pytest.raises(InvalidPrompt, match=r"^response_format: .* too complex"):
        rest_of(too_complex)
    assert json.loads(rest_of(other))
