"""How many requests run at once: half as many after an out-of-memory, then slowly more again.

Memory that was missing often comes back: long conversations end, models of other families leave.
But an out-of-memory makes all running requests compute their tokens again. So each one doubles the
number of steps before a larger batch is tried.
"""

from __future__ import annotations

#: The steps of a full batch before it may grow: after one out-of-memory, and after many.
STEPS, MAX_STEPS = 64, 8192

#: A batch grows by one part in so many.
GROWTH = 4


class BatchLimit:
    """`size` requests may run at once now, and never more than `maximum`."""

    def __init__(self, maximum: int) -> None:
        self.size = self.maximum = maximum
        self._steps_to_grow = 0
        self._steps = 0

    def shrink(self, num_running: int) -> None:
        """Note that a batch of so many requests ran out of memory."""
        self.size = max(num_running // 2, 1)
        self._steps_to_grow = min(max(2 * self._steps_to_grow, STEPS), MAX_STEPS)
        self._steps = 0

    def note_step(self, num_running: int) -> bool:
        """Note a step without an out-of-memory. Returns whether `size` has grown.

        Only a full batch counts: a smaller one shows nothing about a larger one.
        """
        if num_running < self.size:
            return False
        self._steps += 1
        if self._steps < self._steps_to_grow:
            return False
        self._steps = 0
        if self.size == self.maximum:
            self._steps_to_grow = 0
            return False
        self.size = min(self.size + max(self.size // GROWTH, 1), self.maximum)
        return True
