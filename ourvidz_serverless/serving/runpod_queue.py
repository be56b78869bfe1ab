"""The Worker behind a queue-based RunPod endpoint: the handler that `runpod.serverless` calls.

A job runs in a thread, because a plain function would block the SDK's event loop. When the platform
cancels a job, the handler stops the thread and waits for its end: if the slot were free earlier,
the worker would compute more jobs at once than it has slots.

A worker that serves chat has a generator as its handler, because the SDK streams only the output of
a generator. The generator's last item is the document, whether or not the job streams. So on such
an endpoint, and only there, the `output` of `/run` and `/runsync` is a list that ends with the
document.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import runpod
from aiohttp import ClientError, ClientSession
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules.rp_logger import RunPodLogger

from ourvidz_serverless.context import Stop
from ourvidz_serverless.document import Document
from ourvidz_serverless.logs import log
from ourvidz_serverless.serving import runpod_loop
from ourvidz_serverless.serving.job_output import Arrival, Item, is_openai
from ourvidz_serverless.serving.openai.served import Served
from ourvidz_serverless.serving.runpod_loop import Share
from ourvidz_serverless.serving.terminal import (
    SERVE_API,
    TerminalReporter,
    is_for_a_person,
    is_on_platform,
    only_results_on_stdout,
    runs_one_job,
)
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.worker import Worker

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
StreamHandler = Callable[[dict[str, Any]], AsyncIterator[Item]]

#: The least time between two posts of progress, in seconds: a step may take milliseconds.
PROGRESS_INTERVAL_S = 0.5

#: How long one post of progress may take, in seconds.
PROGRESS_TIMEOUT_S = 10.0

#: How long the device may take for a small computation before the first job, in seconds.
FITNESS_S = 60.0

#: How long a result waits for the post of the last progress, in seconds.
LAST_PROGRESS_TIMEOUT_S = 5.0


def serve(worker: Worker, settings: Settings) -> None:
    """Run the SDK's loop with this worker until the platform ends it."""
    RunPodLogger().set_level(_sdk_level())
    runpod.serverless.register_fitness_check(make_fitness_check(worker))
    runpod_loop.install(
        close=lambda: worker.close_after(settings.shutdown_grace_s),
        keep=functools.partial(keep_result, worker),
        grace_s=settings.shutdown_grace_s,
        share=share_of(settings),
        is_lost=lambda: worker.is_lost,
    )
    make_handler_of = make_stream_handler if _streams(settings) else make_handler
    config: dict[str, Any] = {
        "concurrency_modifier": lambda _: num_held(settings),
        "return_aggregate_stream": True,
    }

    def replace() -> None:
        # The SDK reads this after every job, and ends its loop when the running jobs have ended.
        # The same key in a result reaches only the platform, and not from a generator.
        config["refresh_worker"] = True

    config["handler"] = make_handler_of(worker, settings, replace)
    if is_for_a_person(sys.argv):
        config["handler"] = _told_once(config["handler"])
    with only_results_on_stdout() if runs_one_job(sys.argv) else contextlib.nullcontext():
        try:
            runpod.serverless.start(config)
        finally:
            # The SDK ends a single test job by SystemExit.
            worker.flush()


def _sdk_level() -> str:
    """The level of the SDK's log lines: `RUNPOD_LOG_LEVEL`, if it is set.

    At DEBUG, its default, the SDK logs every payload. At INFO it logs the result of a single job,
    which may hold a picture.
    """
    level = os.environ.get("RUNPOD_LOG_LEVEL", "INFO" if is_on_platform() else "WARN")
    return "WARN" if level == "INFO" and runs_one_job(sys.argv) else level


def _told_once(handler: Handler) -> Handler:
    """The handler of one job, whose failure the `TerminalReporter` prints."""

    async def handle(event: dict[str, Any]) -> dict[str, Any]:
        result = await handler(event)
        if "error" in result:
            # The SDK would print the failure again, as JSON.
            RunPodLogger().set_level("NOTSET")
        return result

    return handle


