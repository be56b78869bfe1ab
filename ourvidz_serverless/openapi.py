"""The HTTP face for machines: its routes as OpenAPI 3.1, with the contract's own schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ourvidz_serverless import contract

#: What a chat's caller sends, as the guides show it.
CALL = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is rain?"},
    ],
    "max_tokens": 64,
}
WISH = {"target_worker": "chat_worker", "force": False}
PICTURE = {
    "type": "sdxl_image_fast",
    "user_id": "user-1",
    "prompt": "a red circle on a blue background",
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
    "/emergency/operation": ("Wish", {**WISH, "operation": "pressure_check"}),
}

#: Routes whose answer may be a stream of events.
STREAMS = ("/chat", "/chat/unrestricted", "/enhance", "/job/{job_id}/events")

#: Routes that may answer before a job has ended, and those that ask for no key.
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


def describe(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's own schema, with the bodies, answers and keys of every route."""
    schema["components"] = {
        "schemas": _components(),
        "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
    }
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            _describe(path, operation)
    return schema


def _describe(path: str, operation: dict[str, Any]) -> None:
    if path in BODIES:
        name, example = BODIES[path]
        content = {"schema": _reference(name), "example": example}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    answer = {"application/json": {"schema": _reference("State" if path in OPEN else "Answer")}}
    stream: dict[str, Any] = {"text/event-stream": {}} if path in STREAMS else {}
    failed = {"application/json": {"schema": _reference("Error")}}
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
        # No key at all where the worker has none.
        operation["security"] = [{"bearer": []}, {}]


def _components() -> dict[str, Any]:
    chat = contract.family_schema("chat")
    chat["required"] = [name for name in chat["required"] if name != "type"]
    del chat["properties"]["type"]
    wish = contract.family_schema("admin")["properties"]
    names = ("operation", "target_worker", "force")
    parts = {
        "ChatCall": chat,
        "RunRequest": contract.event_schema(),
        "Wish": {"type": "object", "properties": {name: wish[name] for name in names}},
        "Error": ERROR,
        "Answer": ANSWER,
        "State": STATE,
    }
    hoisted: dict[str, Any] = {}
    for name, part in parts.items():
        hoisted |= {key: _moved(value) for key, value in part.pop("$defs", {}).items()}
        hoisted[name] = _moved({key: value for key, value in part.items() if key[0] != "$"})
    return hoisted


def _moved(part: Any) -> Any:
    """A schema whose references point to the components, where its definitions now are."""
    if isinstance(part, dict):
        return {
            key: value.replace("#/$defs/", "#/components/schemas/")
            if key == "$ref"
            else _moved(value)
            for key, value in part.items()
        }
    return [_moved(item) for item in part] if isinstance(part, list) else part


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
