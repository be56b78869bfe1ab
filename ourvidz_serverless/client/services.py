"""The three ways to reach a worker. Each has the same operations, as steps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from ourvidz_serverless.client.events import EventReader
from ourvidz_serverless.client.outcome import (
    Outcome,
    error_of,
    read_http_outcome,
    read_outcome,
    status_of,
)
from ourvidz_serverless.client.polls import Polls
from ourvidz_serverless.client.steps import (
    TIMEOUT_S,
    Answer,
    NextChunk,
    Request,
    RequestFailed,
    Steps,
    object_in,
    send,
    with_field,
)
from ourvidz_serverless.net.retries import Retry

RUNPOD_URL = "https://api.runpod.ai/v2"

ONCE = Retry(tries=1)

#: The longest `?wait=` of the HTTP service, in seconds.
MAX_WAIT_S = 300

#: The most bytes of a request: RunPod's `/run` and `/runsync`, and the HTTP service.
RUN_BYTES, RUNSYNC_BYTES, HTTP_BYTES = 10_000_000, 20_000_000, 30_000_000


class NotSupported(Exception):
    """Raised for an operation that this kind of server does not have."""


#: The header in which RunPod's load balancer names the worker that answered, and in which a caller
#: asks for a worker (https://docs.runpod.io/serverless/load-balancing/worker-affinity).
WORKER_HEADER = "X-Runpod-Worker-Id"


@dataclass(frozen=True, slots=True)
class JobName:
    """What identifies a job at its service.

    `user_id` is the payload's, and `worker` the one of several workers that has the job. Only HTTP
    needs them.
    """

    id: str
    user_id: str | None = None
    worker: str | None = None


@dataclass(frozen=True, slots=True)
class Connection:
    """Where a service is, and how it is asked. The keys are in `headers`."""

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    policy: Retry = field(default_factory=lambda: Retry(tries=4))
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return re.sub(r"(?<=://)[^/@]*@", "", self.url)

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        worker: str | None = None,
        **options: Any,
    ) -> Request:
        """A request for a path, with a JSON body if there is one, and for one worker if named."""
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        headers = {**self.headers, "Content-Type": "application/json"}
        if worker:
            # Strict, since another worker does not know the job and would answer 404.
            headers[WORKER_HEADER] = f"strict {worker}"
        return Request(method, f"{self.url}/{path}", headers, data, secrets=self.secrets, **options)


class Service(Protocol):
    """One worker, or one endpoint of RunPod with any number of them."""

    @property
    def name(self) -> str:
        """The endpoint's id, or the server's URL without its password."""
        ...

    def submit(self, body: Mapping[str, Any]) -> Steps[JobName]:
        """Queue a job."""
        ...

    def run(self, body: Mapping[str, Any], wait_s: float) -> Steps[Outcome]:
        """Run a job in one request that takes `wait_s` at most."""
        ...

    def status(self, job: JobName, is_tried_once: bool, left_s: float) -> Steps[Outcome]:
        """A job's state."""
        ...

    def stream(self, job: JobName, polls: Polls) -> Steps[Outcome | None]:
        """The pieces of a reply as items. The outcome, if the stream has it."""
        ...

    def cancel(self, job: JobName) -> Steps[None]:
        """Stop a job at its next step."""
        ...

    def health(self) -> Steps[dict[str, Any]]:
        """What the service says of itself."""
        ...


