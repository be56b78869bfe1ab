"""Errors in OpenAI's shape.

    {"error": {"message": "temperature: Input should be less than or equal to 2",
               "type": "invalid_request_error", "param": "temperature", "code": "invalid_value"}}

Statuses, types and codes are those of https://platform.openai.com/docs/guides/error-codes where
OpenAI has one for the case. For the rest the code is ours, in lower case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ourvidz_serverless.document import Failure
from ourvidz_serverless.errors import Code


class Kind(NamedTuple):
    """How a kind of error is sent."""

    status: int
    type: str
    code: str


INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"

INVALID_VALUE = Kind(400, INVALID_REQUEST, "invalid_value")
UNSUPPORTED_PARAMETER = Kind(400, INVALID_REQUEST, "unsupported_parameter")
UNSUPPORTED_VALUE = Kind(400, INVALID_REQUEST, "unsupported_value")
CONTEXT_LENGTH_EXCEEDED = Kind(400, INVALID_REQUEST, "context_length_exceeded")
MISSING = Kind(400, INVALID_REQUEST, "missing_required_parameter")
MODEL_NOT_FOUND = Kind(404, INVALID_REQUEST, "model_not_found")
ID_IN_USE = Kind(409, INVALID_REQUEST, "id_in_use")
UNKNOWN_URL = Kind(404, INVALID_REQUEST, "unknown_url")

#: The kind of each failure of a job.
KINDS: Mapping[Code, Kind] = {
    "INVALID_PROMPT": INVALID_VALUE,
    # OpenAI refuses for content with 400. Clients know the code.
    "CONTENT_REFUSED": Kind(400, INVALID_REQUEST, "content_policy_violation"),
    "UNAUTHORIZED": Kind(401, INVALID_REQUEST, "invalid_api_key"),
    "RATE_LIMITED": Kind(429, "requests", "rate_limit_exceeded"),
    "WORKER_UNAVAILABLE": Kind(503, SERVER_ERROR, "worker_unavailable"),
    "MODEL_LOAD_ERROR": Kind(503, SERVER_ERROR, "model_load_error"),
    "OOM_ERROR": Kind(503, SERVER_ERROR, "oom_error"),
    "REFERENCE_FRAME_ERROR": Kind(422, INVALID_REQUEST, "reference_frame_error"),
    "TIMEOUT_ERROR": Kind(504, SERVER_ERROR, "timeout_error"),
    "CANCELLED": Kind(409, INVALID_REQUEST, "cancelled"),
    "UPLOAD_ERROR": Kind(502, SERVER_ERROR, "upload_error"),
    "INTERNAL_ERROR": Kind(500, SERVER_ERROR, "internal_error"),
}

#: A message that begins with the name of a field.
FIELD = re.compile(r"([a-z]\w*(?:\.\w+)*): ")


class ApiError(Exception):
    """An error of a call. `param` is the caller's name of the field that is wrong."""

    def __init__(
        self,
        kind: Kind,
        message: str,
        param: str | None = None,
        *,
        retry_after: float | None = None,
        is_retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.param = kind, message, param
        self._retry_after, self._is_retryable = retry_after, is_retryable

    @property
    def error(self) -> dict[str, Any]:
        """What OpenAI has below `error`."""
        kind = self.kind
        return {
            "message": self.message,
            "type": kind.type,
            "param": self.param,
            "code": kind.code,
        }

    @property
    def body(self) -> dict[str, Any]:
        """The body of a response."""
        return {"error": self.error}

    @property
    def text(self) -> str:
        """The error as JSON text: RunPod takes the error of a job only as a text."""
        return json.dumps(self.error)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a response.

        OpenAI's own clients repeat every call with a status of 5xx twice, unless `x-should-retry`
        says otherwise (`_should_retry` in openai's `_base_client.py`).
        """
        headers = {"x-should-retry": str(self._is_retryable).lower()}
        if self._retry_after is not None:
            headers["Retry-After"] = str(max(1, round(self._retry_after)))
        if self.kind.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def unknown_url(path: str) -> ApiError:
    """The error for a path of the protocol at which nothing is served."""
    return ApiError(UNKNOWN_URL, f"nothing is served at {path[:100]}")


def of_failure(failure: Failure, name_of: Callable[[str], str] = lambda name: name) -> ApiError:
    """A job's failure as an error; `name_of` gives the caller's name of a field of the payload."""
    message, param = failure.message, None
    if failure.code == "INVALID_PROMPT" and (field := FIELD.match(message)):
        param = name_of(field[1])
        message = f"{param}: {message[field.end() :]}"
    return ApiError(
        CONTEXT_LENGTH_EXCEEDED if failure.is_too_long else KINDS[failure.code],
        message,
        param,
        retry_after=failure.retry_after,
        # The same call would take as long again, and the device would compute it again.
        is_retryable=failure.retryable and failure.code != "TIMEOUT_ERROR",
    )
