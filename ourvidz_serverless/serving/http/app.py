"""The Worker behind plain HTTP: for RunPod's load-balancing endpoints, for pods, for local work.

    python -m ourvidz_serverless.http

    POST /chat, /chat/unrestricted, /enhance    the application's chat calls, answered in place
    POST /jobs                                  any job, {"input": PAYLOAD}; ?wait=SECONDS
    GET  /job/{id}, /job/{id}/events            where it stands; POST /job/{id}/cancel
    GET  /ping, /health                         without a key
    GET  /                                      a page to look at (`page.py`), where it is wanted
    GET  /status, /worker/info, /enhancement/info, /debug/env, /memory/status, /memory/report
    POST /memory/load, /memory/unload, /emergency/operation

A failure is a status that is not 2xx and `{"success": false, "error": "<text>", ...}`, whatever
failed. The socket is open before the models are there: until then `/ping` answers 204.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import socket
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import FrameType
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ourvidz_serverless import __version__, jobs, logs, settings
from ourvidz_serverless.context import Stop, to_nobody
from ourvidz_serverless.document import Document, Failure
from ourvidz_serverless.errors import (
    DeadlinePassed,
    InternalError,
    InvalidPrompt,
    JobError,
    ModelLoadError,
    WorkerUnavailable,
)
from ourvidz_serverless.guard import access
from ourvidz_serverless.job import Identity, Job
from ourvidz_serverless.jobs.chat import ChatJob
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.loading.readahead import ReadAhead
from ourvidz_serverless.serving.http import page, request_checks
from ourvidz_serverless.serving.http.connections import KEEP_ALIVE_S, Connection
from ourvidz_serverless.serving.http.job_store import CallThreads, Docket, Ticket
from ourvidz_serverless.serving.http.openapi import EMERGENCIES, describe
from ourvidz_serverless.serving.http.request_checks import (
    MAX_REQUESTS,
    MAX_REQUESTS_WITHOUT_KEY,
    RequestChecks,
    is_known,
    key_of,
)
from ourvidz_serverless.serving.registration import Registration
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.worker import Worker

#: A body that takes longer is given up; a thread never waits for one.
BODY_TIMEOUT_S = 60.0

#: The caller waits 45 s for a reply, and 90 s for a long one: longer than the default's tokens.
LONG_REPLY_TOKENS = 512

#: How long before its caller gives up a job is stopped, so that the answer still arrives.
LAST_WORD_S = 2.0

#: How soon the end of the last job is seen by a worker that leaves, in seconds.
LEAVING_POLL_S = 0.1

#: Proxies close a connection on which nothing is said for a minute or so.
HEARTBEAT_S = 15.0

#: Most commas and brackets of a body, since no other thread runs while Python parses it. They are
#: more than a job's texts may have characters, and a picture as a data URI has one.
MAX_JSON_MARKS = 250_000
JSON_MARKS = (b",", b"[", b"{")

#: Threads that read bodies and payloads, threads that answer administrators, and how many of the
#: administrators' calls may wait.
READERS = 4
ADMINISTRATORS = 8

#: What the caller is asked to wait while the models are loaded, in seconds.
LOADING_S = 5

#: What the specification's routes ask, in the words of this job type.
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

#: A failure's status on the wire.
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


class Face:
    """What the routes share: the worker, once it is there, and the docket of its jobs."""

    def __init__(self, config: Settings) -> None:
        self.settings = config
        self.docket = Docket(config.device_places, config.chat_places, config.http_backlog)
        # A worker that cannot answer an administrator must still read what callers send.
        self.reading = CallThreads("read", READERS, MAX_REQUESTS + MAX_REQUESTS_WITHOUT_KEY)
        self.administration = CallThreads("administer", ADMINISTRATORS, ADMINISTRATORS)
        self.is_closing = False
        self._worker: Worker | None = None
        self._registration = Registration.of(config)

    @property
    def own_hosts(self) -> frozenset[str]:
        """The host names, beside loopback's, that the worker is reached by."""
        registered = self._registration.host if self._registration else None
        return frozenset([*self.settings.allowed_hosts, *([registered] if registered else [])])

    @property
    def is_ready(self) -> bool:
        return self._worker is not None and not self.is_closing and not self.is_lost

    @property
    def is_lost(self) -> bool:
        """Whether the worker's device failed, so that nothing can be served any more."""
        return self._worker is not None and self._worker.is_lost

    @property
    def worker(self) -> Worker:
        """The worker; raises WorkerUnavailable while its models are being loaded."""
        if self._worker is None:
            raise WorkerUnavailable("the models are being loaded", retry_after=LOADING_S)
        return self._worker

    def open(self, worker: Worker) -> None:
        """Serve with this worker from now on, and tell the application where, if it wants that."""
        self._worker = worker
        if self.is_closing:
            worker.close(0)
        elif self._registration:
            self._registration.announce()

    def close(self) -> None:
        """Take no further job; what runs has the grace that the settings give it."""
        self.is_closing = True
        if self._registration:
            self._registration.close()
        if self._worker:
            self._worker.close(self.settings.shutdown_grace_s)


