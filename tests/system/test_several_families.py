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

#: The number of pictures that the worker takes: two that are prepared or computed, three that wait.
MAX_TAKEN = 5


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a file. While it exists, no step of a picture ends."""
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
    """Submit pictures one by one. The worker has taken each, up to its limit, before the next."""
    jobs: list[str] = []
    for number in range(count):
        payload = sdxl_payload(id=f"{name}-{number}")
        jobs.append(platform.submit(payload, id=payload["id"]))
        if number < MAX_TAKEN:
            platform.wait_for_updates(jobs[-1])
    return jobs


def finish(platform: Platform, hold: Path, jobs: list[str]) -> list[str]:
    """Let the pictures complete, and return their statuses."""
    hold.unlink()
    return [platform.result(job)["output"][-1]["status"] for job in jobs]


def stage(platform: Platform, job: str) -> object:
    """The last reported stage of a job, or its document if it has ended."""
    document = platform.updates(job)[-1].document
    return document["output"]["stage"] if document.get("status") == "IN_PROGRESS" else document


def test_a_chat_is_answered_while_earlier_pictures_wait(platform: Platform, hold: Path) -> None:
    pictures = submit_pictures(platform, "earlier", MAX_TAKEN - 1)

    chat = platform.submit(chat_payload(id="chat"))

    assert platform.result(chat)["output"][-1]["response"] == "Water."
    assert [stage(platform, job) for job in pictures] == ["generate", *["wait"] * 3]
    assert finish(platform, hold, pictures) == ["completed"] * (MAX_TAKEN - 1)


def test_a_waiting_picture_is_cancelled_while_another_computes(
    platform: Platform, hold: Path, worker: WorkerProcess
) -> None:
    pictures = submit_pictures(platform, "waits", 4)

    platform.cancel(pictures[3])

    worker.wait_for_log(f"({pictures[3]}) CANCELLED")
    assert [stage(platform, job) for job in pictures[:3]] == ["generate", "wait", "wait"]
    assert finish(platform, hold, pictures[:3]) == ["completed"] * 3


def test_pictures_beyond_the_workers_backlog_stay_in_the_platforms_queue(
    platform: Platform, hold: Path
) -> None:
    pictures = submit_pictures(platform, "many", MAX_TAKEN + 2)
    states = [platform.status(job)["status"] for job in pictures]
    assert states == ["IN_PROGRESS"] * MAX_TAKEN + ["IN_QUEUE"] * 2

    platform.cancel(pictures[3])

    platform.wait_for_updates(pictures[MAX_TAKEN])
    assert platform.status(pictures[MAX_TAKEN + 1])["status"] == "IN_QUEUE"
    del pictures[3]
    assert finish(platform, hold, pictures) == ["completed"] * len(pictures)


# --- over HTTP ---


def test_a_chat_over_http_is_answered_though_every_place_for_pictures_is_taken(
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

        answer = service.post("/chat", chat_payload(id="chat"))

        assert taken == [202, 202, 202, 429]
        assert (answer.status_code, answer.json()["response"]) == (200, "Water.")
        local.fake_sdxl.go_on.set()
