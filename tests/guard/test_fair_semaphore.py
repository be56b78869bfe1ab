"""The fair semaphore gives places in order of arrival, and a stop ends a wait."""

import random
import threading
import time
from concurrent.futures import Future

import pytest

from ourvidz_serverless.context import Stop
from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.guard import fair_semaphore
from ourvidz_serverless.guard.fair_semaphore import FairSemaphore
from tests.fakes.tiny_chat import until
from tests.patience import PATIENCE_S, start


class Waiters:
    """Threads that wait for places of a semaphore, and what `on_wait` reported to each."""

    def __init__(self, places: int) -> None:
        self.semaphore = FairSemaphore(places)
        self.stops: dict[str, Stop] = {}
        self.reported: dict[str, list[int]] = {}
        self.served: list[str] = []

    def join(self, name: str, arrival: int | None = None) -> Future[None]:
        """Start a thread that takes a place. Returns once the thread waits, or has a place."""
        number = 100 + len(self.stops) if arrival is None else arrival
        stop, reported = Stop(), list[int]()
        self.stops[name], self.reported[name] = stop, reported

        def on_wait(ahead: int) -> None:
            reported.append(ahead)
            if stop.error:
                raise stop.error

        def wait() -> None:
            self.semaphore.acquire(number, stop, on_wait)
            self.served.append(name)

        waiting = start(wait)
        until(lambda: bool(reported) or waiting.done())
        return waiting


@pytest.fixture(autouse=True)
def no_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that only an event ends a wait.
    monkeypatch.setattr(fair_semaphore, "TICK_S", 10 * PATIENCE_S)


def test_places_are_given_in_order_of_arrival() -> None:
    waiters = Waiters(1)
    waiters.join("first").result(PATIENCE_S)
    names = [f"waits {i}" for i in range(8)]
    waiting = [waiters.join(name) for name in names]

    for each in waiting:
        waiters.semaphore.release()
        each.result(PATIENCE_S)

    assert waiters.served == ["first", *names]


def test_an_earlier_arrival_gets_the_place_before_one_that_waited_longer() -> None:
    waiters = Waiters(1)
    waiters.join("first").result(PATIENCE_S)
    late, early = waiters.join("late", arrival=9), waiters.join("early", arrival=8)

    for each in (early, late):
        waiters.semaphore.release()
        each.result(PATIENCE_S)

    assert waiters.served == ["first", "early", "late"]


def test_a_waiting_thread_gets_each_new_number_of_threads_ahead() -> None:
    waiters = Waiters(2)
    for name in ("a", "b"):
        waiters.join(name).result(PATIENCE_S)
    waiting = [waiters.join(name) for name in ("c", "d", "e")]

    for count, each in enumerate(waiting, 1):
        waiters.semaphore.release()
        each.result(PATIENCE_S)
        until(lambda count=count: len(waiters.reported["e"]) == min(count + 1, 3))

    assert waiters.reported["e"] == [3, 2, 1]


def test_a_stop_ends_a_wait_at_once_and_moves_the_next_thread_up() -> None:
    waiters = Waiters(1)
    waiters.join("first").result(PATIENCE_S)
    stopped, following = waiters.join("stopped"), waiters.join("next")

    waiters.stops["stopped"].set()

    with pytest.raises(Cancelled):
        stopped.result(PATIENCE_S)
    until(lambda: waiters.reported["next"] == [2, 1])
    waiters.semaphore.release()
    following.result(PATIENCE_S)
    assert waiters.served == ["first", "next"]


def test_a_stop_that_was_set_before_the_wait_ends_it() -> None:
    waiters = Waiters(1)
    waiters.join("first").result(PATIENCE_S)
    stop = Stop()
    stop.set()

    def on_wait(ahead: int) -> None:
        assert stop.error
        raise stop.error

    with pytest.raises(Cancelled):
        waiters.semaphore.acquire(200, stop, on_wait)
    assert waiters.semaphore.num_waiting == 0


def test_stops_during_waits_neither_lose_nor_add_a_place() -> None:
    semaphore, inside = FairSemaphore(3), threading.Semaphore(3)
    stops = [Stop() for _ in range(300)]

    def visit(arrival: int, stop: Stop) -> bool:
        def on_wait(ahead: int) -> None:
            if stop.error:
                raise stop.error

        try:
            semaphore.acquire(arrival, stop, on_wait)
        except Cancelled:
            return True
        has_place = inside.acquire(blocking=False)
        time.sleep(0.0005)  # long enough for a fourth thread to enter
        if has_place:
            inside.release()
        semaphore.release()
        return has_place

    # Sixteen threads take the visits from one list.
    visits = enumerate(stops)
    threads = [start(lambda: all(visit(*each) for each in visits)) for _ in range(16)]
    for stop in random.Random(0).sample(stops, 100):
        stop.set()
    assert all(each.result(PATIENCE_S) for each in threads)

    def refuse(ahead: int) -> None:
        raise AssertionError(f"a place was lost: {ahead} threads are ahead")

    for arrival in range(3):
        semaphore.acquire(arrival, Stop(), refuse)
