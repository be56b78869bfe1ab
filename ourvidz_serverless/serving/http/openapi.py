"""The HTTP service as OpenAPI 3.1, with the schemas of the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ourvidz_serverless.serving import schema as contract
from ourvidz_serverless.serving.openai import schemas as openai
from ourvidz_serverless.settings import Settings

#: The example of a chat call, the same as in the documents.
CALL = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is rain?"},
    ],
    "max_tokens": 64,
}
WISH = {"target_worker": "chat_worker", "force": False}

#: The description of a target. The schema lists only the families.
ABOUT_TARGET = "a family, or a model's name from `/memory/status`; all models if it is missing"
EMERGENCIES = ("force_unload", "predictive_load", "pressure_check")
PICTURE = {
    "type": "sdxl_image_fast",
    "user_id": "user-1",
    "prompt": "green hills under a blue sky, a yellow sun on the right",
    "config": {"resolution": "1024x576"},
}

#: Each route's body: the schema's name, and an example.
BODIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "/chat": ("ChatCall", CALL),
    "/chat/unrestricted": ("ChatCall", CALL),
    "/enhance": ("ChatCall", CALL),
    "/jobs": ("RunRequest", {"input": PICTURE}),
    "/memory/load": ("Wish", WISH),
    "/memory/unload": ("Wish", WISH),
    "/emergency/operation": ("Emergency", {**WISH, "operation": "pressure_check"}),
    **{path: (name, openai.EXAMPLES[name]) for path, name in openai.CALL_OF.items()},
}

#: The headers for a key. The second is for callers behind a gateway that uses the first.
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
KEYS: list[dict[str, list[str]]] = [{"bearer": []}, {"key": []}]

#: Routes whose response may be a stream of events.
STREAMS = ("/chat", "/chat/unrestricted", "/enhance", "/job/{job_id}/events", *openai.STREAMS)

#: Routes that may respond before a job has ended, and routes that need no key.
ACCEPTING = ("/jobs", "/job/{job_id}/cancel")
OPEN = ("/ping", "/health")

ERROR = {
    "title": "Error",
    "type": "object",
    "properties": {
        "success": {"const": False},
        "error": {"type": "string"},
        "code": {"type": "string"},
        "retryable": {"type": "boolean"},
        "retry_after": {"type": "number"},
    },
    "required": ["success", "error"],
}
ANSWER = {
    "title": "Answer",
    "type": "object",
    "properties": {"success": {"type": "boolean"}},
    "required": ["success"],
}
STATE = {"title": "State", "type": "object", "properties": {"status": {"type": "string"}}}


def describe(schema: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """FastAPI's schema, with the bodies, responses and keys of every route added."""
    target = _target(settings.families)
    schema["components"] = {"schemas": _components(target), "securitySchemes": SECURITY_SCHEMES}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            _describe(path, operation, bool(settings.worker_api_key), target)
    return schema


def _describe(
    path: str, operation: dict[str, Any], has_keys: bool, target: Mapping[str, Any]
) -> None:
    for parameter in operation.get("parameters", ()):
        if parameter["name"] == "target_worker":
            parameter["schema"] = target
    if path in BODIES:
        name, example = BODIES[path]
        content = {"schema": _reference(name), "example": example}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    name = openai.ANSWER_OF.get(path, "State" if path in OPEN else "Answer")
    answer = {"application/json": {"schema": _reference(name)}}
    stream: dict[str, Any] = {"text/event-stream": {}} if path in STREAMS else {}
    error = "OpenAIError" if path in openai.ANSWER_OF else "Error"
    failed = {"application/json": {"schema": _reference(error)}}
    operation["responses"] = {
        "200": {"description": "done", "content": {**answer, **stream}},
        "4XX": {"description": "refused", "content": failed},
        "5XX": {"description": "failed, or not served now", "content": failed},
    }
    if path in ACCEPTING:
        operation["responses"]["202"] = {"description": "under way", "content": answer}
    if path in OPEN:
        operation["responses"]["503"] = {"description": "not ready", "content": answer}
        operation["responses"]["204"] = {"description": "models are being loaded"}
    else:
        # A small body may have the key as its `api_key`. Every route accepts a header.
        operation["security"] = KEYS if has_keys else [*KEYS, {}]


def _target(families: Sequence[str]) -> dict[str, Any]:
    names = [name for family in families for name in (family, f"{family}_worker")]
    return {"type": "string", "enum": names, "description": ABOUT_TARGET}


def _components(target: Mapping[str, Any]) -> dict[str, Any]:
    chat = contract.family_schema("chat")
    chat["required"] = [name for name in chat["required"] if name != "type"]
    del chat["properties"]["type"]
    chat["properties"]["id"] = {"anyOf": [chat["properties"]["id"], {"type": "null"}]}
    # The contract lists each field in both places. Here one is enough.
    config = chat["$defs"]["ChatConfig"]["properties"]
    for name in set(config) & set(chat["properties"]):
        del config[name]
    force = contract.family_schema("admin")["properties"]["force"]
    move: dict[str, Any] = {
        "type": "object",
        "properties": {"target_worker": {"anyOf": [target, {"type": "null"}]}, "force": force},
    }
    operation = {"type": "string", "enum": [*EMERGENCIES]}
    run = contract.event_schema()
    run["properties"]["s3Config"] = {"anyOf": [run["properties"]["s3Config"], {"type": "null"}]}
    parts = {
        "ChatCall": chat,
        "RunRequest": run,
        "Wish": move,
        "Emergency": {
            **move,
            "properties": {**move["properties"], "operation": operation},
            "required": ["operation"],
        },
        "Error": ERROR,
        "Answer": ANSWER,
        "State": STATE,
        **openai.schemas(),
    }
    components: dict[str, Any] = {}
    for name, part in parts.items():
        components |= {key: _rebased(value) for key, value in part.pop("$defs", {}).items()}
        components[name] = _rebased({key: value for key, value in part.items() if key[0] != "$"})
    return components


def _rebased(part: Any) -> Any:
    """A schema whose references point to the components instead of `$defs`."""
    if isinstance(part, dict):
        return {
            key: value.replace("#/$defs/", "#/components/schemas/")
            if key == "$ref"
            else _rebased(value)
            for key, value in part.items()
        }
    return [_rebased(item) for item in part] if isinstance(part, list) else part


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
