"""What a running job knows of the world outside: its deadline, its stop, who hears progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ourvidz_serverless.errors import Cancelled, DeadlinePassed, JobError
from ourvidz_serverless.payloads import Signs

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

    def wait(self, seconds: float) -> None:
        """Wait so long, or until the signal is set."""
        self._event.wait(seconds)

    @property
    def error(self) -> JobError | None:
        """The error to end with, once the signal is set."""
        return self._error if self._event.is_set() else None


@dataclass(slots=True)
class Pace:
    """How fast a stage goes: from step `first`, at the time `since`, to `last`, of `total`."""

    first: int
    last: int
    total: int
    since: float


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
        self.audit: dict[str, Any] = {}
        self.asks_consent = False  # for a reference of this job, where its texts are sexual
        self.signs: Signs | None = None  # in the job's texts, once the content floor read them
        self.timings: dict[str, float] = {}
        self.progress: Mapping[str, Any] = {}
        self._report = report
        self._clock = clock
        self._started = clock()
        self._timeout_s = timeout_s
        self._paces: dict[str, Pace] = {}

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started

    @property
    def remaining_s(self) -> float:
        """The seconds that are left: none for a job that was told to stop."""
        return 0.0 if self.stop.error else self._timeout_s - self.elapsed_s

    @property
    def over(self) -> JobError | None:
        """What the job was stopped with, or DeadlinePassed once its time is up."""
        if self.elapsed_s >= self._timeout_s and not self.stop.error:
            return DeadlinePassed(f"the job's {self._timeout_s:g} seconds are over")
        return self.stop.error

    def check(self) -> None:
        """Raise what the job is `over` with, if it is."""
        if error := self.over:
            raise error

    def step(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of a stage are behind, then `check`.

        From the second step on the report tells how many seconds the stage will take yet, by the
        pace since its first one. A stage that is tried again, in a smaller way, has a new first
        step.
        """
        progress: dict[str, Any] = {
            "stage": stage,
            "step": done,
            "steps": total,
            "progress": done / total,
        }
        now, pace = self._clock(), self._paces.get(stage)
        if pace is None or done <= pace.last or total != pace.total:
            pace = self._paces[stage] = Pace(done, done, total, now)
        pace.last = done
        if done > pace.first:
            step_s = (now - pace.since) / (done - pace.first)
            progress["remaining_s"] = round(step_s * (total - done), 1)
        self.progress = progress
        self._report(progress)
        self.check()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage into `timings`, in seconds, and check at its door."""
        self.check()
        self.progress = {"stage": name}
        started = self._clock()
        try:
            yield
        finally:
            spent = self.timings.get(name, 0.0) + self._clock() - started
            self.timings[name] = round(spent, 4)