def num_held(settings: Settings) -> int:
    """How many jobs the SDK may give to the worker: those that run, and those that wait."""
    return settings.resolved_concurrency + settings.resolved_backlog


def share_of(settings: Settings) -> Share | None:
    """How many of these jobs may need the device alone; None if all do, or none.

    The other places are always free for chats.
    """
    if not (settings.exclusive_places and settings.shared_places):
        return None

    served = Served.of(settings)

    def is_exclusive(event: Mapping[str, Any]) -> bool:
        return Arrival.of(event, settings, served).envelope.is_exclusive

    return Share(settings.exclusive_places + settings.resolved_backlog, is_exclusive)


def make_fitness_check(
    worker: Worker, within_s: float = FITNESS_S
) -> Callable[[], Awaitable[None]]:
    """The SDK's check before it takes the first job. If it raises, the process ends."""

    async def device_computes() -> None:
        # In a thread, because a dead device may never answer.
        checking = asyncio.to_thread(worker.check_device)
        try:
            await asyncio.wait_for(checking, within_s)
        except TimeoutError:
            raise RuntimeError(f"the device does not answer within {within_s:g} seconds") from None

    return device_computes


def _streams(settings: Settings) -> bool:
    # The SDK takes no generator for a single test input.
    has_queue = is_on_platform() or SERVE_API in sys.argv
    return has_queue and settings.shared_places > 0


def make_handler(
    worker: Worker, settings: Settings, replace: Callable[[], None] = lambda: None
) -> Handler:
    """The async handler: runs each job in a thread, and posts its progress in order.

    Calls `replace` if the worker has lost its device.
    """
    threads = ThreadPoolExecutor(num_held(settings), thread_name_prefix="job")
    served = Served.of(settings)

    async def handler(event: dict[str, Any]) -> dict[str, Any]:
        arrival = Arrival.of(event, settings, served)
        if arrival.items is not None:
            return _without_events(arrival.items)
        stop, reporter = Stop(), make_reporter(event, settings)
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(
            threads, worker.run, arrival.envelope, stop, reporter.report, reporter.write
        )
        try:
            document = await asyncio.shield(running)
            reporter.show(document)
            if worker.is_lost:
                replace()
            return arrival.output.result(document)
        except asyncio.CancelledError:
            stop.set()
            await _wait_for_end(running)
            raise
        finally:
            await reporter.close()

    return handler


def make_stream_handler(
    worker: Worker, settings: Settings, replace: Callable[[], None] = lambda: None
) -> StreamHandler:
    """The handler as a generator: yields what the job streams, and then the document."""
    threads = ThreadPoolExecutor(num_held(settings), thread_name_prefix="job")
    served = Served.of(settings)

    async def handler(event: dict[str, Any]) -> AsyncIterator[Item]:
        arrival = Arrival.of(event, settings, served)
        if arrival.items is not None:
            for item in arrival.items:
                yield item
            return
        stop, reporter, deltas = Stop(), make_reporter(event, settings), Deltas()
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(
            threads, worker.run, arrival.envelope, stop, reporter.report, deltas.emit
        )
        running.add_done_callback(deltas.end)
        _call_at_end_of_task(stop.set)
        try:
            async for text in deltas:
                for item in arrival.output.piece(text):
                    yield item
        finally:
            # The job still runs only if this handler was cancelled.
            stop.set()
            await _wait_for_end(running)
            await reporter.close()
        document = running.result()
        reporter.show(document)
        if worker.is_lost:
            replace()
        for item in arrival.output.end(document):
            yield item

    return handler


def _without_events(items: tuple[Item, ...]) -> dict[str, Any]:
    """The item for a handler that streams nothing."""
    last = items[-1]
    assert isinstance(last, dict)
    return dict(last)


def _call_at_end_of_task(call: Callable[[], None]) -> None:
    """Call a function when the current task ends.

    If a job is cancelled while the SDK posts an item, the generator gets no exception. It stays at
    its `yield` until it is garbage-collected, perhaps after another job.
    """
    task = asyncio.current_task()
    assert task
    task.add_done_callback(lambda _: call())


