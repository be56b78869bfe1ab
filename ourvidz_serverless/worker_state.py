"""Whether a worker takes jobs: it may have been told to end, or its device may have failed."""

from __future__ import annotations

import threading
from enum import IntEnum
from typing import Literal

from ourvidz_serverless.errors import WorkerUnavailable
from ourvidz_serverless.logs import log

#: Why a worker takes no jobs, as `health` reports it.
UnavailableReason = Literal["shutting_down", "unhealthy"]


class Phase(IntEnum):
    """How far a worker has come on its way to its end."""

    OPEN = 0
    #: It was told to end. It still takes and runs jobs.
    LEAVING = 1
    #: It takes no further job.
    CLOSED = 2


class WorkerState:
    """The phase of a worker, which never goes back, and whether its device still works."""

    def __init__(self) -> None:
        self._phase = Phase.OPEN
        self._is_lost = threading.Event()

    @property
    def is_lost(self) -> bool:
        """Whether the device failed, so that the worker can do no further job."""
        return self._is_lost.is_set()

    @property
    def unavailable_reason(self) -> UnavailableReason | None:
        """What keeps the worker from taking jobs, if anything does."""
        if self.is_lost:
            return "unhealthy"
        return "shutting_down" if self._phase >= Phase.LEAVING else None

    def reach(self, phase: Phase) -> None:
        """Come at least as far as this phase."""
        self._phase = max(self._phase, phase)

    def lose_device(self) -> None:
        """Note that the device takes no more work from this process."""
        if not self.is_lost:
            log.error("the device takes no more work from this process, which must be replaced")
        self._is_lost.set()

    def check_open(self) -> None:
        """Raise WorkerUnavailable if the worker takes no further job."""
        if self._phase >= Phase.CLOSED:
            raise WorkerUnavailable("the worker is shutting down")

    def check_device(self) -> None:
        """Raise WorkerUnavailable if the device failed."""
        if self.is_lost:
            raise WorkerUnavailable("this worker's device failed, and it is being replaced")
