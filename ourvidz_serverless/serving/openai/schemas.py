"""The protocol's calls and answers as JSON Schema, for the OpenAPI document.

A call has OpenAI's fields, and beside them our own, with the schemas of the contract.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ourvidz_serverless.serving import schema as contract
from ourvidz_serverless.serving.openai import calls

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
OBJECT: Schema = {"type": "object"}

#: The example of each call, as in the documents.
EXAMPLES: Mapping[str, Schema] = {
    "ChatCompletionCall": {
        "model": "qwen_instruct",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    },
    "CompletionCall": {"model": "qwen_base", "prompt": "The capital of France is"},
    "ImageCall": {"model": "sdxl", "prompt": "green hills under a blue sky", "size": "512x512"},
}

#: The calls and the answers by path. A GET has no call.
CALL_OF = {
    "/v1/chat/completions": "ChatCompletionCall",
    "/v1/completions": "CompletionCall",
    "/v1/images/generations": "ImageCall",
}
ANSWER_OF = {
    "/v1/chat/completions": "Completion",
    "/v1/completions": "Completion",
    "/v1/images/generations": "Pictures",
    "/v1/models": "ModelList",
    "/v1/models/{name}": "Model",
}
STREAMS = ("/v1/chat/completions", "/v1/completions")

PART: Schema = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": TEXT},
    "required": ["type", "text"],
}
MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [TEXT, {"type": "array", "items": PART}]},
    },
    "required": ["role", "content"],
}
STREAM_OPTIONS: Schema = {
    "type": "object",
    "properties": {"include_usage": {"type": "boolean"}},
    "description": "only where stream is true",
}
MODEL: Schema = {
    "title": "Model",
    "type": "object",
    "properties": {"id": TEXT, "object": {"const": "model"}, "created": {"type": "integer"}},
    "required": ["id", "object", "created"],
}

ANSWERS: Mapping[str, Schema] = {
    "Completion": {
        "title": "Completion",
        "type": "object",
        "properties": {
            "id": TEXT,
            "object": {"enum": ["chat.completion", "text_completion"]},
            "created": {"type": "integer"},
            "model": TEXT,
            "choices": {"type": "array", "items": OBJECT},
            "usage": OBJECT,
        },
        "required": ["id", "object", "created", "model", "choices", "usage"],
    },
    "Pictures": {
        "title": "Pictures",
        "type": "object",
        "properties": {
            "created": {"type": "integer"},
            "data": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"b64_json": TEXT, "url": TEXT, "seed": {"type": "integer"}},
                },
            },
        },
        "required": ["created", "data"],
    },
    "Model": MODEL,
    "ModelList": {
        "title": "ModelList",
        "type": "object",
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": MODEL}},
        "required": ["object", "data"],
    },
    "OpenAIError": {
        "title": "OpenAIError",
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": TEXT,
                    "type": TEXT,
                    "param": {"type": ["string", "null"]},
                    "code": TEXT,
                },
                "required": ["message", "type", "param", "code"],
            }
        },
        "required": ["error"],
    },
}


def schemas() -> dict[str, Schema]:
    """The schema of each call and answer by name."""
    made = (_chat_call(), _completion_call(), _image_call())
    return {each["title"]: each for each in made} | {**ANSWERS}


def _chat_call() -> Schema:
    own = contract.family_schema("chat")
    limit = own["properties"]["max_tokens"]
    theirs = {
        "model": _or_null(TEXT),
        "messages": {"type": "array", "items": MESSAGE},
        "max_completion_tokens": limit,
        "max_tokens": limit,
        "stream_options": _or_null(STREAM_OPTIONS),
    }
    fields = {**_unsupported(calls.UNSUPPORTED_IN_CHAT), **theirs}
    return _call("ChatCompletionCall", own, calls.CHAT_FIELDS, fields, ["messages"])


def _completion_call() -> Schema:
    own = contract.family_schema("chat")
    prompts = {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 1}
    theirs = {
        "model": _or_null(TEXT),
        "prompt": {"anyOf": [TEXT, prompts]},
        "max_tokens": own["properties"]["max_tokens"],
        "stream_options": _or_null(STREAM_OPTIONS),
    }
    fields = {**_unsupported(calls.UNSUPPORTED_IN_COMPLETIONS), **theirs}
    return _call("CompletionCall", own, calls.CHAT_FIELDS, fields, ["prompt"])


def _image_call() -> Schema:
    own = contract.family_schema("sdxl")
    config = own["$defs"]["SdxlConfig"]["properties"]
    names = calls.CONFIG_FIELDS - calls.CONFIG_NAMES.keys()
    theirs = {
        "model": _or_null(TEXT),
        "n": config["num_images"],
        "size": {**_or_null(TEXT), "description": "auto, or 1024x1024"},
        "quality": {"enum": [*calls.TYPE_OF_QUALITY, None]},
        "output_compression": config["quality"],
        "response_format": {"enum": ["b64_json", "url", None]},
    }
    fields = {**_unsupported(calls.UNSUPPORTED_IN_IMAGES), **theirs}
    fields |= {name: config[name] for name in sorted(names) if name in config}
    return _call("ImageCall", own, {*calls.IMAGE_FIELDS, "config"}, fields, [])


def _call(
    title: str, own: Schema, names: Iterable[str], fields: Schema, required: list[str]
) -> Schema:
    """The schema of a call, with some of our fields and all of OpenAI's."""
    properties = {name: own["properties"][name] for name in sorted(names)}
    properties["id"] = _or_null(properties["id"])
    properties |= {"user": _or_null(TEXT), **fields}
    schema = {
        "title": title,
        "type": "object",
        "properties": properties,
        "required": required,
        "$defs": own.get("$defs", {}),
    }
    contract.drop_unused(schema)
    return schema


def _unsupported(table: Mapping[str, tuple[Any, ...]]) -> Schema:
    """What is refused, except for the values that ask for nothing."""
    about = "not supported"
    return {name: {"enum": [*values, None], "description": about} for name, values in table.items()}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}
