"""What a family's loop tells the running job, and what it asks the job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Progress(Protocol):
    """The running job, as a family's `generate(request, progress)` sees it."""

    def check(self) -> None:
        """Raise the job's error if the job was stopped or its time is over."""

    def step(self, done: int, total: int) -> None:
        """Report that `done` of `total` denoising steps are done."""

    def memory_plan(self, plan: Mapping[str, Any]) -> None:
        """Report how the job was made to fit the device, if that is not the default way."""

    def speed(self, report: Mapping[str, Any]) -> None:
        """Report what `speed` changed: forwards that were skipped, the decoder that was used."""


class NoProgress:
    """The progress of a generation without a job: nothing is reported, nothing stops it."""

    def check(self) -> None: ...

    def step(self, done: int, total: int) -> None: ...

    def memory_plan(self, plan: Mapping[str, Any]) -> None: ...

    def speed(self, report: Mapping[str, Any]) -> None: ...
