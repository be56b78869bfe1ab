"""A collector: it takes traces and metrics by OTLP over HTTP, in OpenTelemetry's own classes.

    with Collector() as collector:
        ...
        assert collector.spans("admit")

It follows the specification (https://opentelemetry.io/docs/specs/otlp/#otlphttp): POST of protobuf,
perhaps gzipped, to `/v1/traces` and `/v1/metrics`; 200 with an empty message.
"""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.patience import PATIENCE_S
from tests.servers.local_server import Answer, LocalServer, Request

MESSAGES = {
    "/v1/traces": (ExportTraceServiceRequest, ExportTraceServiceResponse),
    "/v1/metrics": (ExportMetricsServiceRequest, ExportMetricsServiceResponse),
}


@dataclass(frozen=True)
class Span:
    """One span: its ids in hexadecimal, its time in seconds, its attributes."""

    name: str
    trace_id: str
    id: str
    parent_id: str
    kind: int
    began: float
    ended: float
    facts: dict[str, Any]
    is_error: bool


class Collector(LocalServer):
    """Keeps every request, and reads the spans and the points in them."""

    #: An answer that is scripted as "slow" comes when the collector is stopped, and not before.
    slow_seconds = 10 * PATIENCE_S

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.requests: list[Request] = []
        self._messages: list[Any] = []

    def answer(self, request: Request) -> Answer:
        asked, answered = MESSAGES[request.path]
        assert request.headers["Content-Type"] == "application/x-protobuf"
        is_zipped = request.headers.get("Content-Encoding") == "gzip"
        body = gzip.decompress(request.body) if is_zipped else request.body
        with self.changed:
            self._messages.append(asked.FromString(body))
        headers = {"Content-Type": "application/x-protobuf"}
        return Answer(200, answered().SerializeToString(), headers)

    def note(self, request: Request, answer: Answer | None) -> None:
        with self.changed:
            self.requests.append(request)

    @property
    def text(self) -> str:
        """All that arrived, for a search."""
        return "".join(map(str, self._messages))

    @property
    def resource(self) -> dict[str, Any]:
        """Who sent the first message."""
        message = self._messages[0]
        is_trace = isinstance(message, ExportTraceServiceRequest)
        first = (message.resource_spans if is_trace else message.resource_metrics)[0]
        return _facts(first.resource.attributes)

    def spans(self, name: str | None = None) -> list[Span]:
        """The spans of this name, or all, in the order of their beginnings."""
        found = [span for span in self._spans() if name in (None, span.name)]
        return sorted(found, key=lambda span: span.began)

    def wait_for_jobs(self, count: int = 1) -> list[Span]:
        """Wait for the spans of so many jobs, which are sent last, and return them."""
        self.wait_until(lambda: len(self.spans("job")) >= count, what=f"{count} spans of jobs")
        return self.spans("job")

    def points(self, metric: str) -> dict[tuple[Any, ...], Any]:
        """The newest points of a metric: numbers, or the counts of histograms, by attributes."""
        return {values: _value(point) for values, point in self._points(metric)}

    def sums(self, metric: str) -> dict[tuple[Any, ...], float]:
        """The newest sums of a histogram, by attributes."""
        return {values: point.sum for values, point in self._points(metric)}

    def _points(self, metric: str) -> Iterator[tuple[tuple[Any, ...], Any]]:
        for each in self.metrics():
            if each.name == metric:
                for point in getattr(each, each.WhichOneof("data")).data_points:
                    yield tuple(_facts(point.attributes).values()), point

    def metrics(self) -> Iterator[Any]:
        """Every metric of every message."""
        for message in list(self._messages):
            if isinstance(message, ExportMetricsServiceRequest):
                for each in message.resource_metrics:
                    for scope in each.scope_metrics:
                        yield from scope.metrics

    def _spans(self) -> Iterator[Span]:
        for message in list(self._messages):
            if isinstance(message, ExportTraceServiceRequest):
                for each in message.resource_spans:
                    for scope in each.scope_spans:
                        yield from map(_span, scope.spans)


def _span(span: Any) -> Span:
    return Span(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.kind,
        span.start_time_unix_nano / 1e9,
        span.end_time_unix_nano / 1e9,
        _facts(span.attributes),
        span.status.code == 2,
    )


def _facts(attributes: Any) -> dict[str, Any]:
    return {each.key: _plain(each.value) for each in attributes}


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(each) for each in value.array_value.values]
    return getattr(value, kind)


def _value(point: Any) -> Any:
    if hasattr(point, "count"):
        return point.count
    return getattr(point, point.WhichOneof("value"))
