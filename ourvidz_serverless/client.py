"""The Python client: submits jobs to RunPod's endpoints, with the SDK's `Endpoint`.

    client = Client({"sdxl": "abc123", "chat": ["def456", "ghi789"]}, api_key="rpa_...")
    job = client.submit({"type": "sdxl_image_fast", "user_id": "user-1", "prompt": "a red circle"})
    document = job.result()

A job goes to an endpoint of its type's family: of several, to the one with the least load. A job
that fails raises the class of `errors` that the worker raised.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import requests

from ourvidz_serverless.errors import Cancelled, DeadlinePassed, InternalError, JobError
from ourvidz_serverless.jobs import FAMILY_OF
from ourvidz_serverless.jobs.envelope import job_type
from ourvidz_serverless.net.retries import Fault, Retry, is_transient, retry

if TYPE_CHECKING:
    from runpod.endpoint import Endpoint

T = TypeVar("T")

ERRORS = {error.code: error for error in JobError.__subclasses__()}

#: The statuses of `GET /job/{id}` for the platform's.
STATUS_OF: Mapping[str, Status] = {
    "IN_QUEUE": "queued",
    "IN_PROGRESS": "processing",
    "COMPLETED": "completed",
    "FAILED": "failed",
    "CANCELLED": "failed",
    "TIMED_OUT": "failed",
}

#: The first and the longest wait between two polls for a job, in seconds.
FIRST_POLL_S, LAST_POLL_S = 0.25, 3.0
#: The time limit of one request, in seconds.
TIMEOUT_S = 30

Status = Literal["queued", "processing", "completed", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A job's state: with its `document` after its end, with its `error` if it failed."""

    status: Status
    progress: Mapping[str, Any] | None = None
    document: Mapping[str, Any] | None = None
    error: JobError | None = None