@dataclass(frozen=True, slots=True)
class Queue:
    """An endpoint of RunPod's queue."""

    endpoint: str
    to: Connection

    @property
    def name(self) -> str:
        return self.endpoint

    def submit(self, body: Mapping[str, Any]) -> Steps[JobName]:
        request = _bounded(self.to.request("POST", "run", body), RUN_BYTES, "RunPod's /run")
        answer = yield from send(request, self.to.policy, with_field("id"))
        return JobName(str(answer["id"]), _user_in(body))

    def run(self, body: Mapping[str, Any], wait_s: float) -> Steps[Outcome]:
        path, timeout_s = f"runsync?wait={int(wait_s * 1000)}", wait_s + TIMEOUT_S
        request = self.to.request("POST", path, body, timeout_s=timeout_s)
        request = _bounded(request, RUNSYNC_BYTES, "RunPod's /runsync")
        return read_outcome((yield from send(request, self.to.policy, with_field("status"))))

    def status(self, job: JobName, is_tried_once: bool, left_s: float) -> Steps[Outcome]:
        policy = ONCE if is_tried_once else self.to.policy
        request = self.to.request("GET", f"status/{quote(job.id, '')}")
        return read_outcome((yield from send(request, policy, with_field("status"))))

    def stream(self, job: JobName, polls: Polls) -> Steps[Outcome | None]:
        # After a lost answer some pieces are missing: no more are given, but the rest at the end.
        request = self.to.request("GET", f"stream/{quote(job.id, '')}")
        while True:
            answer = yield from polls.ask(send(request, ONCE, with_field("status")))
            items = (answer or {}).get("stream") or []
            for piece in () if polls.is_answer_lost else _pieces(items):
                yield from polls.give(piece)
            has_ended = answer and status_of(answer) in ("completed", "failed")
            if items:
                polls.note_news()
                polls.check()
            elif has_ended:
                return None
            else:
                yield from polls.pause()

    def cancel(self, job: JobName) -> Steps[None]:
        request = self.to.request("POST", f"cancel/{quote(job.id, '')}", {})
        yield from send(request, self.to.policy, with_field("status"))

    def health(self) -> Steps[dict[str, Any]]:
        request = self.to.request("GET", "health")
        return (yield from send(request, self.to.policy, with_field("jobs")))


@dataclass(frozen=True, slots=True)
class LocalApi:
    """The test server of RunPod's SDK, `handler.py --rp_serve_api`.

    It computes a job while it answers a request for the job's status or stream, and forgets the
    job then. So no request is tried twice, and a stream comes as a whole.
    """

    to: Connection

    @property
    def name(self) -> str:
        return self.to.shown

    def submit(self, body: Mapping[str, Any]) -> Steps[JobName]:
        request = self.to.request("POST", "run", body)
        answer = yield from send(request, self.to.policy, with_field("id"))
        return JobName(str(answer["id"]), _user_in(body))

    def run(self, body: Mapping[str, Any], wait_s: float) -> Steps[Outcome]:
        request = self.to.request("POST", "runsync", body, timeout_s=wait_s)
        return read_outcome((yield from send(request, ONCE, with_field("status"))))

    def status(self, job: JobName, is_tried_once: bool, left_s: float) -> Steps[Outcome]:
        request = self.to.request("POST", f"status/{quote(job.id, '')}", timeout_s=left_s)
        return read_outcome((yield from send(request, ONCE, with_field("status"))))

    def stream(self, job: JobName, polls: Polls) -> Steps[Outcome | None]:
        path = f"stream/{quote(job.id, '')}"
        request = self.to.request("POST", path, timeout_s=polls.left_s)
        answer = yield from send(request, ONCE, with_field("status"))
        items = answer.get("stream")
        if items is None:
            # A worker without chat does not stream. The job is still to be run.
            return None
        for piece in _pieces(items):
            yield from polls.give(piece)
        return read_outcome({**answer, "output": [each.get("output") for each in items]})

    def cancel(self, job: JobName) -> Steps[None]:
        raise NotSupported("the SDK's test server (--rp_serve_api) cannot cancel a job")
        yield

    def health(self) -> Steps[dict[str, Any]]:
        raise NotSupported("the SDK's test server (--rp_serve_api) has no /health")
        yield


