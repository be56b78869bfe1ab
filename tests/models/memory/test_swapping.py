"""Two models on a device with room for one: swapped on demand, never while a job uses one."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.models.memory.ledger import Ledger
from tests.fakes.devices import FakeMemory, FakeModel, fake_ledger
from tests.fakes.tiny_chat import ask, tiny_pair
from tests.patience import PATIENCE_S


class CountingModel:
    """A model that counts its arrivals. It fails if it is moved while a job uses it."""

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


class TwoModels:
    """A ledger with two models, and room for one or both."""

    def __init__(self, places: int) -> None:
        self.one, self.other = CountingModel(), CountingModel()
        self.ledger = fake_ledger(places)
        self.ledger.register(self.one, "one", "chat")
        self.ledger.register(self.other, "other", "chat")


def test_a_model_stays_on_the_device_until_another_needs_the_room() -> None:
    pair = TwoModels(places=1)

    for model in (pair.one, pair.one, pair.other, pair.one):
        with pair.ledger.using(model):
            pass

    assert (pair.one.arrivals, pair.other.arrivals) == (2, 1)
    assert (pair.one.is_there, pair.other.is_there) == (True, False)


def test_nothing_is_swapped_if_both_models_fit() -> None:
    pair = TwoModels(places=2)

    for model in (pair.one, pair.other, pair.one, pair.other):
        pair.ledger.acquire(model)

    assert (pair.one.arrivals, pair.other.arrivals) == (1, 1)


def test_a_job_that_waits_for_a_swap_can_be_cancelled() -> None:
    pair = TwoModels(places=1)
    pair.ledger.acquire(pair.one)

    def check() -> None:
        raise Cancelled("the job was cancelled")

    with pytest.raises(Cancelled):
        pair.ledger.acquire(pair.other, check)

    assert pair.ledger.acquire(pair.one).swap_s == 0


def test_a_later_request_does_not_overtake_one_that_waits() -> None:
    pair = TwoModels(places=1)
    lease = pair.ledger.acquire(pair.one)
    order: list[str] = []

    def visit(name: str, model: CountingModel) -> None:
        with pair.ledger.using(model):
            order.append(name)

    waiting = threading.Thread(target=visit, args=("other", pair.other))
    later = threading.Thread(target=visit, args=("one", pair.one))
    for count, thread in enumerate((waiting, later), 1):
        thread.start()
        while pair.ledger.num_waiting < count:
            time.sleep(0.01)
    pair.ledger.release(pair.one, lease)
    for thread in (waiting, later):
        thread.join(PATIENCE_S)

    assert order == ["other", "one"]


def test_no_model_is_moved_while_a_job_uses_it() -> None:
    pair, lock = TwoModels(places=1), threading.Lock()

    def visit(number: int) -> None:
        model = pair.one if number % 3 else pair.other
        with pair.ledger.using(model):
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


def test_swapped_models_reply_as_models_that_stay_loaded() -> None:
    both_fit, one_fits = tiny_pair(places=2), tiny_pair(places=1)
    models = ["qwen_instruct", "qwen_base", "qwen_base", "qwen_instruct"] * 3
    expected = [reply(both_fit, model)[0] for model in models]

    with ThreadPoolExecutor(len(models)) as threads:
        at_once = list(threads.map(lambda model: reply(one_fits, model)[0], models))

    assert at_once == expected
    assert len(set(expected)) == 2


def test_a_reply_reports_the_time_of_a_swap() -> None:
    chat = tiny_pair(places=1)
    swaps = [reply(chat, model)[1] > 0 for model in ("qwen_base", "qwen_base", "qwen_instruct")]

    assert swaps == [True, False, True]


# --- counts in the report ---


def counts(ledger: Ledger, name: str) -> dict[str, int]:
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
def test_loads_evictions_drops_and_reads_are_counted(
    host_bytes: int, counted: dict[str, int]
) -> None:
    ledger = Ledger(FakeMemory(10, host_bytes), has_mover_thread=False)
    one, other = FakeModel(10), FakeModel(10)
    ledger.register(one, "one", "none")
    ledger.register(other, "other", "none")

    for model in (one, other, one):
        with ledger.using(model):
            pass

    assert counts(ledger, "one") == counted
