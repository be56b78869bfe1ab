"""Rate limits: the most jobs of a user, and of an endpoint, in a window of time.

Windows are fixed: a window opens with its first job and closes after its length, however many jobs
arrive. A job over a limit is refused with the seconds until the window closes. The jobs are counted
in this worker's memory or, if several workers share the limits, in Redis.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from ourvidz_serverless.deadline import NEVER, Deadline
from ourvidz_serverless.errors import RateLimited
from ourvidz_serverless.logs import log
from ourvidz_serverless.net.plain_redis import PlainRedis
from ourvidz_serverless.net.retries import Fault, Retry, is_transient, retry
from ourvidz_serverless.net.upstash import Upstash
from ourvidz_serverless.settings import Rate, Settings

#: Short, because each job waits until it is counted.
RETRY = Retry(base_s=0.1, try_s=2.0)

#: When the memory holds more windows than this, half of them are dropped.
MAX_WINDOWS = 10_000


#: After an outage of Redis was seen, the seconds until Redis is asked again.
AWAY_S = 30.0

#: Counts one more job in one step, so that no window is without an end, whatever happens meanwhile.
COUNT = """
local count = redis.call('INCR', KEYS[1])
if redis.call('PTTL', KEYS[1]) < 0 then redis.call('EXPIRE', KEYS[1], ARGV[1]) end
return {count, redis.call('PTTL', KEYS[1])}
"""


class Counter(Protocol):
    """Counts jobs in windows. `count` makes one try and raises Fault."""

    policy: Retry

    @property
    def is_away(self) -> bool:
        """Whether the workers that share the windows count apart at the moment."""
        ...

    def count(self, key: str, window_s: int) -> tuple[int, float]:
        """Count one more job: the jobs in the open window, and the seconds until it closes."""
        ...


class RateLimits:
    """The limits of one endpoint. Without rates there are none."""

    def __init__(self, rates: Mapping[str, Rate], counter: Counter) -> None:
        self.rates, self._counter = rates, counter

    @classmethod
    def of(cls, settings: Settings, endpoint: str = "local") -> RateLimits:
        """The limits that the environment sets; each endpoint's jobs are counted separately.

        Raises ModelLoadError if `REDIS_URL` is no URL of Redis.
        """
        given = {"user": settings.rate_limit_user, "endpoint": settings.rate_limit_endpoint}
        rates = {name: rate for name, rate in given.items() if rate}
        shared = _shared_counter(settings, endpoint) if rates else None
        if shared is None:
            return cls(rates, MemoryCounter())
        return cls(rates, FallbackCounter(shared) if settings.rate_limit_fail_open else shared)

    @property
    def is_away(self) -> bool:
        """Whether this worker counts its own jobs alone, although the limits are shared."""
        return self._counter.is_away

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
    is_away = False

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
    """Counts in Redis, for all workers that share the database.

    A job whose answer is lost is counted again by the next try, so a limit may take effect a job
    or two early, never late.
    """

    is_away = False

    def __init__(self, redis: PlainRedis, endpoint: str, policy: Retry = RETRY) -> None:
        self._redis, self._endpoint, self.policy = redis, endpoint, policy

    def count(self, key: str, window_s: int) -> tuple[int, float]:
        name = _window_name(self._endpoint, key, window_s)
        match self._redis.call("EVAL", COUNT, 1, name, window_s):
            case [int(count), int(closes_ms)]:
                return count, max(closes_ms, 0) / 1000
        raise Fault(None)


class UpstashCounter:
    """The same by Upstash's REST interface, in the same windows."""

    is_away = False

    def __init__(self, redis: Upstash, endpoint: str, policy: Retry = RETRY) -> None:
        self._redis, self._endpoint, self.policy = redis, endpoint, policy

    def count(self, key: str, window_s: int) -> tuple[int, float]:
        # NX: only the first job of a window sets its end.
        name = _window_name(self._endpoint, key, window_s)
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


class FallbackCounter:
    """A shared counter, and one in this process while the shared one fails.

    After a failure one job every `AWAY_S` asks the shared counter again, so that an outage delays
    few jobs by their tries, and not each. The windows in this process begin anew.
    """

    policy = Retry(tries=1)

    def __init__(self, shared: Counter, clock: Callable[[], float] = time.monotonic) -> None:
        self._shared, self._own, self._clock = shared, MemoryCounter(clock), clock
        self._lock = threading.Lock()
        self._ask_at = -math.inf
        self.is_away = False

    def count(self, key: str, window_s: int) -> tuple[int, float]:
        if not self._may_ask():
            return self._own.count(key, window_s)
        try:
            counted = retry(
                lambda: self._shared.count(key, window_s),
                on=is_transient,
                policy=self._shared.policy,
            )
        except Fault as exc:
            self._note_outage(exc)
            return self._own.count(key, window_s)
        self._note_answer()
        return counted

    def _may_ask(self) -> bool:
        """Whether a job may ask the shared counter: in an outage one job every `AWAY_S` seconds."""
        with self._lock:
            now = self._clock()
            if self.is_away and now < self._ask_at:
                return False
            if self.is_away:
                self._ask_at = now + AWAY_S
            return True

    def _note_outage(self, fault: Fault) -> None:
        with self._lock:
            self._ask_at = self._clock() + AWAY_S
            is_first, self.is_away = not self.is_away, True
        if is_first:
            log.warning(
                "rate limits: Redis does not count (%s); until it does, this worker counts alone",
                fault,
            )

    def _note_answer(self) -> None:
        with self._lock:
            was_away, self.is_away = self.is_away, False
        if was_away:
            log.info("rate limits: Redis counts again")


def _shared_counter(settings: Settings, endpoint: str) -> Counter | None:
    """The counter that all workers of an endpoint share; None if no Redis is named."""
    if settings.redis_url:
        redis = PlainRedis(settings.redis_url.get_secret_value(), RETRY.try_s)
        return RedisCounter(redis, endpoint)
    url, token = settings.upstash_redis_rest_url, settings.upstash_redis_rest_token
    return (
        UpstashCounter(Upstash(url, token.get_secret_value()), endpoint) if url and token else None
    )


def _window_name(endpoint: str, key: str, window_s: int) -> str:
    return f"ourvidz:{endpoint}:{key}:{window_s}"
