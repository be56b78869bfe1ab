"""What both clients share: how they are made, and every operation as steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ourvidz_serverless.client.assets import Place
from ourvidz_serverless.client.outcome import Document, Outcome, document_of
from ourvidz_serverless.client.payload import body_of
from ourvidz_serverless.client.polls import Polls
from ourvidz_serverless.client.routes import Endpoints, OneService, Payload, Routes, least_loaded
from ourvidz_serverless.client.services import (
    RUNPOD_URL,
    Connection,
    HttpService,
    JobName,
    LocalApi,
    Service,
)
from ourvidz_serverless.client.steps import Item, Steps
from ourvidz_serverless.net.retries import Retry

#: How often a request is tried.
POLICY = Retry(tries=4)

LOCAL_URL = "http://localhost:8000"


@dataclass(slots=True)
class JobState:
    """A submitted job: its service, its name, and its outcome once that is known."""

    service: Service
    name: JobName
    ended: Outcome | None = field(default=None, repr=False)


class Calls:
    """A client's configuration. `Client` and `AsyncClient` carry out its steps."""

    def __init__(
        self,
        endpoints: Mapping[str, str | Sequence[str]],
        api_key: str,
        worker_key: str | None = None,
        base_url: str | None = None,
        policy: Retry | None = None,
        *,
        assets: str | Path | None = None,
    ) -> None:
        """A client of RunPod's queue.

        `endpoints` has the ids of each family's endpoints: a job goes to the one of several with
        the least load. `worker_key` is for workers with WORKER_API_KEY. `policy` says how often a
        request is tried. `assets` is the URL or the folder that the paths of assets are relative
        to, for `download`.
        """
        headers = {"Authorization": f"Bearer {api_key}"}
        secrets = _known(api_key, worker_key)
        to = Connection((base_url or RUNPOD_URL).rstrip("/"), headers, policy or POLICY, secrets)
        self._set(Endpoints(endpoints, to), worker_key, assets)

    @classmethod
    def over_http(
        cls,
        url: str,
        api_key: str | None = None,
        worker_key: str | None = None,
        policy: Retry | None = None,
        *,
        assets: str | Path | None = None,
    ) -> Self:
        """A client of one worker with `SERVE=http`, at `https://ENDPOINT_ID.api.runpod.ai` or else.

        `api_key` is sent as the bearer: the worker's key, or a gateway's. Then `worker_key` is
        the worker's own. Without `assets`, assets come from the worker's `/assets`.
        """
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        headers |= {"X-API-Key": worker_key} if worker_key else {}
        secrets = _known(api_key, worker_key)
        to = Connection(url.rstrip("/"), headers, policy or POLICY, secrets)
        return cls._of(OneService(HttpService(to)), None, assets or to)

    @classmethod
    def local(
        cls,
        url: str = LOCAL_URL,
        worker_key: str | None = None,
        policy: Retry | None = None,
        *,
        assets: str | Path = Path("outputs"),
    ) -> Self:
        """A client of the test server of RunPod's SDK, `python handler.py --rp_serve_api`.

        It computes a job only when `status`, `result` or `stream` asks for it. It tells no
        progress, and cannot cancel.
        """
        to = Connection(url.rstrip("/"), {}, policy or POLICY, _known(worker_key))
        return cls._of(OneService(LocalApi(to)), worker_key, assets)

    @classmethod
    def _of(cls, routes: Routes, payload_key: str | None, place: Place | None) -> Self:
        made = cls.__new__(cls)
        made._set(routes, payload_key, place)
        return made

    def _set(self, routes: Routes, payload_key: str | None, place: Place | None) -> None:
        # The HTTP service takes the worker's key from a header, the others from the payload.
        self._routes, self._payload_key, self._place = routes, payload_key, place

    def _submitting(self, payload: Payload, s3_config: Mapping[str, Any] | None) -> Steps[JobState]:
        body = body_of(payload, self._payload_key, s3_config)
        service = yield from least_loaded(self._routes.candidates(payload))
        return JobState(service, (yield from service.submit(body)))

    def _running_at_once(
        self, payload: Payload, wait_s: float, s3_config: Mapping[str, Any] | None
    ) -> Steps[Document]:
        body = body_of(payload, self._payload_key, s3_config)
        service = yield from least_loaded(self._routes.candidates(payload))
        return document_of((yield from service.run(body, wait_s)), wait_s)

    def _state_of(self, endpoint: str, name: JobName) -> JobState:
        return JobState(self._routes.named(endpoint), name)

    def _health(self, family: str | None) -> Steps[dict[str, Any]]:
        found = {}
        for service in self._routes.of_family(family):
            found[service.name] = yield from service.health()
        return found


def state_now(job: JobState, left_s: float) -> Steps[Outcome]:
    """A job's state now."""
    if job.ended:
        return job.ended
    outcome = yield from job.service.status(job.name, False, left_s)
    _note(job, outcome)
    return outcome


def following(job: JobState, timeout_s: float) -> Steps[Document]:
    """Waits for a job's end. Each new progress is an item."""
    polls, last = Polls(timeout_s), None
    while job.ended is None:
        outcome = yield from polls.ask(job.service.status(job.name, True, polls.left_s))
        if outcome and outcome.progress and outcome.progress != last:
            last = outcome.progress
            yield Item(last)
            polls.note_news()
        _note(job, outcome)
        if not job.ended:
            yield from polls.pause()
    return document_of(job.ended, timeout_s)


def streaming(job: JobState, timeout_s: float) -> Steps[Document]:
    """Waits for a job's end. Each piece of its reply is an item."""
    polls = Polls(timeout_s)
    _note(job, (yield from job.service.stream(job.name, polls)))
    document = yield from following(job, polls.left_s)
    rest = _rest(document, polls.given)
    if rest:
        yield Item(rest)
    return document


def _note(job: JobState, outcome: Outcome | None) -> None:
    if outcome and outcome.has_ended:
        job.ended = outcome
        if outcome.error:
            outcome.error.add_note(f"job {job.name.id} at {job.service.name}")


def _rest(document: Document, given: str) -> str:
    """The part of a reply after the pieces that were given; empty if they do not match it."""
    reply = document.get("response") or document.get("enhanced_prompt") or ""
    return reply.removeprefix(given) if reply.startswith(given) else ""


def _known(*secrets: str | None) -> tuple[str, ...]:
    return tuple(secret for secret in secrets if secret)
