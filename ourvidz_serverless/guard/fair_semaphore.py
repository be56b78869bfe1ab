"""A fair semaphore: places are given in the order of arrival, and whoever waits can be stopped."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable

from ourvidz_serverless.context import Stop

#: How often a thread that waits looks at the time, in seconds. A place and a stop wake it at once.
TICK_S = 1.0

#: Called with the number of threads that have to go before the one that waits can; what it raises
#: ends the wait.
Hear = Callable[[int], None]


class FairSemaphore:
    """So many places. With one place it is a lock."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: list[int] = []  # arrivals, the first to go first
        self._news = threading.Condition()

    @property
    def num_waiting(self) -> int:
        """How many threads wait for a place now."""
        with self._news:
            return len(self._waiting)

    def acquire(self, arrival: int, stop: Stop, hear: Hear) -> None:
        """Take a place, as soon as all that wait and have a lower `arrival` have had one.

        No two that wait have the same. While there is no place `hear` is called: at the beginning
        of the wait, whenever the number of those ahead changes, when `stop` is set, and every
        `TICK_S` seconds.
        """
        with stop.waking(self._wake):
            self._enter(arrival, stop, hear)

    def release(self) -> None:
        """Give a place back."""
        with self._news:
            self._free += 1
            self._news.notify_all()

    def _enter(self, me: int, stop: Stop, hear: Hear) -> None:
        with self._news:
            bisect.insort(self._waiting, me)
            self._news.notify_all()
        try:
            while ahead := self._take(me):
                hear(ahead)
                self._wait(me, ahead, stop)
        except BaseException:
            with self._news:
                self._waiting.remove(me)
                self._news.notify_all()
            raise

    def _take(self, me: int) -> int:
        """Take a place if it is this thread's turn; else how many go first."""
        with self._news:
            ahead = self._ahead(me)
            if not ahead:
                self._waiting.remove(me)
                self._free -= 1
            return ahead

    def _wait(self, me: int, ahead: int, stop: Stop) -> None:
        with self._news:
            self._news.wait_for(lambda: self._ahead(me) != ahead or stop.error, TICK_S)

    def _ahead(self, me: int) -> int:
        return max(self._waiting.index(me) + 1 - self._free, 0)

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()
