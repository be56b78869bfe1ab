"""What the client does, without input and output: generators that yield commands.

`Client` and `AsyncClient` differ only in how they carry out a command: a `Request` is sent, a
`Pause` is slept, an `Item` is given to the caller. So every operation is written once, and neither
client can do what the other cannot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from ourvidz_serverless.net.retries import Fault, Retry

T = TypeVar("T")

#: The time limit of one request, in seconds.
TIMEOUT_S = 30.0

#: The most characters of a server's own text that an error repeats.
MAX_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request. The answer to this command is an `Answer`.

    With `streams` the answer to a request that succeeds has no body: `NextChunk` reads it.
    """

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes | None = field(default=None, repr=False)
    timeout_s: float = TIMEOUT_S
    streams: bool = False
    #: What no error may repeat.
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def shown(self) -> str:
        """The request in an error: without the URL's password and query, which may be secret."""
        url = re.sub(r"(?<=://)[^/@]*@|[?#].*", "", self.url)
        return f"{self.method} {url}"


@dataclass(frozen=True, slots=True)
class NextChunk:
    """The next bytes of the request that streams, as the answer; None at its end."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Item:
    """Give this value to the caller, who iterates."""

    value: Any


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response. The names of its headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_ok(self) -> bool:
        return 200 <= self.status < 300


Command: TypeAlias = Request | NextChunk | Pause | Item
Steps: TypeAlias = Generator[Command, Any, T]


class RequestFailed(Fault):
    """Raised for a request that failed, after its tries; the text names the request and the reason.

    `status` is the HTTP status, or None if no whole answer came. The text never has a key.
    """

    def __init__(self, request: Request, answer: Answer | None = None, why: str = "") -> None:
        status = answer.status if answer and not why else None
        asked = answer.headers.get("retry-after") if answer else None
        super().__init__(status, asked, answer.body if answer else b"", why)
        reason = why or f"HTTP {status}"
        said = _error_text(self.body) if not why else ""
        text = f"{request.shown}: {reason}{': ' if said else ''}{said}"
        for secret in filter(None, request.secrets):
            text = text.replace(secret, "***")
        self.args = (text,)


def send(
    request: Request,
    policy: Retry,
    read: Callable[[Answer], T],
    accepts: Callable[[Answer], bool] = lambda answer: answer.is_ok,
) -> Steps[T]:
    """What `read` returns for the answer, after as many tries as the policy allows.

    `read` raises ValueError for an answer that is not whole. Raises RequestFailed, also for an
    answer that `accepts` refuses.
    """
    failures = 0
    while True:
        try:
            answer: Answer = yield request
            if not accepts(answer):
                raise RequestFailed(request, answer)
            try:
                return read(answer)
            except ValueError as exc:
                raise RequestFailed(request, answer, f"no whole answer: {exc}") from None
        except RequestFailed as exc:
            failures += 1
            if failures >= policy.tries or not exc.is_transient:
                raise
            wait_s = policy.wait_s(failures, exc.retry_after)
        yield Pause(wait_s)


def with_field(name: str) -> Callable[[Answer], dict[str, Any]]:
    """A reader of JSON objects. It raises ValueError for one without this field."""

    def read(answer: Answer) -> dict[str, Any]:
        try:
            document = json.loads(answer.body)
        except ValueError:
            raise ValueError("it is not JSON") from None
        if not (isinstance(document, dict) and name in document):
            raise ValueError(f"it has no {name}")
        return document

    return read


def object_in(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; an empty one if there is none."""
    try:
        document = json.loads(body)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _error_text(body: bytes) -> str:
    """The server's own words, if its body is JSON with an `error` or a `detail`.

    The page of a gateway says no more than its status.
    """
    document = object_in(body)
    found = next((document[name] for name in ("error", "detail") if document.get(name)), "")
    return found[:MAX_ERROR_CHARS] if isinstance(found, str) else ""
