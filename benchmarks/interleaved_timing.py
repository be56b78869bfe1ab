"""Interleaved timing: two variants run alternately, so that other load slows both equally.

A control ratio compares a variant with itself, its earlier runs with its later ones. On a quiet
machine it is 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks import report


@dataclass(frozen=True, slots=True)
class InterleavedTiming:
    """Seconds of each run of variants a and b. A round runs a, b, b, a: b's two runs are apart."""

    a: list[float]
    b_first: list[float]
    b_second: list[float]

    @property
    def a_s(self) -> float:
        """The median of a, in seconds."""
        return median(self.a)

    @property
    def b_s(self) -> float:
        """The median of b, in seconds."""
        return median(self.b_first + self.b_second)

    @property
    def ratio(self) -> float:
        """How many times longer b takes than a."""
        return self.b_s / self.a_s

    @property
    def control(self) -> float:
        """The ratio of b to itself: its first runs of the rounds over its second ones."""
        return median(self.b_first) / median(self.b_second)

    @property
    def trusted_ratio(self) -> float | str:
        """The ratio, or `report.ABOUT_ONE`, or `report.UNSTEADY` if the control is off."""
        return report.trusted_ratio(self.ratio, self.control)


def time_interleaved(
    a: Callable[[], object], b: Callable[[], object], rounds: int
) -> InterleavedTiming:
    """Time a, b, b, a in each round. The caller warms both up."""
    timing = InterleavedTiming([], [], [])
    for _ in range(rounds):
        order = ((a, timing.a), (b, timing.b_first), (b, timing.b_second), (a, timing.a))
        for run, seconds in order:
            seconds.append(timed(run))
    return timing


def control_ratio(runs: Sequence[float]) -> float | None:
    """The median of a variant's earlier runs over that of its later ones; None for a single run."""
    half = len(runs) // 2
    return median(runs[:half]) / median(runs[-half:]) if half else None


def timed(run: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
