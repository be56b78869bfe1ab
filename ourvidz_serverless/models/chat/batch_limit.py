"""How many requests run at once: half as many after an out-of-memory, then slowly more again.

The memory that was missing often comes back: long conversations end, and other families' models
leave. An out-of-memory costs all running requests another read of their tokens, so each one doubles
the steps before a larger batch is tried again.
"""

from __future__ import annotations

#: The steps of a full batch after which it may grow: after one out-of-memory, and after many.
PATIENCE, MAX_PATIENCE = 64, 8192

#: By which part of itself, as one in so many, the batch grows.
GROWTH = 4


class BatchLimit:
    """`size` is how many requests may run now, `most` how many ever."""

    def __init__(self, most: int) -> None:
        self.size = self.most = most
        self._patience = 0
        self._steps = 0

    def shrink(self, running: int) -> None:
        """Note that so many requests ran out of memory together."""
        self.size = max(running // 2, 1)
        self._patience = min(max(2 * self._patience, PATIENCE), MAX_PATIENCE)
        self._steps = 0

    def note_step(self, running: int) -> bool:
        """Note a step of so many without an out-of-memory; whether more may run from now on.

        A smaller batch than is allowed shows nothing about a larger one.
        """
        if running < self.size:
            return False
        self._steps += 1
        if self._steps < self._patience:
            return False
        self._steps = 0
        if self.size == self.most:
            self._patience = 0
            return False
        self.size = min(self.size + max(self.size // GROWTH, 1), self.most)
        return True
