"""A collector, and workers that send to it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ourvidz_serverless.settings import Settings
from ourvidz_serverless.telemetry import exports
from tests.fakes.local_worker import LocalWorker
from tests.servers.collector import Collector

#: An interval that no test outlasts, in milliseconds: only the flush at a worker's end sends.
NEVER_MS = 3_600_000


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        yield server


@pytest.fixture
def observed(
    local: Callable[..., LocalWorker], collector: Collector
) -> Iterator[Callable[..., LocalWorker]]:
    """A function that builds a LocalWorker whose telemetry the collector gets at its `flush`."""
    built: list[LocalWorker] = []

    def build(settings: dict[str, Any] | None = None, **parts: Any) -> LocalWorker:
        own = {
            "otel_exporter_otlp_endpoint": collector.url,
            "otel_bsp_schedule_delay": NEVER_MS,
            "otel_metric_export_interval": NEVER_MS,
        }
        built.append(local(settings=Settings(**{**own, **(settings or {})}), **parts))
        return built[-1]

    yield build
    # A collector that still hangs answers now.
    collector.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "FLUSH_S", 0.1)
        for each in built:
            each.worker.flush()
