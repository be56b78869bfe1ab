"""Job types: how a payload becomes a Job, and how a Job is run. See `families` for who does it."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from PIL import Image
from pydantic import ValidationError

from ourvidz_serverless import families
from ourvidz_serverless.context import Bounds, JobContext
from ourvidz_serverless.errors import InvalidPrompt
from ourvidz_serverless.job import ANONYMOUS, KEY_PATTERN, MAX_CALLBACK_URL, Identity, Job
from ourvidz_serverless.jobs import admin
from ourvidz_serverless.output import Output, Text, Video
from ourvidz_serverless.settings import Settings

#: The name under which a worker itself answers, beside its families.
ADMIN = "admin"

#: The specification's fourteen job types, and who serves each.
FAMILY_OF = {name: family.name for name, family in families.FAMILY_OF.items()} | {
    "admin_utilities": ADMIN
}

#: What a payload may hold beside its job's fields, where it does.
ALSO_TEXT = ("api_key", "job_id", "job_type")

#: Names that the caller's legacy fields use for the same.
SYNONYMS = {"wan_video_fast": "video_fast", "wan_video_high": "video_high"}

#: How long before RunPod's timeout a job reports its own: seconds, or a share of RunPod's timeout
#: if that is less.
TIMEOUT_MARGIN_S, TIMEOUT_MARGIN = 30.0, 0.1

#: RunPod's default timeout of an endpoint, in seconds.
DEFAULT_TIMEOUT_S = 600.0

#: RunPod's longest timeout, a week, in seconds.
MAX_TIMEOUT_S = 604_800


def parse(event: Mapping[str, Any], settings: Settings) -> Job:
    """The job that a RunPod event asks for.

    Raises InvalidPrompt that names the first field which does not hold, in the caller's own
    words for it.
    """
    payload = _payload(event)
    try:
        job: Job = module(FAMILY_OF[payload["type"]]).parse(payload, settings)
        return job
    except ValidationError as exc:
        raise InvalidPrompt(_first(exc)) from None


def module(family: str) -> ModuleType:
    """The module with a family's `parse`, `prepare` and `run`; the worker's own for `ADMIN`."""
    return admin if family == ADMIN else families.load_module(families.FAMILIES[family].jobs_module)


def model_of(job: Job, models: Mapping[str, Any]) -> Any | None:
    """The model that serves a job, from the models by family; None if there is none.

    That is the family's own, unless the family's module has a `choose_model(job, models)`.
    """
    family = FAMILY_OF[job.type]
    choose = getattr(module(family), "choose_model", None)
    return choose(job, models) if choose else models.get(family)


def is_exclusive(name: str | None) -> bool:
    """Whether a job of this type needs the device alone while it computes.

    False for an unknown type: such a job computes nothing.
    """
    family = families.FAMILY_OF.get(name) if name else None
    return family is not None and family.is_exclusive


def event_is_exclusive(event: Mapping[str, Any]) -> bool:
    """The same for a job that has not been parsed."""
    return is_exclusive(job_type(_mapping(event.get("input"))))


def prepare(job: Job, model: Any, context: JobContext) -> None:
    """Have ready what the job's family needs before the device is taken."""
    module(FAMILY_OF[job.type]).prepare(job, model, context)


def run(
    job: Job, model: Any, references: Mapping[str, Image.Image], context: JobContext
) -> Iterator[Output | Text | Video]:
    """The job's outputs, one by one, each as soon as it is there."""
    # Whoever has no turn would cut short what another's is measured by.
    if is_exclusive(job.type):
        model.device.reset_peak()
    yield from module(FAMILY_OF[job.type]).run(job, model, references, context)
    peak_mb = model.device.peak_mb() if model.device else None
    if peak_mb is not None:
        context.metadata["vram_used"] = peak_mb


def job_type(payload: Mapping[str, Any]) -> str | None:
    """Which of the fourteen a payload asks for, whatever field and name it came by."""
    asked = payload.get("type") or payload.get("job_type") or _older_type(payload)
    name = SYNONYMS.get(asked, asked) if isinstance(asked, str) else None
    return name if name in FAMILY_OF else None


