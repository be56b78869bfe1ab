"""Two models in one place: swapped on demand, never in the middle of a request."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.models.memory.ledger import Ledger
from tests.fakes.devices import Card, Parcel, card
from tests.fakes.tiny_chat import ask, tiny_pair
from tests.patience import PATIENCE_S


class Guest:
    """A model that remembers where it is, and may not be moved while it is used."""

    num_bytes = 1
    is_on_disk = False

    def __init__(self) -> None:
        self.is_there = False
        self.arrivals = 0
        self.users = 0

    def load(self) -> None: ...

    def to_device(self) -> None:
        self.is_there, self.arrivals = True, self.arrivals + 1

    def to_host(self) -> None:
        assert self.users == 0
        self.is_there = False

    def drop(self) -> None: ...


class House:
    """Two guests, and places for one or both."""

    def __init__(self, places: int) -> None:
        self.one, self.other = Guest(), Guest()
        self.ledger = card(places)
        self.ledger.register(self.one, "one", "chat")
        self.ledger.register(self.other, "other", "chat")


def test_a_model_stays_until_another_wants_its_place() -> None:
    house = House(places=1)

    for model in (house.one, house.one, house.other, house.one):
        with house.ledger.using(model):
            pass

    assert (house.one.arrivals, house.other.arrivals) == (2, 1)
    assert (house.one.is_there, house.other.is_there) == (True, False)


def test_where_there_is_a_place_for_each_nothing_is_swapped() -> None:
    house = House(places=2)

    for model in (house.one, house.other, house.one, house.other):
        house.ledger.acquire(model)

    assert (house.one.arrivals, house.other.arrivals) == (1, 1)


def test_whoever_waits_for_a_swap_can_be_cancelled() -> None:
    house = House(places=1)
    house.ledger.acquire(house.one)

    def check() -> None:
        raise Cancelled("the job was cancelled")

    with pytest.raises(Cancelled):
        house.ledger.acquire(house.other, check)

    assert house.ledger.acquire(house.one).swap_s == 0


def test_nobody_overtakes_a_request_that_waits() -> None:
    house = House(places=1)
    lease = house.ledger.acquire(house.one)
    order: list[str] = []

    def visit(name: str, model: Guest) -> None:
        with house.ledger.using(model):
            order.append(name)

    waiting = threading.Thread(target=visit, args=("other", house.other))
    later = threading.Thread(target=visit, args=("one", house.one))
    for count, thread in enumerate((waiting, later), 1):
        thread.start()
        while house.ledger.num_waiting < count:
            time.sleep(0.01)
    house.ledger.release(house.one, lease)
    for thread in (waiting, later):
        thread.join(PATIENCE_S)

    assert order == ["other", "one"]


def test_no_model_moves_while_it_is_used() -> None:
    house, lock = House(places=1), threading.Lock()

    def visit(turn: int) -> None:
        model = house.one if turn % 3 else house.other
        with house.ledger.using(model):
            with lock:
                model.users += 1
            assert model.is_there
            time.sleep(0.001)
            with lock:
                model.users -= 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(visit, range(60)))


def reply(chat: Any, model: str) -> tuple[str, float]:
    made = ask(chat, ("user", "Hello"), model=model, max_tokens=20, temperature=0)
    return "".join(made), made.stats.swap_s


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


# --- what the ledger counts ---


def journeys(ledger: Ledger, name: str) -> dict[str, int]:
    row = next(row for row in ledger.report() if row.name == name)
    return {
        "loads": row.num_loads,
        "evictions": row.num_evictions,
        "parked": row.num_parked,
        "drops": row.num_drops,
        "reads": row.num_reads,
    }


@pytest.mark.parametrize(
    ("host_bytes", "counted"),
    [
        (10, {"loads": 2, "evictions": 1, "parked": 1, "drops": 0, "reads": 0}),
        (0, {"loads": 2, "evictions": 1, "parked": 0, "drops": 1, "reads": 1}),
    ],
    ids=["parked in the host's memory", "dropped where that has no room"],
)
def test_every_way_of_a_model_is_counted(host_bytes: int, counted: dict[str, int]) -> None:
    ledger = Ledger(Card(10, host_bytes), has_mover_thread=False)
    one, other = Parcel(10), Parcel(10)
    ledger.register(one, "one", "none")
    ledger.register(other, "other", "none")

    for model in (one, other, one):
        with ledger.using(model):
            pass

    assert journeys(ledger, "one") == counted
