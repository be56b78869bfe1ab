"""A collector that refuses, hangs or is gone: jobs go on, and the end of a worker is not held."""

import logging
from collections.abc import Callable

import pytest

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.telemetry import exports
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.patience import PATIENCE_S, start, wait_until
from tests.servers.collector import Collector
from tests.servers.local_server import free_port

Observe = Callable[..., LocalWorker]

#: Intervals in milliseconds, so that a test sees many exports.
OFTEN = {"otel_bsp_schedule_delay": 20, "otel_metric_export_interval": 20}


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log's lines about the collector, and any other line of OpenTelemetry."""
    found = [each for each in caplog.records if not each.name.startswith("urllib3")]
    return [each.message for each in found if "collector" in each.message or "opentel" in each.name]


def ids(collector: Collector) -> list[str]:
    """The ids of the jobs whose spans have arrived."""
    return [job.facts["ourvidz.job.id"] for job in collector.spans("job")]


def test_a_collector_that_refuses_is_logged_once_for_each_signal(
    observed: Observe, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.script([401] * 1000)
    at = observed(OFTEN)
    for number in range(3):
        at.run(sdxl_payload(id=f"job-{number}"))
        collector.wait_until(lambda seen=10 * (number + 1): len(collector.requests) >= seen)

    at.worker.flush()

    assert sorted(lines(caplog)) == [
        "the collector takes no metrics (HTTP 401); jobs go on",
        "the collector takes no traces (HTTP 401); jobs go on",
    ]


def test_a_collector_that_works_again_is_logged_and_gets_what_follows(
    observed: Observe, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ourvidz")
    collector.script([400])
    at = observed({**OFTEN, "otel_metrics_exporter": "none"})
    at.run(sdxl_payload(id="lost"))
    wait_until(lambda: lines(caplog))

    at.run(sdxl_payload(id="found"))

    wait_until(lambda: ids(collector) and ids(collector)[-1] == "found")
    at.worker.flush()
    # The collector has the spans before the worker has its answer.
    wait_until(lambda: len(lines(caplog)) > 1)
    assert lines(caplog) == [
        "the collector takes no traces (HTTP 400); jobs go on",
        "the collector takes traces again",
    ]


def test_a_log_line_about_the_collector_has_none_of_its_url(
    observed: Observe, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No time for a second try.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")
    url = f"http://127.0.0.1:{free_port()}/zebra?key=zebra"
    at = observed({"otel_exporter_otlp_traces_endpoint": url, "otel_metrics_exporter": "none"})
    at.run()

    at.worker.flush()

    assert lines(caplog) == ["the collector takes no traces (ConnectionError); jobs go on"]


def test_jobs_end_while_the_collector_hangs(observed: Observe, collector: Collector) -> None:
    collector.script(["slow"] * 1000)
    at = observed(OFTEN)
    at.run(sdxl_payload(id="first"))
    wait_until(lambda: collector.in_flight)

    documents = [at.run(sdxl_payload(id=f"job-{number}")) for number in range(5)]

    assert {document.status for document in documents} == {"completed"}
    assert collector.in_flight


def test_a_collector_that_hangs_does_not_hold_the_end_of_a_worker(
    observed: Observe,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(10 * PATIENCE_S))
    monkeypatch.setattr(exports, "FLUSH_S", 0.1)
    collector.script(["slow"] * 1000)
    at = observed()
    at.run()

    start(at.worker.flush).result(PATIENCE_S)

    wait_until(lambda: collector.in_flight)
    assert lines(caplog) == ["the collector did not take the last telemetry within 0.1 s"]


def test_a_collector_that_was_gone_before_is_not_waited_for(
    observed: Observe,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(exports, "FLUSH_S", 10 * PATIENCE_S)
    collector.script([401, *["slow"] * 1000])
    at = observed({**OFTEN, "otel_metrics_exporter": "none"})
    at.run(sdxl_payload(id="refused"))
    wait_until(lambda: lines(caplog))
    at.run(sdxl_payload(id="held"))

    start(at.worker.flush).result(PATIENCE_S)

    assert lines(caplog) == ["the collector takes no traces (HTTP 401); jobs go on"]


def test_the_last_traces_are_sent_though_nobody_takes_metrics(
    observed: Observe, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.script([404])
    at = observed({"otel_metric_export_interval": 20})
    wait_until(lambda: lines(caplog))
    at.run()

    at.worker.flush()

    assert ids(collector) == ["job-1"]


def test_a_full_batch_is_sent_before_its_time(
    observed: Observe, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "BATCH", 5)
    at = observed()

    at.run()

    collector.wait_until(lambda: len(collector.spans()) >= 5)


def test_a_collector_that_hangs_costs_a_bounded_number_of_spans(
    observed: Observe, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "MAX_SPANS", 20)
    at = observed()
    for number in range(5):
        at.run(sdxl_payload(id=f"job-{number}"))

    at.worker.flush()

    assert len(collector.spans()) == 20
    assert collector.spans("job")[-1].facts["ourvidz.job.id"] == "job-4"


def test_a_certificate_that_is_missing_is_logged_like_a_refusal(
    observed: Observe, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", "/no/such/file.pem")
    url = f"https://127.0.0.1:{free_port()}"
    at = observed({"otel_exporter_otlp_endpoint": url, "otel_metrics_exporter": "none"})
    at.run()

    at.worker.flush()

    assert lines(caplog) == ["the collector takes no traces (OSError); jobs go on"]


def test_a_limit_that_is_no_number_ends_the_start_with_one_line(
    observed: Observe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many")

    with pytest.raises(ModelLoadError, match=r"^OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT"):
        observed()
