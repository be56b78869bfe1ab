"""The routes of the HTTP service.

    POST /chat, /chat/unrestricted, /enhance    chat calls, answered on the request
    POST /jobs                                  any job, {"input": PAYLOAD}; ?wait=SECONDS
    GET  /job/{id}, /job/{id}/events            a job's status; POST /job/{id}/cancel
    GET  /ping, /health                         without a key
    GET  /status, /worker/info, /enhancement/info, /debug/env, /memory/status, /memory/report
    POST /memory/load, /memory/unload, /emergency/operation

The web page (`page.py`) has its own routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ourvidz_serverless.context import Stop, discard
from ourvidz_serverless.errors import DeadlinePassed, InvalidPrompt, JobError
from ourvidz_serverless.guard import access
from ourvidz_serverless.job import Identity, Job
from ourvidz_serverless.jobs.chat import ChatJob
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.serving.http.job_store import JobRecord
from ourvidz_serverless.serving.http.openapi import EMERGENCIES
from ourvidz_serverless.serving.http.request_body import read_json
from ourvidz_serverless.serving.http.request_checks import is_known, key_of
from ourvidz_serverless.serving.http.responses import (
    EventStream,
    document_body,
    document_response,
    events_of,
    status_body,
)
from ourvidz_serverless.serving.http.service import HttpService
from ourvidz_serverless.settings import Settings

#: A reply with more tokens than this, the default's, is long: its caller waits twice as long.
LONG_REPLY_TOKENS = 512

#: A job is stopped this long before its caller gives up, so that the response still arrives.
RESPONSE_MARGIN_S = 2.0

#: The `admin_utilities` operation of each route.
ADMIN = "admin_utilities"
OPERATION_OF = {
    "/status": "status",
    "/worker/info": "info",
    "/enhancement/info": "enhancement_info",
    "/memory/status": "memory_status",
    "/memory/report": "memory_report",
    "/debug/env": "debug_env",
    "/memory/load": "memory_load",
    "/memory/unload": "memory_unload",
}

router = APIRouter()


def _service(request: Request) -> HttpService:
    service: HttpService = request.app.state.service
    return service


Service = Annotated[HttpService, Depends(_service)]


def _check_key(request: Request, service: Service) -> None:
    access.check(key_of(request.headers), service.settings.worker_api_key)


NeedsKey = Depends(_check_key)
Wait = Annotated[float, Query(ge=0, le=300, description="seconds to wait for the job's end")]
Target = Annotated[str | None, Query(description="a family or a model")]
User = Annotated[str | None, Query(description="the job's `user_id`; none for a job without one")]


# --- health ---


@router.head("/ping", response_class=Response, include_in_schema=False)
@router.get("/ping", response_class=Response)
async def ping(service: Service) -> Response:
    """RunPod's load balancer: 200 takes requests, 204 is still loading, 503 takes no more."""
    if service.is_closing or service.is_lost:
        return Response(status_code=503)
    return JSONResponse({"status": "healthy"}) if service.is_ready else Response(status_code=204)


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(service: Service) -> Response:
    """Whether jobs are taken, what is served, and on what."""
    families = list(service.settings.families)
    if service.is_ready:
        return JSONResponse({**service.worker.health(), "families": families})
    if service.is_lost:
        return JSONResponse({**service.worker.health(), "families": families}, 503)
    state = "shutting_down" if service.is_closing else "loading"
    return JSONResponse({"status": state, "model_loaded": False, "families": families}, 503)


# --- chat, answered on the request ---


@router.post("/chat")
async def chat(request: Request, service: Service) -> Response:
    """A conversation's next reply, in `response`."""
    payload = await _read_body(request, service)
    is_unrestricted = _job_type_in(payload) == "chat_unrestricted"
    kind = "chat_unrestricted" if is_unrestricted else "chat_conversation"
    return await _reply(request, service, {**payload, "type": kind})


@router.post("/chat/unrestricted")
async def chat_unrestricted(request: Request, service: Service) -> Response:
    """The same in adult mode."""
    payload = await _read_body(request, service)
    return await _reply(request, service, {**payload, "type": "chat_unrestricted"})


