"""The jobs of one HTTP face: run in threads, watched while they run, remembered for a while.

RunPod keeps a queue and every job's status for us; behind plain HTTP nobody does. So there are as
many threads as the worker takes jobs at once, a bounded row of jobs that wait for one, and the
last jobs' documents, in memory: whoever needs them for longer has the callback.
"""

from __future__ import annotations

import asyncio
import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from ourvidz_serverless import jobs
from ourvidz_serverless.context import Stop
from ourvidz_serverless.errors import RateLimited
from ourvidz_serverless.payloads import Document
from ourvidz_serverless.worker import Worker

#: Jobs whose end is remembered.
KEPT = 500

#: What a caller is asked to wait, in seconds, when every thread and place in the row is taken.
RETRY_AFTER_S = 2

Status = Literal["queued", "processing", "completed", "failed"]


class Ticket:
    """One job as its caller sees it: where it stands, what it said so far, how it ended.

    Its state belongs to the event loop; `changed` wakes whoever watches it.
    """

    def __init__(self, job_id: str, delivery: Hashable = None) -> None:
        self.job_id = job_id
        #: Whose delivery it was, and to which worker.
        self.delivery = delivery
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


class Docket:
    """Takes jobs as long as there is room, and knows the last ones by their ids."""

    def __init__(self, threads: int, waiting: int) -> None:
        self._most = threads + waiting
        self._open = 0
        self._tickets: OrderedDict[str, Ticket] = OrderedDict()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="job")

    def submit(self, worker: Worker, job_id: str, event: Mapping[str, Any]) -> Ticket:
        """Have a job run as soon as a thread is free; raise RateLimited when the row is full.

        A job that is under way is not taken again: one ticket, which stops it for all.
        """
        # As `Flights` has it, which a delivery that waits for a thread does not reach.
        delivery = (worker, jobs.user_id(event), jobs.api_key(event))
        first = self._tickets.get(job_id)
        if first and not first.document and first.delivery == delivery:
            return first
        if self._open >= self._most:
            raise RateLimited(
                f"{self._open} jobs are under way here already", retry_after=RETRY_AFTER_S
            )
        loop, ticket = asyncio.get_running_loop(), Ticket(job_id, delivery)

        def tell(**changes: Any) -> None:
            loop.call_soon_threadsafe(functools.partial(ticket.note, **changes))

        self._open += 1
        self._remember(ticket)
        running = loop.run_in_executor(self._threads, _run, worker, event, ticket.stop, tell)
        running.add_done_callback(functools.partial(self._end, ticket))
        return ticket

    def find(self, job_id: str) -> Ticket | None:
        """The latest job of that id, while it is remembered."""
        return self._tickets.get(job_id)

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
        await asyncio.to_thread(self._threads.shutdown)

    def _remember(self, ticket: Ticket) -> None:
        self._tickets.pop(ticket.job_id, None)
        self._tickets[ticket.job_id] = ticket
        ended = [name for name, old in self._tickets.items() if old.document]
        for name in ended[:-KEPT]:
            del self._tickets[name]

    def _end(self, ticket: Ticket, running: asyncio.Future[Document]) -> None:
        self._open -= 1
        document = running.result()
        ticket.note(document=document, status=document.status)


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
