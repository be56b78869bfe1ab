"""One running job: its deadline, its stop signal, its progress, and the facts it collects."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.document import Asset, Document, Failure, check_result, versions
from ourvidz_serverless.errors import Cancelled, DeadlinePassed, InternalError, JobError
from ourvidz_serverless.job import Signs

#: Receives each report of progress.
Report = Callable[[Mapping[str, Any]], None]

#: Receives each part of a streamed reply.
Emit = Callable[[Mapping[str, Any]], None]

#: The next job's number in the order of arrival.
_arrivals = itertools.count()


def discard(item: Mapping[str, Any]) -> None:
    """An `Emit` for a job whose stream nobody reads."""


class Trace(Protocol):
    """Records the parts of one job. `telemetry` has one that sends them to a collector."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of a request on behalf of the job, with which its receiver joins the trace.

        They name the innermost span that is open in this thread.
        """

    def span(self, name: str, **facts: str | int) -> AbstractContextManager[object]:
        """Record the block as a part of the job, with facts that hold no text of the caller."""


class NoTrace:
    """A `Trace` that records nothing."""

    headers: Mapping[str, str] = {}

    def span(self, name: str, **facts: str | int) -> AbstractContextManager[object]:
        return nullcontext()


NO_TRACE = NoTrace()


class Stop:
    """A job's stop signal, with the error that ends the job."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._error: JobError = Cancelled("the job was cancelled")
        self._callbacks: list[Callable[[], None]] = []

    def set(self, error: JobError | None = None) -> None:
        """Stop the job at its next step. Only the first caller's error is used."""
        if error and not self._event.is_set():
            self._error = error
        self._event.set()
        for callback in tuple(self._callbacks):
            callback()

    def wait(self, seconds: float) -> None:
        """Wait for this time, or until the signal is set."""
        self._event.wait(seconds)

    @contextmanager
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        """Call `callback` if the signal is set during the block.

        A signal that was set earlier causes no call, so check `error` inside the block.
        """
        self._callbacks.append(callback)
        try:
            yield
        finally:
            self._callbacks.remove(callback)

    @property
    def error(self) -> JobError | None:
        """The error that ends the job; None until the signal is set."""
        return self._error if self._event.is_set() else None


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a job may take, in seconds.

    `wait_s` limits the wait for the device, `work_s` everything else, and `total_s` the sum:
    the platform's own timeout also counts the wait.
    """

    work_s: float
    wait_s: float = math.inf
    total_s: float = math.inf


@dataclass(slots=True)
class Pace:
    """A stage's speed: it did step `first` at the time `since`, and is at `last` of `total`."""

    first: int
    last: int
    total: int
    since: float


class JobContext:
    """One running job. The code that computes calls `step`, which raises if the job must stop."""

    def __init__(
        self,
        stop: Stop,
        report: Report,
        bounds: Bounds,
        clock: Callable[[], float] = time.monotonic,
        emit: Emit = discard,
    ) -> None:
        self.arrival = next(_arrivals)
        self.stop = stop
        self.emit = emit
        self.warnings: list[str] = []
        self.metadata: dict[str, Any] = {}
        self.reply: dict[str, Any] = {}
        self.audit: dict[str, Any] = {}
        #: Whether a sexual text in this job needs consent, since the job has a reference.
        self.needs_consent = False
        #: What the content floor found in the job's texts; None until it has read them.
        self.signs: Signs | None = None
        self.timings: dict[str, float] = {}
        self.trace: Trace = NO_TRACE
        self.progress: Mapping[str, Any] = {}
        self._report = report
        self._clock = clock
        self._started = clock()
        self._bounds = bounds
        # Waits for the device: the seconds of those that ended, and the start of the current one.
        # One tuple, so that other threads read both from the same moment.
        self._waits: tuple[float, float | None] = (0.0, None)
        self._paces: dict[str, Pace] = {}

    @property
    def elapsed_s(self) -> float:
        """The seconds since the job arrived."""
        return self._clock() - self._started

    @property
    def waited_s(self) -> float:
        """The seconds that the job has waited for the device."""
        ended_s, since = self._waits
        return ended_s + (0.0 if since is None else self._clock() - since)

    @property
    def remaining_s(self) -> float:
        """The seconds that are left; 0 for a job that was stopped."""
        if self.stop.error:
            return 0.0
        elapsed_s, waited_s = self.elapsed_s, self.waited_s
        of_work = self._bounds.work_s - (elapsed_s - waited_s)
        return min(of_work, self._bounds.total_s - elapsed_s)

    @property
    def deadline(self) -> Deadline:
        """The job's deadline, `remaining_s` from now. A stop ends a sleep."""
        return Deadline(lambda: self.remaining_s, self.stop.wait)

    @property
    def stop_reason(self) -> JobError | None:
        """The error of the job's stop, or DeadlinePassed if its time is over; else None."""
        if self.stop.error:
            return self.stop.error
        bounds, elapsed_s, waited_s = self._bounds, self.elapsed_s, self.waited_s
        if elapsed_s - waited_s >= bounds.work_s:
            return DeadlinePassed(f"the job's {bounds.work_s:g} seconds are over")
        is_late, is_waiting = elapsed_s >= bounds.total_s, self._waits[1] is not None
        if is_late or (is_waiting and waited_s >= bounds.wait_s):
            total = f", and its {bounds.total_s:g} seconds are over" if is_late else ""
            return DeadlinePassed(f"the job waited {waited_s:.0f} s for the device{total}")
        return None

    def check(self) -> None:
        """Raise what is the job's `stop_reason`, if it has one."""
        if error := self.stop_reason:
            raise error

    def step(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of a stage are done, then `check`.

        From the second step on, the report estimates the seconds that the stage still needs, from
        its pace since its first step. A stage that starts again, after it ran out of memory, is
        measured from its new first step.
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
        """Check the job, then record the block as a span, and add its seconds to `timings`."""
        self.check()
        self.progress = {"stage": name}
        started = self._clock()
        try:
            with self.trace.span(name):
                yield
        finally:
            spent = self.timings.get(name, 0.0) + self._clock() - started
            self.timings[name] = round(spent, 4)

    @contextmanager
    def waiting(self) -> Iterator[Callable[[int], None]]:
        """The stage in which a job waits for the device; its time does not count as work.

        Yields a function that takes the number of jobs ahead. It reports each new number as
        progress of the stage, and raises what `check` raises.
        """
        reported = most = 0

        def report(ahead: int) -> None:
            nonlocal reported, most
            if ahead == reported:
                return self.check()
            reported, most = ahead, max(most, ahead)
            self.step("wait", most - ahead, most)

        with self.stage("wait"):
            self._waits = (self.waited_s, self._clock())
            try:
                yield report
            finally:
                self._waits = (self.waited_s, None)

    def document(
        self, job_id: str, worker_id: str, outcome: tuple[Asset, ...] | Failure
    ) -> Document:
        """The document that ends the job, with the facts that were collected here.

        A result that the platform would lose becomes a failure.
        """
        metadata = {
            **self.metadata,
            "processing_time": round(self.elapsed_s, 3),
            "timings": self.timings,
            "versions": versions(),
        }
        if self.warnings:
            metadata["warnings"] = self.warnings
        if isinstance(outcome, Failure):
            return Document(job_id, worker_id, "failed", (), metadata, outcome)
        document = Document(job_id, worker_id, "completed", outcome, metadata, reply=self.reply)
        try:
            check_result(document)
        except InternalError as exc:
            return Document(job_id, worker_id, "failed", failure=Failure.of(exc))
        return document
