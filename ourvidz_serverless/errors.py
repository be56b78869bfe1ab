"""Every way in which a job can fail: one class for each code on the wire.

    JobError
    ├── InvalidPrompt          INVALID_PROMPT
    │   └── PromptTooLong      INVALID_PROMPT
    ├── ContentRefused         CONTENT_REFUSED
    ├── Unauthorized           UNAUTHORIZED
    ├── RateLimited            RATE_LIMITED           retryable
    ├── WorkerUnavailable      WORKER_UNAVAILABLE     retryable
    ├── ModelLoadError         MODEL_LOAD_ERROR       retryable
    ├── OutOfMemory            OOM_ERROR              retryable
    ├── ReferenceFrameError    REFERENCE_FRAME_ERROR
    ├── DeadlinePassed         TIMEOUT_ERROR          retryable
    ├── Cancelled              CANCELLED
    ├── UploadError            UPLOAD_ERROR           retryable
    └── InternalError          INTERNAL_ERROR         retryable
        └── DeviceLost         INTERNAL_ERROR         retryable; the worker's last job

The caller receives the message of a JobError as it is. So a message names a field, a stage or a
count, never a path, a secret or a prompt. The caller searches error texts for the letters `inf` and
`nan`, so no message may contain them ("generation", never "inference"). The cause of an error stays
in the worker.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Code = Literal[
    "CANCELLED",
    "CONTENT_REFUSED",
    "INTERNAL_ERROR",
    "INVALID_PROMPT",
    "MODEL_LOAD_ERROR",
    "OOM_ERROR",
    "RATE_LIMITED",
    "REFERENCE_FRAME_ERROR",
    "TIMEOUT_ERROR",
    "UNAUTHORIZED",
    "UPLOAD_ERROR",
    "WORKER_UNAVAILABLE",
]


class JobError(Exception):
    """The failure of a job: its document has an error instead of assets."""

    code: ClassVar[Code]
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class InvalidPrompt(JobError):
    """Raised when the payload does not validate; the message names the field."""

    code = "INVALID_PROMPT"


class PromptTooLong(InvalidPrompt):
    """Raised when a conversation and its reply are longer than the model's context."""


class ContentRefused(JobError):
    """Raised when the content floor refuses; the message says "content policy"."""

    code = "CONTENT_REFUSED"


class Unauthorized(JobError):
    """Raised when the worker has keys, and the job has none of them."""

    code = "UNAUTHORIZED"


class RateLimited(JobError):
    """Raised when a user or the endpoint is over its limit. `retry_after` is in seconds."""

    code = "RATE_LIMITED"
    retryable = True


class WorkerUnavailable(JobError):
    """Raised when this endpoint does not serve the job type, or is shutting down."""

    code = "WORKER_UNAVAILABLE"
    retryable = True


class ModelLoadError(JobError):
    """Raised when weights are missing, corrupt, or of another architecture."""

    code = "MODEL_LOAD_ERROR"
    retryable = True


class OutOfMemory(JobError):
    """Raised when the device ran out of memory, also with every plan that needs less."""

    code = "OOM_ERROR"
    retryable = True


class ReferenceFrameError(JobError):
    """Raised when a reference image could not be fetched or decoded."""

    code = "REFERENCE_FRAME_ERROR"


class DeadlinePassed(JobError):
    """Raised at the first step after the job's time is up."""

    code = "TIMEOUT_ERROR"
    retryable = True


class Cancelled(JobError):
    """Raised at the first step after the platform stopped the job."""

    code = "CANCELLED"


class UploadError(JobError):
    """Raised when the storage refused an asset, or failed at every try."""

    code = "UPLOAD_ERROR"
    retryable = True


class InternalError(JobError):
    """Raised for an unforeseen error. The log has its place, the caller gets no detail."""

    code = "INTERNAL_ERROR"
    retryable = True


class DeviceLost(InternalError):
    """Raised when the device failed for this process, which must be replaced."""