class Deltas:
    """A job's streamed text. The text that arrives while one item is posted becomes one item."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._has_news = asyncio.Event()
        self._text = ""
        self._is_ended = False

    def emit(self, item: Mapping[str, Any]) -> None:
        """Add text to the stream; called from the job's thread."""
        self._loop.call_soon_threadsafe(self._add, item["delta"])

    def end(self, running: asyncio.Future[Any]) -> None:
        """End the stream after the text that has arrived."""
        self._is_ended = True
        self._has_news.set()

    async def __aiter__(self) -> AsyncIterator[str]:
        while self._text or not self._is_ended:
            await self._has_news.wait()
            self._has_news.clear()
            text, self._text = self._text, ""
            if text:
                yield text

    def _add(self, text: str) -> None:
        self._text += text
        self._has_news.set()


async def _wait_for_end(running: asyncio.Future[Any]) -> None:
    """Wait for a job's thread to end, even if the platform cancels this task again."""
    while not running.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([running])


def keep_result(worker: Worker, event: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
    """Store a result that the platform did not take; the key of the file, if there is one.

    `replay` could not post an answer of OpenAI's protocol, so that is not kept.
    """
    return None if is_openai(event) else worker.keep_result(event, read_output(result))


def read_output(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The document in a result that the SDK posts.

    In a list it is the last item. For a failed job the SDK posts only the failure.
    """
    output = result.get("output")
    last = output[-1] if isinstance(output, list) and output else output
    if isinstance(last, Mapping):
        return last
    return {"status": "failed", "failure": json.loads(result["error"])}


def make_reporter(
    event: Mapping[str, Any], settings: Settings
) -> PlatformReporter | TerminalReporter:
    """What reports a job's progress: to RunPod, or at a terminal."""
    return PlatformReporter(event) if is_on_platform() else TerminalReporter(settings)


class PlatformReporter:
    """Posts the newest progress, in order, and nothing after `close`.

    The SDK's `progress_update` starts a thread for each call, so updates overtake one another. An
    update that arrives after the result leaves the job IN_PROGRESS for ever.
    """

    def __init__(self, event: Mapping[str, Any]) -> None:
        self._event = event
        self._loop = asyncio.get_running_loop()
        self._newest: Mapping[str, Any] = {}
        self._is_failing = False
        self._has_news, self._closing = asyncio.Event(), asyncio.Event()
        self._posting = asyncio.create_task(self._post_all())

    def report(self, progress: Mapping[str, Any]) -> None:
        """Post this progress soon; called from the job's thread."""
        self._newest = progress
        self._loop.call_soon_threadsafe(self._has_news.set)

    def write(self, delta: Mapping[str, Any]) -> None:
        """Do nothing: the platform gets a stream from a generator alone."""

    def show(self, document: Document) -> None:
        """Do nothing: the SDK posts what the handler returns."""

    async def close(self) -> None:
        """End the posts. A post that has begun may arrive first."""
        self._closing.set()
        self._has_news.set()
        await asyncio.wait([self._posting], timeout=LAST_PROGRESS_TIMEOUT_S)
        self._posting.cancel()

    async def _post_all(self) -> None:
        async with AsyncClientSession() as session:
            while await self._has_news.wait() and not self._closing.is_set():
                self._has_news.clear()
                await self._post(session)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), PROGRESS_INTERVAL_S)

    async def _post(self, session: ClientSession) -> None:
        """Post the newest progress once: a later post replaces one that failed."""
        update = json.dumps({"status": "IN_PROGRESS", "output": self._newest}).encode()
        try:
            await runpod_loop.post(session, self._event["id"], update, False, PROGRESS_TIMEOUT_S)
        except (ClientError, OSError) as exc:
            if not self._is_failing:
                why = runpod_loop.describe(exc)
                log.warning("progress of job %s was not posted: %s", self._event["id"], why)
            self._is_failing = True
