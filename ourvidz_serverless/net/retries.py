"""Retries: how often a call is tried again, and after how long; the caller says which errors."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ourvidz_serverless import deadline as deadlines
from ourvidz_serverless.deadline import Deadline

T = TypeVar("T")

#: Which errors are tried again: of a class, of some classes, or those of which a function is true.
On = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]


#: The HTTP statuses that another try may change, beside every 5xx: the server is busy.
TRANSIENT = {408, 425, 429}


class Fault(Exception):
    """One HTTP request that failed.

    `status` is the response's, or None if none came, and `why` says what happened then. `body` is
    the response's, and `retry_after` the seconds that it asks for, if it does.
    """

    def __init__(
        self,
        status: int | None,
        retry_after: str | None = None,
        body: bytes = b"",
        why: str = "no answer",
    ) -> None:
        super().__init__(f"HTTP {status}" if status else why)
        self.status, self.asked, self.body = status, retry_after, body
        # Not `isdigit`, which takes a superscript for a digit.
        self.retry_after = float(retry_after) if retry_after and retry_after.isdecimal() else None

    @property
    def is_transient(self) -> bool:
        return self.status is None or self.status in TRANSIENT or self.status >= 500


class Refused(Fault):
    """A request that is not made, or an answer that is not taken; another try would not help."""

    is_transient = False

    def __init__(self, why: str) -> None:
        super().__init__(None, why=why)


def is_transient(error: BaseException) -> bool:
    """Whether an error has an attribute `is_transient` that is true: another try may succeed."""
    return bool(getattr(error, "is_transient", False))


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a call is made, and how long the waits between its tries are, in seconds."""

    tries: int = 3  # the first one included
    base_s: float = 0.5  # the first wait
    factor: float = 2.0  # each wait is this many times the one before
    jitter: float = 0.25  # a wait is drawn from within this share around its length
    max_s: float = 10.0  # no wait is longer, whatever the server asks for
    try_s: float = 60.0  # no try takes longer

    def wait_s(
        self,
        failures: int,
        asked_s: float | None = None,
        draw: Callable[[], float] = random.random,
    ) -> float:
        """How long to wait after so many failures: at least the `asked_s` of the server."""
        # After so many failures a wait is the longest anyway, and a larger power overflows.
        backoff = self.base_s * self.factor ** min(failures - 1, 64)
        jittered = backoff * (1 + self.jitter * (2 * draw() - 1))
        return min(max(jittered, asked_s or 0.0), self.max_s)


def retry(
    call: Callable[[], T],
    *,
    on: On,
    policy: Retry,
    deadline: Deadline | None = None,
    draw: Callable[[], float] = random.random,
) -> T:
    """What `call` returns, tried again after errors that `on` names.

    The deadline, by default the current one, ends the requests of each try. An error's
    `retry_after` (seconds), if it has one, lengthens the wait. Raises the last error: after
    `policy.tries`, at once if `on` does not name it, and if the next wait would outlast the
    deadline.
    """
    deadline = deadline or deadlines.current()
    failures = 0
    while True:
        try:
            with deadline.applied():
                return call()
        except Exception as exc:
            failures += 1
            wait = policy.wait_s(failures, getattr(exc, "retry_after", None), draw)
            is_last = failures >= policy.tries or wait >= deadline.remaining_s()
            if is_last or not _is_named(exc, on):
                raise
        # Outside the `except`: there the traceback would keep the try's memory during the wait.
        deadline.sleep(wait)


def _is_named(error: Exception, on: On) -> bool:
    return isinstance(error, on) if isinstance(on, (type, tuple)) else on(error)