class Client:
    """Submits jobs to the endpoints of their families.

    `worker_key` is for workers with WORKER_API_KEY. `base_url` is RunPod's by default. A request
    that fails raises `Fault`, with the HTTP status, after its tries.
    """

    def __init__(
        self,
        endpoints: Mapping[str, str | Sequence[str]],
        api_key: str,
        worker_key: str | None = None,
        base_url: str | None = None,
        policy: Retry | None = None,
    ) -> None:
        self._ids = {
            family: (ids,) if isinstance(ids, str) else tuple(ids)
            for family, ids in endpoints.items()
            if ids
        }
        self._api_key, self._worker_key = api_key, worker_key
        self._base_url = base_url
        self._policy = policy or Retry(tries=4)

    def submit(
        self, payload: Mapping[str, Any], s3_config: Mapping[str, Any] | None = None
    ) -> SubmittedJob:
        """Queue a job on the endpoint of its family that has the least load."""
        api, body = self._choose(payload), self._body(payload, s3_config)
        return SubmittedJob(api, api.call(lambda: api.endpoint.run(body)).job_id)

    def run(
        self,
        payload: Mapping[str, Any],
        timeout_s: float = 600,
        s3_config: Mapping[str, Any] | None = None,
    ) -> Mapping[str, Any]:
        """Submit a job and wait for its document. Raises the JobError that it failed with."""
        return self.submit(payload, s3_config).result(timeout_s)

    def runsync(
        self,
        payload: Mapping[str, Any],
        wait_s: float = 90,
        s3_config: Mapping[str, Any] | None = None,
    ) -> Mapping[str, Any]:
        """`run` in one request, for a job that takes `wait_s` at most."""
        api, body = self._choose(payload), self._body(payload, s3_config)
        path, timeout_s = f"runsync?wait={int(wait_s * 1000)}", int(wait_s) + TIMEOUT_S
        outcome = read_outcome(api.post(path, body, timeout_s))
        return _document(outcome, wait_s)

    def job(self, endpoint: str, id: str) -> SubmittedJob:
        """A job that was submitted before, by its endpoint and RunPod's id."""
        return SubmittedJob(self._api(endpoint), id)

    def health(self, family: str) -> dict[str, Any]:
        """RunPod's counts of jobs and workers, by each of a family's endpoints."""
        return {name: self._api(name).health() for name in self._endpoints(family)}

    def _choose(self, payload: Mapping[str, Any]) -> _Api:
        apis = [self._api(name) for name in self._endpoints(self.family_of(payload))]
        return apis[0] if len(apis) == 1 else min(apis, key=_load)

    def family_of(self, payload: Mapping[str, Any]) -> str:
        """The family whose endpoint gets a job; raises ValueError for an unknown type."""
        name = job_type(payload)
        if name is None:
            asked = payload.get("type") or payload.get("job_type")
            raise ValueError(f"{asked} is no job type")
        family = FAMILY_OF[name]
        if family != "admin" or "admin" in self._ids:
            return family
        # Every worker runs admin jobs: the target's family gets the job, or else the first family.
        config = payload.get("config")
        named = config.get("target_worker") if isinstance(config, Mapping) else None
        target = str(named or payload.get("target_worker")).removesuffix("_worker")
        return target if target in self._ids else next(iter(self._ids), family)

    def _endpoints(self, family: str) -> tuple[str, ...]:
        if not self._ids.get(family):
            raise ValueError(f"no endpoint serves {family}")
        return self._ids[family]

    def _api(self, name: str) -> _Api:
        # Imported here, since it takes more than a second: the bridge needs it neither for its help
        # nor to name a setting that is missing.
        from runpod.endpoint import Endpoint

        return _Api(Endpoint(name, self._api_key), self._base_url, self._policy)

    def _body(
        self, payload: Mapping[str, Any], s3_config: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        # The payload gets an id, so that it can be sent again after a lost answer.
        job_id = payload.get("id") or payload.get("job_id") or str(uuid.uuid4())
        key = {"api_key": self._worker_key} if self._worker_key else {}
        body: dict[str, Any] = {"input": {**payload, "id": job_id, **key}}
        return {**body, "s3Config": s3_config} if s3_config else body


class SubmittedJob:
    """A job on its endpoint. Another process can use the job with its `endpoint` and `id`."""

    def __init__(self, api: _Api, id: str) -> None:
        self._api, self.id = api, id

    @property
    def endpoint(self) -> str:
        return self._api.name

    def status(self) -> Outcome:
        """The job's state now."""
        return read_outcome(self._api.get(f"status/{self.id}"))

    def result(self, timeout_s: float = 600) -> Mapping[str, Any]:
        """Wait for the document, with growing waits between polls, also through an outage.

        Raises the JobError that the job ended with. After `timeout_s` raises DeadlinePassed, or
        Fault if the platform does not answer.
        """
        polls = _Polls(self._api, timeout_s)
        while True:
            answer = polls.ask(f"status/{self.id}")
            outcome = read_outcome(answer) if answer else None
            if outcome and outcome.status in ("completed", "failed"):
                return _document(outcome, timeout_s)
            polls.pause()

    def stream(self, timeout_s: float = 600) -> Generator[str, None, Mapping[str, Any]]:
        """A streamed reply, piece by piece; the generator's value is the document.

        RunPod sends each piece once: if an answer is lost, its pieces are lost. Then no more
        pieces are yielded until the end, where the rest of the reply comes in one piece. Raises
        the errors of `result`.
        """
        # Not the SDK's stream, which never ends for a job that was cancelled.
        polls, yielded = _Polls(self._api, timeout_s), ""
        while True:
            answer = polls.ask(f"stream/{self.id}") or {}
            items = answer.get("stream") or []
            for delta in () if polls.is_answer_lost else _deltas(items):
                yielded += delta
                yield delta
            if answer and not items and STATUS_OF[answer["status"]] in ("completed", "failed"):
                break
            polls.pause(has_news=bool(items))
        document = self.result(polls.left_s)
        rest = _rest(document, yielded) if polls.is_answer_lost else ""
        if rest:
            yield rest
        return document

    def cancel(self) -> None:
        """Stop the job at its next step."""
        self._api.post(f"cancel/{self.id}", {})


class _Polls:
    """Polls for one job until the caller's time is over. Each request is tried once."""

    def __init__(self, api: _Api, timeout_s: float) -> None:
        self._api, self._timeout_s = api, timeout_s
        self._ends = time.monotonic() + timeout_s
        self._pause_s = FIRST_POLL_S
        self._failed: Fault | None = None
        #: Whether the platform may have sent an answer that was lost.
        self.is_answer_lost = False

    @property
    def left_s(self) -> float:
        return max(self._ends - time.monotonic(), 0.0)

    def ask(self, path: str) -> Any:
        """The answer; None if there is none and a later poll may get one."""
        try:
            answer = self._api.get(path, Retry(tries=1))
        except Fault as fault:
            if not fault.is_transient:
                raise
            self._failed = fault
            self.is_answer_lost |= fault.status is None or fault.status >= 500
            return None
        self._failed = None
        return answer

    def pause(self, has_news: bool = False) -> None:
        """Wait before the next poll: not at all after news, else longer each time.

        Raises Fault or DeadlinePassed if no time is left.
        """
        if not self.left_s:
            raise self._failed or _under_way(self._timeout_s)
        retry_after_s = (self._failed.retry_after if self._failed else None) or 0.0
        if not has_news:
            time.sleep(min(max(self._pause_s, retry_after_s), self.left_s))
        self._pause_s = FIRST_POLL_S if has_news else min(self._pause_s * 1.5, LAST_POLL_S)


def _deltas(items: Sequence[Mapping[str, Any]]) -> list[str]:
    outputs = (item.get("output") for item in items)
    return [each["delta"] for each in outputs if isinstance(each, Mapping) and "delta" in each]


def _rest(document: Mapping[str, Any], yielded: str) -> str:
    """The part of a reply after the pieces that were yielded; empty if they do not match it."""
    reply = document.get("response") or document.get("enhanced_prompt") or ""
    return reply.removeprefix(yielded) if reply.startswith(yielded) else ""


def read_outcome(answer: Mapping[str, Any]) -> Outcome:
    """The state in an answer of RunPod's `/status` or `/runsync`.

    The output is the document, or, if the worker serves chat, a list that ends with the document.
    """
    status, output = STATUS_OF[answer["status"]], answer.get("output")
    last = output[-1] if isinstance(output, list) and output else output
    document = last if isinstance(last, Mapping) and "job_id" in last else None
    if status in ("queued", "processing"):
        return Outcome(status, progress=last if isinstance(last, Mapping) else None)
    if status == "completed" and document and document["status"] == "completed":
        return Outcome(status, document=document)
    return Outcome("failed", document=document, error=_error(answer, document))


def _error(answer: Mapping[str, Any], document: Mapping[str, Any] | None) -> JobError:
    failure = (document or {}).get("failure") or _parsed(answer.get("error"))
    if failure:
        error = ERRORS.get(failure["code"], InternalError)
        return error(failure["message"], retry_after=failure.get("retry_after"))
    if answer["status"] == "CANCELLED":
        return Cancelled("the job was cancelled")
    if answer["status"] == "TIMED_OUT":
        return DeadlinePassed("the platform ended the job")
    return InternalError(str(answer.get("error") or "the job has no result"))


def _parsed(error: object) -> Mapping[str, Any] | None:
    try:
        failure = json.loads(error) if isinstance(error, str) else None
    except ValueError:
        return None
    return failure if isinstance(failure, Mapping) and "code" in failure else None


def _document(outcome: Outcome, waited_s: float) -> Mapping[str, Any]:
    if outcome.error:
        raise outcome.error
    if outcome.document is None:
        raise _under_way(waited_s)
    return outcome.document


def _under_way(waited_s: float) -> DeadlinePassed:
    return DeadlinePassed(f"the job is still under way after {waited_s:g} seconds")


def _load(api: _Api) -> float:
    """An endpoint's jobs for each of its workers; infinite if unknown."""
    try:
        health = api.health()
    except Fault:
        return float("inf")
    jobs, workers = health["jobs"], health["workers"]
    waiting: float = jobs["inQueue"] + jobs["inProgress"]
    return waiting / max(int(workers.get("running", 0) + workers.get("idle", 0)), 1)


class _Api:
    """One endpoint's operations, with tries."""

    def __init__(self, endpoint: Endpoint, base_url: str | None, policy: Retry) -> None:
        self.endpoint, self._policy = endpoint, policy
        if base_url:
            endpoint.rp_client.endpoint_url_base = base_url

    @property
    def name(self) -> str:
        return str(self.endpoint.endpoint_id)

    def get(self, path: str, policy: Retry | None = None) -> Any:
        client, path = self.endpoint.rp_client, f"{self.name}/{path}"
        return self.call(lambda: _check_field("status", client.get(path, TIMEOUT_S)), policy)

    def post(self, path: str, body: Mapping[str, Any], timeout_s: int = TIMEOUT_S) -> Any:
        client, path = self.endpoint.rp_client, f"{self.name}/{path}"
        return self.call(lambda: _check_field("status", client.post(path, body, timeout_s)))

    def health(self) -> Any:
        return self.call(lambda: _check_field("jobs", self.endpoint.health(TIMEOUT_S)))

    def call(self, request: Callable[[], T], policy: Retry | None = None) -> T:
        """The result of a request; raises Fault after its tries."""
        return retry(lambda: _with_faults(request), on=is_transient, policy=policy or self._policy)


def _check_field(field: str, answer: Any) -> Any:
    """The answer. Raises KeyError for an answer without its field, which is incomplete."""
    if not (isinstance(answer, Mapping) and field in answer):
        raise KeyError(field)
    return answer


def _with_faults(request: Callable[[], T]) -> T:
    """The result of a request. Raises Fault, with the HTTP status, for the SDK's errors."""
    try:
        return request()
    except requests.HTTPError as exc:
        answer = exc.response
        raise Fault(answer.status_code, answer.headers.get("Retry-After")) from exc
    # KeyError: the answer lacks its field.
    except (requests.RequestException, OSError, KeyError) as exc:
        raise Fault(None) from exc
    except RuntimeError as exc:  # The SDK raises it for a wrong API key.
        raise Fault(401) from exc
