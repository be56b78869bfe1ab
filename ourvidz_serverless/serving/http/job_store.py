"""The jobs of the HTTP service: their threads, their backlog, their state and their documents.

RunPod's queue keeps jobs and their status outside the worker. Behind plain HTTP the worker does it
itself: it has as many threads as it runs jobs at once, a bounded backlog, and the documents of the
last jobs, in memory, within a limit. Callers that need a document for longer use the callback. Jobs
that need the device alone have threads and a backlog of their own, so that no other job waits
behind them.
"""

from __future__ import annotations

import asyncio
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Literal, ParamSpec, TypeVar

from ourvidz_serverless.context import Stop
from ourvidz_serverless.document import Document
from ourvidz_serverless.errors import JobError, RateLimited, WorkerUnavailable
from ourvidz_serverless.job import Identity
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.worker import Worker

#: How many ended jobs are remembered.
MAX_ENDED = 500

#: How many characters the documents of ended jobs may have in their assets' URLs together: with
#: `STORAGE_URL=inline:` one has up to ten million. The last ended job is remembered in any case.
MAX_ENDED_CHARS = 200_000_000

#: The `Retry-After`, in seconds, when every thread and every place in the backlog is taken.
RETRY_AFTER_S = 2

#: Threads for jobs that were stopped before they began. Such a job computes nothing: it ends at
#: its first check, and its callback is posted.
STOPPED_THREADS = 4

Status = Literal["queued", "processing", "completed", "failed"]
P = ParamSpec("P")
T = TypeVar("T")


class JobRecord:
    """One job's state: its status, its progress, its text so far, and its document.

    Only the event loop changes it.
    """

    def __init__(self, job_id: str, announces: bool = True) -> None:
        self.job_id = job_id
        #: Whether the job's callbacks are posted.
        self.announces = announces
        self.stop = Stop()
        self.status: Status = "queued"
        self.progress: Mapping[str, Any] = {}
        self.text = ""
        self.document: Document | None = None
        #: Is set at the next change of the state. Take it before you read the state.
        self.changed = asyncio.Event()

    async def wait_for_text(self) -> None:
        """Wait for the job's first text or its end."""
        while not self.text and self.document is None:
            await self.changed.wait()

    async def wait_for_end(self) -> None:
        """Wait for the document."""
        while self.document is None:
            await self.changed.wait()

    def update(self, **changes: Any) -> None:
        """Change attributes, and wake everybody who waits for a change."""
        for name, value in changes.items():
            setattr(self, name, value)
        self.changed.set()
        self.changed = asyncio.Event()