@dataclass(frozen=True, slots=True)
class HttpService:
    """A worker that serves plain HTTP, `SERVE=http`, or several behind RunPod's load balancer."""

    to: Connection

    @property
    def name(self) -> str:
        return self.to.shown

    def submit(self, body: Mapping[str, Any]) -> Steps[JobName]:
        answer, worker = yield from self._post(body, 0)
        return JobName(str(answer["job_id"]), _user_in(body), worker)

    def run(self, body: Mapping[str, Any], wait_s: float) -> Steps[Outcome]:
        answer, _ = yield from self._post(body, min(int(wait_s), MAX_WAIT_S))
        return read_http_outcome(answer)

    def status(self, job: JobName, is_tried_once: bool, left_s: float) -> Steps[Outcome]:
        policy = ONCE if is_tried_once else self.to.policy
        request = self.to.request("GET", _path(job), worker=job.worker)
        return read_http_outcome((yield from send(request, policy, with_field("status"))))

    def stream(self, job: JobName, polls: Polls) -> Steps[Outcome | None]:
        while True:
            outcome = yield from polls.ask(self._read_events(job, polls))
            if outcome:
                return outcome
            yield from polls.pause()

    def _read_events(self, job: JobName, polls: Polls) -> Steps[Outcome]:
        """Server-sent events up to the last one, which has the document.

        A new reader gets the whole text so far. The caller gets what is new in it.
        """
        request = self.to.request("GET", _path(job, "/events"), worker=job.worker, streams=True)
        yield from send(request, ONCE, lambda answer: None)
        reader, text = EventReader(), ""
        while (chunk := (yield NextChunk())) is not None:
            for name, data in reader.feed(chunk):
                if name in ("done", "error"):
                    return read_http_outcome(data)
                text += data.get("delta", "")
                if len(text) > len(polls.given):
                    yield from polls.give(text[len(polls.given) :])
            polls.check()
        raise RequestFailed(request, why="the stream broke off")

    def cancel(self, job: JobName) -> Steps[None]:
        request = self.to.request("POST", _path(job, "/cancel"), {}, job.worker)
        yield from send(request, self.to.policy, with_field("status"))

    def health(self) -> Steps[dict[str, Any]]:
        request = self.to.request("GET", "health")
        return (yield from send(request, self.to.policy, with_field("status")))

    def _post(
        self, body: Mapping[str, Any], wait_s: int
    ) -> Steps[tuple[dict[str, Any], str | None]]:
        """The answer of `/jobs`, and the worker that took the job, if the answer names it.

        Raises the JobError of a job that was refused.
        """
        path, timeout_s = f"jobs?wait={wait_s}" if wait_s else "jobs", wait_s + TIMEOUT_S
        request = self.to.request("POST", path, body, timeout_s=timeout_s)
        _bounded(request, HTTP_BYTES, "the HTTP service")
        try:
            return (yield from send(request, self.to.policy, _taken, _has_job))
        except RequestFailed as exc:
            raise error_of(object_in(exc.body)) or exc from None


def _taken(answer: Answer) -> tuple[dict[str, Any], str | None]:
    """A document that names a job, and the worker that has the job."""
    return with_field("job_id")(answer), answer.headers.get(WORKER_HEADER.lower())


def _has_job(answer: Answer) -> bool:
    """Whether the job was taken. A job that failed while the request waited has a 4xx or 5xx."""
    return answer.is_ok or "job_id" in object_in(answer.body)


def _bounded(request: Request, limit: int, what: str) -> Request:
    """The request. Raises ValueError if it is larger than the server takes."""
    size = len(request.body or b"")
    if size > limit:
        raise ValueError(
            f"the request has {size / 1e6:.1f} MB, and {what} takes {limit / 1e6:.0f}: "
            "give a reference as an https URL, or make it smaller"
        )
    return request


def _pieces(items: list[Mapping[str, Any]]) -> list[str]:
    outputs = (item.get("output") for item in items)
    return [each["delta"] for each in outputs if isinstance(each, Mapping) and "delta" in each]


def _user_in(body: Mapping[str, Any]) -> str | None:
    user: str | None = body["input"].get("user_id")
    return user


def _path(job: JobName, rest: str = "") -> str:
    user = f"?{urlencode({'user_id': job.user_id})}" if job.user_id else ""
    return f"job/{quote(job.id, '')}{rest}{user}"
