"""Our changes to RunPod's loop: the SDK's code that they rely on, their waits and their limits."""

import asyncio
import hashlib
import inspect
import signal
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import runpod
from aiohttp import ClientConnectionError, ClientSession
from runpod.serverless import worker
from runpod.serverless.modules import rp_http, rp_job, rp_ping, rp_scale

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.net.retries import Retry
from ourvidz_serverless.serving import runpod_loop
from ourvidz_serverless.serving.runpod_loop import Loop, Outage, post_result
from tests.servers.local_server import Answer, LocalServer, Request, json_answer

FAST_RETRY = Retry(base_s=0.001, max_s=0.001)

#: The SDK's code that `runpod_loop` replaces or calls, and the first letters of its hash. If one
#: differs, read that code, check that the replacement is still right, and write the new hash here.
RELIED_ON: dict[str, tuple[Callable[..., Any], str]] = {
    each.__qualname__: (each, known)
    for each, known in [
        (rp_scale.JobScaler, "b9b75d9270a3ae4f"),
        (rp_job.get_job, "8ce238208ca5261a"),
        (rp_job.get_stop_signals, "031a55cb85064132"),
        (rp_job.handle_job, "849f93639768bc87"),
        (rp_http._handle_result, "ce88ccb812bcc41f"),
        (rp_http._transmit, "fc9d60458af96c8a"),
        (rp_ping.Heartbeat, "aa0c15420df377b2"),
        (worker.run_worker, "ce0b9b3f79f9f9d3"),
    ]
}


class ResultServer(LocalServer):
    """A platform that accepts results, unless its script says otherwise, and records the posts."""

    def __init__(self) -> None:
        super().__init__()
        self.posts: list[Request] = []

    def answer(self, request: Request) -> Answer:
        return json_answer({})

    def note(self, request: Request, answer: Answer | None) -> None:
        self.posts.append(request)


def post(
    url: str, monkeypatch: pytest.MonkeyPatch, remaining_s: Callable[[], float] = lambda: 9.0
) -> str | None:
    """Post a result to a platform; None, or why the platform did not take it."""
    monkeypatch.setattr(rp_http, "JOB_DONE_URL", f"{url}/job-done/worker-1/$ID?gpu=none")

    async def go() -> str | None:
        async with ClientSession() as session:
            return await post_result(session, "job-1", b"{}", False, remaining_s, FAST_RETRY)

    return asyncio.run(go())


# --- the SDK's code ---


@pytest.mark.parametrize("name", RELIED_ON)
def test_the_sdks_code_that_the_loop_relies_on_is_unchanged(name: str) -> None:
    code, known = RELIED_ON[name]

    assert hashlib.sha256(inspect.getsource(code).encode()).hexdigest()[:16] == known


def test_another_version_of_the_sdk_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runpod, "__version__", "1.13.0")

    with pytest.raises(ModelLoadError, match=r"runpod: version 1\.12\.x is needed, 1\.13\.0 is"):
        runpod_loop.install(lambda: None, lambda *_: None, 20)


# --- shutdown ---


@pytest.fixture
def closed() -> list[str]:
    return []


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch, closed: list[str]) -> Loop:
    """A loop that does not run, without grace; it adds to `closed` each time it is closed."""
    monkeypatch.setattr(rp_job, "send_result", rp_job.send_result)
    return Loop({}, lambda: closed.append("closed"), lambda *_: None, grace_s=0)


def test_sigterm_closes_a_worker_that_is_being_replaced_once(loop: Loop, closed: list[str]) -> None:
    loop.kill_worker()

    loop.handle_shutdown(signal.SIGTERM, None)
    loop.handle_shutdown(signal.SIGTERM, None)

    assert closed == ["closed"]


def test_the_time_to_post_results_is_shortened_by_sigterm_and_not_by_a_replacement(
    loop: Loop,
) -> None:
    loop.kill_worker()
    before = loop.posting_time()()
    loop.handle_shutdown(signal.SIGTERM, None)

    assert (before > 0, loop.posting_time()() > 0) == (True, False)


# --- results ---


@pytest.mark.parametrize("step", [503, 500, 429, 408, "reset"])
def test_a_result_is_posted_again_until_the_platform_takes_it(
    monkeypatch: pytest.MonkeyPatch, step: int | str
) -> None:
    with ResultServer() as platform:
        platform.script([step] * 6)

        assert post(platform.url, monkeypatch) is None
    assert len(platform.posts) == 7


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_a_result_that_is_refused_for_good_is_posted_once(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    with ResultServer() as platform:
        platform.script([status])

        assert post(platform.url, monkeypatch) == f"HTTP {status}"
    assert len(platform.posts) == 1


def test_a_result_is_not_posted_again_after_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = iter([1.0, 1.0, 0.0])
    with ResultServer() as platform:
        platform.script([503] * 9)

        assert post(platform.url, monkeypatch, lambda: next(left)) == "HTTP 503"
    assert len(platform.posts) == 3


def test_a_result_is_posted_once_even_if_no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with ResultServer() as platform:
        assert post(platform.url, monkeypatch, lambda: -5.0) is None
    assert len(platform.posts) == 1


# --- outages ---


def waits(errors: Iterable[Exception]) -> list[float]:
    outage = Outage("jobs")
    return [outage.failed(error) for error in errors]


def test_the_waits_between_polls_grow_to_half_a_minute_in_an_outage() -> None:
    found = waits([ClientConnectionError()] * 9)

    assert found[:4] == pytest.approx([0.5, 1, 2, 4], rel=0.25)
    assert found[-1] == 30


def test_an_outage_is_logged_once_and_its_end_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ourvidz")
    outage = Outage("jobs")

    for _ in range(50):
        outage.failed(ClientConnectionError())
    outage.ended()
    outage.ended()

    assert [record.message for record in caplog.records] == [
        "the platform sends no jobs (ClientConnectionError); trying again",
        "the platform sends jobs again",
    ]


def test_a_failed_heartbeat_is_logged_once_until_one_arrives(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = runpod_loop.HeartbeatLog()

    for _ in range(3):
        log.error("Ping Request Error: refused")
    log.debug("Heartbeat Sent")
    log.error("Ping Request Error: refused")

    assert capsys.readouterr().out.count("Ping Request Error") == 2