router = APIRouter()


def _face(request: Request) -> Face:
    face: Face = request.app.state.face
    return face


TheFace = Annotated[Face, Depends(_face)]


def _check_key(request: Request, face: TheFace) -> None:
    access.check(key_of(request.headers), face.settings.worker_api_key)


NeedsKey = Depends(_check_key)
Wait = Annotated[float, Query(ge=0, le=300, description="seconds to wait for the job's end")]
Target = Annotated[str | None, Query(description="a family or a model")]
User = Annotated[str | None, Query(description="the job's `user_id`; none for a job without one")]


# --- is anybody there ---


@router.head("/ping", response_class=Response, include_in_schema=False)
@router.get("/ping", response_class=Response)
async def ping(face: TheFace) -> Response:
    """RunPod's load balancer: 200 takes requests, 204 is still loading, 503 takes no more."""
    if face.is_closing or face.is_lost:
        return Response(status_code=503)
    return JSONResponse({"status": "healthy"}) if face.is_ready else Response(status_code=204)


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(face: TheFace) -> Response:
    """Whether jobs are taken, what is served, and on what."""
    families = list(face.settings.families)
    if face.is_ready:
        return JSONResponse({**face.worker.health(), "families": families})
    if face.is_lost:
        return JSONResponse({**face.worker.health(), "families": families}, 503)
    state = "shutting_down" if face.is_closing else "loading"
    return JSONResponse({"status": state, "model_loaded": False, "families": families}, 503)


# --- chat, answered in place ---


@router.post("/chat")
async def chat(request: Request, face: TheFace) -> Response:
    """A conversation's next reply, in `response`."""
    payload = await _body(request, face)
    kind = _asked_type(payload)
    return await _reply(
        request,
        face,
        {**payload, "type": kind if kind == "chat_unrestricted" else "chat_conversation"},
    )


@router.post("/chat/unrestricted")
async def chat_unrestricted(request: Request, face: TheFace) -> Response:
    """The same in adult mode."""
    return await _reply(request, face, {**await _body(request, face), "type": "chat_unrestricted"})


@router.post("/enhance")
async def enhance(request: Request, face: TheFace) -> Response:
    """A better prompt, in `enhanced_prompt`."""
    return await _reply(request, face, {**await _body(request, face), "type": "chat_enhance"})


# --- any job ---


@router.post("/jobs")
async def submit(request: Request, face: TheFace, wait: Wait = 0) -> Response:
    """Take a job, {"input": PAYLOAD} as on RunPod's `/run`, and say its id; or wait for its end.

    A payload that does not hold is refused before the job is taken.
    """
    worker, event = face.worker, _event_of(request, **await _input(request, face))
    _check(face, event)
    await face.reading.run(jobs.parse, event, face.settings)
    ticket = face.docket.submit(worker, event)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(ticket.ended(), wait)
    if ticket.document:
        return _answer(ticket.document)
    return JSONResponse(_standing(ticket), 202)


@router.get("/job/{job_id}", dependencies=[NeedsKey])
async def job(job_id: str, request: Request, face: TheFace, user_id: User = None) -> Response:
    """Where a job stands: `queued`, `processing` with its progress, or its document."""
    ticket = _find(face, request, job_id, user_id)
    return JSONResponse(_body_of(ticket.document) if ticket.document else _standing(ticket))


@router.get("/job/{job_id}/events", dependencies=[NeedsKey])
async def job_events(
    job_id: str, request: Request, face: TheFace, user_id: User = None
) -> Response:
    """A job's progress and its end, as server-sent events."""
    return EventStream(_events(_find(face, request, job_id, user_id)))


@router.post("/job/{job_id}/cancel", dependencies=[NeedsKey])
async def cancel(job_id: str, request: Request, face: TheFace, user_id: User = None) -> Response:
    """Stop a job at its next step."""
    ticket = _find(face, request, job_id, user_id)
    face.docket.stop(ticket)
    return JSONResponse(_standing(ticket), 202)


# --- what the worker says of itself ---


