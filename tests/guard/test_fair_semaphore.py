"""The fair semaphore: who gets a place, and how a wait ends."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from ourvidz_serverless.context import Stop
from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.guard import fair_semaphore
from ourvidz_serverless.guard.fair_semaphore import FairSemaphore
from tests.fakes.tiny_chat import until
from tests.patience import PATIENCE_S


class Queue:
    """Threads that wait for places of a semaphore, and what each was told while it waited."""

    def __init__(self, places: int, threads: ThreadPoolExecutor) -> None:
        self.semaphore, self._threads = FairSemaphore(places), threads
        self.stops: dict[str, Stop] = {}
        self.told: dict[str, list[int]] = {}
        self.entered: list[str] = []

    def join(self, name: str, arrival: int | None = None) -> Future[None]:
        """Have a thread wait for a place; it returns once it waits, or has one."""
        number = 100 + len(self.stops) if arrival is None else arrival
        stop, told = Stop(), list[int]()
        self.stops[name], self.told[name] = stop, told

        def hear(ahead: int) -> None:
            told.append(ahead)
            if stop.error:
                raise stop.error

        def wait() -> None:
            self.semaphore.acquire(number, stop, hear)
            self.entered.append(name)

        waiting = self._threads.submit(wait)
        until(lambda: bool(told) or waiting.done())
        return waiting


@pytest.fixture
def queue() -> Callable[[int], Queue]:
    threads = ThreadPoolExecutor(16)
    return lambda places: Queue(places, threads)


@pytest.fixture(autouse=True)
def no_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that nothing but an event ends a wait.
    monkeypatch.setattr(fair_semaphore, "TICK_S", 10 * PATIENCE_S)


def test_places_are_given_in_the_order_of_arrival(queue: Callable[[int], Queue]) -> None:
    line = queue(1)
    line.join("first").result(PATIENCE_S)
    names = [f"waits {i}" for i in range(8)]
    waiting = [line.join(name) for name in names]

    for each in waiting:
        line.semaphore.release()
        each.result(PATIENCE_S)

    assert line.entered == ["first", *names]


def test_who_arrived_earlier_goes_first_though_it_joined_later(
    queue: Callable[[int], Queue],
) -> None:
    line = queue(1)
    line.join("first").result(PATIENCE_S)
    late, early = line.join("late", arrival=9), line.join("early", arrival=8)

    for each in (early, late):
        line.semaphore.release()
        each.result(PATIENCE_S)

    assert line.entered == ["first", "early", "late"]


def test_who_waits_is_told_how_many_go_first_whenever_that_changes(
    queue: Callable[[int], Queue],
) -> None:
    line = queue(2)
    for name in ("a", "b"):
        line.join(name).result(PATIENCE_S)
    waiting = [line.join(name) for name in ("c", "d", "e")]

    for count, each in enumerate(waiting, 1):
        line.semaphore.release()
        each.result(PATIENCE_S)
        until(lambda count=count: len(line.told["e"]) == min(count + 1, 3))

    assert line.told["e"] == [3, 2, 1]


def test_a_stop_ends_a_wait_at_once_and_moves_up_who_stands_behind(
    queue: Callable[[int], Queue],
) -> None:
    line = queue(1)
    line.join("first").result(PATIENCE_S)
    stopped, behind = line.join("stopped"), line.join("behind")

    line.stops["stopped"].set()

    with pytest.raises(Cancelled):
        stopped.result(PATIENCE_S)
    until(lambda: line.told["behind"] == [2, 1])
    line.semaphore.release()
    behind.result(PATIENCE_S)
    assert line.entered == ["first", "behind"]


def test_a_stop_that_came_before_the_wait_is_heard(queue: Callable[[int], Queue]) -> None:
    line = queue(1)
    line.join("first").result(PATIENCE_S)
    stop = Stop()
    stop.set()

    def hear(ahead: int) -> None:
        assert stop.error
        raise stop.error

    with pytest.raises(Cancelled):
        line.semaphore.acquire(200, stop, hear)
    assert line.semaphore.num_waiting == 0


def test_no_more_places_are_held_than_there_are_whoever_is_stopped_meanwhile() -> None:
    semaphore, inside = FairSemaphore(3), threading.Semaphore(3)
    stops = [Stop() for _ in range(300)]

    def visit(arrival: int, stop: Stop) -> bool:
        def hear(ahead: int) -> None:
            if stop.error:
                raise stop.error

        try:
            semaphore.acquire(arrival, stop, hear)
        except Cancelled:
            return True
        has_room = inside.acquire(blocking=False)
        time.sleep(0.0005)  # long enough for whoever should not be here
        if has_room:
            inside.release()
        semaphore.release()
        return has_room

    with ThreadPoolExecutor(16) as threads:
        visits = [threads.submit(visit, i, stop) for i, stop in enumerate(stops)]
        for stop in random.Random(0).sample(stops, 100):
            stop.set()
        assert all(each.result(PATIENCE_S) for each in visits)

    def refuse(ahead: int) -> None:
        raise AssertionError(f"a place was lost: {ahead} go first")

    for arrival in range(3):
        semaphore.acquire(arrival, Stop(), refuse)
