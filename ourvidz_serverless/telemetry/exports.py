"""Sends spans and metrics to a collector, from one thread that no job waits for.

OpenTelemetry's own batch processor and periodic reader start their threads again in each forked
child. RunPod's SDK forks a process for its heartbeats, which would then send every metric twice.
So the thread is this module's own; encoding, retries and requests are OpenTelemetry's.

OpenTelemetry reads more variables by itself, among them OTEL_EXPORTER_OTLP_HEADERS,
OTEL_EXPORTER_OTLP_TIMEOUT, OTEL_EXPORTER_OTLP_COMPRESSION, OTEL_EXPORTER_OTLP_CERTIFICATE,
OTEL_TRACES_SAMPLER, OTEL_TRACES_SAMPLER_ARG, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and
OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE
(https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from typing import Any

import requests
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

from ourvidz_serverless.logs import log

#: The most spans that wait for the collector; the oldest are dropped. OpenTelemetry's default.
MAX_SPANS = 2048

#: The most spans in one request. OpenTelemetry's default.
BATCH = 512

#: How long the end of a process waits for what is left to be sent, in seconds.
FLUSH_S = 3.0


class Exports(SpanProcessor):
    """Receives spans that ended, and sends them and the metrics at their intervals."""

    def __init__(
        self,
        spans_url: str | None,
        metrics_url: str | None,
        spans_every_s: float,
        metrics_every_s: float,
    ) -> None:
        # Its lines would come at every try, and may hold the collector's URL with a key in it.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)
        self._spans = deque[ReadableSpan](maxlen=MAX_SPANS)
        self._to_traces, self._to_metrics = Session("traces"), Session("metrics")
        self._span_exporter: OTLPSpanExporter | None = None
        self._metric_exporter: OTLPMetricExporter | None = None
        self.reader: PeriodicExportingMetricReader | None = None
        if spans_url:
            self._span_exporter = OTLPSpanExporter(spans_url, session=self._to_traces)
        if metrics_url:
            self._metric_exporter = OTLPMetricExporter(metrics_url, session=self._to_metrics)
            # Endless, so that the reader has no thread of its own.
            self.reader = PeriodicExportingMetricReader(self._metric_exporter, math.inf)
        self._spans_every_s, self._metrics_every_s = spans_every_s, metrics_every_s
        self._is_closing, self._wakes = False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    @property
    def takes_spans(self) -> bool:
        """Whether spans are sent at all."""
        return self._span_exporter is not None

    def start(self) -> None:
        """Begin to send. The reader needs its provider before."""
        self._thread.start()

    def on_end(self, span: ReadableSpan) -> None:
        """Keep a span for the next request; called in the thread that ends it."""
        if span.context.trace_flags.sampled:
            self._spans.append(span)
            if len(self._spans) >= BATCH:
                self._wakes.set()

    def close(self) -> None:
        """Send what is left, for `FLUSH_S` at most; not to a collector that took nothing before."""
        self._is_closing = True
        self._wakes.set()
        if not self._is_out:
            self._thread.join(FLUSH_S)
            if self._thread.is_alive():
                log.warning("the collector did not take the last telemetry within %g s", FLUSH_S)
        # No more tries: a shutdown exporter ends its waits between them.
        for exporter in (self._span_exporter, self._metric_exporter):
            if exporter:
                exporter.shutdown()

    @property
    def _is_out(self) -> bool:
        """Whether nothing that was sent last was taken."""
        wanted = {self._to_traces: self._span_exporter, self._to_metrics: self._metric_exporter}
        return all(session.is_out for session, exporter in wanted.items() if exporter)

    def _run(self) -> None:
        every_s = min(self._spans_every_s, self._metrics_every_s)
        sent_at = time.monotonic()
        while not self._is_closing:
            self._wakes.wait(every_s)
            self._wakes.clear()
            self._send_spans()
            if time.monotonic() - sent_at >= self._metrics_every_s:
                sent_at = time.monotonic()
                self._send_metrics()
        self._send_spans()
        self._send_metrics()

    def _send_spans(self) -> None:
        while self._span_exporter and self._spans:
            # Only this thread shortens the queue: a full one that drops a span stays full.
            batch = [self._spans.popleft() for _ in range(min(BATCH, len(self._spans)))]
            self._span_exporter.export(batch)
            self._to_traces.log_change()

    def _send_metrics(self) -> None:
        if self.reader:
            # Without the timeout a slow device would end this thread by an error.
            self.reader.collect(timeout_millis=math.inf)
            self._to_metrics.log_change()


class Session(requests.Session):
    """Requests to the collector; it logs when they begin to fail, and when they succeed again."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what
        #: Whether the last export failed.
        self.is_out = False
        # Why the last try failed; None if it did not.
        self._why: str | None = None

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        try:
            response = super().request(*args, **kwargs)
        except OSError as exc:
            # A RequestException, or a certificate's file that is missing. Only its class: a
            # message has the URL.
            self._why = type(exc).__name__
            raise
        self._why = None if response.ok else f"HTTP {response.status_code}"
        return response

    def log_change(self) -> None:
        """Log one line if the last export failed and the one before did not, or the reverse."""
        is_out = self._why is not None
        if is_out and not self.is_out:
            log.warning("the collector takes no %s (%s); jobs go on", self._what, self._why)
        if self.is_out and not is_out:
            log.info("the collector takes %s again", self._what)
        self.is_out = is_out
