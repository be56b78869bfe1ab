"""What a failed request to a chat server means for its job.

A server's own words stay here: they may quote a prompt. The messages do not tell that there is a
server: a caller has to do with a worker.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ourvidz_serverless.errors import (
    InternalError,
    InvalidPrompt,
    JobError,
    PromptTooLong,
    WorkerUnavailable,
)
from ourvidz_serverless.net.retries import Fault

#: The statuses with which servers refuse what a request asks for.
REFUSED = (400, 413, 422)

#: How servers say that a prompt is too long: by OpenAI's code, vLLM's parameter, or in words.
TOO_LONG = re.compile(
    r"context_length_exceeded|input_tokens|input_text|(?:context|input) length|"
    r"longer than the model's|inputs. tokens \+ .?max_new_tokens",
    re.IGNORECASE,
)

#: The names of our fields in servers' refusals, in the order in which they are looked for.
FIELDS = (
    *("response_format", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "messages", "prompt"),
)
#: Words by which a refusal means a field that it does not name.
WORDS = {"grammar": "response_format", "schema": "response_format", "max_new_tokens": "max_tokens"}


def is_too_long(fault: Fault) -> bool:
    """Whether a server refuses a prompt since it is longer than the context."""
    return fault.status in REFUSED and bool(TOO_LONG.search(_text(fault)))


def of_fault(fault: Fault) -> JobError:
    """The failure of a job whose request failed, or whose stream broke off."""
    if is_too_long(fault):
        return PromptTooLong("messages: they are longer than the model's context")
    if fault.status in REFUSED:
        return InvalidPrompt(f"{_field(_text(fault))}: the model does not take the value")
    if fault.status in (429, 503):
        return WorkerUnavailable("the model is busy", retry_after=fault.retry_after)
    if fault.status is None:
        return WorkerUnavailable("the model does not answer")
    return InternalError("the model failed")


def _text(fault: Fault) -> str:
    """What a refusal says: the code, the parameter and the message of OpenAI's `error`."""
    try:
        body: Any = json.loads(fault.body)
    except ValueError:
        return ""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return str(error)
    return " ".join(str(error.get(name, "")) for name in ("code", "param", "message"))


def _field(text: str) -> str:
    for name in FIELDS:
        if re.search(rf"\b{name}\b", text):
            return name
    lower = text.lower()
    return next((name for word, name in WORDS.items() if word in lower), "messages")
