"""Two models in one place: swapped on demand, never in the middle of a request."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.models.residency import Residency
from tests.support.chatbox import tiny_pair

MESSAGES = [("user", "Hello")]


class Guest:
    """A model that remembers where it is, and may not be moved while it is used."""

    def __init__(self) -> None:
        self.is_there = False
        self.arrivals = 0
        self.users = 0

    def arrive(self) -> None:
        self.is_there, self.arrivals = True, self.arrivals + 1

    def leave(self) -> None:
        assert self.users == 0
        self.is_there = False


@pytest.fixture
def guests() -> tuple[Guest, Guest]:
    return Guest(), Guest()


def test_a_model_stays_until_another_wants_its_place(guests: tuple[Guest, Guest]) -> None:
    residency, (one, other) = Residency(1), guests

    for model in (one, one, other, one):
        residency.take(model)
        residency.give_back(model)

    assert (one.arrivals, other.arrivals) == (2, 1)
    assert (one.is_there, other.is_there) == (True, False)


def test_where_there_is_a_place_for_each_nothing_is_swapped(guests: tuple[Guest, Guest]) -> None:
    residency, (one, other) = Residency(2), guests

    for model in (one, other, one, other):
        residency.take(model)

    assert (one.arrivals, other.arrivals) == (1, 1)


def test_whoever_waits_for_a_swap_can_be_cancelled(guests: tuple[Guest, Guest]) -> None:
    residency, (one, other) = Residency(1), guests
    residency.take(one)

    def check() -> None:
        raise Cancelled("the job was cancelled")

    with pytest.raises(Cancelled):
        residency.take(other, check)

    assert not residency.take(one)


def test_nobody_overtakes_a_request_that_waits(guests: tuple[Guest, Guest]) -> None:
    residency, (one, other) = Residency(1), guests
    residency.take(one)
    order: list[str] = []

    def visit(name: str, model: Guest) -> None:
        residency.take(model)
        order.append(name)
        residency.give_back(model)

    waiting = threading.Thread(target=visit, args=("other", other))
    later = threading.Thread(target=visit, args=("one", one))
    for thread in (waiting, later):
        thread.start()
        time.sleep(0.1)
    residency.give_back(one)
    for thread in (waiting, later):
        thread.join(5)

    assert order == ["other", "one"]


def test_no_model_moves_while_it_is_used(guests: tuple[Guest, Guest]) -> None:
    residency, lock = Residency(1), threading.Lock()

    def visit(turn: int) -> None:
        model = guests[turn % 3 == 0]
        residency.take(model)
        with lock:
            model.users += 1
        assert model.is_there
        time.sleep(0.001)
        with lock:
            model.users -= 1
        residency.give_back(model)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(visit, range(60)))


def reply(chat: Any, model: str) -> tuple[str, float]:
    generation = chat.generate(messages=MESSAGES, model=model, max_tokens=20, temperature=0)
    return "".join(generation), generation.swap_s


def test_two_models_in_one_place_say_what_they_say_in_two() -> None:
    wide, narrow = tiny_pair(places=2), tiny_pair(places=1)
    turns = ["qwen_instruct", "qwen_base", "qwen_base", "qwen_instruct"] * 3
    expected = [reply(wide, model)[0] for model in turns]

    with ThreadPoolExecutor(len(turns)) as threads:
        at_once = list(threads.map(lambda model: reply(narrow, model)[0], turns))

    assert at_once == expected
    assert len(set(expected)) == 2


def test_a_swap_is_reported() -> None:
    chat = tiny_pair(places=1)
    swaps = [reply(chat, model)[1] > 0 for model in ("qwen_base", "qwen_base", "qwen_instruct")]

    assert swaps == [True, False, True]
