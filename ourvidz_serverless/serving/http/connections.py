"""One client's connection to the HTTP service, within limits of time and number."""

from __future__ import annotations

import asyncio
import itertools

from uvicorn.protocols.http.h11_impl import H11Protocol

#: The proxy should close an idle connection: if we close it, its next request may be lost.
KEEP_ALIVE_S = 75

#: A worker needs its files and sockets for its jobs, and a proxy opens few connections.
MAX_CONNECTIONS = 512

#: Numbers the connections in the order in which they became idle. The event loop's clock cannot be
#: used: uvloop's clock does not move while it accepts many connections.
_IDLE_NUMBERS = itertools.count()


class Connection(H11Protocol):
    """A connection that may be idle, or receive a request's head, for `KEEP_ALIVE_S`.

    Beyond `MAX_CONNECTIONS` the connection that is idle longest is closed, so that idle ones do
    not keep new callers out.

    uvicorn itself waits for a head without a limit. We use its parser in Python, since it bounds
    a head's length: the one in C takes a head of any length.
    """

    _timeout: asyncio.TimerHandle | None = None
    _idle_since = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        self._close_one_if_full()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _close_one_if_full(self) -> None:
        """If there are too many connections, close the one that is idle longest."""
        every = [each for each in self.connections if isinstance(each, Connection)]
        open_ones = [each for each in every if not each.transport.is_closing()]
        if len(open_ones) > MAX_CONNECTIONS:
            # Never empty: this one is idle too.
            idle = [each for each in open_ones if each._timeout]
            min(idle, key=lambda each: each._idle_since).transport.close()

    def _watch(self) -> None:
        """Start the timeout between requests."""
        if not self._is_between_requests:
            self._unwatch()
        elif self._timeout is None:
            self._idle_since = next(_IDLE_NUMBERS)
            self._timeout = self.loop.call_later(KEEP_ALIVE_S, self._close_if_idle)

    def _unwatch(self) -> None:
        if self._timeout:
            self._timeout.cancel()
        self._timeout = None

    def _close_if_idle(self) -> None:
        if self._is_between_requests:
            self.transport.close()

    @property
    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete
