"""The metrics of a worker: what each counts, and the table that describes them."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from ourvidz_serverless.context import Stop, discard
from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.errors import OutOfMemory, UploadError
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.net.retries import Fault
from tests.fakes.devices import FakeMemory, FakeModel
from tests.fakes.local_worker import QUICK, LocalWorker, sdxl_payload
from tests.servers.collector import Collector
from tests.servers.supabase import CallbackReceiver

Observe = Callable[..., LocalWorker]
KIND = "sdxl_image_fast"


def test_jobs_are_counted_by_type_status_and_code(observed: Observe, collector: Collector) -> None:
    at = observed()
    at.fake_sdxl.fails = [OutOfMemory("not even one picture fits the device")]
    at.run()
    for number in range(2):
        at.run(sdxl_payload(id=f"job-{number}"))
    at.run({"type": "a type of nobody"})

    at.worker.flush()

    assert collector.points("ourvidz.jobs") == {
        (KIND, "failed", "OOM_ERROR"): 1,
        (KIND, "completed"): 2,
        ("unknown", "failed", "INVALID_PROMPT"): 1,
    }
    assert collector.points("ourvidz.job.duration") == {
        (KIND, "failed"): 1,
        (KIND, "completed"): 2,
        ("unknown", "failed"): 1,
    }


def test_each_span_is_counted_as_a_stage(observed: Observe, collector: Collector) -> None:
    at = observed()
    at.run()

    at.worker.flush()

    spans = [span.name for span in collector.spans() if span.name != "job"]
    counts = {(KIND, name): spans.count(name) for name in spans}
    assert collector.points("ourvidz.job.stage.duration") == counts


def test_a_wait_counts_from_the_arrival_of_the_job(observed: Observe, collector: Collector) -> None:
    at, envelope = observed(), Envelope.of({"id": "rp-1", "input": sdxl_payload()})
    envelope.arrived = time.monotonic() - 1000

    at.worker.run(envelope, Stop(), discard)
    at.worker.flush()

    assert collector.sums("ourvidz.job.wait.duration")[(KIND,)] >= 1000
    (job,) = collector.spans("job")
    assert job.ended - job.began >= 1000


def test_the_cost_of_jobs_is_added_up(observed: Observe, collector: Collector) -> None:
    at = observed({"gpu_price_per_second": 1000.0})
    costs = [at.run().metadata["cost"] for _ in range(3)]

    at.worker.flush()

    assert collector.points("ourvidz.job.cost") == {(KIND,): pytest.approx(sum(costs))}


def test_callbacks_are_counted_by_their_outcome(
    observed: Observe, collector: Collector, receiver: CallbackReceiver
) -> None:
    callback = Callback(receiver.callback_url, receiver.secret, policy=QUICK)
    at = observed(callback=callback)
    at.run()
    receiver.script([500, 500, 500])
    at.run()

    at.worker.flush()

    assert collector.points("ourvidz.callbacks") == {(KIND, "succeeded"): 1, (KIND, "failed"): 1}
    (failed,) = [span for span in collector.spans("callback") if span.is_error]
    assert failed.facts["error.type"] == "Fault"


def test_a_worker_without_a_callback_url_counts_no_callback(
    observed: Observe, collector: Collector
) -> None:
    at = observed()
    at.run()

    at.worker.flush()

    assert collector.points("ourvidz.callbacks") == {}


class FullStorage:
    """A storage that takes thumbnails, and no pictures."""

    policy = QUICK

    def put(self, key: str, data: bytes, mime: str) -> None:
        if mime == "image/png":
            raise Fault(413)

    def url(self, key: str, style: str, expiry_s: int) -> str:
        return key


def test_uploads_are_counted_by_their_outcome_and_their_bytes(
    observed: Observe, collector: Collector
) -> None:
    at = observed(storage=FullStorage())

    document = at.run()
    at.worker.flush()

    assert document.failure and document.failure.code == UploadError.code
    counts = collector.points("ourvidz.uploads")
    assert counts[(KIND, "failed")] == 1
    # A thumbnail that was not stored before the failure is cancelled.
    stored = sum(
        span.facts["ourvidz.bytes"] for span in collector.spans("upload") if not span.is_error
    )
    assert collector.points("ourvidz.upload.size") == ({(KIND,): stored} if stored else {})


# --- what is read at each export ---


def test_models_are_counted_as_they_move_and_the_devices_memory_is_read(
    observed: Observe, collector: Collector
) -> None:
    memory = FakeMemory(10)
    ledger = Ledger(memory)
    first, second = FakeModel(6, memory), FakeModel(6, memory)
    for name, model in (("first", first), ("second", second)):
        ledger.register(model, name, "sdxl", state="disk")
    at = observed(ledger=ledger)
    for model in (first, second, first):
        with ledger.using(model):
            pass

    at.worker.flush()

    moves = collector.points("ourvidz.model.moves")
    assert {key: count for key, count in moves.items() if count} == {
        ("first", "disk_to_host"): 1,
        ("first", "host_to_device"): 2,
        ("first", "device_to_host"): 1,
        ("second", "disk_to_host"): 1,
        ("second", "host_to_device"): 1,
        ("second", "device_to_host"): 1,
    }
    assert collector.points("ourvidz.device.memory.used") == {("fake",): 6}
    assert collector.points("ourvidz.device.memory.limit") == {("fake",): 10}


def test_a_device_that_cannot_be_read_leaves_the_other_metrics(
    observed: Observe, collector: Collector
) -> None:
    class LostMemory(FakeMemory):
        def free_bytes(self) -> int:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    at = observed(ledger=Ledger(LostMemory(10)))
    at.run()

    at.worker.flush()

    assert collector.points("ourvidz.jobs") == {(KIND, "completed"): 1}
    assert collector.points("ourvidz.device.memory.used") == {}


# --- what is wanted ---


@pytest.mark.parametrize(
    ("settings", "paths"),
    [
        ({"otel_traces_exporter": "none"}, {"/v1/metrics"}),
        ({"otel_metrics_exporter": "none"}, {"/v1/traces"}),
        ({}, {"/v1/metrics", "/v1/traces"}),
    ],
)
def test_only_the_wanted_signals_are_sent(
    observed: Observe, collector: Collector, settings: Any, paths: set[str]
) -> None:
    at = observed(settings)
    at.run()

    at.worker.flush()

    assert {request.path for request in collector.requests} == paths
