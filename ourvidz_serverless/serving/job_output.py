"""What a job of RunPod's queue gives back, while it runs and at its end.

A job has our own payload, and ends with the document; or it is a call of OpenAI's protocol. RunPod
sends what is asked of `/openai/v1/...` as `{"openai_route": "/v1/...", "openai_input": {...}}`, and
its own worker for vLLM gives back the body of an answer, or the text of a stream's events:
https://github.com/runpod-workers/worker-vllm/blob/main/src/handler.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from ourvidz_serverless.document import Document, Failure
from ourvidz_serverless.errors import Unauthorized
from ourvidz_serverless.guard import access
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.serving.openai import failures
from ourvidz_serverless.serving.openai.calls import CALLS, Call, TextCall
from ourvidz_serverless.serving.openai.chunks import Chunks, error_events
from ourvidz_serverless.serving.openai.failures import ApiError
from ourvidz_serverless.serving.openai.served import Served
from ourvidz_serverless.settings import Settings

#: One item of the handler's output.
Item = dict[str, Any] | str

MODELS = "/v1/models"
DEFAULT_ROUTE = "/v1/chat/completions"


class JobOutput(Protocol):
    """The items of one job's output, in order."""

    def piece(self, text: str) -> Iterator[Item]:
        """The items for a piece of a streamed reply."""

    def end(self, document: Document) -> Iterator[Item]:
        """The items at the job's end. One with an `error` fails the job, and is the last."""

    def result(self, document: Document) -> dict[str, Any]:
        """The whole output, for a handler that gives back one value."""


class DocumentOutput:
    """The deltas, and then the document."""

    def piece(self, text: str) -> Iterator[Item]:
        yield {"delta": text}

    def end(self, document: Document) -> Iterator[Item]:
        result = document.result()
        error = result.pop("error", None)
        result.pop("refresh_worker", None)
        yield result
        # The SDK does not stream an item with an error, so the error follows the document.
        if error:
            yield {"error": error}

    def result(self, document: Document) -> dict[str, Any]:
        return document.result()


class OpenAIOutput:
    """The body of OpenAI's answer. A failed job has OpenAI's error as its `error`, as JSON text."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def piece(self, text: str) -> Iterator[Item]:
        yield from ()

    def end(self, document: Document) -> Iterator[Item]:
        yield self.result(document)

    def result(self, document: Document) -> dict[str, Any]:
        error = self._call.error_of(document)
        if error is None:
            return self._call.answer(document)
        ends_worker = document.failure is not None and document.failure.ends_worker
        return {"error": error.text, **({"refresh_worker": True} if ends_worker else {})}


class OpenAIStream(OpenAIOutput):
    """The events of a streamed reply, as text. A failure is an event too."""

    def __init__(self, call: TextCall, job_id: str) -> None:
        super().__init__(call)
        self._chunks = Chunks(call, job_id)

    def piece(self, text: str) -> Iterator[Item]:
        yield self._chunks.piece(text)

    def end(self, document: Document) -> Iterator[Item]:
        yield self._chunks.end(document)
        if self._call.error_of(document):
            yield self.result(document)


class Arrival:
    """An event of the queue, as the worker runs it; `items` are its output if no job is needed."""

    def __init__(
        self, envelope: Envelope, output: JobOutput, items: tuple[Item, ...] | None = None
    ) -> None:
        self.envelope, self.output, self.items = envelope, output, items

    @classmethod
    def of(cls, event: Mapping[str, Any], settings: Settings, served: Served) -> Arrival:
        """The arrival of an event; never raises."""
        envelope = Envelope.of(event, settings.families)
        if not is_openai(event):
            return cls(envelope, DocumentOutput())
        body = _openai_input(event)
        try:
            _check_key(body, settings)
            route = event["input"].get("openai_route") or DEFAULT_ROUTE
            if not body and (listed := _models(route, served)):
                return cls(envelope, DocumentOutput(), (listed,))
            if not isinstance(route, str) or route not in CALLS:
                raise failures.unknown_url(str(route))
            call = CALLS[route](body, served)
        except ApiError as exc:
            return cls(envelope, DocumentOutput(), tuple(_refusal(exc, body)))
        envelope = Envelope.of({**event, "input": call.payload}, settings.families)
        if isinstance(call, TextCall) and call.streams:
            return cls(envelope, OpenAIStream(call, envelope.job_id))
        return cls(envelope, OpenAIOutput(call))


def is_openai(event: Mapping[str, Any]) -> bool:
    """Whether an event is a call of OpenAI's protocol."""
    payload = event.get("input")
    return isinstance(payload, Mapping) and bool(payload.keys() & {"openai_route", "openai_input"})


def _openai_input(event: Mapping[str, Any]) -> Mapping[str, Any]:
    body = event["input"].get("openai_input")
    return body if isinstance(body, Mapping) else {}


def _check_key(body: Mapping[str, Any], settings: Settings) -> None:
    """Check the caller's key before a body is judged. A question without a body has no key."""
    key = body.get("api_key")
    try:
        if body:
            access.check(key if isinstance(key, str) else None, settings.worker_api_key)
    except Unauthorized as exc:
        raise failures.of_failure(Failure.of(exc)) from None


def _models(route: object, served: Served) -> dict[str, Any] | None:
    """The answer to a question about the models; None for another route."""
    if route == MODELS:
        return served.listing()
    if isinstance(route, str) and route.startswith(f"{MODELS}/"):
        return served.model(route.removeprefix(f"{MODELS}/"))
    return None


def _refusal(error: ApiError, body: Mapping[str, Any]) -> Iterator[Item]:
    """The output of a call that makes no job."""
    if body.get("stream") is True:
        yield error_events(error)
    yield {"error": error.text}
