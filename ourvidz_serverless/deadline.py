"""Deadlines: how many seconds are left for something, and how to sleep meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """The time by which something must end.

    `remaining_s` returns the seconds until then, or no more than 0 when they are over. `sleep`
    takes seconds; for a job it returns early when the job is stopped.
    """

    remaining_s: Callable[[], float] = lambda: math.inf
    sleep: Callable[[float], None] = time.sleep

    def within(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> Deadline:
        """This deadline, or `seconds` from now if that is earlier."""
        ends = clock() + seconds
        return Deadline(lambda: min(ends - clock(), self.remaining_s()), self.sleep)

    def timeout_s(self, longest: float = math.inf) -> float:
        """The seconds that are left, at most `longest`; raises TimeoutError if there are none."""
        seconds = min(self.remaining_s(), longest)
        if seconds <= 0:
            raise TimeoutError
        return seconds

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make this the deadline of every HTTP request that the block makes in this thread."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


#: The deadline of what may take as long as it likes.
NEVER = Deadline()

_current: ContextVar[Deadline] = ContextVar("deadline", default=NEVER)


def current() -> Deadline:
    """The deadline that is `applied` in this thread; NEVER if there is none."""
    return _current.get()
