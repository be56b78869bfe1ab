"""The responses of the HTTP service: documents, failures and server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ourvidz_serverless.document import Document, Failure
from ourvidz_serverless.errors import JobError
from ourvidz_serverless.serving.http.job_store import JobRecord

#: Proxies close a connection that carries nothing for about a minute, so a stream sends a comment
#: this often, in seconds.
HEARTBEAT_S = 15.0

#: The HTTP status of each failure's code.
STATUS_OF = {
    "INVALID_PROMPT": 400,
    "CONTENT_REFUSED": 403,
    "UNAUTHORIZED": 401,
    "RATE_LIMITED": 429,
    "WORKER_UNAVAILABLE": 503,
    "MODEL_LOAD_ERROR": 503,
    "OOM_ERROR": 503,
    "REFERENCE_FRAME_ERROR": 422,
    "TIMEOUT_ERROR": 504,
    "CANCELLED": 409,
    "UPLOAD_ERROR": 502,
    "INTERNAL_ERROR": 500,
}


def document_response(document: Document, with_assets: bool = True) -> Response:
    """The document as the body, with the status of its failure, or 200."""
    failure = document.failure
    status = STATUS_OF[failure.code] if failure else 200
    return JSONResponse(document_body(document, with_assets), status, _failure_headers(failure))


def error_response(exc: Exception) -> Response:
    """The response for a JobError or an HTTPException."""
    if isinstance(exc, JobError):
        failure = Failure.of(exc)
        return JSONResponse(
            _failure_body(failure), STATUS_OF[failure.code], _failure_headers(failure)
        )
    assert isinstance(exc, HTTPException)
    return JSONResponse({"success": False, "error": exc.detail}, exc.status_code, exc.headers)


def status_body(record: JobRecord) -> dict[str, Any]:
    """The status of a job that has not ended, with its progress if there is any."""
    body: dict[str, Any] = {"success": True, "job_id": record.job_id, "status": record.status}
    return {**body, "progress": record.progress} if record.progress else body


def document_body(document: Document, with_assets: bool = True) -> dict[str, Any]:
    """The document with `success`; a failure's message is in `error`.

    Without assets for a chat: its one asset repeats the text of `response`.
    """
    body = {"success": document.failure is None, **document.callback()}
    if document.failure:
        body |= _failure_body(document.failure)
        del body["error_message"]
    if not with_assets:
        del body["assets"]
    return body


def _failure_body(failure: Failure) -> dict[str, Any]:
    facts = failure.as_dict()
    return {"success": False, "error": facts.pop("message"), **facts}


def _failure_headers(failure: Failure | None) -> dict[str, str]:
    headers: dict[str, str] = {}
    if failure and failure.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(failure.retry_after)))
    if failure and failure.code == "UNAUTHORIZED":
        headers["WWW-Authenticate"] = "Bearer"
    return headers


class EventStream(StreamingResponse):
    """Server-sent events. Calls `at_end` after the last event, or when the client disconnects."""

    def __init__(
        self, events: AsyncIterator[str], at_end: Callable[[], None] = lambda: None
    ) -> None:
        # X-Accel-Buffering: nginx and the proxies that copy it send each event at once.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


async def events_of(record: JobRecord, with_status: bool = True) -> AsyncIterator[str]:
    """A job's events: `status`, `progress`, text as `{"delta": ...}`, and `done` or `error` last.

    `status` is sent at the start and when `queued` becomes `processing`. The first events of a late
    reader are the status, the text so far and the newest progress.
    """
    sent, status = 0, ""
    progress: Mapping[str, Any] = {}
    while True:
        # Read all five at the same moment: the job goes on while an event is sent.
        changed, text, now, document, is_at = (
            record.changed,
            record.text,
            record.progress,
            record.document,
            record.status,
        )
        if with_status and is_at != status and not document:
            yield _event({"status": is_at}, "status")
            status = is_at
        if len(text) > sent:
            yield _event({"delta": text[sent:]})
            sent = len(text)
        if now and now is not progress:
            yield _event(now, "progress")
            progress = now
        if document:
            body = document_body(document, with_assets=not text)
            yield _event(body, "error" if document.failure else "done")
            return
        try:
            await asyncio.wait_for(changed.wait(), HEARTBEAT_S)
        except TimeoutError:
            yield ": still here\n\n"


def _event(data: Mapping[str, Any], name: str | None = None) -> str:
    line = f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
    return f"event: {name}\n{line}" if name else line