@router.get("/status")
@router.get("/worker/info")
@router.get("/enhancement/info")
@router.get("/memory/status")
@router.get("/memory/report")
@router.get("/debug/env")
async def ask(request: Request, face: TheFace, target_worker: Target = None) -> Response:
    """What `admin_utilities` answers, in the words of the specification's endpoints."""
    operation = OPERATION_OF[request.url.path]
    return await _administer(
        request, face, {"operation": operation, "target_worker": target_worker}
    )


@router.post("/memory/load", dependencies=[NeedsKey])
@router.post("/memory/unload", dependencies=[NeedsKey])
async def move(request: Request, face: TheFace) -> Response:
    """Bring models to the device, or off it."""
    operation = OPERATION_OF[request.url.path]
    return await _administer(request, face, {**await _body(request, face), "operation": operation})


@router.post("/emergency/operation", dependencies=[NeedsKey])
async def emergency(request: Request, face: TheFace) -> Response:
    """One of `EMERGENCIES`, with `target_worker` and `force`."""
    body = await _body(request, face)
    if body.get("operation") not in EMERGENCIES:
        raise InvalidPrompt(f"operation: Input should be one of {', '.join(EMERGENCIES)}")
    return await _administer(request, face, body)


async def _administer(request: Request, face: Face, config: Mapping[str, Any]) -> Response:
    """An `admin_utilities` job, beside whatever computes: it waits for no thread of a job."""
    worker, event = face.worker.silent(), _event_of(request, {"type": ADMIN, "config": config})
    document = await face.administration.run(worker.run, event, Stop(), to_nobody, to_nobody)
    if document.failure:
        return _answer(document)
    result = dict(document.reply["result"])
    if result.setdefault("success", True):
        return JSONResponse(result)
    refused = result.get("reason") or "; ".join(result.get("refused", {}).values())
    return JSONResponse({**result, "error": refused}, 409)


# --- the way of a request ---


async def _body(request: Request, face: Face) -> dict[str, Any]:
    """The request's JSON object. Raises InvalidPrompt for anything else."""
    has_key = is_known(request.headers, face.settings.worker_api_key)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            raw = await _read(request, has_key)
    except TimeoutError:
        raise HTTPException(408, "the body took too long to arrive") from None
    except ClientDisconnect:
        raise HTTPException(400, "the body did not arrive") from None
    try:
        body = await face.reading.run(_parse, raw)
    except (ValueError, RecursionError):
        raise InvalidPrompt("body: Input should be JSON") from None
    if not isinstance(body, dict):
        raise InvalidPrompt("body: Input should be an object")
    return body


async def _read(request: Request, has_key: bool) -> bytes:
    raw, limit = bytearray(), request_checks.body_limit(has_key)
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > limit:
            raise request_checks.too_long(has_key)
    return bytes(raw)


def _parse(raw: bytes) -> object:
    """The value of a JSON text; raises ValueError, or InvalidPrompt for too many values."""
    if sum(map(raw.count, JSON_MARKS)) > MAX_JSON_MARKS:
        raise InvalidPrompt(f"body: Input should have at most {MAX_JSON_MARKS} commas and brackets")
    return json.loads(raw, parse_constant=_no_number)


def _no_number(constant: str) -> None:
    raise ValueError(constant)


def _asked_type(payload: Mapping[str, Any]) -> object:
    config = payload.get("config")
    in_config = config.get("job_type") if isinstance(config, Mapping) else None
    return payload.get("type") or payload.get("job_type") or in_config


async def _input(request: Request, face: Face) -> dict[str, Any]:
    """What of RunPod's envelope the worker reads."""
    body = await _body(request, face)
    s3_config = body.get("s3Config")
    if s3_config is not None and not (s3_config and isinstance(s3_config, dict)):
        raise InvalidPrompt("s3Config: Input should be an object with a bucketName")
    return {"payload": body.get("input"), "s3_config": s3_config}


def _check(face: Face, event: Mapping[str, Any]) -> None:
    # The worker asks again; but a job that is only taken says so before it is done.
    access.check(jobs.api_key(event), face.settings.worker_api_key)


def _event_of(request: Request, payload: object, s3_config: object = None) -> dict[str, Any]:
    """What RunPod would hand to the worker; the caller's key stands in the payload."""
    event: dict[str, Any] = {"id": uuid.uuid4().hex, "input": payload}
    if s3_config is not None:
        event["s3Config"] = s3_config
    if isinstance(payload, Mapping):
        own = payload.get("api_key")
        key = key_of(request.headers) if own in (None, "") else own
        event["input"] = {**payload, "api_key": key}
    return event


