"""A job id that arrives twice runs once: the second delivery joins the first and hears its end.

The application is told of that end once, where any of the deliveries has it told: by the first
itself, or, where that one is silent, by the first of those that joined it and are not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from ourvidz_serverless.context import Stop
from ourvidz_serverless.document import Document

#: How soon a joined delivery's cancellation reaches the first.
POLL_S = 0.05


@dataclass
class Flight:
    """A job that is under way. `is_told` once one of its deliveries will tell of its end."""

    end: Future[Document]
    stop: Stop
    is_told: bool


class Flights:
    """The jobs that are under way in this worker, by id."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[Hashable, Flight] = {}

    def run(
        self,
        job_id: Hashable,
        stop: Stop,
        call: Callable[[], Document],
        joined: Callable[[], None] = lambda: None,
        tell: Callable[[Document], Document] | None = None,
    ) -> Document:
        """What `call` gives; or, where that job is under way already, what its first call gives.

        `joined` hears of the latter. A delivery with `tell` is one that has the end told: its
        `call` does so, and `tell` where somebody else's silent call ran.
        """
        with self._lock:
            flight = self._under_way.get(job_id)
            is_first = flight is None
            if flight is None:
                flight = self._under_way[job_id] = Flight(Future(), stop, False)
            is_mine_to_tell = bool(tell) and not flight.is_told
            flight.is_told |= is_mine_to_tell
        if not is_first:
            joined()
            document = self._join(flight, stop)
            return tell(document) if tell and is_mine_to_tell else document
        try:
            flight.end.set_result(call())
        except BaseException as exc:
            flight.end.set_exception(exc)
        finally:
            with self._lock:
                del self._under_way[job_id]
        return flight.end.result()

    def stop_all(self, tell: Callable[[Stop], None]) -> None:
        """Tell every job that is under way to stop."""
        with self._lock:
            stops = [flight.stop for flight in self._under_way.values()]
        for stop in stops:
            tell(stop)

    @staticmethod
    def _join(flight: Flight, my_stop: Stop) -> Document:
        while not wait([flight.end], timeout=POLL_S).done:
            # The platform knows one id, so it cancels whichever delivery it saw last.
            if my_stop.error:
                flight.stop.set(my_stop.error)
        return flight.end.result()
