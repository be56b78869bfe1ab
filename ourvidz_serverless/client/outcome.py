"""A job's state and its document, as the client returns them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict, cast

from ourvidz_serverless.errors import Cancelled, DeadlinePassed, InternalError, JobError

#: The class of each code.
ERRORS = {error.code: error for error in JobError.__subclasses__()}

Status = Literal["queued", "processing", "completed", "failed"]

#: The client's statuses for RunPod's.
STATUS_OF: Mapping[str, Status] = {
    "IN_QUEUE": "queued",
    "IN_PROGRESS": "processing",
    "COMPLETED": "completed",
    "FAILED": "failed",
    "CANCELLED": "failed",
    "TIMED_OUT": "failed",
}


class Progress(TypedDict):
    """How far a job is: `step` of `steps` of its `stage`, and `progress` from 0 to 100."""

    stage: str
    step: int
    steps: int
    progress: float


class Asset(TypedDict):
    """One picture, video or text. `url` is a path in the worker's storage, or a URL."""

    type: Literal["image", "video", "text"]
    url: str
    metadata: dict[str, Any]
    thumbnail_url: NotRequired[str]


class Document(TypedDict):
    """The result of a job that completed. A chat has its reply in `response`."""

    job_id: str
    worker_id: str
    status: str
    assets: list[Asset]
    metadata: dict[str, Any]
    response: NotRequired[str]
    enhanced_prompt: NotRequired[str]
    finish_reason: NotRequired[Literal["stop", "length"]]
    usage: NotRequired[dict[str, int]]
    result: NotRequired[dict[str, Any]]


class StillUnderWay(DeadlinePassed):
    """Raised if the caller's time is over before the job ends. The job goes on."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A job's state: with its `document` after its end, with its `error` if it failed."""

    status: Status
    progress: Progress | None = None
    document: Document | None = None
    error: JobError | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ("completed", "failed")


def document_of(outcome: Outcome, waited_s: float) -> Document:
    """The document. Raises the JobError of a failed job, or StillUnderWay."""
    if outcome.error:
        raise outcome.error
    if outcome.document is None:
        raise under_way(waited_s)
    return outcome.document


def under_way(waited_s: float) -> StillUnderWay:
    return StillUnderWay(f"the job is still under way after {waited_s:g} seconds")


def read_outcome(answer: Mapping[str, Any]) -> Outcome:
    """The state in an answer of RunPod's `/status` or `/runsync`.

    The output is the document, or, if the worker serves chat, a list that ends with the document.
    After the document of a failed job the SDK's test server has its error.
    """
    status, output = status_of(answer), answer.get("output")
    items = output if isinstance(output, list) else [output]
    last = items[-1] if items else None
    documents = [each for each in items if isinstance(each, Mapping) and "job_id" in each]
    document = documents[-1] if documents else None
    if status in ("queued", "processing"):
        is_progress = isinstance(last, Mapping) and "step" in last
        return Outcome(status, progress=cast(Progress, last) if is_progress else None)
    found = cast("Document | None", document)
    if status == "completed" and document and document["status"] == "completed":
        return Outcome(status, document=found)
    return Outcome("failed", document=found, error=_error_of_queue(answer, document))


def status_of(answer: Mapping[str, Any]) -> Status:
    """The client's status for RunPod's. One that is not known is no end."""
    return STATUS_OF.get(answer["status"], "processing")


def read_http_outcome(answer: Mapping[str, Any]) -> Outcome:
    """The state in an answer of the HTTP service: a job's status, or its document."""
    status: Status = answer["status"]
    if status in ("queued", "processing"):
        return Outcome(status, progress=answer.get("progress"))
    # The document of a streamed chat comes without assets.
    document = {"assets": [], **answer}
    del document["success"]
    error = error_of(answer) if status == "failed" else None
    return Outcome(status, document=cast(Document, document), error=error)


def error_of(failure: Mapping[str, Any]) -> JobError | None:
    """The error of an object with a `code`; None if it has none."""
    if not isinstance(failure.get("code"), str):
        return None
    error = ERRORS.get(failure["code"], InternalError)
    message = failure.get("message") or failure.get("error") or failure["code"]
    return error(str(message), retry_after=failure.get("retry_after"))


def _error_of_queue(answer: Mapping[str, Any], document: Mapping[str, Any] | None) -> JobError:
    error = error_of((document or {}).get("failure") or _parsed(answer.get("error")))
    if error:
        return error
    if answer["status"] == "CANCELLED":
        return Cancelled("the job was cancelled")
    if answer["status"] == "TIMED_OUT":
        return DeadlinePassed("the platform ended the job")
    return InternalError(str(answer.get("error") or "the job has no result"))


def _parsed(error: object) -> Mapping[str, Any]:
    try:
        failure = json.loads(error) if isinstance(error, str) else None
    except ValueError:
        return {}
    return failure if isinstance(failure, Mapping) else {}