def _find(face: Face, request: Request, job_id: str, user_id: str | None) -> Ticket:
    """The job that the caller may see: the one of this key, this user and this id."""
    ticket = face.docket.find(Identity.of(user_id, key_of(request.headers), job_id))
    if ticket is None:
        raise HTTPException(404, "this worker remembers no job with this id, user_id and key")
    return ticket


async def _reply(request: Request, face: Face, payload: Mapping[str, Any]) -> Response:
    """A chat job's answer, on this request: whoever hangs up stops it, and no callback is posted.

    Raises DeadlinePassed shortly before the caller gives up waiting.
    """
    worker, event = face.worker.silent(), _event_of(request, payload)
    _check(face, event)
    job = await face.reading.run(jobs.parse, event, face.settings)
    ticket = face.docket.submit(worker, event)
    streams = isinstance(job, ChatJob) and job.stream
    stop = functools.partial(face.docket.stop, ticket)
    until = ticket.begun() if streams else ticket.ended()
    await _wait(request, until, stop, _reply_timeout_s(face.settings, job))
    # A job that failed before its first event has a status; who asked for events and has a whole
    # reply already gets them all the same.
    if ticket.document and (ticket.document.failure or not streams):
        return _answer(ticket.document, with_assets=False)
    return EventStream(_events(ticket), at_end=stop)


def _reply_timeout_s(config: Settings, job: Job) -> float:
    """How long the caller of a chat waits, in seconds, less what the answer's way takes."""
    is_long = isinstance(job, ChatJob) and (job.max_tokens or 0) > LONG_REPLY_TOKENS
    return max(config.http_reply_timeout_s * (2 if is_long else 1) - LAST_WORD_S, 0.0)


async def _wait(
    request: Request,
    until: Awaitable[None],
    stop: Callable[[JobError | None], None],
    timeout_s: float,
) -> None:
    """Wait for a job. Stop it with `stop` when its caller hangs up, or its time is over."""
    reached = asyncio.ensure_future(until)
    gone = asyncio.create_task(_hang_up(request))
    try:
        await asyncio.wait({reached, gone}, timeout=timeout_s, return_when="FIRST_COMPLETED")
        if reached.done():
            return
        late = DeadlinePassed(f"the reply took more than {timeout_s:g} seconds")
        stop(None if gone.done() else late)
        await asyncio.wait({reached}, timeout=LAST_WORD_S / 2)
        if not reached.done():
            raise late
    finally:
        gone.cancel()
        reached.cancel()


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- what goes back ---


class EventStream(StreamingResponse):
    """Server-sent events; `at_end` is called when the last is sent, or the client has gone."""

    def __init__(
        self, events: AsyncIterator[str], at_end: Callable[[], None] = lambda: None
    ) -> None:
        # A proxy that gathers a stream into one answer is told not to.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._at_end = at_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


async def _events(ticket: Ticket) -> AsyncIterator[str]:
    """`data: {"delta": ...}` as words come, `progress` events, and `done` or `error` at the end.

    Whoever comes later is first told the words so far, and where the job stands.
    """
    told = 0
    progress: Mapping[str, Any] = {}
    while True:
        # Of one moment: while an event is sent, the job goes on.
        news, text, now, document = ticket.news, ticket.text, ticket.progress, ticket.document
        if len(text) > told:
            yield _event({"delta": text[told:]})
            told = len(text)
        if now and now is not progress:
            yield _event(now, "progress")
            progress = now
        if document:
            yield _event(
                _body_of(document, with_assets=not text), "error" if document.failure else "done"
            )
            return
        try:
            await asyncio.wait_for(news.wait(), HEARTBEAT_S)
        except TimeoutError:
            yield ": still here\n\n"


def _event(data: Mapping[str, Any], name: str | None = None) -> str:
    line = f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
    return f"event: {name}\n{line}" if name else line


def _standing(ticket: Ticket) -> dict[str, Any]:
    body: dict[str, Any] = {"success": True, "job_id": ticket.job_id, "status": ticket.status}
    return {**body, "progress": ticket.progress} if ticket.progress else body


def _answer(document: Document, with_assets: bool = True) -> Response:
    failure = document.failure
    status = STATUS_OF[failure.code] if failure else 200
    return JSONResponse(_body_of(document, with_assets), status, _headers(failure))


def _body_of(document: Document, with_assets: bool = True) -> dict[str, Any]:
    """The document as this face's callers read it: a chat's words once, a failure as text."""
    body = {"success": document.failure is None, **document.callback()}
    if document.failure:
        body |= _failed(document.failure)
        del body["error_message"]
    if not with_assets:
        del body["assets"]
    return body


