"""The one answer to a job: the callback's body and the handler's result.

Specification, "Callback Payload Format". The application's edge function reads `error_message` and
`metadata.error_type` first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ourvidz_serverless.errors import DeviceLost, InternalError, JobError

#: RunPod drops a larger result of `/run` without a word (10 MB; `/runsync` allows 20).
MAX_RESULT_BYTES = 10_000_000

Status = Literal["processing", "completed", "failed"]


@dataclass(frozen=True, slots=True)
class Asset:
    """One stored output, as the caller finds it."""

    type: Literal["image", "video", "text"]
    url: str
    thumbnail_url: str | None
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job failed, in the specification's shape."""

    code: str
    message: str
    retryable: bool
    retry_after: float | None = None
    #: Whether the worker can do no further job.
    is_the_workers_end: bool = False

    @classmethod
    def of(cls, error: JobError) -> Failure:
        is_end = isinstance(error, DeviceLost)
        return cls(error.code, error.message, error.retryable, error.retry_after, is_end)

    def as_dict(self) -> dict[str, Any]:
        body = {"code": self.code, "message": self.message, "retryable": self.retryable}
        return body if self.retry_after is None else {**body, "retry_after": self.retry_after}


@dataclass(frozen=True, slots=True)
class Document:
    """The one answer to a job. `reply` is what stands beside the assets: a chat's own words."""

    job_id: str
    worker_id: str
    status: Status
    assets: tuple[Asset, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    reply: Mapping[str, Any] = field(default_factory=dict)

    def callback(self) -> dict[str, Any]:
        """The body that is posted: `error` is an object, as the specification has it."""
        body: dict[str, Any] = {
            "job_id": self.job_id,
            "worker_id": self.worker_id,
            "status": self.status,
            "assets": [_asset(asset) for asset in self.assets],
            # Null without a failure: the application merges these into its row, which may hold
            # the error of an earlier try.
            "metadata": {
                **self.metadata,
                "error_type": self.failure.code if self.failure else None,
            },
            **self.reply,
        }
        if self.failure:
            body["error"] = self.failure.as_dict()
            body["error_message"] = self.failure.message
        return body

    def result(self) -> dict[str, Any]:
        """What the handler returns, anew at each call, since the SDK takes `error` out of it.

        RunPod wants `error` as a string: an object there shows as COMPLETED without output. So
        the failure's JSON text stands in `error`, and the object beside it in `failure`. With
        `refresh_worker`, which the SDK takes out too, RunPod replaces the worker.
        """
        body = self.callback()
        if self.failure:
            body["failure"] = body["error"]
            body["error"] = json.dumps(body["error"])
            if self.failure.is_the_workers_end:
                body["refresh_worker"] = True
        return body


def _asset(asset: Asset) -> dict[str, Any]:
    body = {"type": asset.type, "url": asset.url, "metadata": dict(asset.metadata)}
    return {**body, "thumbnail_url": asset.thumbnail_url} if asset.thumbnail_url else body


def check_result(document: Document) -> None:
    """Raise InternalError for a document that RunPod would lose: not JSON, or too large."""
    try:
        # As the SDK writes it: not escaped, so that half a surrogate pair fails here, not there.
        text = json.dumps(document.result(), allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except (TypeError, ValueError) as exc:
        raise InternalError("the result could not be written as JSON") from exc
    if size > MAX_RESULT_BYTES:
        raise InternalError(f"the result has {size} bytes; the platform takes {MAX_RESULT_BYTES}")
