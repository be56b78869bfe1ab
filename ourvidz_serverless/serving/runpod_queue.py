"""The Worker behind a queue-based RunPod endpoint: the handler that `runpod.serverless` calls.

A plain function would block the SDK's event loop, so a job runs in a thread. When the platform
cancels it, the handler asks the thread to stop and waits for it, since a slot that is free while
its thread still computes is a slot too many.

Where chat is served the handler is a generator, since the SDK streams no other's output. Its last
item is the document, whether or not the job streams; so on such an endpoint, and only there, the
`output` of `/run` and `/runsync` is a list whose last item is the document.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from tqdm import tqdm

from ourvidz_serverless import jobs
from ourvidz_serverless.context import Stop
from ourvidz_serverless.document import Document
from ourvidz_serverless.logs import log
from ourvidz_serverless.serving import runpod_loop
from ourvidz_serverless.serving.runpod_loop import Share
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.worker import Worker

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
StreamHandler = Callable[[dict[str, Any]], AsyncIterator[dict[str, Any]]]

#: A step of a small picture takes milliseconds, and nobody reads progress that fast.
PROGRESS_INTERVAL_S = 0.5

#: How long one post of progress may take, in seconds.
PROGRESS_S = 10.0

#: How long the device may take for a small computation before the first job, in seconds.
FITNESS_S = 60.0

#: The result must not wait long for a platform that does not take the last progress.
LAST_PROGRESS_S = 5.0


def serve(worker: Worker, settings: Settings) -> None:
    """Run the SDK's loop with this worker until the platform ends it."""
    # At DEBUG, the SDK's default, it logs every payload; at a terminal we show the result.
    quiet = "INFO" if is_on_platform() else "WARN"
    RunPodLogger().set_level(os.environ.get("RUNPOD_LOG_LEVEL", quiet))
    runpod.serverless.register_fitness_check(make_fitness_check(worker))
    runpod_loop.install(
        close=lambda: worker.close_after(settings.shutdown_grace_s),
        keep=lambda event, result: worker.keep_result(event, read_output(result)),
        grace_s=settings.shutdown_grace_s,
        share=share_of(settings),
    )
    make = make_stream_handler if _streams(settings) else make_handler
    config: dict[str, Any] = {
        "concurrency_modifier": lambda _: num_held(settings),
        "return_aggregate_stream": True,
    }

    def replace() -> None:
        # The SDK looks here after every job, and ends its loop when those that run are done. That
        # key in a result only tells the platform, and in a generator's nobody reads it.
        config["refresh_worker"] = True

    config["handler"] = make(worker, settings, replace)
    runpod.serverless.start(config)


def num_held(settings: Settings) -> int:
    """How many jobs the SDK may hand to the worker: those that are done, and those that wait."""
    return settings.resolved_concurrency + settings.resolved_backlog


def share_of(settings: Settings) -> Share | None:
    """How many of them may be jobs that take turns, where there are others.

    Beside these there is always a place for as many chats as are answered at once.
    """
    if not (settings.exclusive_places and settings.shared_places):
        return None
    return Share(settings.exclusive_places + settings.resolved_backlog, jobs.event_is_exclusive)


def make_fitness_check(
    worker: Worker, within_s: float = FITNESS_S
) -> Callable[[], Awaitable[None]]:
    """The check that the SDK makes before it takes a job; where it raises, the process ends."""

    async def device_computes() -> None:
        # In a thread, since a dead device may never answer.
        checking = asyncio.to_thread(worker.check_device)
        try:
            await asyncio.wait_for(checking, within_s)
        except TimeoutError:
            raise RuntimeError(f"the device does not answer within {within_s:g} seconds") from None

    return device_computes


def _streams(settings: Settings) -> bool:
    # The SDK's run of a single test input takes no generator.
    has_queue = is_on_platform() or "--rp_serve_api" in sys.argv
    return has_queue and settings.shared_places > 0


def make_handler(
    worker: Worker, settings: Settings, replace: Callable[[], None] = lambda: None
) -> Handler:
    """The async handler: a job in a thread of its own, its progress told in order.

    `replace` is called when a job has left the worker without its device.
    """
    threads = ThreadPoolExecutor(num_held(settings), thread_name_prefix="job")

    async def handler(event: dict[str, Any]) -> dict[str, Any]:
        stop, reporter = Stop(), make_reporter(event)
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(threads, worker.run, event, stop, reporter.report)
        try:
            document = await asyncio.shield(running)
            reporter.show(document)
            if worker.is_lost:
                replace()
            return document.result()
        except asyncio.CancelledError:
            stop.set()
            await _wait_out(running)
            raise
        finally:
            await reporter.close()

    return handler