class JobThreads:
    """Threads for jobs of one kind, and a bounded backlog of jobs that wait for a thread.

    Call its methods only from the event loop.
    """

    def __init__(self, threads: int, backlog: int) -> None:
        self._threads, self._limit = threads, threads + backlog
        self._running = 0
        #: How many jobs wait or run.
        self.num_open = 0
        #: The jobs without a thread, each with the call that runs it.
        self._backlog: OrderedDict[JobRecord, Callable[[], Document]] = OrderedDict()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="job")
        self._stopped_pool = ThreadPoolExecutor(STOPPED_THREADS, thread_name_prefix="stopped")
        self._all_ended = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether every thread and every place in the backlog is taken."""
        return self.num_open >= self._limit

    def add(self, record: JobRecord, call: Callable[[], Document]) -> None:
        """Run a job as soon as a thread is free."""
        self.num_open += 1
        self._backlog[record] = call
        self._start_next()

    def run_if_waiting(self, record: JobRecord) -> None:
        """Run a stopped job at once if it has no thread yet: it ends at its first check."""
        if call := self._backlog.pop(record, None):
            self._start(record, call, self._stopped_pool)

    async def close(self) -> None:
        """Wait until the last job has ended."""
        while self.num_open:
            self._all_ended.clear()
            await self._all_ended.wait()
        self._pool.shutdown()
        self._stopped_pool.shutdown()

    def _start_next(self) -> None:
        while self._backlog and self._running < self._threads:
            record, call = self._backlog.popitem(last=False)
            self._running += 1
            self._start(record, call, self._pool)

    def _start(self, record: JobRecord, call: Callable[[], Document], pool: Executor) -> None:
        running = asyncio.get_running_loop().run_in_executor(pool, call)
        running.add_done_callback(functools.partial(self._on_end, record, pool))

    def _on_end(self, record: JobRecord, pool: Executor, running: asyncio.Future[Document]) -> None:
        self.num_open -= 1
        if pool is self._pool:
            self._running -= 1
            self._start_next()
        if not self.num_open:
            self._all_ended.set()
        document = running.result()
        record.update(document=document, status=document.status)


class JobStore:
    """Accepts jobs while there is room, and finds the last ones by user, key and id.

    Call its methods only from the event loop.
    """

    def __init__(self, exclusive_places: int, shared_places: int, backlog: int) -> None:
        """`exclusive_places` threads run jobs that need the device alone, `shared_places` the rest.

        Each kind has at least one thread, and a backlog of `backlog` jobs.
        """
        self._exclusive = JobThreads(max(exclusive_places, 1), backlog)
        self._others = JobThreads(max(shared_places, 1), backlog)
        self._records: OrderedDict[Identity, JobRecord] = OrderedDict()

    def submit(self, worker: Worker, envelope: Envelope, announces: bool = True) -> JobRecord:
        """Run a job as soon as a thread is free; raises RateLimited if the backlog is full.

        A job that is already under way is not started again: both callers get the same record, and
        a stop by either stops it.
        """
        identity = envelope.identity
        first = self._records.get(identity)
        if first and not first.document and first.announces == announces:
            return first
        threads = self._exclusive if envelope.is_exclusive else self._others
        if threads.is_full:
            raise RateLimited(
                f"{threads.num_open} jobs are under way here already", retry_after=RETRY_AFTER_S
            )
        loop, record = asyncio.get_running_loop(), JobRecord(identity.job_id, announces)

        def update(**changes: Any) -> None:
            loop.call_soon_threadsafe(functools.partial(record.update, **changes))

        self._remember(identity, record)
        threads.add(record, functools.partial(_run, worker, envelope, record, update))
        return record

    def stop(self, record: JobRecord, error: JobError | None = None) -> None:
        """Stop a job at its next step. A job without a thread ends at once.

        Such a job's place in the backlog is free again.
        """
        record.stop.set(error)
        for threads in (self._exclusive, self._others):
            threads.run_if_waiting(record)

    def find(self, identity: Identity) -> JobRecord | None:
        """The latest job of that user, key and id; None if it is not remembered."""
        return self._records.get(identity)

    @property
    def counts(self) -> dict[str, int]:
        """How many jobs are `queued` and `processing`."""
        records = self._records.values()
        return {
            status: sum(record.status == status for record in records)
            for status in ("queued", "processing")
        }

    async def close(self) -> None:
        """Wait until the last job has ended. Close the worker first, so that they end."""
        await asyncio.gather(self._exclusive.close(), self._others.close())

    def _remember(self, identity: Identity, record: JobRecord) -> None:
        self._records.pop(identity, None)
        self._records[identity] = record
        num_ended = num_chars = 0
        for name, old in reversed(tuple(self._records.items())):
            if old.document:
                num_ended += 1
                num_chars += sum(len(asset.url) for asset in old.document.assets)
                if num_ended > MAX_ENDED or (num_chars > MAX_ENDED_CHARS and num_ended > 1):
                    del self._records[name]


class CallThreads:
    """A few threads for short calls of one kind, so that one kind never delays another."""

    def __init__(self, name: str, threads: int, waiting: int) -> None:
        self._limit = threads + waiting
        self._open = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a call; raises WorkerUnavailable if too many calls are open already."""
        if self.is_full:
            raise WorkerUnavailable(
                f"{self._open} such calls are under way here already", retry_after=RETRY_AFTER_S
            )
        self._open += 1
        running = asyncio.get_running_loop().run_in_executor(
            self._pool, functools.partial(call, *args, **kwargs)
        )
        running.add_done_callback(self._on_end)
        return await asyncio.shield(running)

    @property
    def is_full(self) -> bool:
        """Whether the next call would be refused."""
        return self._open >= self._limit

    def close(self) -> None:
        """Start no more calls. Running calls end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _on_end(self, running: asyncio.Future[Any]) -> None:
        self._open -= 1
        # Read the exception even if nobody waits for it, or asyncio logs it.
        if not running.cancelled():
            running.exception()


def _run(
    worker: Worker, envelope: Envelope, record: JobRecord, update: Callable[..., None]
) -> Document:
    """Run one job in its thread; each update of `text` is the whole text so far."""
    text = ""

    def emit(item: Mapping[str, Any]) -> None:
        nonlocal text
        text += item["delta"]
        update(text=text)

    update(status="processing")
    return worker.run(
        envelope, record.stop, lambda progress: update(progress=progress), emit, record.announces
    )