def job_id(event: Mapping[str, Any]) -> str | None:
    """The id that the caller knows the job by, as far as a broken payload tells."""
    payload = _mapping(event.get("input"))
    candidates = (payload.get("id"), payload.get("job_id"), event.get("id"))
    return next((name for name in candidates if _is_key(name)), None)


def new_id() -> str:
    """An id for a job that has none, or none that can be read."""
    return f"unnamed-{uuid.uuid4().hex}"


def identity(event: Mapping[str, Any]) -> Identity:
    """The identity by which a job is joined, found or stopped.

    A job without a user is known by the platform's own id: two anonymous callers may send the same
    id, by chance or on purpose.
    """
    user, key, own = user_id(event), api_key(event), _text_of(event.get("id"))
    if user in (None, ANONYMOUS):
        return Identity.of(None, key, own or new_id())
    return Identity.of(user, key, job_id(event) or own or new_id())


def user_id(event: Mapping[str, Any]) -> str | None:
    """The user whose job this is, as far as a broken payload tells."""
    return _text(event, "user_id")


def api_key(event: Mapping[str, Any]) -> str | None:
    """The key that the job brings, as far as a broken payload tells."""
    return _text(event, "api_key")


def callback_url(event: Mapping[str, Any]) -> str | None:
    """Where the job wants its end told, as far as a broken payload tells."""
    url = _text(event, "callback_url")
    return url if url and len(url) <= MAX_CALLBACK_URL else None


def bounds(event: Mapping[str, Any], settings: Settings) -> Bounds:
    """How long a job may work, and wait for the device.

    On the queue both together end a margin before RunPod's own timeout, whose clock runs from the
    moment in which it hands the job over: the job's `policy.executionTimeout`, in milliseconds, or
    the endpoint's, which no worker is told of. It is taken to be RunPod's default, or longer where
    `JOB_TIMEOUT_S` is.
    """
    own_s = _own_timeout_s(event)
    if own_s is not None:
        return Bounds(own_s, settings.device_wait_s, own_s)
    work_s = settings.job_timeout_s
    is_queued = settings.serve == "queue"
    total_s = max(work_s, _less_margin(DEFAULT_TIMEOUT_S)) if is_queued else math.inf
    return Bounds(work_s, settings.device_wait_s, total_s)


def _own_timeout_s(event: Mapping[str, Any]) -> float | None:
    """What a job's `policy.executionTimeout` leaves it, where it has one."""
    given_ms = _mapping(event.get("policy")).get("executionTimeout")
    if isinstance(given_ms, bool) or not isinstance(given_ms, (int, float)):
        return None
    return _less_margin(given_ms / 1000) if 0 < given_ms <= MAX_TIMEOUT_S * 1000 else None


def _less_margin(timeout_s: float) -> float:
    return timeout_s - min(TIMEOUT_MARGIN_S, timeout_s * TIMEOUT_MARGIN)


def _text(event: Mapping[str, Any], field: str) -> str | None:
    return _text_of(_mapping(event.get("input")).get(field))


def _text_of(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_key(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(KEY_PATTERN.strip("^$"), name) is not None


def _payload(event: Mapping[str, Any]) -> dict[str, Any]:
    """The event's input without its nulls (a null means absent), with one id and one type."""
    payload = event.get("input")
    if not isinstance(payload, Mapping):
        raise InvalidPrompt("input: Input should be an object")
    payload = _without_nulls(payload)
    for name in ALSO_TEXT:
        if not isinstance(payload.get(name, ""), str):
            raise InvalidPrompt(f"{name}: Input should be a valid string")
    if not _is_key(payload.get("job_id", "absent")):
        raise InvalidPrompt(f"job_id: String should match pattern '{KEY_PATTERN}'")
    payload["id"] = payload.get("id", payload.get("job_id", event.get("id")))
    payload["type"] = job_type(payload)
    if payload["type"] is None:
        raise InvalidPrompt(f"type: Input should be one of {', '.join(FAMILY_OF)}")
    if event.get("s3Config"):
        payload["s3Config"] = event["s3Config"]
    return payload


def _older_type(payload: Mapping[str, Any]) -> object:
    """The specification's chat payloads carry their type in `config` alone."""
    return _mapping(payload.get("config")).get("job_type")


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
    error = exc.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message