@router.post("/enhance")
async def enhance(request: Request, service: Service) -> Response:
    """A better prompt, in `enhanced_prompt`."""
    payload = await _read_body(request, service)
    return await _reply(request, service, {**payload, "type": "chat_enhance"})


# --- any job ---


@router.post("/jobs")
async def submit(request: Request, service: Service, wait: Wait = 0) -> Response:
    """Take a job, {"input": PAYLOAD} as on RunPod's `/run`, and say its id; or wait for its end.

    A payload that does not hold is refused before the job is taken.
    """
    envelope = _envelope_of(request, **await _read_job(request, service))
    _check_key_of(envelope, service)
    await service.readers.run(envelope.job, service.settings)
    record = service.job_store.submit(service.worker, envelope)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(record.wait_for_end(), wait)
    if record.document:
        return document_response(record.document)
    return JSONResponse(status_body(record), 202)


@router.get("/job/{job_id}", dependencies=[NeedsKey])
async def job(job_id: str, request: Request, service: Service, user_id: User = None) -> Response:
    """Where a job stands: `queued`, `processing` with its progress, or its document."""
    record = _find(service, request, job_id, user_id)
    return JSONResponse(document_body(record.document) if record.document else status_body(record))


@router.get("/job/{job_id}/events", dependencies=[NeedsKey])
async def job_events(
    job_id: str, request: Request, service: Service, user_id: User = None
) -> Response:
    """A job's status, its progress and its end, as server-sent events."""
    return EventStream(events_of(_find(service, request, job_id, user_id)))


@router.post("/job/{job_id}/cancel", dependencies=[NeedsKey])
async def cancel(job_id: str, request: Request, service: Service, user_id: User = None) -> Response:
    """Stop a job at its next step."""
    record = _find(service, request, job_id, user_id)
    service.job_store.stop(record)
    return JSONResponse(status_body(record), 202)


# --- administration ---


@router.get("/status")
@router.get("/worker/info")
@router.get("/enhancement/info")
@router.get("/memory/status")
@router.get("/memory/report")
@router.get("/debug/env")
async def ask(request: Request, service: Service, target_worker: Target = None) -> Response:
    """What `admin_utilities` answers, in the words of the specification's endpoints."""
    operation = OPERATION_OF[request.url.path]
    config = {"operation": operation, "target_worker": target_worker}
    return await _administer(request, service, config)


@router.post("/memory/load", dependencies=[NeedsKey])
@router.post("/memory/unload", dependencies=[NeedsKey])
async def move(request: Request, service: Service) -> Response:
    """Bring models to the device, or off it."""
    body = await _read_body(request, service)
    return await _administer(
        request, service, {**body, "operation": OPERATION_OF[request.url.path]}
    )


@router.post("/emergency/operation", dependencies=[NeedsKey])
async def emergency(request: Request, service: Service) -> Response:
    """One of `EMERGENCIES`, with `target_worker` and `force`."""
    body = await _read_body(request, service)
    if body.get("operation") not in EMERGENCIES:
        raise InvalidPrompt(f"operation: Input should be one of {', '.join(EMERGENCIES)}")
    return await _administer(request, service, body)


async def _administer(
    request: Request, service: HttpService, config: Mapping[str, Any]
) -> Response:
    """The response to an `admin_utilities` job, which runs in a thread of its own kind."""
    envelope = _envelope_of(request, {"type": ADMIN, "config": config})
    run = functools.partial(service.worker.run, announces=False)
    document = await service.administrators.run(run, envelope, Stop(), discard)
    if document.failure:
        return document_response(document)
    result = dict(document.reply["result"])
    if result.setdefault("success", True):
        return JSONResponse(result)
    refused = result.get("reason") or "; ".join(result.get("refused", {}).values())
    return JSONResponse({**result, "error": refused}, 409)


# --- from a request to an event ---


async def _read_body(request: Request, service: HttpService) -> dict[str, Any]:
    has_key = is_known(request.headers, service.settings.worker_api_key)
    return await read_json(request, has_key, service.readers)


