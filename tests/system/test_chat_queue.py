"""Chat with the loop of RunPod's SDK: many jobs at once, streams, and cancelled jobs."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import requests

from ourvidz_serverless.models.chat.loader import POCKET
from ourvidz_serverless.serving.runpod_queue import make_stream_handler
from ourvidz_serverless.settings import Settings
from tests.fakes import slow_handler
from tests.fakes.fake_chat import EndlessChat
from tests.fakes.local_worker import LocalWorker, chat_payload, sdxl_payload
from tests.fakes.slow_handler import Slowdown
from tests.fakes.tiny_chat import tiny_folder
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.handler import LOCAL_API, failure, run_handler, served_at, start
from tests.servers.runpod import Platform
from tests.servers.supabase import CallbackReceiver
from tests.servers.worker_process import WorkerProcess

#: A long reply: the greedy model never ends it. It takes minutes with the slowdown on.
LONG = {"max_tokens": 1200, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def slowdown(tmp_path_factory: pytest.TempPathFactory) -> Slowdown:
    return Slowdown(tmp_path_factory.mktemp("slowdown") / "slowdown")


@pytest.fixture(scope="module")
def receiver() -> Iterator[CallbackReceiver]:
    with CallbackReceiver() as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def worker(
    platform: Platform, slowdown: Slowdown, receiver: CallbackReceiver, outputs: Path, model: str
) -> Iterator[WorkerProcess]:
    env = {
        "FAMILIES": "chat",
        "CHAT_INSTRUCT_MODEL": model,
        "STORAGE_URL": f"file:{outputs}",
        "CALLBACK_URL": receiver.callback_url,
        "JOB_CALLBACK_SECRET": receiver.secret,
    }
    with slow_handler.start(platform, slowdown, **env) as process:
        yield process


def document(platform: Platform, job: str) -> dict[str, Any]:
    last: dict[str, Any] = platform.result(job)["output"][-1]
    return last


def test_a_completed_chat_job_has_its_reply(platform: Platform) -> None:
    job = platform.submit(chat_payload(id="answered"))

    result = document(platform, job)

    assert platform.status(job)["status"] == "COMPLETED"
    assert platform.stream(job) == platform.status(job)["output"] == [result]
    assert unquote(result["assets"][0]["url"].split(",", 1)[1]) == result["response"]


def test_a_stream_has_deltas_and_then_the_document(platform: Platform) -> None:
    job = platform.submit(chat_payload(id="streamed", stream=True, max_tokens=200))

    result = document(platform, job)

    *deltas, last = platform.stream(job)
    assert "".join(item["delta"] for item in deltas) == result["response"]
    assert last == result
    assert platform.status(job)["output"] == [*deltas, last]
    assert [update.is_stream for update in platform.updates(job)] == [True]


def test_a_stream_can_be_read_while_its_job_runs(platform: Platform, slowdown: Slowdown) -> None:
    with slowdown.on():
        job = platform.submit(chat_payload(id="growing", stream=True, **LONG))

        platform.wait_until(lambda: len(platform.stream(job)) > 3)

        assert platform.status(job)["status"] == "IN_PROGRESS"
    assert document(platform, job)["usage"]["completion_tokens"] > 0


def test_the_callback_of_a_streamed_job_holds_its_document(
    platform: Platform, receiver: CallbackReceiver
) -> None:
    job = platform.submit(chat_payload(id="called-back", stream=True))

    result = document(platform, job)

    (callback,) = [each for each in receiver.received if each.document["job_id"] == "called-back"]
    assert callback.document == result


def test_a_refused_chat_job_fails_on_runpod_with_an_error_in_json(platform: Platform) -> None:
    job = platform.submit(chat_payload(temperature=9))

    platform.result(job)

    assert platform.status(job)["status"] == "FAILED"
    assert failure(platform.status(job))["message"].startswith("temperature: ")
    assert platform.stream(job)[-1]["failure"] == failure(platform.status(job))


def test_fifty_jobs_at_once_get_the_replies_that_each_gets_alone(platform: Platform) -> None:
    def payload(name: str, i: int) -> dict[str, Any]:
        messages = [
            {"role": "system", "content": "You write letters. " * 10},
            {"role": "user", "content": f"Number {i}. " * (1 + i % 5)},
        ]
        return chat_payload(id=f"{name}-{i}", messages=messages, temperature=0, max_tokens=20)

    at_once = [platform.submit(payload("crowd", i)) for i in range(50)]
    crowd = [document(platform, job)["response"] for job in at_once]

    for i in range(0, 50, 10):
        alone = document(platform, platform.submit(payload("alone", i)))
        assert alone["response"] == crowd[i]
    assert len(set(crowd)) > 10


@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_chat_job_ends_and_the_next_one_is_answered(
    platform: Platform, worker: WorkerProcess, slowdown: Slowdown, outputs: Path, stream: bool
) -> None:
    name = f"cancelled-{stream}"
    with slowdown.on():
        job = platform.submit(chat_payload(id=name, stream=stream, **LONG))
        worker.wait_for_log(f"({name})")
        platform.cancel(job)

        log = worker.wait_for_log(f"({name}) CANCELLED")

    assert platform.status(job)["status"] == "CANCELLED"
    assert not (outputs / f"user-1/{name}").exists()
    assert "Traceback" not in log
    assert document(platform, platform.submit(chat_payload(id=f"after-{name}")))


def test_a_cancel_while_the_sdk_posts_a_delta_stops_the_job(tmp_path: Path) -> None:
    endless, settings = EndlessChat(), Settings(families=("chat",))
    worker = LocalWorker(tmp_path, settings=settings, models={"chat": endless}).worker

    async def cancel_in_a_post() -> bool:
        # The SDK keeps a reference to the generator, so Python does not close it.
        event = {"id": "rp-1", "input": chat_payload(stream=True)}
        items = make_stream_handler(worker, settings)(event)
        posting = asyncio.Event()

        async def sdk() -> None:
            async for _ in items:
                posting.set()
                await asyncio.Event().wait()

        job = asyncio.create_task(sdk())
        await asyncio.wait_for(posting.wait(), PATIENCE_S)
        job.cancel()
        is_stopped = await asyncio.to_thread(endless.stopped.wait, PATIENCE_S)
        await items.aclose()
        return is_stopped

    assert asyncio.run(cancel_in_a_post())


def test_no_text_of_a_conversation_is_logged(platform: Platform, worker: WorkerProcess) -> None:
    messages = [{"role": "user", "content": "an unmistakable zebra"}]
    reply = document(platform, platform.submit(chat_payload(id="quiet", messages=messages)))

    assert "zebra" not in worker.log
    assert reply["response"] not in worker.log


def test_after_sigterm_a_reply_may_finish_within_the_grace_time(tmp_path: Path, model: str) -> None:
    env = {"FAMILIES": "chat", "CHAT_INSTRUCT_MODEL": model, "STORAGE_URL": f"file:{tmp_path}"}
    slowdown = Slowdown(tmp_path / "slowdown")
    with (
        Platform() as own,
        slow_handler.start(own, slowdown, SHUTDOWN_GRACE_S="600", **env) as process,
    ):
        with slowdown.on():
            job = own.submit(chat_payload(stream=True, **LONG))
            own.wait_until(lambda: own.stream(job))
            process.terminate()
            process.wait_for_log("shutting down")

        assert document(own, job)["status"] == "completed"
        assert process.wait() == 0


def test_one_worker_serves_images_and_chat(tmp_path: Path, model: str) -> None:
    env = {"FAMILIES": "sdxl,chat", "CHAT_INSTRUCT_MODEL": model, "STORAGE_URL": f"file:{tmp_path}"}
    with Platform() as own, start(own, **env):
        picture = own.submit(sdxl_payload(id="picture"))
        reply = own.submit(chat_payload(id="reply"))

        types = [document(own, job)["assets"][0]["type"] for job in (picture, reply)]

    assert types == ["image", "text"]
    assert own.updates(picture)[-1].terminal


# --- without RunPod ---


@pytest.mark.parametrize("stream", [True, False])
def test_the_handler_prints_the_answer_of_its_test_input(
    tmp_path: Path, model: str, stream: bool
) -> None:
    payload = json.dumps({"input": chat_payload(stream=stream, temperature=0)})
    env = {"FAMILIES": "chat", "CHAT_INSTRUCT_MODEL": model, "STORAGE_URL": f"file:{tmp_path}"}

    run = run_handler("--test_input", payload, **env)

    assert run.returncode == 0, run.stderr
    plain = json.loads(run_handler("--test_input", payload, **env, VERBOSE="1").stdout)
    assert run.stdout == plain["response"] + "\n"


def test_the_local_api_streams_a_chat(tmp_path: Path, model: str) -> None:
    env = {"FAMILIES": "chat", "CHAT_INSTRUCT_MODEL": model, "STORAGE_URL": f"file:{tmp_path}"}
    with start(None, *LOCAL_API, **env) as process:
        url = served_at(process)
        job = requests.post(
            f"{url}/run", json={"input": chat_payload(stream=True)}, timeout=PATIENCE_S
        )
        answer = requests.post(f"{url}/stream/{job.json()['id']}", timeout=PATIENCE_S).json()

    *deltas, last = [item["output"] for item in answer["stream"]]
    assert "".join(item["delta"] for item in deltas) == last["response"]


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("/no/such/model", "CHAT_INSTRUCT_MODEL: there is nothing at /no/such/model"),
        ("tests", "CHAT_INSTRUCT_MODEL: tests does not load as chat"),
    ],
)
def test_a_start_without_a_chat_model_exits_with_one_line(place: str, line: str) -> None:
    run = run_handler(FAMILIES="chat", CHAT_INSTRUCT_MODEL=place)

    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith(f"cannot start: {line}")
    assert "Traceback" not in run.stderr


# --- the pocket model ---


@pytest.mark.slow
@pytest.mark.skipif(not POCKET.exists(), reason="`make chat` builds the pocket model")
def test_the_pocket_model_answers_the_test_input_in_english(tmp_path: Path) -> None:
    payload = (ROOT / "test_input.chat.json").read_text()

    run = run_handler("--test_input", payload, FAMILIES="chat", STORAGE_URL=f"file:{tmp_path}")

    assert run.returncode == 0, run.stderr
    assert "sky" in run.stdout.lower() and "light" in run.stdout.lower()
