"""What a job costs: the device's time that it uses, times the price of a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ourvidz_serverless.context import JobContext

#: Digits after the point of a cost. A second of a GPU costs about 0.0003 dollars.
DIGITS = 8


class DeviceCost:
    """Divides the seconds in which the device is used among the jobs that use it.

    A second that n jobs share costs each of them one part in n. So the costs of all jobs together
    are the price of the seconds in which at least one job used the device.
    """

    def __init__(
        self, price_per_second: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Without a price nothing is counted."""
        self._price, self._clock = price_per_second, clock
        self._lock = threading.Lock()
        self._num_jobs, self._since = 0, clock()
        # How many seconds a job would have to pay that has used the device since the start: the
        # integral of 1 / n. A job pays for the difference between its end and its beginning.
        self._share_s = 0.0

    @contextmanager
    def of(self, context: JobContext) -> Iterator[None]:
        """Add the cost of the block, in which the job uses the device, to `metadata.cost`."""
        if self._price is None:
            yield
            return
        began_s = self._change(1)
        try:
            yield
        finally:
            seconds = self._change(-1) - began_s
            spent = context.metadata.get("cost", 0.0) + seconds * self._price
            context.metadata["cost"] = round(spent, DIGITS)

    def _change(self, jobs: int) -> float:
        """Count jobs that begin, or end if negative; returns the share of each until now."""
        with self._lock:
            now = self._clock()
            if self._num_jobs:
                self._share_s += (now - self._since) / self._num_jobs
            self._num_jobs, self._since = self._num_jobs + jobs, now
            return self._share_s
