"""Polls for one job, until it ends or the caller's time is over."""

from __future__ import annotations

import time

from ourvidz_serverless.client.outcome import under_way
from ourvidz_serverless.client.steps import Item, Pause, RequestFailed, Steps, T

#: The first and the longest wait between two polls for a job, in seconds.
FIRST_POLL_S, LAST_POLL_S = 0.25, 3.0


class Polls:
    """The waits between polls, which grow, and what failed meanwhile."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._ends = time.monotonic() + timeout_s
        self._pause_s = FIRST_POLL_S
        self._failed: RequestFailed | None = None
        #: Whether the server may have sent an answer that was lost.
        self.is_answer_lost = False
        #: What the caller has of a streamed reply.
        self.given = ""

    @property
    def left_s(self) -> float:
        return max(self._ends - time.monotonic(), 0.0)

    def ask(self, steps: Steps[T]) -> Steps[T | None]:
        """What the steps return; None if they fail and a later poll may succeed."""
        try:
            answer = yield from steps
        except RequestFailed as exc:
            if not exc.is_transient:
                raise
            self._failed = exc
            self.is_answer_lost |= exc.status is None or exc.status >= 500
            return None
        self._failed = None
        return answer

    def pause(self) -> Steps[None]:
        """Wait before the next poll, longer each time.

        Raises RequestFailed or StillUnderWay if no time is left.
        """
        self.check()
        asked_s = (self._failed.retry_after if self._failed else None) or 0.0
        yield Pause(min(max(self._pause_s, asked_s), self.left_s))
        self._pause_s = min(self._pause_s * 1.5, LAST_POLL_S)

    def give(self, piece: str) -> Steps[None]:
        """Give a piece of a reply to the caller."""
        self.given += piece
        yield Item(piece)

    def note_news(self) -> None:
        """Begin again with the first wait."""
        self._pause_s = FIRST_POLL_S

    def check(self) -> None:
        """Raise RequestFailed or StillUnderWay if no time is left."""
        if not self.left_s:
            raise self._failed or under_way(self.timeout_s)