def _failed(failure: Failure) -> dict[str, Any]:
    facts = failure.as_dict()
    return {"success": False, "error": facts.pop("message"), **facts}


def _headers(failure: Failure | None) -> dict[str, str]:
    headers: dict[str, str] = {}
    if failure and failure.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(failure.retry_after)))
    if failure and failure.code == "UNAUTHORIZED":
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def _refusal(exc: Exception) -> Response:
    """The response for an error that has its own status."""
    if isinstance(exc, JobError):
        failure = Failure.of(exc)
        return JSONResponse(_failed(failure), STATUS_OF[failure.code], _headers(failure))
    assert isinstance(exc, HTTPException)
    return JSONResponse({"success": False, "error": exc.detail}, exc.status_code, exc.headers)


async def _on_error(request: Request, exc: Exception) -> Response:
    return _refusal(exc)


async def _on_bad_parameter(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    error = exc.errors()[0]
    return _refusal(InvalidPrompt(f"{error['loc'][-1]}: {error['msg']}"))


async def _on_bug(request: Request, exc: Exception) -> Response:
    logs.bug(request.url.path, exc)
    return _refusal(InternalError("an internal error; the log says where"))


# --- the process ---


def make_app(face: Face) -> FastAPI:
    """The routes over a face, which may still be loading."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await face.docket.close()
        face.reading.close()
        face.administration.close()

    app = FastAPI(
        title="ourvidz_serverless",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.face = face
    described = functools.partial(get_openapi, title=app.title, version=app.version)
    app.openapi = functools.cache(  # type: ignore[method-assign]
        lambda: describe(described(routes=app.routes), face.settings)
    )
    app.include_router(router)
    if page.is_wanted(face.settings):
        app.include_router(page.make_router(face.settings, NeedsKey, face.own_hosts))
    app.add_exception_handler(JobError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(RequestValidationError, _on_bad_parameter)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(
        RequestChecks, keys=face.settings.worker_api_key, hosts=face.own_hosts, refuse=_refusal
    )
    return app


class Server(uvicorn.Server):
    """uvicorn, except that the face hears of SIGTERM, and the process then ends with code 0."""

    def __init__(self, config: uvicorn.Config, face: Face) -> None:
        super().__init__(config)
        self._face = face

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._face.close()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen until the last job has ended: a load balancer hears 503, and callers its end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                while any(self._face.docket.counts.values()):
                    await asyncio.sleep(LEAVING_POLL_S)
        await super().shutdown(sockets)


def make_server(face: Face) -> Server:
    """The server of a face; sockets are handed to its `run`."""
    # uvicorn's own tracebacks may quote a request; ours (`logs.bug`) do not.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        make_app(face),
        http=Connection,
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        ws="none",
        timeout_graceful_shutdown=int(face.settings.shutdown_grace_s) + 10,
    )
    return Server(config, face)


def serve(config: Settings, reading: ReadAhead | None = None) -> None:
    """Answer requests until SIGTERM; jobs then get the same grace as on the queue.

    Raises ModelLoadError when the models do not load: the socket is open before they are, so that
    RunPod's load balancer hears 204 meanwhile.
    """
    face = Face(config)
    server = make_server(face)
    sockets = [_listen(config.host, port) for port in _ports(config)]
    log.info("HTTP on %s", ", ".join(f"port {each.getsockname()[1]}" for each in sockets))
    if page.is_wanted(config):
        log.info("a page at http://%s:%d/", config.host, sockets[0].getsockname()[1])
    fault: list[BaseException] = []

    def load() -> None:
        try:
            face.open(Worker.of(config, reading))
            log.info("ready")
        except BaseException as exc:
            fault.append(exc)
            server.should_exit = True

    threading.Thread(target=load, daemon=True, name="load").start()
    server.run(sockets)
    if fault:
        raise fault[0]


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises ModelLoadError if this machine does not have the address."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # A name such as localhost may mean an address of either kind.
        kind, *_, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        is_any = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=kind, dualstack_ipv6=is_any)
    except OSError as exc:
        why = exc.strerror or type(exc).__name__
        raise ModelLoadError(f"HOST, PORT: cannot listen at {host}, port {port}: {why}") from exc


def _ports(config: Settings) -> list[int]:
    health = config.port_health
    return [config.port] if health in (None, config.port) else [config.port, int(health or 0)]


def main() -> None:
    """The HTTP face as a process of its own."""
    try:
        config = settings.read_for_worker()
        logs.configure(config.log_level)
        serve(config, ReadAhead.of(config).start())
    except ModelLoadError as exc:
        sys.exit(f"cannot start: {exc.message}")


if __name__ == "__main__":
    main()
