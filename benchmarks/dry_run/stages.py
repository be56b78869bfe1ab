"""The stages of a job on a fake device, and what each of them took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.dry_run.counts import Counts
from benchmarks.dry_run.fake_cuda import FakeCuda
from ourvidz_serverless.models.progress import NoProgress


@dataclass(frozen=True, slots=True)
class Run:
    """One job, computed by `who`, and the counts of its stages in their order.

    `weight_bytes` are on the device when the job begins. `plans` are the memory plans that the
    worker fell back to because something did not fit.
    """

    work: str
    who: str
    weight_bytes: int
    stages: dict[str, Counts]
    plans: tuple[Mapping[str, Any], ...] = ()

    @property
    def step(self) -> Counts:
        """One denoising step, as all after the first are."""
        return self.stages[STEP]

    @property
    def peak_bytes(self) -> int:
        return max(each.peak_bytes for each in self.stages.values())


#: The stages of a job, in this order. References end where the first step begins.
WEIGHTS, PROMPTS, REFERENCES = "weights", "prompts", "references"
FIRST_STEP, STEP, DECODING = "first step", "each further step", "decoding"


class Marks(NoProgress):
    """Divides a job into stages: each `mark` ends one. It is a job's progress too.

    `done` puts the networks back as they were.
    """

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._is_first_step = True

    def mark(self, name: str) -> None:
        """End a stage, which has this name. Nothing is kept of it here."""

    def repeated(self, name: str, times: int, seconds: float) -> None:
        """Report that an ended stage is the same thing several times, each in so many seconds."""

    def step(self, done: int, total: int) -> None:
        self.mark(FIRST_STEP if self._is_first_step else STEP)
        self._is_first_step = False

    def before_first(self, network: Any, name: str) -> None:
        """End a stage when a network is called for the first time in this job."""

        def mark(*_: Any) -> None:
            hook.remove()
            self.mark(name)

        hook = network.register_forward_pre_hook(mark)
        self._hooks.append(hook)

    def after_each(self, network: Any, name: str) -> None:
        """End a stage, or a part of it, whenever a network has computed."""
        self._hooks.append(network.register_forward_hook(lambda *_: self.mark(name)))

    def done(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Stages(Marks):
    """The counts of a fake device by stage.

    A stage that is marked twice is one with all counts, except a step: the last one stays.
    """

    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self.fake = fake
        self.stages: dict[str, Counts] = {}
        self.plans: list[Mapping[str, Any]] = []
        self.fake.take()

    def mark(self, name: str) -> None:
        taken = self.fake.take()
        if name in self.stages and name != STEP:
            taken = self.stages[name] + taken
        self.stages[name] = taken

    def memory_plan(self, plan: Mapping[str, Any]) -> None:
        self.plans.append(plan)
