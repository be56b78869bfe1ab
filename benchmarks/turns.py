"""Two arms that take turns, so that what else the machine does strikes both alike.

A control is an arm against itself, its earlier runs over its later ones: 1 on a quiet machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks import report


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds of each run of two arms; those of b in the first half of a round stand first."""

    a: list[float]
    b_first: list[float]
    b_second: list[float]

    @property
    def a_s(self) -> float:
        """A's median, in seconds."""
        return median(self.a)

    @property
    def b_s(self) -> float:
        """B's median, in seconds."""
        return median(self.b_first + self.b_second)

    @property
    def ratio(self) -> float:
        """How many times longer b takes than a."""
        return self.b_s / self.a_s

    @property
    def control(self) -> float:
        """The same of b against itself, in the first half of a round and in the second."""
        return median(self.b_first) / median(self.b_second)

    @property
    def told(self) -> float | str:
        """The ratio, or that the control is off."""
        return report.trusted(self.ratio, self.control)


def take_turns(a: Callable[[], object], b: Callable[[], object], rounds: int) -> Turns:
    """Run a, b, b, a as many rounds as asked for, each timed. Warming up is the caller's."""
    turns = Turns([], [], [])
    for _ in range(rounds):
        order = ((a, turns.a), (b, turns.b_first), (b, turns.b_second), (a, turns.a))
        for run, spent in order:
            spent.append(timed(run))
    return turns


def control_of(runs: Sequence[float]) -> float | None:
    """The earlier half of an arm's runs against the later half; None of a single run."""
    half = len(runs) // 2
    return median(runs[:half]) / median(runs[-half:]) if half else None


def timed(run: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
