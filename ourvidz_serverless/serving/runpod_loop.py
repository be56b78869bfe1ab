"""RunPod's worker loop with its faults mended. Only this module replaces parts of the SDK.

What the SDK (1.12) does, and what `install` does instead:

- After SIGTERM the SDK runs no more jobs, although its poll for jobs is still open: a job from that
  poll is never run and never answered. Here the poll ends first, and its job is run. The poll is
  not cancelled, because its answer may already hold a job.
- The SDK drops a result after three tries, which take about four seconds. Here the tries go on for
  `RESULT_S`, and `keep` stores a result that the platform did not take.
- While the platform cannot be reached, the SDK polls again at once and logs every try. Here the
  waits grow, with one line in the log when the outage begins, and one when it ends.
- The SDK takes jobs of any type, up to its concurrency. Here a `Share` limits how many jobs of one
  kind the worker holds.
- The SDK replaces a worker only after a job. Here a worker that `is_lost` begins no more polls, and
  ends even if it has no job.
- In the SDK a stop signal that comes before the job's task has begun is lost, and the job's slot
  may be lost too. Here the job is stopped when it begins.

The rest of the loop is the SDK's own. `tests/serving/test_runpod_loop.py` fails if a version of the
SDK changes code that this module relies on.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import runpod
from aiohttp import ClientError, ClientResponseError, ClientSession, ClientTimeout
from runpod.http_client import TooManyRequests
from runpod.serverless.modules import rp_http, rp_job, rp_ping, rp_scale
from runpod.serverless.modules.rp_logger import RunPodLogger

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.logs import log
from ourvidz_serverless.net.retries import Fault, Retry

#: The version of the SDK whose internals are replaced here.
SDK = "1.12."

#: How long the tries to post a result go on, in seconds. Meanwhile its job keeps its slot.
RESULT_S = 120.0

#: The waits between the tries to post a result, and how long one try may take.
RESULT_RETRY = Retry(base_s=0.5, max_s=10.0, try_s=60.0)

#: The waits between polls while the platform cannot be reached.
POLL_RETRY = Retry(base_s=0.5, max_s=30.0)

#: How long a stop signal is remembered for a job that has not begun, in seconds. Not longer: a
#: later try of the job has the same id.
EARLY_STOP_S = 10.0

#: How often a closing worker checks whether the last job has ended, in seconds.
IDLE_POLL_S = 0.1

#: The content type of the SDK's posts of JSON.
HEADERS = {"charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded"}

#: Stores a job's result that the platform did not take; returns its key, or None if that failed.
Keep = Callable[[Mapping[str, Any], Mapping[str, Any]], str | None]


@dataclass(frozen=True, slots=True)
class Share:
    """A limit on how many jobs of one kind the worker holds."""

    most: int
    includes: Callable[[Mapping[str, Any]], bool]


def install(
    close: Callable[[], None],
    keep: Keep,
    grace_s: float,
    share: Share | None = None,
    is_lost: Callable[[], bool] = lambda: False,
) -> None:
    """Make `runpod.serverless.start` run this loop.

    `close` is called once, at SIGTERM or SIGINT. After it, results are posted for `grace_s` at
    most. While the worker holds as many jobs of `share` as it may, it does not poll at all, because
    a poll cannot choose the kind of its job. A worker that `is_lost` ends with its last job. Raises
    ModelLoadError for another version of the SDK.
    """
    if not runpod.__version__.startswith(SDK):
        raise ModelLoadError(f"runpod: version {SDK}x is needed, {runpod.__version__} is installed")
    rp_scale.JobScaler = functools.partial(
        Loop, close=close, keep=keep, grace_s=grace_s, share=share, is_lost=is_lost
    )
    rp_ping.log = HeartbeatLog()


class Loop(rp_scale.JobScaler):
    """The SDK's three loops: one takes jobs, one runs them, one listens for stop signals."""

    def __init__(
        self,
        config: dict[str, Any],
        close: Callable[[], None],
        keep: Keep,
        grace_s: float,
        share: Share | None = None,
        is_lost: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(config)
        self._close, self._keep, self._grace_s = close, keep, grace_s
        self._is_closing, self._is_lost, self._ends = False, is_lost, math.inf
        self._started: set[str] = set()
        self._share, self._in_share = share, set[str]()
        self._job_ended = asyncio.Event()
        self._early_stops: dict[str, float] = {}
        self._jobs_outage, self._stops_outage = Outage("jobs"), Outage("stop signals")
        self.jobs_fetcher, self.stop_signals_fetcher = self._fetch_jobs, self._fetch_stops
        rp_job.send_result = self._send_result

    @property
    def is_closing(self) -> bool:
        """Whether the loop begins no more polls for jobs."""
        return self._is_closing or self._is_lost()

    def handle_shutdown(self, signum: int, frame: object) -> None:
        """The handler of SIGTERM and SIGINT; a second signal changes nothing."""
        if self._ends == math.inf:
            self._ends = time.monotonic() + self._grace_s
            self._close()
        self.kill_worker()

    def kill_worker(self) -> None:
        """Begin no more polls for jobs. End when the open poll and every job have ended.

        The SDK also calls this to replace a worker. The jobs of such a worker have unlimited time
        until a signal comes.
        """
        self._is_closing = True

    async def _fetch_jobs(self, session: ClientSession, count: int) -> list[dict[str, Any]] | None:
        """The jobs of one poll. The SDK calls this only after the previous poll has ended."""
        if self.is_closing:
            await self._wait_until_idle()
            super().kill_worker()
            return None
        room = self._room
        if not room:
            # Do not poll after this wait: the SDK limits the time of this call, and a poll needs
            # all of it. The SDK calls again.
            self._job_ended.clear()
            await self._job_ended.wait()
            return None
        try:
            jobs: list[dict[str, Any]] | None = await rp_job.get_job(session, min(count, room))
        except TooManyRequests:
            raise  # The SDK waits by itself.
        except (ClientError, OSError) as exc:
            await self._pause(self._jobs_outage.failed(exc))
            return None
        self._jobs_outage.ended()
        if self._share:
            self._in_share |= {job["id"] for job in jobs or [] if self._share.includes(job)}
        return jobs

    @property
    def _room(self) -> int:
        """How many jobs the worker may take, in case all of them are of the share."""
        return self._share.most - len(self._in_share) if self._share else sys.maxsize

    async def _wait_until_idle(self) -> None:
        # Replaces the SDK's wait for the last jobs, during which it ignores stop signals.
        while self.current_occupancy():
            await asyncio.sleep(IDLE_POLL_S)

    async def _pause(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not self.is_closing:
            await asyncio.sleep(IDLE_POLL_S)

    async def _fetch_stops(self, session: ClientSession) -> list[str]:
        """The ids of the jobs to stop, from one poll, which is cancelled when the last job ends."""
        poll = asyncio.ensure_future(rp_job.get_stop_signals(session))
        ended = asyncio.ensure_future(self._shutdown_event.wait())
        try:
            await asyncio.wait({poll, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not poll.done():
                return []
            stops: list[str] = poll.result()
        except TooManyRequests:
            raise
        except (ClientError, OSError) as exc:
            await self._pause(self._stops_outage.failed(exc))
            return []
        finally:
            poll.cancel()
            ended.cancel()
        self._stops_outage.ended()
        return stops

    async def stop_job(self, job_id: str) -> bool:
        """Stop a running job, or remember to stop it when it begins."""
        if job_id in self._started:
            stopped: bool = await super().stop_job(job_id)
            return stopped
        now = time.monotonic()
        remembered = self._early_stops.items()
        self._early_stops = {id: at for id, at in remembered if now - at < EARLY_STOP_S}
        self._early_stops[job_id] = now
        return False

    async def handle_job(self, session: ClientSession, job: dict[str, Any]) -> None:
        """Run a job and post its result."""
        stopped_at = self._early_stops.pop(job["id"], None)
        if stopped_at is not None and time.monotonic() - stopped_at < EARLY_STOP_S:
            task = asyncio.current_task()
            assert task
            # Takes effect at the handler's first `await`. The job then ends like any stopped job.
            task.cancel()
        self._started.add(job["id"])
        try:
            await super().handle_job(session, job)
        finally:
            self._started.discard(job["id"])
            self._in_share.discard(job["id"])
            self._job_ended.set()

    async def _send_result(
        self,
        session: ClientSession,
        result: dict[str, Any],
        job: dict[str, Any],
        is_stream: bool = False,
    ) -> None:
        """Post a result, and store it if the platform does not take it."""
        body = json.dumps(result, ensure_ascii=False).encode()
        refusal = await post_result(session, job["id"], body, is_stream, self.posting_time())
        if refusal:
            place = await asyncio.to_thread(self._keep, job, result)
            kept = f"it is kept at {place}" if place else "it could not be kept"
            log.error("the result of job %s was not taken (%s); %s", job["id"], refusal, kept)
        RunPodLogger().info("Finished.", job["id"])

    def posting_time(self) -> Callable[[], float]:
        """A countdown of the seconds left to post a result; fewer when the worker closes."""
        ends = time.monotonic() + RESULT_S
        return lambda: min(ends, self._ends) - time.monotonic()


async def post_result(
    session: ClientSession,
    job_id: str,
    body: bytes,
    is_stream: bool,
    remaining_s: Callable[[], float],
    policy: Retry = RESULT_RETRY,
) -> str | None:
    """Post a job's result, at least once, until the platform takes it.

    Returns None, or the last error in words. An error that another try would not change ends the
    tries.
    """
    failures = 0
    while True:
        try:
            await post(session, job_id, body, is_stream, policy.try_s)
            return None
        except (ClientError, OSError) as exc:
            refusal, is_final = describe(exc), not is_transient(exc)
        failures += 1
        wait_s = policy.wait_s(failures)
        if is_final or wait_s >= remaining_s():
            return refusal
        await asyncio.sleep(wait_s)


async def post(
    session: ClientSession, job_id: str, body: bytes, is_stream: bool, within_s: float
) -> None:
    """Post a job's data once; raises aiohttp's error, or TimeoutError."""
    url = rp_http.JOB_DONE_URL.replace("$ID", job_id) + f"&isStream={str(is_stream).lower()}"
    headers = {**HEADERS, "X-Request-ID": job_id}
    timeout = ClientTimeout(total=within_s)
    async with session.post(url, data=body, headers=headers, timeout=timeout) as answer:
        answer.raise_for_status()
        await answer.read()


def is_transient(error: Exception) -> bool:
    """Whether another try may succeed: there was no answer, or the platform is busy."""
    status = error.status if isinstance(error, ClientResponseError) else None
    return Fault(status).is_transient


def describe(error: Exception) -> str:
    """An error in words, without its URL: that holds the ids of the endpoint and the worker."""
    if isinstance(error, ClientResponseError):
        return f"HTTP {error.status}"
    return type(error).__name__


class Outage:
    """Logs one line when polls of one kind begin to fail, and one when they succeed again."""

    def __init__(self, what: str) -> None:
        self._what, self._failures, self._reason = what, 0, ""

    def failed(self, error: Exception) -> float:
        """Count a failure. Returns the wait before the next try, in seconds."""
        self._failures += 1
        reason = describe(error)
        if reason != self._reason:
            log.warning("the platform sends no %s (%s); trying again", self._what, reason)
        self._reason = reason
        return POLL_RETRY.wait_s(self._failures)

    def ended(self) -> None:
        """End the outage, if there was one."""
        if self._failures:
            log.info("the platform sends %s again", self._what)
        self._failures, self._reason = 0, ""


class HeartbeatLog:
    """Replaces the SDK's logger of heartbeats: one line for an outage, not for each failed ping."""

    def __init__(self) -> None:
        self._log, self._is_down = RunPodLogger(), False

    def error(self, message: str) -> None:
        """Log a failed ping, unless the ping before failed too."""
        if not self._is_down:
            self._log.error(message)
        self._is_down = True

    def debug(self, message: str) -> None:
        """Log a ping that arrived."""
        self._is_down = False
        self._log.debug(message)

    def info(self, message: str) -> None:
        """Log anything else."""
        self._log.info(message)
