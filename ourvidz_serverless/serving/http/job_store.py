"""The jobs of one HTTP face: run in threads, watched while they run, remembered for a while.

RunPod keeps a queue and every job's status for us; behind plain HTTP nobody does. So there are as
many threads as the worker does jobs at once, a bounded row of jobs that wait for one, and the
last jobs' documents, in memory: whoever needs them for longer has the callback. Jobs that take
turns on the device have threads and a row of their own, so that no other job waits behind them.
"""

from __future__ import annotations

import asyncio
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Literal, ParamSpec, TypeVar

from ourvidz_serverless import jobs
from ourvidz_serverless.context import Stop
from ourvidz_serverless.document import Document
from ourvidz_serverless.errors import JobError, RateLimited, WorkerUnavailable
from ourvidz_serverless.job import Identity
from ourvidz_serverless.worker import Worker

#: Jobs whose end is remembered.
KEPT = 500

#: What a caller is asked to wait, in seconds, when every thread and place in the row is taken.
RETRY_AFTER_S = 2

#: Threads for jobs that were stopped before they began. Such a job computes nothing: it ends at
#: its first check, and its callback is posted.
STOPPED_THREADS = 4

Status = Literal["queued", "processing", "completed", "failed"]
P = ParamSpec("P")
T = TypeVar("T")


class Ticket:
    """One job as its caller sees it: where it stands, what it said so far, how it ended.

    Its state belongs to the event loop; `changed` wakes whoever watches it.
    """

    def __init__(self, job_id: str, worker: Worker | None = None) -> None:
        self.job_id = job_id
        #: Which worker runs it: one that posts callbacks, or a silent one.
        self.worker = worker
        self.stop = Stop()
        self.status: Status = "queued"
        self.progress: Mapping[str, Any] = {}
        self.text = ""
        self.document: Document | None = None
        #: Set at the next change of any kind; take it before looking at the state.
        self.news = asyncio.Event()

    async def begun(self) -> None:
        """Wait until the job has said something, or has ended."""
        while not self.text and self.document is None:
            await self.news.wait()

    async def ended(self) -> None:
        """Wait for the document."""
        while self.document is None:
            await self.news.wait()

    def note(self, **changes: Any) -> None:
        """Change the state, and wake who watches."""
        for name, value in changes.items():
            setattr(self, name, value)
        self.news.set()
        self.news = asyncio.Event()


class Row:
    """Threads for jobs of one kind, and a bounded number of jobs that wait for one.

    Call its methods only from the event loop.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        self._threads, self._most = threads, threads + waiting
        self._running = 0
        self.num_open = 0
        #: What has no thread yet: the call that runs it, and holds its payload.
        self._waiting: OrderedDict[Ticket, Callable[[], Document]] = OrderedDict()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="job")
        self._stopped = ThreadPoolExecutor(STOPPED_THREADS, thread_name_prefix="stopped")
        self._is_empty = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether every thread is busy, and every place in the row is taken."""
        return self.num_open >= self._most

    def add(self, ticket: Ticket, call: Callable[[], Document]) -> None:
        """Run a job as soon as a thread is free."""
        self.num_open += 1
        self._waiting[ticket] = call
        self._start_next()

    def end_waiting(self, ticket: Ticket) -> None:
        """Run a stopped job at once, if it still waits: it ends at its first check."""
        if call := self._waiting.pop(ticket, None):
            self._start(ticket, call, self._stopped)

    async def close(self) -> None:
        """Wait until the last job has ended."""
        while self.num_open:
            self._is_empty.clear()
            await self._is_empty.wait()
        self._pool.shutdown()
        self._stopped.shutdown()

    def _start_next(self) -> None:
        while self._waiting and self._running < self._threads:
            ticket, call = self._waiting.popitem(last=False)
            self._running += 1
            self._start(ticket, call, self._pool)

    def _start(self, ticket: Ticket, call: Callable[[], Document], pool: Executor) -> None:
        running = asyncio.get_running_loop().run_in_executor(pool, call)
        running.add_done_callback(functools.partial(self._end, ticket, pool))

    def _end(self, ticket: Ticket, pool: Executor, running: asyncio.Future[Document]) -> None:
        self.num_open -= 1
        if pool is self._pool:
            self._running -= 1
            self._start_next()
        if not self.num_open:
            self._is_empty.set()
        document = running.result()
        ticket.note(document=document, status=document.status)


