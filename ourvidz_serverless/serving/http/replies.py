"""What all routes do: they read a request, make its event, and wait for its reply."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from ourvidz_serverless.errors import DeadlinePassed, JobError
from ourvidz_serverless.guard import access
from ourvidz_serverless.job import Job
from ourvidz_serverless.jobs.chat import ChatJob
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.serving.http.job_store import JobRecord
from ourvidz_serverless.serving.http.request_body import read_json
from ourvidz_serverless.serving.http.request_checks import is_known, key_of
from ourvidz_serverless.serving.http.request_ids import id_of
from ourvidz_serverless.serving.http.service import HttpService
from ourvidz_serverless.settings import Settings

#: A reply with more tokens than this, the default's, is long: its caller waits twice as long.
LONG_REPLY_TOKENS = 512

#: A job is stopped this long before its caller gives up, so that the response still arrives.
RESPONSE_MARGIN_S = 2.0

#: How long the caller of a picture waits, in seconds: RunPod's load balancer ends a request after
#: 5.5 minutes.
PICTURE_TIMEOUT_S = 300.0


def service_of(request: Request) -> HttpService:
    """The state that the routes share."""
    service: HttpService = request.app.state.service
    return service


Service = Annotated[HttpService, Depends(service_of)]


def _check_key(request: Request, service: Service) -> None:
    access.check(key_of(request.headers), service.settings.worker_api_key)


NeedsKey = Depends(_check_key)


async def read_body(request: Request, service: HttpService) -> dict[str, Any]:
    """The request's JSON object; raises what `read_json` raises."""
    has_key = is_known(request.headers, service.settings.worker_api_key)
    return await read_json(request, has_key, service.readers)


def envelope_of(request: Request, payload: object, s3_config: object = None) -> Envelope:
    """The event that RunPod would give to the worker, with the caller's key in the payload."""
    event: dict[str, Any] = {"id": id_of(request.scope), "input": payload}
    if s3_config is not None:
        event["s3Config"] = s3_config
    if traceparent := request.headers.get("traceparent"):
        event["traceparent"] = traceparent
    if isinstance(payload, Mapping):
        own = payload.get("api_key")
        key = key_of(request.headers) if own in (None, "") else own
        event["input"] = {**payload, "api_key": key}
    return Envelope.of(event, service_of(request).settings.families)


def check_key_of(envelope: Envelope, service: HttpService) -> None:
    """Raise Unauthorized for a job without a key of the worker.

    The worker checks the key too, but a route may answer before the worker runs the job.
    """
    access.check(envelope.api_key, service.settings.worker_api_key)


@dataclass(frozen=True, slots=True)
class Reply:
    """A job whose caller waits for it on the request."""

    record: JobRecord
    streams: bool
    #: Ends the job at its next step.
    stop: Callable[[], None]


async def begin_reply(
    request: Request, service: HttpService, payload: Mapping[str, Any], announces: bool = False
) -> Reply:
    """Run a job until its stream begins, or until its end. A disconnect stops the job.

    No callback is posted unless `announces`. Raises JobError for an invalid payload, and
    DeadlinePassed shortly before the caller gives up.
    """
    envelope = envelope_of(request, payload)
    check_key_of(envelope, service)
    job = await service.readers.run(envelope.job, service.settings)
    record = service.job_store.submit(service.worker, envelope, announces=announces)
    streams = isinstance(job, ChatJob) and job.stream
    stop = functools.partial(service.job_store.stop, record)
    until = record.wait_for_text() if streams else record.wait_for_end()
    await _wait(request, until, stop, reply_timeout_s(service.settings, job))
    return Reply(record, streams, stop)


def reply_timeout_s(settings: Settings, job: Job) -> float:
    """How long a job may take, in seconds: its caller's patience, less the margin."""
    if not isinstance(job, ChatJob):
        return PICTURE_TIMEOUT_S
    is_long = (job.max_tokens or 0) > LONG_REPLY_TOKENS
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
