"""What a running job knows of the world outside: its deadline, its stop, who hears progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ourvidz_serverless.errors import Cancelled, DeadlinePassed, JobError

Report = Callable[[Mapping[str, Any]], None]
Emit = Callable[[Mapping[str, Any]], None]


def to_nobody(item: Mapping[str, Any]) -> None:
    """Where a job's stream goes when nobody reads it."""


class Stop:
    """A job's stop signal, which carries the error that the job ends with."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._error: JobError = Cancelled("the job was cancelled")

    def set(self, error: JobError | None = None) -> None:
        """Ask the job to stop; the first caller's error is the one that counts."""
        if error and not self._event.is_set():
            self._error = error
        self._event.set()

    @property
    def error(self) -> JobError | None:
        """The error to end with, once the signal is set."""
        return self._error if self._event.is_set() else None


class JobContext:
    """Handed to the code that computes, which calls `step` as it goes and is stopped there."""

    def __init__(
        self,
        stop: Stop,
        report: Report,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        emit: Emit = to_nobody,
    ) -> None:
        self.stop = stop
        self.emit = emit
        self.warnings: list[str] = []
        self.metadata: dict[str, Any] = {}
        self.reply: dict[str, Any] = {}
        self.timings: dict[str, float] = {}
        self._report = report
        self._clock = clock
        self._started = clock()
        self._timeout_s = timeout_s

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started

    @property
    def remaining_s(self) -> float:
        return self._timeout_s - self.elapsed_s

    def check(self) -> None:
        """Raise what the job was stopped with, or DeadlinePassed once its time is up."""
        if self.stop.error:
            raise self.stop.error
        if self.remaining_s <= 0:
            raise DeadlinePassed(f"the job's {self._timeout_s:g} seconds are over")

    def step(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of a stage are behind, then `check`."""
        self._report({"stage": stage, "step": done, "steps": total, "progress": done / total})
        self.check()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage into `timings`, in seconds, and check at its door."""
        self.check()
        started = self._clock()
        try:
            yield
        finally:
            spent = self.timings.get(name, 0.0) + self._clock() - started
            self.timings[name] = round(spent, 4)