def make_stream_handler(
    worker: Worker, settings: Settings, replace: Callable[[], None] = lambda: None
) -> StreamHandler:
    """The same as a generator: what the job streams, item by item, and then the document."""
    threads = ThreadPoolExecutor(num_held(settings), thread_name_prefix="job")

    async def handler(event: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        stop, reporter, deltas = Stop(), make_reporter(event), Deltas()
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(
            threads, worker.run, event, stop, reporter.report, deltas.emit
        )
        running.add_done_callback(deltas.end)
        _at_the_end_of_this_task(stop.set)
        try:
            async for delta in deltas:
                yield delta
        finally:
            # Nothing is under way any more unless we were cancelled.
            stop.set()
            await _wait_out(running)
            await reporter.close()
        document = running.result()
        reporter.show(document)
        if worker.is_lost:
            replace()
        result = document.result()
        error = result.pop("error", None)
        result.pop("refresh_worker", None)
        yield result
        # The SDK streams no item that holds an error, so the error goes after the document.
        if error:
            yield {"error": error}

    return handler


def _at_the_end_of_this_task(call: Callable[[], None]) -> None:
    """A generator hears nothing of a cancel that meets the SDK while it posts an item.

    It stays at its `yield` until its memory is freed, which may be after another job.
    """
    task = asyncio.current_task()
    assert task
    task.add_done_callback(lambda _: call())


class Deltas:
    """A job's stream on its way to the caller: what gathers while one item is posted is one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._gathered = ""
        self._is_ended = False

    def emit(self, item: Mapping[str, Any]) -> None:
        """Take what the job says next; called from the job's thread."""
        self._loop.call_soon_threadsafe(self._take, item["delta"])

    def end(self, running: asyncio.Future[Any]) -> None:
        """The job has ended; what gathered is still given."""
        self._is_ended = True
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        while self._gathered or not self._is_ended:
            await self._news.wait()
            self._news.clear()
            text, self._gathered = self._gathered, ""
            if text:
                yield {"delta": text}

    def _take(self, text: str) -> None:
        self._gathered += text
        self._news.set()


async def _wait_out(running: asyncio.Future[Any]) -> None:
    """Wait for a job's thread, though the platform may cancel us again meanwhile."""
    while not running.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([running])


def read_output(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The document in what is posted to the platform.

    For a streamed job it is the last item. For a failed job the SDK posts only the failure.
    """
    output = result.get("output")
    last = output[-1] if isinstance(output, list) and output else output
    if isinstance(last, Mapping):
        return last
    return {"status": "failed", "failure": json.loads(result["error"])}


def make_reporter(event: Mapping[str, Any]) -> PlatformReporter | TerminalReporter:
    """Who hears of a job's progress: RunPod, or somebody at a terminal."""
    return PlatformReporter(event) if is_on_platform() else TerminalReporter()


def is_on_platform() -> bool:
    """Whether RunPod runs this process, and not somebody at a terminal."""
    return "RUNPOD_WEBHOOK_POST_OUTPUT" in os.environ


class PlatformReporter:
    """Posts progress in order, the newest only, and nothing after `close`.

    The SDK's `progress_update` opens a thread for each call: updates overtake one another, and
    one that arrives after the result leaves the job IN_PROGRESS for ever.
    """

    def __init__(self, event: Mapping[str, Any]) -> None:
        self._event = event
        self._loop = asyncio.get_running_loop()
        self._newest: Mapping[str, Any] = {}
        self._is_failing = False
        self._news, self._closing = asyncio.Event(), asyncio.Event()
        self._posting = asyncio.create_task(self._post_all())

    def report(self, progress: Mapping[str, Any]) -> None:
        """Take note of progress; called from the job's thread."""
        self._newest = progress
        self._loop.call_soon_threadsafe(self._news.set)

    def show(self, document: Document) -> None:
        """Nothing: the SDK posts what the handler returns."""

    async def close(self) -> None:
        """Post nothing more; a post that is on its way arrives first."""
        self._closing.set()
        self._news.set()
        await asyncio.wait([self._posting], timeout=LAST_PROGRESS_S)
        self._posting.cancel()

    async def _post_all(self) -> None:
        async with AsyncClientSession() as session:
            while await self._news.wait() and not self._closing.is_set():
                self._news.clear()
                await self._post(session)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), PROGRESS_INTERVAL_S)

    async def _post(self, session: ClientSession) -> None:
        """Post the newest progress once: a later post replaces one that failed."""
        update = json.dumps({"status": "IN_PROGRESS", "output": self._newest}).encode()
        try:
            await runpod_loop.post(session, self._event["id"], update, False, PROGRESS_S)
        except (ClientError, OSError) as exc:
            if not self._is_failing:
                why = runpod_loop.describe(exc)
                log.warning("progress of job %s was not posted: %s", self._event["id"], why)
            self._is_failing = True


class TerminalReporter:
    """A progress bar on stderr, and the result on stdout."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def report(self, progress: Mapping[str, Any]) -> None:
        """Move the bar; it appears with the first step."""
        if self._bar is None:
            self._bar = tqdm(total=progress["steps"], unit="step", desc=progress["stage"])
        self._bar.update(progress["step"] - self._bar.n)

    def show(self, document: Document) -> None:
        """Print the document as the caller gets it."""
        self._leave_bar()
        print(json.dumps(document.result(), indent=2, ensure_ascii=False), flush=True)

    async def close(self) -> None:
        """Leave the bar as it stands."""
        self._leave_bar()

    def _leave_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
