"""A raw event as RunPod delivers it: its sender, its job and its payload."""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ourvidz_serverless import jobs
from ourvidz_serverless.context import Bounds
from ourvidz_serverless.errors import InvalidPrompt, JobError
from ourvidz_serverless.job import ANONYMOUS, KEY_PATTERN, MAX_CALLBACK_URL, Identity, Job
from ourvidz_serverless.job_types import ADMIN, job_type, named_type
from ourvidz_serverless.settings import Settings

#: Fields of any payload beside those of its job type. Each must be a text.
ALSO_TEXT = ("api_key", "job_id", "job_type")

#: A job ends this long before RunPod's timeout: these seconds, or this share of the timeout if that
#: is less.
TIMEOUT_MARGIN_S, TIMEOUT_MARGIN = 30.0, 0.1

#: RunPod's default timeout of an endpoint, in seconds.
DEFAULT_TIMEOUT_S = 600.0

#: RunPod's longest timeout, a week, in seconds.
MAX_TIMEOUT_S = 604_800


@dataclass(slots=True)
class Envelope:
    """One event, read once: its job's type, id, user, key and callback URL.

    A missing or invalid field is None. `job` parses the payload at its first call.
    """

    event: Mapping[str, Any] = field(repr=False)
    job_type: str | None
    #: The caller's id of the job, or a new one.
    job_id: str
    #: Identifies the job to join, find or stop it. It includes user and key: the id alone gives
    #: a caller no access.
    identity: Identity
    api_key: str | None = field(repr=False)
    callback_url: str | None = field(repr=False)
    #: The caller's W3C trace context: a header over HTTP, or `metadata.traceparent`. Not checked.
    traceparent: str | None = None
    #: When this process received the event, by `time.monotonic`.
    arrived: float = field(default_factory=time.monotonic)
    _job: Job | None = field(default=None, repr=False)
    _is_parsed: bool = field(default=False, repr=False)

    @classmethod
    def of(cls, event: Mapping[str, Any], families: Sequence[str] = ()) -> Envelope:
        """The envelope of an event; never raises.

        A job that names no type has the default type of the worker's `families`, if it is one.
        """
        payload, own_id = _mapping(event.get("input")), _text(event.get("id"))
        named = _job_id(payload, own_id)
        job_id = named or new_id()
        key, user = _text(payload.get("api_key")), _text(payload.get("user_id"))
        if user in (None, ANONYMOUS):
            # Two anonymous callers may send the same id, by chance or on purpose. The platform's
            # id is unique.
            identity = Identity.of(None, key, own_id or new_id())
        else:
            identity = Identity.of(user, key, named or own_id or job_id)
        url = _text(payload.get("callback_url"))
        url = url if url and len(url) <= MAX_CALLBACK_URL else None
        parent = event.get("traceparent") or _mapping(payload.get("metadata")).get("traceparent")
        kind = job_type(payload, families)
        return cls(event, kind, job_id, identity, key, url, _text(parent))

    @property
    def is_exclusive(self) -> bool:
        """Whether the job needs the device alone; False for a payload without a valid type."""
        return jobs.is_exclusive(self.job_type)

    def job(self, settings: Settings) -> Job:
        """The job that the payload asks for.

        Raises InvalidPrompt, with the first invalid field by the caller's name for it.
        """
        if self._job is None:
            self._is_parsed = True
            self._job = self._parse(settings)
        return self._job

    def job_or_none(self, settings: Settings) -> Job | None:
        """The same; None if the payload is not valid, or if an earlier call of `job` failed."""
        if not self._is_parsed:
            with suppress(JobError):
                self.job(settings)
        return self._job

    def bounds(self, settings: Settings) -> Bounds:
        """How long the job may work, and wait for the device.

        On the queue the sum ends a margin before RunPod's timeout, which starts when RunPod
        delivers the job. That timeout is the job's `policy.executionTimeout`, in milliseconds, or
        the endpoint's. No worker can read the endpoint's, so RunPod's default is assumed, or
        `JOB_TIMEOUT_S` if that is longer.
        """
        own_s = self._own_timeout_s()
        if own_s is not None:
            return Bounds(own_s, settings.device_wait_s, own_s)
        work_s = settings.job_timeout_s
        is_queued = settings.serve == "queue"
        total_s = max(work_s, _less_margin(DEFAULT_TIMEOUT_S)) if is_queued else math.inf
        return Bounds(work_s, settings.device_wait_s, total_s)

    def _own_timeout_s(self) -> float | None:
        """The job's `policy.executionTimeout` less the margin, in seconds; None if it has none."""
        given_ms = _mapping(self.event.get("policy")).get("executionTimeout")
        if isinstance(given_ms, bool) or not isinstance(given_ms, (int, float)):
            return None
        return _less_margin(given_ms / 1000) if 0 < given_ms <= MAX_TIMEOUT_S * 1000 else None

    def _parse(self, settings: Settings) -> Job:
        payload = self._payload(settings)
        try:
            return jobs.parse(payload, settings)
        except ValidationError as exc:
            raise InvalidPrompt(_first(exc)) from None

    def _payload(self, settings: Settings) -> dict[str, Any]:
        """The input without its nulls (a null means absent), with one id and one type."""
        given = self.event.get("input")
        if not isinstance(given, Mapping):
            raise InvalidPrompt("input: Input should be an object")
        payload = _without_nulls(given)
        for name in ALSO_TEXT:
            if not isinstance(payload.get(name, ""), str):
                raise InvalidPrompt(f"{name}: Input should be a valid string")
        if not _is_key(payload.get("job_id", "absent")):
            raise InvalidPrompt(f"job_id: String should match pattern '{KEY_PATTERN}'")
        payload["id"] = payload.get("id", payload.get("job_id", self.event.get("id")))
        if self.job_type is None:
            raise InvalidPrompt(_unknown_type(named_type(payload), settings.families))
        payload["type"] = self.job_type
        if self.event.get("s3Config"):
            payload["s3Config"] = self.event["s3Config"]
        return payload


def new_id() -> str:
    """A new id, for a job without a valid one."""
    return f"unnamed-{uuid.uuid4().hex}"


def _unknown_type(named: object, served: Sequence[str]) -> str:
    """The error of a payload whose type is missing or unknown, with the types that are served."""
    names = [name for name, family in jobs.FAMILY_OF.items() if family in (*served, ADMIN)]
    types = f"one of {', '.join(names)}"
    if named is None:
        return f"type: Field required on a worker of several families: {types}"
    return f"type: Input should be {types}"


def _job_id(payload: Mapping[str, Any], own_id: str | None) -> str | None:
    candidates = (payload.get("id"), payload.get("job_id"), own_id)
    return next((name for name in candidates if isinstance(name, str) and _is_key(name)), None)


def _less_margin(timeout_s: float) -> float:
    return timeout_s - min(TIMEOUT_MARGIN_S, timeout_s * TIMEOUT_MARGIN)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_key(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(KEY_PATTERN.strip("^$"), name) is not None


def _without_nulls(payload: Mapping[Any, Any]) -> dict[str, Any]:
    """The payload and its `config` and `metadata` without null values."""
    found = _given(payload)
    for key in ("config", "metadata"):
        if isinstance(found.get(key), Mapping):
            found[key] = _given(found[key])
    return found


def _given(fields: Mapping[Any, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _first(exc: ValidationError) -> str:
    """The first invalid field, and why it is invalid."""
    error = exc.errors(include_url=False, include_input=False, include_context=False)[0]
    name = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message
