"""A fair semaphore: it gives its places in order of arrival, and a stop ends a wait."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ourvidz_serverless.context import JobContext, Stop

#: How often a waiting thread checks its deadline, in seconds. A free place or a stop wakes it at
#: once.
TICK_S = 1.0

#: Called with the number of threads ahead of the one that waits. An error that it raises ends the
#: wait.
OnWait = Callable[[int], None]


class FairSemaphore:
    """A number of places. With one place it is a lock."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: list[int] = []  # numbers of arrival, in ascending order
        self._changed = threading.Condition()

    @property
    def num_waiting(self) -> int:
        """How many threads wait for a place."""
        with self._changed:
            return len(self._waiting)

    @contextmanager
    def place(self, context: JobContext) -> Iterator[None]:
        """A place for the duration of the block; the job's wait for it is reported as progress.

        Raises the job's error if the job must stop while it waits.
        """
        with context.waiting() as report:
            self.acquire(context.arrival, context.stop, report)
        try:
            yield
        finally:
            self.release()

    def acquire(self, arrival: int, stop: Stop, on_wait: OnWait) -> None:
        """Take a place, after every waiting thread with a lower `arrival` has taken one.

        Each thread's `arrival` is unique. While no place is free, `on_wait` is called: at the start
        of the wait, whenever the number of threads ahead changes, when `stop` is set, and every
        `TICK_S` seconds.
        """
        with stop.calling(self._wake):
            self._enter(arrival, stop, on_wait)

    def release(self) -> None:
        """Return a place."""
        with self._changed:
            self._free += 1
            self._changed.notify_all()

    def _enter(self, arrival: int, stop: Stop, on_wait: OnWait) -> None:
        with self._changed:
            bisect.insort(self._waiting, arrival)
            self._changed.notify_all()
        try:
            while ahead := self._take(arrival):
                on_wait(ahead)
                self._wait(arrival, ahead, stop)
        except BaseException:
            with self._changed:
                self._waiting.remove(arrival)
                self._changed.notify_all()
            raise

    def _take(self, arrival: int) -> int:
        """Take a place unless other threads are ahead; the number of threads ahead."""
        with self._changed:
            ahead = self._ahead(arrival)
            if not ahead:
                self._waiting.remove(arrival)
                self._free -= 1
            return ahead

    def _wait(self, arrival: int, ahead: int, stop: Stop) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ahead(arrival) != ahead or stop.error, TICK_S)

    def _ahead(self, arrival: int) -> int:
        return max(self._waiting.index(arrival) + 1 - self._free, 0)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
