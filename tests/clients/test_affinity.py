"""Several HTTP workers behind RunPod's load balancer: a job's requests reach the job's worker."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ourvidz_serverless.client import AsyncClient, Client, RequestFailed
from ourvidz_serverless.settings import Settings
from tests.clients.python_clients import QUICK, Awaited
from tests.fakes.fake_chat import FakeChat
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import LocalWorker, chat_payload, sdxl_payload
from tests.servers.balancer import LoadBalancer
from tests.servers.http_service import ServedHttp
from tests.servers.javascript import RUNTIMES, call

SETTINGS = Settings(families=("sdxl", "chat"))


@pytest.fixture
def balancer(tmp_path: Path) -> Iterator[LoadBalancer]:
    with ExitStack() as running:
        urls = {}
        for name in ("pod-a", "pod-b"):
            models = {"sdxl": FakeSdxl(), "chat": FakeChat("Rain ", "falls.")}
            worker = LocalWorker(tmp_path / name, settings=SETTINGS, models=models).worker
            urls[name] = running.enter_context(ServedHttp(SETTINGS, worker)).url
        yield running.enter_context(LoadBalancer(urls))


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest, balancer: LoadBalancer) -> Iterator[Any]:
    if request.param == "sync":
        yield Client.over_http(balancer.url, policy=QUICK)
        return
    with asyncio.Runner() as runner:
        made = AsyncClient.over_http(balancer.url, policy=QUICK)
        yield Awaited(made, runner.get_loop())
        runner.run(made.close())


def workers_of(balancer: LoadBalancer, job_id: str) -> set[str]:
    """The workers that served the requests for a job after its submission."""
    return {worker for path, worker in balancer.served if path.startswith(f"/job/{job_id}")}


def test_the_balancer_sends_requests_without_the_header_to_each_worker_in_turn(
    balancer: LoadBalancer,
) -> None:
    plain = Client.over_http(balancer.url, policy=QUICK)

    for _ in range(4):
        plain.health()

    assert [worker for _, worker in balancer.served] == ["pod-a", "pod-b"] * 2


def test_each_request_for_a_job_reaches_the_worker_that_has_it(
    client: Any, balancer: LoadBalancer
) -> None:
    jobs = [client.submit(sdxl_payload(id=f"job-{i}")) for i in range(3)]

    assert [job.result()["status"] for job in jobs] == ["completed"] * 3
    assert [workers_of(balancer, job.id) for job in jobs] == [{job.worker} for job in jobs]
    assert {job.worker for job in jobs} == {"pod-a", "pod-b"}


def test_a_stream_and_a_cancel_reach_the_worker_that_has_the_job(
    client: Any, balancer: LoadBalancer
) -> None:
    jobs = [client.submit(chat_payload(id=f"job-{i}", stream=True)) for i in range(3)]

    replies = ["".join(job.stream()) for job in jobs]
    for job in jobs:
        job.cancel()

    assert replies == ["Rain falls."] * 3
    assert [workers_of(balancer, job.id) for job in jobs] == [{job.worker} for job in jobs]


def test_another_process_finds_a_job_by_its_worker(client: Any, balancer: LoadBalancer) -> None:
    jobs = [client.submit(sdxl_payload(id=f"job-{i}")) for i in range(3)]

    again = [client.job(job.endpoint, job.id, job.user_id, job.worker) for job in jobs]

    assert [job.result()["job_id"] for job in again] == ["job-0", "job-1", "job-2"]


def test_a_job_whose_worker_is_gone_is_not_found(client: Any, balancer: LoadBalancer) -> None:
    job = client.submit(sdxl_payload())
    del balancer.workers[job.worker]

    with pytest.raises(RequestFailed, match="/job/job-1: HTTP 404"):
        job.result()


def test_without_a_load_balancer_a_job_names_no_worker(tmp_path: Path) -> None:
    worker = LocalWorker(tmp_path, settings=SETTINGS).worker
    with ServedHttp(SETTINGS, worker) as service:
        job = Client.over_http(service.url, policy=QUICK).submit(sdxl_payload())

        assert (job.worker, job.result()["status"]) == (None, "completed")


# --- the TypeScript client ---


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_request_of_the_typescript_client_reaches_the_worker_that_has_the_job(
    balancer: LoadBalancer, runtime: str
) -> None:
    jobs = [sdxl_payload(id=f"job-{i}") for i in range(3)]

    value = call(runtime, "overHttp", service={"url": balancer.url, "apiKey": "k"}, jobs=jobs)[
        "value"
    ]

    assert [result["status"] for result in value["results"]] == ["completed"] * 3
    assert {name["worker"] for name in value["stored"]} == {"pod-a", "pod-b"}
    assert [workers_of(balancer, name["id"]) for name in value["stored"]] == [
        {name["worker"]} for name in value["stored"]
    ]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_job_that_fails_over_http_throws_its_failure(
    balancer: LoadBalancer, runtime: str
) -> None:
    unserved = {"type": "video_fast", "user_id": "user-1", "prompt": "a red sun"}

    error = call(
        runtime, "overHttp", service={"url": balancer.url, "apiKey": "k"}, jobs=[unserved]
    )["error"]

    assert (error["name"], error["failure"]["code"]) == ("JobFailed", "WORKER_UNAVAILABLE")
    assert error["failure"]["retryable"] is True
