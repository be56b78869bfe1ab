"""Jobs of several families in one worker: who waits for the device, and for how long."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from tests.fakes.tiny_chat import until
from tests.patience import PATIENCE_S

BOTH = {"families": ("sdxl", "chat")}


class TimedPainter(FakeSdxl):
    """A `FakeSdxl` whose pictures take a second each of the worker's clock."""

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
    """A worker for pictures and chat whose SDXL is held, and jobs that come one by one."""

    def __init__(self, root: Path, threads: ThreadPoolExecutor, **settings: Any) -> None:
        self.clock, self._threads = Clock(), threads
        fake_sdxl, fake_chat = TimedPainter(self.clock), FakeChat("Water.")
        self.at = LocalWorker(
            root,
            settings=Settings(**BOTH, **settings),
            fake_sdxl=fake_sdxl,
            models={"sdxl": fake_sdxl, "chat": fake_chat},
            clock=self.clock,
        )
        self.stops: list[Stop] = []
        self.told: list[list[Any]] = []
        fake_sdxl.hold()

    def picture(self, **changes: Any) -> Future[Document]:
        """Have a picture painted; returns once it is held at its first step, or waits."""
        number = len(self.stops)
        payload = sdxl_payload(id=f"job-{number}", config={"seed": number}, **changes)
        stop, told = Stop(), list[Any]()
        self.stops.append(stop)
        self.told.append(told)
        event = {"id": f"rp-{number}", "input": payload}
        running = self._threads.submit(self.at.worker.run, Envelope.of(event), stop, told.append)
        if number == 0:
            assert self.at.fake_sdxl.at_step.wait(PATIENCE_S)
        else:
            until(lambda: bool(told) or running.done())
        return running

    def pictures(self, count: int) -> list[Future[Document]]:
        return [self.picture() for _ in range(count)]

    @property
    def painted(self) -> list[int]:
        """The numbers of the pictures in the order in which they were begun."""
        return [request.seeds[0] for request in self.at.fake_sdxl.requests]

    def end(self) -> None:
        self.at.fake_sdxl.go_on.set()


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[Callable[..., Crowd]]:
    made: list[Crowd] = []
    with ThreadPoolExecutor(32) as threads:

        def make(**settings: Any) -> Crowd:
            made.append(Crowd(tmp_path, threads, **settings))
            return made[-1]

        yield make
        for each in made:
            each.end()


def failure(running: Future[Document]) -> tuple[str, str]:
    found = running.result(PATIENCE_S).failure
    assert found
    return found.code, found.message


def test_twenty_pictures_of_a_second_end_well_and_in_order_though_each_has_five_seconds(
    crowd: Callable[..., Crowd],
) -> None:
    # With one place none overtakes another that prepares.
    at = crowd(concurrency=1, job_timeout_s=5)
    running = at.pictures(20)

    at.end()

    assert [each.result(PATIENCE_S).status for each in running] == ["completed"] * 20
    assert at.painted == list(range(20))


def test_of_many_pictures_one_computes_at_a_time(crowd: Callable[..., Crowd]) -> None:
    at = crowd()
    running = at.pictures(20)

    at.end()

    assert [each.result(PATIENCE_S).status for each in running] == ["completed"] * 20
    assert at.at.fake_sdxl.most_at_once == 1


def test_chat_is_answered_while_pictures_wait(crowd: Callable[..., Crowd]) -> None:
    at = crowd()
    running = at.pictures(20)

    assert at.at.run(chat_payload(id="asks"), Stop()).status == "completed"
    assert not any(each.done() for each in running)


def test_a_wait_that_is_too_long_says_that_it_was_one(
    crowd: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_semaphore, "TICK_S", 0.01)
    at = crowd(job_timeout_s=1000, device_wait_s=30)
    _, *waiting = at.pictures(4)

    at.clock.advance(31)

    assert [failure(each) for each in waiting] == [
        ("TIMEOUT_ERROR", "the job waited 31 s for the device")
    ] * 3
    assert at.painted == [0]


def test_a_job_that_waits_does_not_outlast_its_own_execution_timeout(
    tmp_path: Path, crowd: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_semaphore, "TICK_S", 0.01)
    at = crowd()
    at.pictures(1)
    event = {"input": sdxl_payload(id="short"), "policy": {"executionTimeout": 60_000}}
    told: list[Any] = []
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(at.at.worker.run, Envelope.of(event), Stop(), told.append)
        until(lambda: bool(told))
        at.clock.advance(54)

        assert failure(running) == (
            "TIMEOUT_ERROR",
            "the job waited 54 s for the device, and its 54 seconds are over",
        )


def test_a_job_that_waits_is_cancelled_at_once_and_leaves_its_place_to_the_next(
    crowd: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_semaphore, "TICK_S", 10 * PATIENCE_S)
    at = crowd()
    running = at.pictures(5)

    at.stops[2].set()

    assert failure(running[2])[0] == "CANCELLED"
    until(lambda: at.told[4][-1]["step"] == 1)
    at.end()
    assert [each.result(PATIENCE_S).status for each in running].count("completed") == 4
    assert sorted(at.painted) == [0, 1, 3, 4]


def test_a_job_that_waits_reports_how_many_go_first(crowd: Callable[..., Crowd]) -> None:
    at = crowd()

    at.pictures(5)

    assert at.told[4] == [{"stage": "wait", "step": 0, "steps": 3, "progress": 0.0}]


def test_what_waits_has_fetched_nothing_yet(crowd: Callable[..., Crowd]) -> None:
    at = crowd()
    fetched: list[str] = []
    fetch = at.at.files.references
    at.at.files.references = lambda job, context: (fetched.append(job.id), fetch(job, context))[1]

    running = at.pictures(6)

    assert fetched == ["job-0", "job-1"]
    at.end()
    for each in running:
        each.result(PATIENCE_S)
    assert len(fetched) == 6
