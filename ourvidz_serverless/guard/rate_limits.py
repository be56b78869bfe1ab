"""Rate limits: so many jobs a user, and so many an endpoint, in a window of time.

A window opens with its first job and closes after its length, however many jobs came. What is
over a limit is refused, and is told when the window closes. The count is kept in this worker's
memory, or, where many workers must share it, in Upstash Redis by its REST interface
(https://upstash.com/docs/redis/features/restapi).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from ourvidz_serverless.deadline import NEVER, Deadline
from ourvidz_serverless.errors import RateLimited
from ourvidz_serverless.net.retries import Fault, Retry, is_transient, retry
from ourvidz_serverless.net.transport import Transport
from ourvidz_serverless.settings import Rate, Settings

#: A job waits for its count, so not for long.
RETRY = Retry(base_s=0.1, try_s=2.0)

#: Windows that the memory holds before it drops half of them.
MOST_WINDOWS = 10_000


class Store(Protocol):
    """Where jobs are counted. `count` makes one try and raises Fault."""

    policy: Retry

    def count(self, key: str, window_s: int) -> tuple[int, float]:
        """Count one more: how many the open window holds now, and the seconds until it closes."""
        ...


class Limits:
    """The limits of one endpoint; without rates, none."""

    def __init__(self, rates: Mapping[str, Rate], store: Store) -> None:
        self.rates, self._store = rates, store

    @classmethod
    def of(cls, settings: Settings, endpoint: str = "local") -> Limits:
        """The limits that the environment sets; `endpoint` keeps one endpoint's from another's."""
        rates = {"user": settings.rate_limit_user, "endpoint": settings.rate_limit_endpoint}
        url, token = settings.upstash_redis_rest_url, settings.upstash_redis_rest_token
        shared = url and Upstash(url, token.get_secret_value() if token else "", endpoint)
        return cls({name: rate for name, rate in rates.items() if rate}, shared or Memory())

    def check(self, user_id: str, deadline: Deadline = NEVER) -> None:
        """Count a job of this user.

        Raises RateLimited with the seconds to wait, or Fault where it could not be counted.
        """
        # The user first: what a user is refused must not use up everybody's share.
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
            lambda: self._store.count(key, window_s),
            on=is_transient,
            policy=self._store.policy,
            deadline=deadline,
        )


class Memory:
    """Counts in this process."""

    policy = RETRY

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._windows: dict[str, tuple[int, float]] = {}

    def count(self, key: str, window_s: int) -> tuple[int, float]:
        now = self._clock()
        with self._lock:
            count, closes = self._windows.get(key, (0, now + window_s))
            if closes <= now:
                count, closes = 0, now + window_s
            self._windows[key] = (count + 1, closes)
            if len(self._windows) > MOST_WINDOWS:
                # The half that closes last, which leaves out all that is closed already.
                by_end = sorted(self._windows.items(), key=lambda window: window[1][1])
                self._windows = dict(by_end[MOST_WINDOWS // 2 :])
        return count + 1, closes - now


class Upstash:
    """Counts in Redis behind Upstash's REST interface, for all workers that share it."""

    def __init__(self, url: str, token: str, endpoint: str, policy: Retry = RETRY) -> None:
        self._url = f"{url.rstrip('/')}/pipeline"
        self._prefix = f"ourvidz:{endpoint}"
        self._transport = Transport({"Authorization": f"Bearer {token}"})
        self.policy = policy

    def count(self, key: str, window_s: int) -> tuple[int, float]:
        # NX: the first job of a window sets its end. A job whose answer was lost is counted
        # again with the next try, so a limit may be met a job or two early, never late.
        name = f"{self._prefix}:{key}:{window_s}"
        commands = [["INCR", name], ["EXPIRE", name, window_s, "NX"], ["PTTL", name]]
        answer = self._transport.send(
            "POST",
            self._url,
            data=json.dumps(commands).encode(),
            headers={"Content-Type": "application/json"},
            within_s=self.policy.try_s,
        )
        return _count_and_rest(answer.json())


def _count_and_rest(answer: object) -> tuple[int, float]:
    match answer:
        case [{"result": int(count)}, {"result": _}, {"result": int(closes_ms)}]:
            return count, max(closes_ms, 0) / 1000
    raise Fault(None)
