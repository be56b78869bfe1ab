"""Telemetry of real workers: on the SDK's queue and over HTTP, with a collector that may fail."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from ourvidz_serverless.settings import Settings
from tests.fakes.fake_chat import FakeChat
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import LocalWorker, chat_payload, sdxl_payload
from tests.files import ROOT
from tests.patience import PATIENCE_S, wait_until
from tests.servers.collector import Collector
from tests.servers.handler import HANDLER, POCKET, start
from tests.servers.http_service import ServedHttp
from tests.servers.runpod import Platform
from tests.servers.supabase import CallbackReceiver
from tests.servers.worker_process import WorkerProcess

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"

#: An interval that no test outlasts, in milliseconds, and one that each test sees often.
NEVER, OFTEN = "3600000", "20"


def sending_to(collector: Collector, every_ms: str) -> dict[str, str]:
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": every_ms,
        "OTEL_METRIC_EXPORT_INTERVAL": every_ms,
        # A test that waits for it fails.
        "OTEL_EXPORTER_OTLP_TIMEOUT": str(10 * PATIENCE_S),
    }


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        yield server


# --- on the queue ---


@pytest.mark.slow
def test_a_job_on_the_queue_is_sent_at_the_latest_when_its_worker_ends(
    collector: Collector, receiver: CallbackReceiver, tmp_path: Path
) -> None:
    env = {
        **sending_to(collector, NEVER),
        "STORAGE_URL": f"file:{tmp_path}",
        "CALLBACK_URL": receiver.callback_url,
        "JOB_CALLBACK_SECRET": receiver.secret,
        "GPU_PRICE_PER_SECOND": "0.0003",
    }
    with Platform(hold=0.05) as platform, start(platform, **env) as process:
        job = platform.submit(sdxl_payload(metadata={"traceparent": TRACEPARENT}))
        document = platform.result(job)["output"]
        assert collector.requests == []

        process.terminate()
        assert process.wait() == 0

    names = {span.name for span in collector.spans()}
    parts = {"admit", "wait", "fetch", "generate", "decode", "deliver", "upload", "callback"}
    assert names == {"job", *parts}
    assert {span.trace_id for span in collector.spans()} == {TRACE}
    (job_span,), (callback,) = collector.spans("job"), collector.spans("callback")
    assert job_span.parent_id == PARENT
    assert job_span.facts["ourvidz.cost"] == document["metadata"]["cost"] > 0
    (received,) = receiver.received
    assert received.headers["traceparent"] == f"00-{TRACE}-{callback.id}-01"
    assert collector.points("ourvidz.jobs") == {("sdxl_image_fast", "completed"): 1}


def num_threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@contextmanager
def fake_worker(platform: Platform, folder: Path, **env: str) -> Iterator[WorkerProcess]:
    own = {"HOLD": str(folder / "hold"), "STORAGE_URL": f"file:{folder / 'assets'}", **env}
    args = ["tests.fakes.fake_handler"]
    with WorkerProcess(platform, "-m", args=args, env=own, cwd=ROOT) as process:
        yield process


@pytest.mark.slow
def test_the_process_that_sends_heartbeats_sends_no_telemetry(
    collector: Collector, tmp_path: Path
) -> None:
    with (
        Platform(hold=0.05) as platform,
        fake_worker(platform, tmp_path, **sending_to(collector, OFTEN)) as process,
    ):
        platform.wait_until(lambda: platform.pings)

        assert [num_threads(child) for child in children(process.pid)] == [1]


# --- with a collector that fails ---


@dataclass
class Running:
    """A worker's process, and a function that runs a job on it and returns the job's status."""

    process: WorkerProcess
    run: Callable[[str], str]


@contextmanager
def on_the_queue(folder: Path, env: dict[str, str]) -> Iterator[Running]:
    with Platform(hold=0.05) as platform, fake_worker(platform, folder, **env) as process:

        def run(name: str) -> str:
            job = platform.submit(sdxl_payload(id=name))
            return str(platform.result(job)["output"]["status"])

        yield Running(process, run)


@contextmanager
def over_http(folder: Path, env: dict[str, str]) -> Iterator[Running]:
    own = {"SERVE": "http", "HOST": "127.0.0.1", "PORT": "0", "STORAGE_URL": f"file:{folder}"}
    with WorkerProcess(None, str(HANDLER), env={**POCKET, **own, **env}, cwd=ROOT) as process:
        (port,) = re.findall(r"port (\d+)", process.wait_for_log("ready"))

        def run(name: str) -> str:
            body = {"input": sdxl_payload(id=name)}
            url = f"http://127.0.0.1:{port}/jobs?wait=150"
            return str(requests.post(url, json=body, timeout=PATIENCE_S).json()["status"])

        yield Running(process, run)


def die(collector: Collector) -> None:
    collector.stop()


def hang(collector: Collector) -> None:
    collector.script(["slow"] * 1000)


def refuse(collector: Collector) -> None:
    collector.script([503] * 1000)


@pytest.mark.slow
@pytest.mark.parametrize("misbehave", [die, hang, refuse])
@pytest.mark.parametrize("running", [on_the_queue, over_http])
def test_a_collector_that_fails_disturbs_no_job_and_not_the_end_of_the_worker(
    running: Callable[..., Running],
    misbehave: Callable[[Collector], None],
    collector: Collector,
    tmp_path: Path,
) -> None:
    with running(tmp_path, sending_to(collector, OFTEN)) as worker:
        assert worker.run("first") == "completed"
        collector.wait_for_jobs()

        misbehave(collector)
        if misbehave is hang:
            wait_until(lambda: collector.in_flight)
        assert worker.run("second") == "completed"

        worker.process.terminate()
        assert worker.process.wait() == 0
        log = worker.process.log
    assert log.count("the collector") <= 2
    assert "Traceback" not in log


# --- over HTTP ---


def test_a_request_with_a_traceparent_has_its_job_in_the_callers_trace(
    local: Callable[..., LocalWorker], collector: Collector
) -> None:
    settings = Settings(
        families="sdxl,chat", serve="http", otel_exporter_otlp_endpoint=collector.url
    )
    at = local(settings=settings, models={"sdxl": FakeSdxl(), "chat": FakeChat("Water.")})
    headers = {"traceparent": TRACEPARENT}
    with ServedHttp(at.settings, at.worker) as http:
        http.post("/jobs?wait=100", {"input": sdxl_payload()}, headers=headers)
        http.post("/chat", chat_payload(), headers=headers)
        http.get("/status", headers=headers)

    at.worker.flush()

    jobs = collector.spans("job")
    assert [job.facts["ourvidz.job.type"] for job in jobs] == [
        "sdxl_image_fast",
        "chat_conversation",
        "admin_utilities",
    ]
    assert {(job.trace_id, job.parent_id) for job in jobs} == {(TRACE, PARENT)}
    assert {span.trace_id for span in collector.spans()} == {TRACE}
