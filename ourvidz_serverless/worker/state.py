"""Whether a worker accepts jobs: it may be shutting down, or its device may have failed."""

from __future__ import annotations

import threading
from enum import IntEnum
from typing import Literal

from ourvidz_serverless.errors import WorkerUnavailable
from ourvidz_serverless.logs import log

#: Why a worker accepts no jobs, as `health` reports it.
UnavailableReason = Literal["shutting_down", "unhealthy"]


class Phase(IntEnum):
    """The phases of a worker, in order."""

    OPEN = 0
    #: It is shutting down, and still accepts and runs jobs.
    LEAVING = 1
    #: It accepts no further job.
    CLOSED = 2


class WorkerState:
    """A worker's phase, which only moves forward, and whether its device still works."""

    def __init__(self) -> None:
        self._phase = Phase.OPEN
        self._is_lost = threading.Event()

    @property
    def is_lost(self) -> bool:
        """Whether the device failed, so that the worker can do no further job."""
        return self._is_lost.is_set()

    @property
    def unavailable_reason(self) -> UnavailableReason | None:
        """Why the worker accepts no jobs; None while it does."""
        if self.is_lost:
            return "unhealthy"
        return "shutting_down" if self._phase >= Phase.LEAVING else None

    def reach(self, phase: Phase) -> None:
        """Enter this phase, unless the worker is already past it."""
        self._phase = max(self._phase, phase)

    def lose_device(self) -> None:
        """Record that the device failed: this process can do no further job."""
        if not self.is_lost:
            log.error("the device takes no more work from this process, which must be replaced")
        self._is_lost.set()

    def check_open(self) -> None:
        """Raise WorkerUnavailable if the worker accepts no further job."""
        if self._phase >= Phase.CLOSED:
            raise WorkerUnavailable("the worker is shutting down")

    def check_device(self) -> None:
        """Raise WorkerUnavailable if the device failed."""
        if self.is_lost:
            raise WorkerUnavailable("this worker's device failed, and it is being replaced")
