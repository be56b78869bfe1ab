"""The trace of one job: a span for the job, and one for each of its parts."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ourvidz_serverless.errors import JobError

#: The header and the format of W3C's Trace Context (https://www.w3.org/TR/trace-context/).
PROPAGATOR = TraceContextTextMapPropagator()

#: Receives the name of a span that ended, its seconds, its facts, and its error's code.
OnSpan = Callable[[str, float, Mapping[str, str | int], str | None], None]


class Ids(IdGenerator):
    """Ids from the system. OpenTelemetry's own come from `random`, which a library may seed."""

    def generate_span_id(self) -> int:
        return 1 + secrets.randbelow(2**64 - 1)

    def generate_trace_id(self) -> int:
        return 1 + secrets.randbelow(2**128 - 1)

    def is_trace_id_random(self) -> bool:
        return True


class JobTrace:
    """Records the spans of one job, from any thread, below the job's own span `root`.

    `queued_s` is the time from the job's arrival, on the clock `time.monotonic`, to its thread.
    """

    def __init__(
        self, tracer: Tracer, root: Span, job_type: str, arrived: float, on_span: OnSpan
    ) -> None:
        self.job_type, self.arrived = job_type, arrived
        self.queued_s = time.monotonic() - arrived
        self._root, self._tracer, self._on_span = root, tracer, on_span
        # A stack for each thread: uploads run beside the stages.
        self._threads = threading.local()

    @property
    def id(self) -> str:
        """The trace's id, as W3C writes it."""
        return f"{self._root.get_span_context().trace_id:032x}"

    @property
    def headers(self) -> Mapping[str, str]:
        headers: dict[str, str] = {}
        PROPAGATOR.inject(headers, set_span_in_context(self._innermost))
        return headers

    def end(self, facts: Mapping[str, str | int | float], code: str | None) -> None:
        """End the job's own span, with the code of its failure if it has one."""
        for name, value in facts.items():
            self._root.set_attribute(name, value)
        if code:
            fail(self._root, code)
        self._root.end()

    @contextmanager
    def span(self, name: str, **facts: str | int) -> Iterator[None]:
        span = self._tracer.start_span(
            name,
            set_span_in_context(self._innermost),
            SpanKind.CLIENT if name == "callback" else SpanKind.INTERNAL,
            {f"ourvidz.{fact}": value for fact, value in facts.items()},
        )
        open_spans, began, code = self._open, time.monotonic(), None
        open_spans.append(span)
        try:
            yield
        except Exception as exc:
            code = exc.code if isinstance(exc, JobError) else type(exc).__name__
            fail(span, code)
            raise
        finally:
            # A generator's span may end after one that was opened later.
            open_spans.remove(span)
            span.end()
            self._on_span(name, time.monotonic() - began, facts, code)

    @property
    def _open(self) -> list[Span]:
        """The spans that are open in this thread, outermost first."""
        spans: list[Span] = self._threads.__dict__.setdefault("spans", [])
        return spans

    @property
    def _innermost(self) -> Span:
        return self._open[-1] if self._open else self._root


def begin_span(tracer: Tracer, name: str, traceparent: str | None, **options: Any) -> Span:
    """A span in the caller's trace, or in a new one if `traceparent` is absent or invalid."""
    carrier = {"traceparent": traceparent} if traceparent else {}
    return tracer.start_span(name, PROPAGATOR.extract(carrier), **options)


def fail(span: Span, code: str) -> None:
    """Mark a span as failed. Its message stays out, since it may quote what the caller sent."""
    span.set_attribute("error.type", code)
    span.set_status(Status(StatusCode.ERROR))