async def _read_job(request: Request, service: HttpService) -> dict[str, Any]:
    """The parts of RunPod's envelope that the worker reads: the payload and `s3Config`."""
    body = await _read_body(request, service)
    s3_config = body.get("s3Config")
    if s3_config is not None and not (s3_config and isinstance(s3_config, dict)):
        raise InvalidPrompt("s3Config: Input should be an object with a bucketName")
    return {"payload": body.get("input"), "s3_config": s3_config}


def _job_type_in(payload: Mapping[str, Any]) -> object:
    config = payload.get("config")
    in_config = config.get("job_type") if isinstance(config, Mapping) else None
    return payload.get("type") or payload.get("job_type") or in_config


def _envelope_of(request: Request, payload: object, s3_config: object = None) -> Envelope:
    """The event that RunPod would give to the worker, with the caller's key in the payload."""
    event: dict[str, Any] = {"id": uuid.uuid4().hex, "input": payload}
    if s3_config is not None:
        event["s3Config"] = s3_config
    if traceparent := request.headers.get("traceparent"):
        event["traceparent"] = traceparent
    if isinstance(payload, Mapping):
        own = payload.get("api_key")
        key = key_of(request.headers) if own in (None, "") else own
        event["input"] = {**payload, "api_key": key}
    return Envelope.of(event, _service(request).settings.families)


def _check_key_of(envelope: Envelope, service: HttpService) -> None:
    # The worker checks the key too, but `/jobs` may answer before the worker runs the job.
    access.check(envelope.api_key, service.settings.worker_api_key)


def _find(service: HttpService, request: Request, job_id: str, user_id: str | None) -> JobRecord:
    """The job of the caller's key, this user and this id. Raises HTTPException (404)."""
    record = service.job_store.find(Identity.of(user_id, key_of(request.headers), job_id))
    if record is None:
        raise HTTPException(404, "this worker remembers no job with this id, user_id and key")
    return record


# --- a chat's reply ---


async def _reply(request: Request, service: HttpService, payload: Mapping[str, Any]) -> Response:
    """The response to a chat job. No callback is posted, and a disconnect stops the job.

    Raises DeadlinePassed shortly before the caller gives up.
    """
    envelope = _envelope_of(request, payload)
    _check_key_of(envelope, service)
    job = await service.readers.run(envelope.job, service.settings)
    record = service.job_store.submit(service.worker, envelope, announces=False)
    streams = isinstance(job, ChatJob) and job.stream
    stop = functools.partial(service.job_store.stop, record)
    until = record.wait_for_text() if streams else record.wait_for_end()
    await _wait(request, until, stop, reply_timeout_s(service.settings, job))
    # A stream that failed before its first event still gets an HTTP status. A stream whose reply
    # is already complete is sent as events all the same.
    if record.document and (record.document.failure or not streams):
        return document_response(record.document, with_assets=False)
    # Without `status` events: some callers read each event of a chat as a piece of its text.
    return EventStream(events_of(record, with_status=False), at_end=stop)


def reply_timeout_s(settings: Settings, job: Job) -> float:
    """How long a chat job may take, in seconds: its caller's patience, less the margin."""
    is_long = isinstance(job, ChatJob) and (job.max_tokens or 0) > LONG_REPLY_TOKENS
    return max(settings.http_reply_timeout_s * (2 if is_long else 1) - RESPONSE_MARGIN_S, 0.0)


async def _wait(
    request: Request,
    until: Awaitable[None],
    stop: Callable[[JobError | None], None],
    timeout_s: float,
) -> None:
    """Wait for a job. Calls `stop` if the caller disconnects or the time is over.

    Raises DeadlinePassed if the stopped job does not end soon.
    """
    reached = asyncio.ensure_future(until)
    disconnected = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait(
            {reached, disconnected}, timeout=timeout_s, return_when="FIRST_COMPLETED"
        )
        if reached.done():
            return
        late = DeadlinePassed(f"the reply took more than {timeout_s:g} seconds")
        stop(None if disconnected.done() else late)
        await asyncio.wait({reached}, timeout=RESPONSE_MARGIN_S / 2)
        if not reached.done():
            raise late
    finally:
        disconnected.cancel()
        reached.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
