"""A `Progress` that keeps what a generation reports, and can stop the generation."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from ourvidz_serverless.errors import Cancelled


@dataclass
class RecordedProgress:
    """Keeps every report. It calls `on_check` and `on_step`, which may raise."""

    on_check: Callable[[], None] = lambda: None
    on_step: Callable[[int, int], None] = lambda done, total: None
    steps: list[tuple[int, int]] = field(default_factory=list)
    memory_plans: list[Mapping[str, Any]] = field(default_factory=list)
    speed_reports: list[Mapping[str, Any]] = field(default_factory=list)

    def check(self) -> None:
        self.on_check()

    def step(self, done: int, total: int) -> None:
        self.steps.append((done, total))
        self.on_step(done, total)

    def span(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()

    def memory_plan(self, plan: Mapping[str, Any]) -> None:
        self.memory_plans.append(plan)

    def speed(self, report: Mapping[str, Any]) -> None:
        self.speed_reports.append(report)


def stop_at_step(step: int) -> RecordedProgress:
    """A progress that stops the generation at this step."""

    def stop(done: int, total: int) -> None:
        if done == step:
            raise Cancelled("stop")

    return RecordedProgress(on_step=stop)
