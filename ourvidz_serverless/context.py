"""What a running job knows of the world outside: its deadline, its stop, who hears progress."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.errors import Cancelled, DeadlinePassed, JobError
from ourvidz_serverless.job import Signs

Report = Callable[[Mapping[str, Any]], None]
Emit = Callable[[Mapping[str, Any]], None]


#: The next job's number in the order of arrival.
_arrivals = itertools.count()


def to_nobody(item: Mapping[str, Any]) -> None:
    """Where a job's stream goes when nobody reads it."""


class Stop:
    """A job's stop signal, which carries the error that the job ends with."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._error: JobError = Cancelled("the job was cancelled")
        self._wakes: list[Callable[[], None]] = []

    def set(self, error: JobError | None = None) -> None:
        """Ask the job to stop; the first caller's error is the one that counts."""
        if error and not self._event.is_set():
            self._error = error
        self._event.set()
        for wake in tuple(self._wakes):
            wake()

    def wait(self, seconds: float) -> None:
        """Wait so long, or until the signal is set."""
        self._event.wait(seconds)

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Call `wake` when the signal is set, as long as the block lasts.

        A signal that was set before is not told again: look at `error` once the block has begun.
        """
        self._wakes.append(wake)
        try:
            yield
        finally:
            self._wakes.remove(wake)

    @property
    def error(self) -> JobError | None:
        """The error to end with, once the signal is set."""
        return self._error if self._event.is_set() else None


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a job may take, in seconds.

    `work_s` bounds all that is not a wait for the device, `wait_s` that wait, and `total_s` both
    together, since the platform's own clock does not stand still while a job waits.
    """

    work_s: float
    wait_s: float = math.inf
    total_s: float = math.inf


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
        bounds: Bounds,
        clock: Callable[[], float] = time.monotonic,
        emit: Emit = to_nobody,
    ) -> None:
        self.arrival = next(_arrivals)
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
        self._bounds = bounds
        # Of waits for the device: the seconds of those that ended, and when one began that has not.
        # They change together, since other threads read them.
        self._waits: tuple[float, float | None] = (0.0, None)
        self._paces: dict[str, Pace] = {}

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started

    @property
    def waited_s(self) -> float:
        """The seconds that the job has waited for the device."""
        ended_s, since = self._waits
        return ended_s + (0.0 if since is None else self._clock() - since)

    @property
    def remaining_s(self) -> float:
        """The seconds that are left: none for a job that was told to stop."""
        if self.stop.error:
            return 0.0
        elapsed_s, waited_s = self.elapsed_s, self.waited_s
        of_work = self._bounds.work_s - (elapsed_s - waited_s)
        return min(of_work, self._bounds.total_s - elapsed_s)

    @property
    def deadline(self) -> Deadline:
        """The job's deadline: `remaining_s` are left, and a stop ends a sleep."""
        return Deadline(lambda: self.remaining_s, self.stop.wait)

    @property
    def over(self) -> JobError | None:
        """What the job was stopped with, or DeadlinePassed once its time is up."""
        if self.stop.error:
            return self.stop.error
        bounds, elapsed_s, waited_s = self._bounds, self.elapsed_s, self.waited_s
        if elapsed_s - waited_s >= bounds.work_s:
            return DeadlinePassed(f"the job's {bounds.work_s:g} seconds are over")
        is_late, is_waiting = elapsed_s >= bounds.total_s, self._waits[1] is not None
        if is_late or (is_waiting and waited_s >= bounds.wait_s):
            whole = f", and its {bounds.total_s:g} seconds are over" if is_late else ""
            return DeadlinePassed(f"the job waited {waited_s:.0f} s for the device{whole}")
        return None

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

    @contextmanager
    def waiting(self) -> Iterator[Callable[[int], None]]:
        """The stage in which a job waits for the device; its time does not count as work.

        It gives a function to call with the number of jobs that go first. The function reports a
        number that has changed, as steps of the stage, and then does what `check` does.
        """
        told = most = 0

        def hear(ahead: int) -> None:
            nonlocal told, most
            if ahead == told:
                return self.check()
            told, most = ahead, max(most, ahead)
            self.step("wait", most - ahead, most)

        with self.stage("wait"):
            self._waits = (self.waited_s, self._clock())
            try:
                yield hear
            finally:
                self._waits = (self.waited_s, None)
