"""Traces and metrics of jobs, sent to a collector of OpenTelemetry if the settings name one.

Without a collector nothing of OpenTelemetry is imported, and a job makes two calls here that do
nothing. `docs/observability.md` describes what is sent.
"""

from __future__ import annotations

from typing import Protocol

from ourvidz_serverless.context import NO_TRACE, JobContext, Trace
from ourvidz_serverless.document import Document
from ourvidz_serverless.job import Job
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.settings import Settings, otlp_url
from ourvidz_serverless.telemetry.observed import Observed

__all__ = ["Observed", "Telemetry", "open_telemetry"]


class Telemetry(Protocol):
    """What a worker tells of its jobs. No method raises, and none waits for the collector."""

    def begin(self, envelope: Envelope, context: JobContext) -> Trace:
        """The trace of a job that begins to run in this thread."""

    def end(self, job: Job | None, document: Document, context: JobContext) -> None:
        """End the trace of `context`, and count the job. `job` is None for an invalid payload."""

    def close(self) -> None:
        """Send what is left. It takes at most `exports.FLUSH_S` seconds."""


class NoTelemetry:
    """For a worker without a collector."""

    def begin(self, envelope: Envelope, context: JobContext) -> Trace:
        return NO_TRACE

    def end(self, job: Job | None, document: Document, context: JobContext) -> None: ...

    def close(self) -> None: ...


def open_telemetry(settings: Settings, observed: Observed) -> Telemetry:
    """The telemetry that the settings ask for."""
    if not (otlp_url(settings, "traces") or otlp_url(settings, "metrics")):
        return NoTelemetry()
    # Imports OpenTelemetry.
    from ourvidz_serverless.telemetry.worker_telemetry import WorkerTelemetry

    return WorkerTelemetry(settings, observed)
