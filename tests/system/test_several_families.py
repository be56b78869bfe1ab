"""Pictures and chats on one worker, behind RunPod's own loop and behind HTTP."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ourvidz_serverless.settings import Settings
from tests.fakes.fake_chat import FakeChat
from tests.fakes.local_worker import LocalWorker, chat_payload, sdxl_payload
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.http_service import ServedHttp
from tests.servers.runpod import Platform
from tests.servers.worker_process import WorkerProcess

#: Pictures that the worker holds: two at work, and three that wait.
HELD = 5


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file exists, no picture is finished."""
    return tmp_path_factory.mktemp("hold") / "hold"


@pytest.fixture(scope="module", autouse=True)
def worker(platform: Platform, hold: Path) -> Iterator[WorkerProcess]:
    env = {
        "HOLD": str(hold),
        "FAMILIES": "sdxl,chat",
        "STORAGE_URL": f"file:{hold.parent / 'assets'}",
        "QUEUE_BACKLOG": "3",
    }
    args = ["tests.fakes.fake_handler"]
    with WorkerProcess(platform, "-m", args=args, env=env, cwd=ROOT) as process:
        yield process


@pytest.fixture(autouse=True)
def held(hold: Path) -> Iterator[None]:
    hold.touch()
    yield
    hold.unlink(missing_ok=True)


def submit_pictures(platform: Platform, name: str, count: int) -> list[str]:
    """Pictures, each behind the one before, which the worker has by then or will not take."""
    jobs: list[str] = []
    for number in range(count):
        payload = sdxl_payload(id=f"{name}-{number}")
        jobs.append(platform.submit(payload, id=payload["id"]))
        if number < HELD:
            platform.wait_for_updates(jobs[-1])
    return jobs


def finish(platform: Platform, hold: Path, jobs: list[str]) -> list[str]:
    """Let the pictures be painted; how each ended."""
    hold.unlink()
    return [platform.result(job)["output"][-1]["status"] for job in jobs]


def stage(platform: Platform, job: str) -> object:
    """The stage that a job last reported, or how it ended."""
    document = platform.updates(job)[-1].document
    return document["output"]["stage"] if document.get("status") == "IN_PROGRESS" else document


def test_a_chat_behind_pictures_is_answered_while_they_wait(platform: Platform, hold: Path) -> None:
    pictures = submit_pictures(platform, "ahead", HELD - 1)

    asked = platform.submit(chat_payload(id="asked"))

    assert platform.result(asked)["output"][-1]["response"] == "Water."
    assert [stage(platform, job) for job in pictures] == ["generate", *["wait"] * 3]
    assert finish(platform, hold, pictures) == ["completed"] * (HELD - 1)


def test_a_picture_that_waits_is_cancelled_while_another_computes(
    platform: Platform, hold: Path, worker: WorkerProcess
) -> None:
    pictures = submit_pictures(platform, "waits", 4)

    platform.cancel(pictures[3])

    worker.wait_for_log(f"({pictures[3]}) CANCELLED")
    assert [stage(platform, job) for job in pictures[:3]] == ["generate", "wait", "wait"]
    assert finish(platform, hold, pictures[:3]) == ["completed"] * 3


def test_pictures_that_the_worker_may_not_hold_stay_in_the_platforms_queue(
    platform: Platform, hold: Path
) -> None:
    pictures = submit_pictures(platform, "many", HELD + 2)
    states = [platform.status(job)["status"] for job in pictures]
    assert states == ["IN_PROGRESS"] * HELD + ["IN_QUEUE"] * 2

    platform.cancel(pictures[3])

    platform.wait_for_updates(pictures[HELD])
    assert platform.status(pictures[HELD + 1])["status"] == "IN_QUEUE"
    del pictures[3]
    assert finish(platform, hold, pictures) == ["completed"] * len(pictures)


# --- over HTTP ---


def test_a_chat_over_http_has_a_thread_though_every_place_for_pictures_is_taken(
    tmp_path: Path,
) -> None:
    settings = Settings(families=("sdxl", "chat"), concurrency=1, http_backlog=2)
    local = LocalWorker(tmp_path, settings=settings, models={"chat": FakeChat("Water.")})
    local.models["sdxl"] = local.fake_sdxl
    local.fake_sdxl.hold()
    with ServedHttp(settings, local.worker) as service:
        pictures = [{"input": sdxl_payload(id=f"picture-{i}")} for i in range(4)]
        taken = [service.post("/jobs", picture).status_code for picture in pictures]
        assert local.fake_sdxl.at_step.wait(PATIENCE_S)

        answer = service.post("/chat", chat_payload(id="asked"))

        assert taken == [202, 202, 202, 429]
        assert (answer.status_code, answer.json()["response"]) == (200, "Water.")
        local.fake_sdxl.go_on.set()
