"""The metrics of a worker: a table of them, and the instruments that record them.

Names and units follow OpenTelemetry's conventions
(https://opentelemetry.io/docs/specs/semconv/general/metrics/): a unit is in UCUM, seconds are `s`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from ourvidz_serverless.telemetry.observed import Observed

Kind = Literal["counter", "histogram", "gauge"]
Attributes = Mapping[str, str]

#: The bounds of the buckets of seconds: from a chat's first stage to the longest video.
SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; `is_read` if it is read from the worker at each export."""

    name: str
    kind: Kind
    unit: str
    attributes: tuple[str, ...]
    about: str
    is_read: bool = False


JOBS = Metric(
    "ourvidz.jobs",
    "counter",
    "{job}",
    ("ourvidz.job.type", "ourvidz.job.status", "error.type"),
    "jobs that ended",
)
DURATION = Metric(
    "ourvidz.job.duration",
    "histogram",
    "s",
    ("ourvidz.job.type", "ourvidz.job.status"),
    "from a job's arrival in the worker to the end of its callback",
)
STAGE = Metric(
    "ourvidz.job.stage.duration",
    "histogram",
    "s",
    ("ourvidz.job.type", "ourvidz.stage"),
    "one span of a job, by the span's name",
)
WAIT = Metric(
    "ourvidz.job.wait.duration",
    "histogram",
    "s",
    ("ourvidz.job.type",),
    "how long a job waited in the worker: for a thread and for the device",
)
COST = Metric(
    "ourvidz.job.cost",
    "counter",
    "{currency}",
    ("ourvidz.job.type",),
    "the sum of metadata.cost",
)
PEAK = Metric(
    "ourvidz.job.memory.peak",
    "histogram",
    "By",
    ("ourvidz.job.type",),
    "the peak of the device's memory during a job",
)
CALLBACKS = Metric(
    "ourvidz.callbacks",
    "counter",
    "{callback}",
    ("ourvidz.job.type", "ourvidz.outcome"),
    "documents that were posted, after all tries",
)
UPLOADS = Metric(
    "ourvidz.uploads",
    "counter",
    "{file}",
    ("ourvidz.job.type", "ourvidz.outcome"),
    "files that were stored, after all tries",
)
UPLOAD_SIZE = Metric(
    "ourvidz.upload.size", "counter", "By", ("ourvidz.job.type",), "bytes of the stored files"
)
RUNNING = Metric("ourvidz.jobs.running", "gauge", "{job}", (), "jobs that run now", is_read=True)
MEMORY_USED = Metric(
    "ourvidz.device.memory.used",
    "gauge",
    "By",
    ("ourvidz.device",),
    "memory of the device that is in use, by whatever program",
    is_read=True,
)
MEMORY_LIMIT = Metric(
    "ourvidz.device.memory.limit",
    "gauge",
    "By",
    ("ourvidz.device",),
    "memory of the device, or VRAM_BUDGET_GB",
    is_read=True,
)
MOVES = Metric(
    "ourvidz.model.moves",
    "counter",
    "{move}",
    ("ourvidz.model", "ourvidz.move"),
    "moves of a model between disk, host and device",
    is_read=True,
)

METRICS = (
    *(JOBS, DURATION, STAGE, WAIT, COST, PEAK),
    *(CALLBACKS, UPLOADS, UPLOAD_SIZE),
    *(RUNNING, MEMORY_USED, MEMORY_LIMIT, MOVES),
)

#: The spans of a job that are also counted by their outcome.
COUNTED = {"callback": CALLBACKS, "upload": UPLOADS}


class Metrics:
    """Records the metrics of one worker by a meter of OpenTelemetry."""

    def __init__(self, meter: Meter, observed: Observed) -> None:
        self._instruments: dict[Metric, Any] = {
            metric: _instrument(meter, metric) for metric in METRICS if not metric.is_read
        }
        self._observed = observed
        _read(meter.create_observable_gauge, RUNNING, self._running)
        _read(meter.create_observable_gauge, MEMORY_USED, self._memory_used)
        _read(meter.create_observable_gauge, MEMORY_LIMIT, self._memory_limit)
        _read(meter.create_observable_counter, MOVES, self._moves)

    def add(self, metric: Metric, value: float, *attributes: str | None) -> None:
        """Record a value. The attributes come in the metric's order; one that is None is absent."""
        pairs = zip(metric.attributes, attributes, strict=True)
        found = {name: attribute for name, attribute in pairs if attribute is not None}
        instrument = self._instruments[metric]
        record = instrument.record if metric.kind == "histogram" else instrument.add
        record(value, found)

    def _running(self) -> Iterator[Observation]:
        yield Observation(self._observed.num_running())

    def _memory_used(self) -> Iterator[Observation]:
        if ledger := self._observed.ledger:
            memory = ledger.memory
            yield Observation(
                memory.total_bytes - memory.free_bytes(), {"ourvidz.device": memory.name}
            )

    def _memory_limit(self) -> Iterator[Observation]:
        if ledger := self._observed.ledger:
            yield Observation(ledger.memory.total_bytes, {"ourvidz.device": ledger.memory.name})

    def _moves(self) -> Iterator[Observation]:
        for row in self._observed.ledger.report() if self._observed.ledger else ():
            moves = {
                "disk_to_host": row.num_reads,
                "host_to_device": row.num_loads,
                "device_to_host": row.num_parked,
                "to_disk": row.num_drops,
            }
            for move, count in moves.items():
                yield Observation(count, {"ourvidz.model": row.name, "ourvidz.move": move})


def _instrument(meter: Meter, metric: Metric) -> Any:
    if metric.kind == "counter":
        return meter.create_counter(metric.name, metric.unit, metric.about)
    bounds = SECONDS if metric.unit == "s" else None
    return meter.create_histogram(
        metric.name, metric.unit, metric.about, explicit_bucket_boundaries_advisory=bounds
    )


def _read(
    create: Callable[..., Any], metric: Metric, observe: Callable[[], Iterator[Observation]]
) -> None:
    """Create an instrument that is read at each export."""

    def callback(options: CallbackOptions) -> Iterable[Observation]:
        return observe()

    create(metric.name, [callback], metric.unit, metric.about)
