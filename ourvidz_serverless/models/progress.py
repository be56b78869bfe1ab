"""The running job, as a family's generation loop sees it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Progress(Protocol):
    """What `generate(request, progress)` reports, and how a stop reaches it."""

    def check(self) -> None:
        """Raise the job's error if the job was stopped, or if its time is over."""

    def step(self, done: int, total: int) -> None:
        """Report that `done` of `total` denoising steps are done."""

    def span(self, name: str) -> AbstractContextManager[object]:
        """Record the block as a part of the job, such as `decode`."""

    def memory_plan(self, plan: Mapping[str, Any]) -> None:
        """Report how the job was made to fit the device's memory, if not in the default way."""

    def speed(self, report: Mapping[str, Any]) -> None:
        """Report what the `speed` preset changed: skipped forwards, the decoder that was used."""


class NoProgress:
    """For a generation without a job: it reports nothing, and nothing stops it."""

    def check(self) -> None: ...

    def step(self, done: int, total: int) -> None: ...

    def span(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()

    def memory_plan(self, plan: Mapping[str, Any]) -> None: ...

    def speed(self, report: Mapping[str, Any]) -> None: ...
