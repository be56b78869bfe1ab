"""Rate limits: the most jobs of a user, and of an endpoint, in a window of time.

Windows are fixed: a window opens with its first job and closes after its length, however many jobs
arrive. A job over a limit is refused with the seconds until the window closes. The jobs are counted
in this worker's memory or, if several workers share the limits, in Upstash Redis.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from ourvidz_serverless.deadline import NEVER, Deadline
from ourvidz_serverless.errors import RateLimited
from ourvidz_serverless.net.retries import Fault, Retry, is_transient, retry
from ourvidz_serverless.net.upstash import Upstash
from ourvidz_serverless.settings import Rate, Settings

#: Short, because each job waits until it is counted.
RETRY = Retry(base_s=0.1, try_s=2.0)

#: When the memory holds more windows than this, half of them are dropped.
MAX_WINDOWS = 10_000


class Counter(Protocol):
    """Counts jobs in windows. `count` makes one try and raises Fault."""

    policy: Retry

    def count(self, key: str, window_s: int) -> tuple[int, float]:
        """Count one more job: the jobs in the open window, and the seconds until it closes."""
        ...


class RateLimits:
    """The limits of one endpoint. Without rates there are none."""

    def __init__(self, rates: Mapping[str, Rate], counter: Counter) -> None:
        self.rates, self._counter = rates, counter

    @classmethod
    def of(cls, settings: Settings, endpoint: str = "local") -> RateLimits:
        """The limits that the environment sets; each endpoint's jobs are counted separately."""
        rates = {"user": settings.rate_limit_user, "endpoint": settings.rate_limit_endpoint}
        url, token = settings.upstash_redis_rest_url, settings.upstash_redis_rest_token
        counter: Counter = MemoryCounter()
        if url:
            redis = Upstash(url, token.get_secret_value() if token else "")
            counter = RedisCounter(redis, endpoint)
        return cls({name: rate for name, rate in rates.items() if rate}, counter)

    def check(self, user_id: str, deadline: Deadline = NEVER) -> None:
        """Count a job of this user.

        Raises RateLimited with the seconds to wait, and Fault if the job could not be counted.
        """
        # The user first: a job that is over its user's limit must not use up the endpoint's.
        for name, key in (("user", f"user:{user_id}"), ("endpoint", "endpoint")):
            rate = self.rates.get(name)
            if rate:
                count, closes_s = self._count(key, rate.window_s, deadline)
                if count > rate.jobs:
                    raise RateLimited(
                        f"over the limit of {rate} for this {name}", retry_after=round(closes_s, 1)
                    )

    def _count(self, key: str, window_s: int, deadline: Deadline) -> tuple[int, float]:
        return retry(
            lambda: self._counter.count(key, window_s),
            on=is_transient,
            policy=self._counter.policy,
            deadline=deadline,
        )


class MemoryCounter:
    """Counts in this process."""

    policy = RETRY

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._windows: dict[str, tuple[int, float]] = {}

    @property
    def num_windows(self) -> int:
        """How many windows are in memory, closed ones included."""
        return len(self._windows)

    def count(self, key: str, window_s: int) -> tuple[int, float]:
        now = self._clock()
        with self._lock:
            count, closes = self._windows.get(key, (0, now + window_s))
            if closes <= now:
                count, closes = 0, now + window_s
            self._windows[key] = (count + 1, closes)
            if len(self._windows) > MAX_WINDOWS:
                # The half that closes last remains, so every closed window is dropped.
                by_end = sorted(self._windows.items(), key=lambda window: window[1][1])
                self._windows = dict(by_end[MAX_WINDOWS // 2 :])
        return count + 1, closes - now


class RedisCounter:
    """Counts in Redis, for all workers that share the database."""

    def __init__(self, redis: Upstash, endpoint: str, policy: Retry = RETRY) -> None:
        self._redis, self._prefix = redis, f"ourvidz:{endpoint}"
        self.policy = policy

    def count(self, key: str, window_s: int) -> tuple[int, float]:
        # NX: only the first job of a window sets its end. A job whose answer is lost is counted
        # again by the next try, so a limit may take effect a job or two early, never late.
        name = f"{self._prefix}:{key}:{window_s}"
        answer = self._redis.pipeline(
            ("INCR", name),
            ("EXPIRE", name, window_s, "NX"),
            ("PTTL", name),
            within_s=self.policy.try_s,
        )
        match answer:
            case [{"result": int(count)}, {"result": _}, {"result": int(closes_ms)}]:
                return count, max(closes_ms, 0) / 1000
        raise Fault(None)
