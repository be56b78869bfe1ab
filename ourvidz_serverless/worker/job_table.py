"""The jobs of one worker by user, key and id: those that run, and the last that ended."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from ourvidz_serverless.context import JobContext, Stop
from ourvidz_serverless.document import Document
from ourvidz_serverless.job import Identity

#: The most ended jobs that are remembered.
MAX_ENDED = 1000

#: How soon a stop of a joined delivery reaches the running job, in seconds.
POLL_S = 0.05


@dataclass
class RunningJob:
    """A job that runs, and what is known of it."""

    stop: Stop
    end: Future[Document] = field(default_factory=Future)
    #: Whether one of the job's deliveries posts its document.
    is_posted: bool = False
    #: These two are set once the payload is parsed.
    job_type: str | None = None
    context: JobContext | None = None


class JobTable:
    """Runs a job once, however often it is delivered, and remembers the state of each job.

    It keeps no payload and no document. Any thread may read it, without waiting for a job.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Identity, RunningJob] = {}
        self._ended: OrderedDict[Identity, Mapping[str, Any]] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def run(
        self,
        identity: Identity,
        stop: Stop,
        call: Callable[[], Document],
        on_join: Callable[[], None] = lambda: None,
        post: Callable[[Document], Document] | None = None,
    ) -> Document:
        """The result of `call`, or for a job that already runs, the result of its first `call`.

        Exactly one delivery posts the document, if any has a `post`. If the first one has it, its
        `call` posts the document itself. Otherwise the first delivery with a `post` that joins the
        job calls that. `on_join` is called if the job already runs.
        """
        with self._lock:
            job = self._running.get(identity)
            is_first = job is None
            if job is None:
                job = self._running[identity] = RunningJob(stop)
            posts = post is not None and not job.is_posted
            job.is_posted |= posts
        if is_first:
            return self._run(identity, job, call)
        on_join()
        document = _join(job, stop)
        return post(document) if post and posts else document

    def began(self, identity: Identity, job_type: str, context: JobContext) -> None:
        """Record a running job's type, and the context that has its progress."""
        with self._lock:
            job = self._running[identity]
            job.job_type, job.context = job_type, context

    def ended(self, identity: Identity, document: Document, seconds: float) -> None:
        """Record how a job ended. A job that was refused before it began is not counted."""
        with self._lock:
            job = self._running[identity]
            if job.job_type is None:
                return
            facts: dict[str, Any] = {"status": document.status, "type": job.job_type}
            facts["processing_time"] = round(seconds, 3)
            if document.failure:
                facts["error"] = document.failure.as_dict()
            job.context = None
            self._ended[identity] = facts
            self._ended.move_to_end(identity)
            self._counts[document.status] += 1
            if len(self._ended) > MAX_ENDED:
                self._ended.popitem(last=False)

    def find(self, identity: Identity) -> Mapping[str, Any] | None:
        """The state of a job, as `job_status` reports it; None for an unknown or forgotten job."""
        with self._lock:
            job = self._running.get(identity)
            context = job.context if job else None
            if job is None or context is None:
                return self._ended.get(identity)
        facts: dict[str, Any] = {"status": "processing", "type": job.job_type, **context.progress}
        return {**facts, "processing_time": round(context.elapsed_s, 3)}

    def counts(self) -> dict[str, int]:
        """The number of jobs that run, that completed and that failed."""
        with self._lock:
            return {
                "processing": sum(job.context is not None for job in self._running.values()),
                "completed": self._counts["completed"],
                "failed": self._counts["failed"],
            }

    def stop_all(self, stop: Callable[[Stop], None]) -> None:
        """Call `stop` with the stop signal of every job that runs."""
        with self._lock:
            signals = [job.stop for job in self._running.values()]
        for signal in signals:
            stop(signal)

    def _run(self, identity: Identity, job: RunningJob, call: Callable[[], Document]) -> Document:
        try:
            job.end.set_result(call())
        except BaseException as exc:
            job.end.set_exception(exc)
        finally:
            with self._lock:
                del self._running[identity]
        return job.end.result()


def _join(job: RunningJob, stop: Stop) -> Document:
    """The document of a job that runs; a stop of this delivery stops the job."""
    while not wait([job.end], timeout=POLL_S).done:
        # The platform has one id for all deliveries, and cancels the latest one.
        if stop.error:
            job.stop.set(stop.error)
    return job.end.result()