class Docket:
    """Accepts jobs while there is room, and remembers the last ones by user, key and id.

    Call its methods only from the event loop.
    """

    def __init__(self, device_places: int, other_places: int, waiting: int) -> None:
        """`device_places` threads are for jobs that take turns on the device.

        `other_places` are for all others. Either kind has one thread at least, and `waiting` more
        jobs may wait for one.
        """
        self._in_turn = Row(max(device_places, 1), waiting)
        self._beside = Row(max(other_places, 1), waiting)
        self._tickets: OrderedDict[Identity, Ticket] = OrderedDict()

    def submit(self, worker: Worker, event: Mapping[str, Any]) -> Ticket:
        """Have a job run as soon as a thread is free; raise RateLimited when the row is full.

        A job that is under way is not taken again: one ticket, which stops it for all.
        """
        identity = jobs.identity(event)
        first = self._tickets.get(identity)
        if first and not first.document and first.worker is worker:
            return first
        row = self._in_turn if jobs.is_in_turn(event) else self._beside
        if row.is_full:
            raise RateLimited(
                f"{row.num_open} jobs are under way here already", retry_after=RETRY_AFTER_S
            )
        loop, ticket = asyncio.get_running_loop(), Ticket(identity.job_id, worker)

        def tell(**changes: Any) -> None:
            loop.call_soon_threadsafe(functools.partial(ticket.note, **changes))

        self._remember(identity, ticket)
        row.add(ticket, functools.partial(_run, worker, event, ticket.stop, tell))
        return ticket

    def stop(self, ticket: Ticket, error: JobError | None = None) -> None:
        """Stop a job at its next step; one that waits for a thread ends at once.

        Such a job gives its place in the row back.
        """
        ticket.stop.set(error)
        for row in (self._in_turn, self._beside):
            row.end_waiting(ticket)

    def find(self, identity: Identity) -> Ticket | None:
        """The latest job of that user, key and id, while it is remembered."""
        return self._tickets.get(identity)

    @property
    def counts(self) -> dict[str, int]:
        """How many jobs wait and run at this moment."""
        tickets = self._tickets.values()
        return {
            status: sum(ticket.status == status for ticket in tickets)
            for status in ("queued", "processing")
        }

    async def close(self) -> None:
        """Wait until the last job has ended; the worker sees to it that they do."""
        await asyncio.gather(self._in_turn.close(), self._beside.close())

    def _remember(self, identity: Identity, ticket: Ticket) -> None:
        self._tickets.pop(identity, None)
        self._tickets[identity] = ticket
        ended = [name for name, old in self._tickets.items() if old.document]
        for name in ended[:-KEPT]:
            del self._tickets[name]


class CallThreads:
    """A few threads for short calls of one kind, so that one kind never delays another."""

    def __init__(self, name: str, threads: int, waiting: int) -> None:
        self._most = threads + waiting
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
        running.add_done_callback(self._end)
        return await asyncio.shield(running)

    @property
    def is_full(self) -> bool:
        """Whether the next call would be refused."""
        return self._open >= self._most

    def close(self) -> None:
        """Start no further call. Running calls end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _end(self, running: asyncio.Future[Any]) -> None:
        self._open -= 1
        # If nobody waits for it any more, its error is dropped.
        if not running.cancelled():
            running.exception()


def _run(
    worker: Worker, event: Mapping[str, Any], stop: Stop, tell: Callable[..., None]
) -> Document:
    """One job in its thread; what it streams is told as the whole text so far."""
    said = ""

    def emit(item: Mapping[str, Any]) -> None:
        nonlocal said
        said += item["delta"]
        tell(text=said)

    tell(status="processing")
    return worker.run(event, stop, lambda progress: tell(progress=progress), emit)
