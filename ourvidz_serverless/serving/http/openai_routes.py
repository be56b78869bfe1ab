"""OpenAI's protocol over HTTP.

    POST /v1/chat/completions, /v1/completions     a reply, or its stream
    POST /v1/images/generations                    pictures
    GET  /v1/models, /v1/models/{name}             what this worker serves

An OpenAI client has `/v1` in its base URL, and one of the worker's keys as its key.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ourvidz_serverless.document import Failure
from ourvidz_serverless.errors import JobError
from ourvidz_serverless.guard import access
from ourvidz_serverless.serving.http.job_store import JobRecord
from ourvidz_serverless.serving.http.replies import (
    NeedsKey,
    Service,
    begin_reply,
    read_body,
)
from ourvidz_serverless.serving.http.request_checks import key_of
from ourvidz_serverless.serving.http.responses import HEARTBEAT, EventStream, texts_of
from ourvidz_serverless.serving.http.service import HttpService
from ourvidz_serverless.serving.openai import failures
from ourvidz_serverless.serving.openai.calls import CALLS, ImageCall, TextCall
from ourvidz_serverless.serving.openai.chunks import Chunks
from ourvidz_serverless.serving.openai.failures import ApiError, Kind

PREFIX = "/v1/"

router = APIRouter()


@router.get("/v1/models", dependencies=[NeedsKey])
async def list_models(service: Service) -> Response:
    """The models that this worker serves."""
    return JSONResponse(service.openai_models.listing())


@router.get("/v1/models/{name:path}", dependencies=[NeedsKey])
async def find_model(name: str, service: Service) -> Response:
    """One of these models."""
    return JSONResponse(service.openai_models.model(name))


@router.post("/v1/chat/completions")
@router.post("/v1/completions")
@router.post("/v1/images/generations")
async def answer(request: Request, service: Service) -> Response:
    """The answer to a call, or the stream of a reply."""
    body = await read_body(request, service)
    _check_key_in(request, body, service)
    call = CALLS[request.url.path](body, service.openai_models)
    # As for the same job by the worker's own routes: `/chat` posts no callback, `/jobs` does.
    try:
        reply = await begin_reply(request, service, call.payload, isinstance(call, ImageCall))
    except JobError as exc:
        raise call.error(Failure.of(exc)) from None
    document = reply.record.document
    if document and (error := call.error_of(document)):
        raise error
    if isinstance(call, TextCall) and reply.streams:
        return EventStream(_events(reply.record, call), at_end=reply.stop)
    assert document
    return JSONResponse(call.answer(document))


def is_route(path: str) -> bool:
    """Whether a path belongs to the protocol, even if nothing is there."""
    return path.startswith(PREFIX)


def error_response(exc: Exception, path: str) -> Response:
    """The response for an ApiError, a JobError or an HTTPException, in OpenAI's shape."""
    if isinstance(exc, JobError):
        exc = failures.of_failure(Failure.of(exc))
    if isinstance(exc, ApiError):
        return JSONResponse(exc.body, exc.kind.status, exc.headers)
    assert isinstance(exc, HTTPException)
    error = ApiError(
        Kind(exc.status_code, failures.INVALID_REQUEST, "invalid_request"), str(exc.detail)
    )
    if exc.status_code == failures.UNKNOWN_URL.status:
        error = failures.unknown_url(path)
    return JSONResponse(error.body, exc.status_code, {**error.headers, **(exc.headers or {})})


def _check_key_in(request: Request, body: Mapping[str, Any], service: HttpService) -> None:
    """Check the caller's key before the body is judged; the body may have it as `api_key`."""
    own = body.get("api_key")
    key = own if isinstance(own, str) and own else key_of(request.headers)
    access.check(key, service.settings.worker_api_key)


async def _events(record: JobRecord, call: TextCall) -> AsyncIterator[str]:
    chunks = Chunks(call, record.job_id)
    async for text in texts_of(record):
        yield chunks.piece(text) if text else HEARTBEAT
    assert record.document
    yield chunks.end(record.document)
