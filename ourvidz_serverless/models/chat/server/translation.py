"""Our requests in the words of OpenAI's protocol, and what a server cannot do, refused by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ourvidz_serverless.errors import InvalidPrompt
from ourvidz_serverless.models.chat.request import ChatRequest, Message, SamplingParams
from ourvidz_serverless.settings import SERVER_FIELDS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

#: The fields of `SamplingParams` that OpenAI's protocol has, under the same names.
OPENAI_FIELDS = frozenset(
    {
        *("frequency_penalty", "logit_bias", "max_tokens", "presence_penalty", "seed", "stop"),
        *("temperature", "top_p"),
    }
)

#: What servers have beside these, by the owner that they name in `GET /v1/models`. Servers that are
#: not here have what `CHAT_SERVER_FIELDS` lists. `response_format` is that of completions.
FIELDS_OF_OWNER: Mapping[str, frozenset[str]] = {
    "vllm": frozenset(SERVER_FIELDS),
    "sglang": frozenset(SERVER_FIELDS),
}

#: Values that switch a field off. They are sent, since vLLM and SGLang take what a request leaves
#: out from the checkpoint's `generation_config.json`.
OFF: Mapping[str, Any] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

#: The marks of chat formats. A server's tokenizer takes them in a message for control tokens, with
#: which a message could end itself and begin one of another role.
CONTROL = re.compile(r"<[|\uff5c][^<>|\uff5c\s]{1,60}[|\uff5c]>|<(?:start|end)_of_turn>|\[/?INST\]")


@dataclass(frozen=True, slots=True)
class Served:
    """One of the server's models: its name there, and what it takes beside OpenAI's fields.

    With `salts` the server's cache shares nothing between users.
    """

    name: str
    fields: frozenset[str]
    salts: bool = False


def prompt_of(request: ChatRequest, kept: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """The path for a request, and its prompt: the messages at these places.

    The instruct model gets messages, the base model one text, as `build_prompt` makes it.
    """
    messages = [request.messages[index] for index in kept]
    if request.model == "qwen_base":
        return COMPLETIONS, {"prompt": "\n\n".join(text for _, text in messages)}
    return CHAT, {"messages": [{"role": role, "content": text} for role, text in messages]}


def options_of(request: ChatRequest, served: Served) -> dict[str, Any]:
    """All of a request's body but its prompt. Raises InvalidPrompt for what the server lacks."""
    if request.thinking:
        # Only some servers keep thoughts out of the reply, and none says so.
        raise _lacking("thinking")
    body = {"model": served.name, "stream": True, "stream_options": {"include_usage": True}}
    body |= _sampling(request.sampling, served)
    if served.salts and request.user:
        body["cache_salt"] = request.user
    if request.model != "qwen_base" and "chat_template_kwargs" in served.fields:
        # Templates of models that can think, such as Qwen3's, let them unless this is said.
        body["chat_template_kwargs"] = {"enable_thinking": False}
    if request.schema is None:
        return body
    if request.model == "qwen_base" and "response_format" not in served.fields:
        raise _lacking("response_format")
    return {**body, "response_format": _response_format(request.schema)}


def check_texts(messages: Sequence[Message]) -> None:
    """Raise InvalidPrompt for a text with a control token, which the server would obey."""
    for index, (_, text) in enumerate(messages):
        if CONTROL.search(text):
            raise InvalidPrompt(f"messages.{index}.content: Input should have no control tokens")


def _sampling(sampling: SamplingParams, served: Served) -> dict[str, Any]:
    body = {}
    for field in dataclasses.fields(sampling):
        name, value = field.name, getattr(sampling, field.name)
        is_off = value in (field.default, (), {})
        if name in OPENAI_FIELDS:
            # Temperature and top_p have other defaults at other servers.
            if not is_off or name in ("temperature", "top_p"):
                body[name] = list(value) if isinstance(value, tuple) else value
        elif name in served.fields:
            body[name] = OFF[name] if is_off else value
        elif not is_off:
            raise _lacking(name)
    return body


def _response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    if schema == {"type": "object"}:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}


def _lacking(field: str) -> InvalidPrompt:
    return InvalidPrompt(f"{field}: not supported by this worker")
