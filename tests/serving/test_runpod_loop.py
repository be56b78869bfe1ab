"""What is replaced in RunPod's loop: what it relies on in the SDK, how it waits and gives up."""

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

HASTE = Retry(base_s=0.001, max_s=0.001)

#: The SDK's code that `runpod_loop` replaces or calls, by the first letters of its hash. Where one
#: differs, read it again, see that the replacement still holds, and note the new hash here.
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


class Done(LocalServer):
    """Takes results, unless its script says otherwise, and counts the posts."""

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
    """Post a result to a platform; why it was not taken, if it was not."""
    monkeypatch.setattr(rp_http, "JOB_DONE_URL", f"{url}/job-done/worker-1/$ID?gpu=none")

    async def go() -> str | None:
        async with ClientSession() as session:
            return await post_result(session, "job-1", b"{}", False, remaining_s, HASTE)

    return asyncio.run(go())


# --- the SDK that it was written for ---


@pytest.mark.parametrize("name", RELIED_ON)
def test_the_sdks_code_is_the_one_that_was_read(name: str) -> None:
    code, known = RELIED_ON[name]

    assert hashlib.sha256(inspect.getsource(code).encode()).hexdigest()[:16] == known


def test_another_version_of_the_sdk_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runpod, "__version__", "1.13.0")

    with pytest.raises(ModelLoadError, match=r"runpod: version 1\.12\.x is needed, 1\.13\.0 is"):
        runpod_loop.install(lambda: None, lambda *_: None, 20)


# --- the end of a worker ---


@pytest.fixture
def closed() -> list[str]:
    return []


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch, closed: list[str]) -> Loop:
    """A loop that nobody runs, whose grace is over at once; `closed` tells when it was closed."""
    monkeypatch.setattr(rp_job, "send_result", rp_job.send_result)
    return Loop({}, lambda: closed.append("closed"), lambda *_: None, grace_s=0)


def test_a_worker_that_is_being_replaced_still_hears_sigterm(loop: Loop, closed: list[str]) -> None:
    loop.kill_worker()

    loop.handle_shutdown(signal.SIGTERM, None)
    loop.handle_shutdown(signal.SIGTERM, None)

    assert closed == ["closed"]


def test_the_grace_of_results_begins_with_the_signal_and_not_with_the_replacement(
    loop: Loop,
) -> None:
    loop.kill_worker()
    before = loop._left()()
    loop.handle_shutdown(signal.SIGTERM, None)

    assert (before > 0, loop._left()() > 0) == (True, False)


# --- results ---


@pytest.mark.parametrize("step", [503, 500, 429, 408, "reset"])
def test_a_result_is_posted_again_until_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, step: int | str
) -> None:
    with Done() as platform:
        platform.script([step] * 6)

        assert post(platform.url, monkeypatch) is None
    assert len(platform.posts) == 7


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_a_refusal_that_no_other_try_would_change_is_final(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    with Done() as platform:
        platform.script([status])

        assert post(platform.url, monkeypatch) == f"HTTP {status}"
    assert len(platform.posts) == 1


def test_a_result_is_given_up_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([1.0, 1.0, 0.0])
    with Done() as platform:
        platform.script([503] * 9)

        assert post(platform.url, monkeypatch, lambda: next(left)) == "HTTP 503"
    assert len(platform.posts) == 3


def test_a_result_is_posted_once_though_no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with Done() as platform:
        assert post(platform.url, monkeypatch, lambda: -5.0) is None
    assert len(platform.posts) == 1


# --- outages ---


def waits(errors: Iterable[Exception]) -> list[float]:
    outage = Outage("jobs")
    return [outage.failed(error) for error in errors]


def test_the_waits_of_an_outage_grow_to_half_a_minute() -> None:
    found = waits([ClientConnectionError()] * 9)

    assert found[:4] == pytest.approx([0.5, 1, 2, 4], rel=0.25)
    assert found[-1] == 30


def test_an_outage_is_told_once_and_its_end_once(caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_heartbeat_that_fails_is_told_once_until_one_arrives(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = runpod_loop.OneLineAnOutage()

    for _ in range(3):
        log.error("Ping Request Error: refused")
    log.debug("Heartbeat Sent")
    log.error("Ping Request Error: refused")

    assert capsys.readouterr().out.count("Ping Request Error") == 2
