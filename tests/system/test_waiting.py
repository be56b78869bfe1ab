"""Jobs of several families in one worker: which of them wait for the device, and for how long."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ourvidz_serverless.context import Stop
from ourvidz_serverless.document import Document
from ourvidz_serverless.guard import fair_semaphore
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.settings import Settings
from tests.fakes.clock import Clock
from tests.fakes.fake_chat import FakeChat
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import LocalWorker, chat_payload, sdxl_payload
from tests.patience import PATIENCE_S, start, wait_until

BOTH = {"families": ("sdxl", "chat")}


class TimedSdxl(FakeSdxl):
    """A `FakeSdxl` that advances the worker's clock by a second for each picture."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def generate(
        self, request: ImageRequest, progress: Progress
    ) -> Generator[np.ndarray, None, None]:
        for picture in super().generate(request, progress):
            self.clock.advance(1)
            yield picture


class Crowd:
    """A worker for pictures and chat whose SDXL is held, and jobs that arrive one by one."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.clock = Clock()
        fake_sdxl, fake_chat = TimedSdxl(self.clock), FakeChat("Water.")
        self.local = LocalWorker(
            root,
            settings=Settings(**BOTH, **settings),
            fake_sdxl=fake_sdxl,
            models={"sdxl": fake_sdxl, "chat": fake_chat},
            clock=self.clock,
        )
        self.stops: list[Stop] = []
        self.progress: list[list[Any]] = []
        fake_sdxl.hold()

    def picture(self, **changes: Any) -> Future[Document]:
        """Run a job of one picture. Returns once it is held at its first step, or waits."""
        number = len(self.stops)
        payload = sdxl_payload(id=f"job-{number}", config={"seed": number}, **changes)
        stop, progress = Stop(), list[Any]()
        self.stops.append(stop)
        self.progress.append(progress)
        event = {"id": f"rp-{number}", "input": payload}
        running = start(self.local.worker.run, Envelope.of(event), stop, progress.append)
        if number == 0:
            assert self.local.fake_sdxl.at_step.wait(PATIENCE_S)
        else:
            wait_until(lambda: progress or running.done())
        return running

    def pictures(self, count: int) -> list[Future[Document]]:
        return [self.picture() for _ in range(count)]

    @property
    def started(self) -> list[int]:
        """The numbers of the pictures, in the order in which they started."""
        return [request.seeds[0] for request in self.local.fake_sdxl.requests]

    def release(self) -> None:
        self.local.fake_sdxl.go_on.set()


@pytest.fixture
def make_crowd(tmp_path: Path) -> Iterator[Callable[..., Crowd]]:
    crowds: list[Crowd] = []

    def make(**settings: Any) -> Crowd:
        crowds.append(Crowd(tmp_path, **settings))
        return crowds[-1]

    yield make
    for each in crowds:
        each.release()


def failure(running: Future[Document]) -> tuple[str, str]:
    found = running.result(PATIENCE_S).failure
    assert found
    return found.code, found.message


def test_twenty_pictures_complete_in_order_though_they_wait_longer_than_their_timeout(
    make_crowd: Callable[..., Crowd],
) -> None:
    # With one place no job overtakes another while that one is prepared.
    crowd = make_crowd(concurrency=1, job_timeout_s=5)
    running = crowd.pictures(20)

    crowd.release()

    assert [each.result(PATIENCE_S).status for each in running] == ["completed"] * 20
    assert crowd.started == list(range(20))


def test_one_picture_of_many_computes_at_a_time(make_crowd: Callable[..., Crowd]) -> None:
    crowd = make_crowd()
    running = crowd.pictures(20)

    crowd.release()

    assert [each.result(PATIENCE_S).status for each in running] == ["completed"] * 20
    assert crowd.local.fake_sdxl.most_at_once == 1


def test_chat_is_answered_while_pictures_wait(make_crowd: Callable[..., Crowd]) -> None:
    crowd = make_crowd()
    running = crowd.pictures(20)

    assert crowd.local.run(chat_payload(id="chat"), Stop()).status == "completed"
    assert not any(each.done() for each in running)


def test_a_job_that_waits_too_long_for_the_device_fails_and_says_so(
    make_crowd: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_semaphore, "TICK_S", 0.01)
    crowd = make_crowd(job_timeout_s=1000, device_wait_s=30)
    _, *waiting = crowd.pictures(4)

    crowd.clock.advance(31)

    assert [failure(each) for each in waiting] == [
        ("TIMEOUT_ERROR", "the job waited 31 s for the device")
    ] * 3
    assert crowd.started == [0]


def test_a_waiting_job_fails_at_its_own_execution_timeout(
    tmp_path: Path, make_crowd: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_semaphore, "TICK_S", 0.01)
    crowd = make_crowd()
    crowd.pictures(1)
    event = {"input": sdxl_payload(id="short"), "policy": {"executionTimeout": 60_000}}
    progress: list[Any] = []
    running = start(crowd.local.worker.run, Envelope.of(event), Stop(), progress.append)
    wait_until(lambda: progress)
    crowd.clock.advance(54)

    assert failure(running) == (
        "TIMEOUT_ERROR",
        "the job waited 54 s for the device, and its 54 seconds are over",
    )


def test_a_waiting_job_is_cancelled_at_once_and_frees_its_place(
    make_crowd: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_semaphore, "TICK_S", 10 * PATIENCE_S)
    crowd = make_crowd()
    running = crowd.pictures(5)

    crowd.stops[2].set()

    assert failure(running[2])[0] == "CANCELLED"
    wait_until(lambda: crowd.progress[4][-1]["step"] == 1)
    crowd.release()
    assert [each.result(PATIENCE_S).status for each in running].count("completed") == 4
    assert sorted(crowd.started) == [0, 1, 3, 4]


def test_a_waiting_job_reports_how_many_jobs_are_before_it(
    make_crowd: Callable[..., Crowd],
) -> None:
    crowd = make_crowd()

    crowd.pictures(5)

    assert crowd.progress[4] == [{"stage": "wait", "step": 0, "steps": 3, "progress": 0.0}]


def test_a_waiting_job_has_fetched_no_references_yet(make_crowd: Callable[..., Crowd]) -> None:
    crowd = make_crowd()
    fetched: list[str] = []
    fetch = crowd.local.files.references

    def record_fetch(job: Any, context: Any) -> Any:
        fetched.append(job.id)
        return fetch(job, context)

    crowd.local.files.references = record_fetch

    running = crowd.pictures(6)

    assert fetched == ["job-0", "job-1"]
    crowd.release()
    for each in running:
        each.result(PATIENCE_S)
    assert len(fetched) == 6
