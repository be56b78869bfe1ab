"""The telemetry of a worker with a collector: a trace for each job, and the worker's metrics."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NoOpTracer, SpanKind, Tracer

from ourvidz_serverless import __version__
from ourvidz_serverless.context import JobContext
from ourvidz_serverless.document import Document
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.job import Job
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.settings import Settings, otlp_url
from ourvidz_serverless.telemetry import facts, metrics
from ourvidz_serverless.telemetry.exports import Exports
from ourvidz_serverless.telemetry.job_trace import Ids, JobTrace, begin_span
from ourvidz_serverless.telemetry.metrics import Metrics
from ourvidz_serverless.telemetry.observed import Observed

#: Who records: the scope of every span and metric.
SCOPE = "ourvidz_serverless"

#: The type of a job whose payload names none that is known.
UNKNOWN = "unknown"


class WorkerTelemetry:
    """Records the jobs of one worker, with providers of its own: no library adds anything."""

    def __init__(self, settings: Settings, observed: Observed) -> None:
        self._settings = settings
        self._exports = Exports(
            otlp_url(settings, "traces"),
            otlp_url(settings, "metrics"),
            settings.otel_bsp_schedule_delay / 1000,
            settings.otel_metric_export_interval / 1000,
        )
        resource = _resource(settings, observed.worker_id)
        self._tracer = _tracer(self._exports, resource)
        readers = [self._exports.reader] if self._exports.reader else []
        meters = MeterProvider(readers, resource, shutdown_on_exit=False)
        self._metrics = Metrics(meters.get_meter(SCOPE, __version__), observed)
        self._exports.start()

    def begin(self, envelope: Envelope, context: JobContext) -> JobTrace:
        kind = envelope.job_type or UNKNOWN
        waited_s = time.monotonic() - envelope.arrived
        root = begin_span(
            self._tracer,
            "job",
            envelope.traceparent,
            kind=SpanKind.CONSUMER if self._settings.serve == "queue" else SpanKind.SERVER,
            attributes={"ourvidz.job.id": envelope.job_id, "ourvidz.job.type": kind},
            start_time=time.time_ns() - int(waited_s * 1e9),
        )
        on_span = functools.partial(self._on_span, kind)
        trace = JobTrace(self._tracer, root, kind, envelope.arrived, on_span)
        if root.is_recording():
            context.audit["trace_id"] = trace.id
        return trace

    def end(self, job: Job | None, document: Document, context: JobContext) -> None:
        trace = context.trace
        assert isinstance(trace, JobTrace)
        code = document.failure.code if document.failure else None
        trace.end({**facts.of_document(document), **self._facts_of(job, document)}, code)
        kind, status, add = trace.job_type, document.status, self._metrics.add
        add(metrics.JOBS, 1, kind, status, code)
        add(metrics.DURATION, time.monotonic() - trace.arrived, kind, status)
        add(metrics.WAIT, trace.queued_s + context.waited_s, kind)
        if (cost := document.metadata.get("cost")) is not None:
            add(metrics.COST, cost, kind)
        if peak := facts.peak_bytes(document):
            add(metrics.PEAK, peak, kind)

    def close(self) -> None:
        self._exports.close()

    def _facts_of(self, job: Job | None, document: Document) -> Mapping[str, facts.Value]:
        return dict(facts.of_job(job, document, self._settings)) if job else {}

    def _on_span(
        self,
        kind: str,
        name: str,
        seconds: float,
        span_facts: Mapping[str, str | int],
        code: str | None,
    ) -> None:
        """Record a span's seconds, and count callbacks and uploads."""
        self._metrics.add(metrics.STAGE, seconds, kind, name)
        if name in metrics.COUNTED:
            self._metrics.add(metrics.COUNTED[name], 1, kind, "failed" if code else "succeeded")
        if name == "upload" and not code:
            self._metrics.add(metrics.UPLOAD_SIZE, int(span_facts["bytes"]), kind)


def _tracer(exports: Exports, resource: Resource) -> Tracer:
    """The tracer of a provider that hands its spans to `exports`."""
    if not exports.takes_spans:
        return NoOpTracer()
    try:
        provider = TracerProvider(resource=resource, shutdown_on_exit=False, id_generator=Ids())
    except ValueError as exc:
        # A limit such as OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT is no number.
        raise ModelLoadError(str(exc)) from exc
    provider.add_span_processor(exports)
    return provider.get_tracer(SCOPE, __version__)


def _resource(settings: Settings, worker_id: str) -> Resource:
    """Who sends: OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over the worker's own names."""
    own = {
        "service.name": SCOPE,
        "service.version": __version__,
        "service.instance.id": worker_id,
        "ourvidz.families": list(settings.families),
    }
    if endpoint := os.environ.get("RUNPOD_ENDPOINT_ID"):
        own["runpod.endpoint_id"] = endpoint
    return Resource(own).merge(OTELResourceDetector().detect())
