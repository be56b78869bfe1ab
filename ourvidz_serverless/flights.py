"""A job id that arrives twice runs once: the second delivery joins the first and hears its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

from ourvidz_serverless.context import Stop
from ourvidz_serverless.payloads import Document

#: How soon a joined delivery's cancellation reaches the first.
POLL_S = 0.05


class Flights:
    """The jobs that are under way in this worker, by id."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[str, tuple[Future[Document], Stop]] = {}

    def run(self, job_id: str, stop: Stop, call: Callable[[], Document]) -> Document:
        """What `call` gives; or, where that job is under way already, what its first call gives."""
        with self._lock:
            first = self._under_way.get(job_id)
            if first is None:
                mine: Future[Document] = Future()
                self._under_way[job_id] = (mine, stop)
        if first:
            return self._join(*first, stop)
        try:
            mine.set_result(call())
        except BaseException as exc:
            mine.set_exception(exc)
        finally:
            with self._lock:
                del self._under_way[job_id]
        return mine.result()

    def stop_all(self, tell: Callable[[Stop], None]) -> None:
        """Tell every job that is under way to stop."""
        with self._lock:
            stops = [stop for _, stop in self._under_way.values()]
        for stop in stops:
            tell(stop)

    @staticmethod
    def _join(first: Future[Document], its_stop: Stop, my_stop: Stop) -> Document:
        while not wait([first], timeout=POLL_S).done:
            # The platform knows one id, so it cancels whichever delivery it saw last.
            if my_stop.error:
                its_stop.set(my_stop.error)
        return first.result()
