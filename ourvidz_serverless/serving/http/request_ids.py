"""An id for each request, in the header `x-request-id` of its response.

A job that names no id of its own gets its request's, so that the id leads to the job's lines in the
log. OpenAI's clients read the header (`_request_id` of an answer, `request_id` of an error).
"""

from __future__ import annotations

import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"


class RequestIds:
    """ASGI middleware: makes an id, and adds it to the response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(HEADER, id_of(scope))
            await send(message)

        await self._app(scope, receive, send_with_id)


def id_of(scope: Scope) -> str:
    """The id of a request: 32 hex digits."""
    state = scope.setdefault("state", {})
    request_id: str = state.setdefault("request_id", uuid.uuid4().hex)
    return request_id
