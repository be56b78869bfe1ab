"""The stages of a job on a real device: their seconds, and in another run what else they took."""

from __future__ import annotations

import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.dry_run.stages import STEP, Marks
from benchmarks.gpu.findings import Fact, Findings, Kernels, Stage
from benchmarks.interleaved_timing import control_ratio

#: A whole job, from its beginning to the last picture or frame.
WHOLE = "whole job"

#: Runs one job. It marks the stages, takes a prompt of its own, and returns what it made.
Run = Callable[[Marks, str], Any]

#: How many of the longest kernels are reported.
LONGEST = 12


class Clock:
    """Moments on a device. On CUDA they are events in the stream, for which nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"

    def now(self) -> Any:
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        if not self.is_cuda:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


class TimedStages(Marks):
    """The seconds of a job's stages; a stage that is marked again is another one."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock, self._moments = clock, [("", clock.now())]
        self._known: dict[str, list[float]] = {}

    def mark(self, name: str) -> None:
        self._moments.append((name, self._clock.now()))

    def repeated(self, name: str, times: int, seconds: float) -> None:
        self._known[name] = [seconds]

    def seconds(self) -> dict[str, list[float]]:
        """The seconds of each stage, and of the whole job."""
        found: dict[str, list[float]] = defaultdict(list)
        for (_, begin), (name, end) in zip(self._moments, self._moments[1:], strict=False):
            found[name].append(self._clock.seconds(begin, end))
        ends = self._moments[0][1], self._moments[-1][1]
        return {**found, **self._known, WHOLE: [self._clock.seconds(*ends)]}


class ProbedStages(Marks):
    """The peak of memory in each stage of a job, and how often the host waits. It takes no time."""

    def __init__(self, waits: Sequence[warnings.WarningMessage], is_cuda: bool) -> None:
        super().__init__()
        self._waits, self._seen, self._is_cuda = waits, len(waits), is_cuda
        self.found: dict[str, tuple[int, int]] = {}
        #: The lines that made the host wait, by stage.
        self.lines: dict[str, Counter[str]] = defaultdict(Counter)
        self._reset()

    def mark(self, name: str) -> None:
        if not self._is_cuda:
            return
        new, self._seen = self._waits[self._seen :], len(self._waits)
        self.lines[name].update(f"{Path(each.filename).name}:{each.lineno}" for each in new)
        waits = len(new)
        peak, before = torch.cuda.max_memory_allocated(), self.found.get(name, (0, 0))
        # Of the steps the last one stays, as in the counts.
        self.found[name] = max(peak, before[0]), waits if name == STEP else waits + before[1]
        self._reset()

    def repeated(self, name: str, times: int, seconds: float) -> None:
        if name in self.found:
            peak, waits = self.found[name]
            self.found[name] = peak, round(waits / times)

    def _reset(self) -> None:
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()


@contextmanager
def noted_waits(is_cuda: bool) -> Iterator[list[warnings.WarningMessage]]:
    """A list of the moments at which the host waits for a CUDA device, by torch's own warnings."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        if is_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield noted
        finally:
            if is_cuda:
                torch.cuda.set_sync_debug_mode("default")


@dataclass(eq=False)
class Arm:
    """One way to run a job, and the seconds of its stages in all runs so far."""

    who: str
    run: Run
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    probed: dict[str, tuple[int, int]] = field(default_factory=dict)
    lines: dict[str, Counter[str]] = field(default_factory=dict)

    def time(self, clock: Clock, prompt: str) -> None:
        stages = TimedStages(clock)
        self._run(stages, prompt)
        for name, each in stages.seconds().items():
            # The steps of one run are one figure, so that runs can be compared.
            self.seconds[name].append(median(each) if name == STEP else sum(each))

    def probe(self, prompt: str, is_cuda: bool) -> Any:
        """Run the job once for its memory and its waits; returns what it made."""
        with noted_waits(is_cuda) as waits:
            stages = ProbedStages(waits, is_cuda)
            made = self._run(stages, prompt)
        self.probed, self.lines = stages.found, stages.lines
        return made

    def profile(self, work: str, prompt: str) -> Kernels | None:
        """The kernels of one job; None where torch's profiler sees none."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            self._run(Marks(), prompt)
        found = [
            (each.key[:120], each.count, each.self_device_time_total / 1000)
            for each in profiler.key_averages()
            if each.self_device_time_total
        ]
        found.sort(key=lambda each: -each[2])
        count = sum(each[1] for each in found)
        return Kernels(work, self.who, count, found[:LONGEST]) if found else None

    def stages(self, work: str) -> Iterator[Stage]:
        for name in {**self.seconds, **self.probed}:
            seconds = self.seconds.get(name)
            peak, waits = self.probed.get(name, (None, None))
            yield Stage(
                work,
                self.who,
                name,
                median(seconds) if seconds else None,
                len(seconds or ()),
                control_ratio(seconds) if seconds else None,
                peak,
                waits,
            )

    def _run(self, stages: Marks, prompt: str) -> Any:
        try:
            return self.run(stages, prompt)
        finally:
            stages.done()


@dataclass(frozen=True, slots=True)
class Comparison:
    """A job by the worker and by its peer, alternately; see `compare`."""

    work: str
    device: torch.device
    findings: Findings

    def of(self, runs: Mapping[str, Run], rounds: int) -> dict[str, Any]:
        """Time each way to run the job, by its name. Returns what each made at first.

        Each run has a prompt of its own, so nothing that is kept from the last one helps. The first
        run of each warms it up and is not timed. It ends early when the next run would not fit the
        time. A way that fails, as one that needs more memory than there is, is left out.
        """
        is_cuda, clock = self.device.type == "cuda", Clock(self.device)
        arms, made, longest_s = [], {}, 0.0
        for arm in (Arm(who, run) for who, run in runs.items()):
            began = time.monotonic()
            result = self._attempt(arm, partial(arm.probe, f"{self.work}, at first", is_cuda))
            if result is not None:
                made[arm.who] = result
                longest_s = max(longest_s, time.monotonic() - began)
                arms.append(arm)
        for index, arm in enumerate([*arms, *reversed(arms)] * rounds):
            if self.findings.seconds_left < 1.5 * longest_s:
                break
            self._attempt(arm, partial(arm.time, clock, f"{self.work}, {index}"))
        for arm in arms:
            for stage in arm.stages(self.work):
                self.findings.add(stage)
            for name, lines in arm.lines.items():
                if lines:
                    what = ", ".join(f"{times} {line}" for line, times in lines.most_common())
                    self.findings.add(Fact(f"{self.work}, {name}, by {arm.who}: waits", what))
        if is_cuda:
            self._profile(arms, longest_s)
        return made

    def _attempt(self, arm: Arm, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as exc:
            if is_cuda_lost(exc):
                raise
            why = " ".join(f"{type(exc).__name__}: {exc}".split())[:300]
            self.findings.add(Fact(f"{self.work}, by {arm.who}: failed", why))
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        return None

    def _profile(self, arms: Sequence[Arm], longest_s: float) -> None:
        for arm in arms:
            if self.findings.seconds_left > 3 * longest_s + 5:
                kernels = self._attempt(arm, partial(arm.profile, self.work, f"{self.work}, last"))
                if kernels:
                    self.findings.add(kernels)


def is_cuda_lost(error: BaseException) -> bool:
    """Whether the device cannot be used any more, so that the part must end."""
    from ourvidz_serverless.models.memory.device import is_lost

    return is_lost(error)
