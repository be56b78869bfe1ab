"""The ledger: never over the device's size, nobody moved in lease, and no request forgotten."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import settings as budget
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ourvidz_serverless.errors import ModelLoadError, OutOfMemory
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.memory.types import PressureLevels
from tests.fakes.devices import Card
from tests.patience import PATIENCE_S

TOTAL = 24


class Depot:
    """Where freights really are. It is what a ledger must not get wrong."""

    def __init__(self, total: int = TOTAL, host: int = 40, tells_all: bool = True) -> None:
        self.lock = threading.Lock()
        # A real device does not tell what a job has been promised and has not taken yet.
        self.total, self.host, self.tells_all = total, host, tells_all
        self.on_device = self.in_host = self.working = 0

    name = "depot"
    is_host = False

    @property
    def total_bytes(self) -> int:
        return self.total

    def free_bytes(self) -> int:
        return self.total - (self.on_device + self.working if self.tells_all else 0)

    def host_free_bytes(self) -> int:
        return self.host - self.in_host

    def change(self, device: int = 0, host: int = 0, working: int = 0) -> None:
        with self.lock:
            self.on_device += device
            self.in_host += host
            self.working += working
            assert 0 <= self.on_device + self.working <= self.total, "over the device's size"
            assert self.on_device >= 0 and self.in_host >= 0


class Freight:
    """A model of a weight, in one of three places, which may fail on its way."""

    is_on_disk = True

    def __init__(self, depot: Depot, num_bytes: int, place: str = "disk") -> None:
        self.depot, self.num_bytes, self.place = depot, num_bytes, place
        self.users = 0
        self.fails: list[Exception] = []

    def load(self) -> None:
        self._move("disk", "host", host=self.num_bytes)

    def to_device(self) -> None:
        self._move("host", "device", device=self.num_bytes, host=-self.num_bytes)

    def to_host(self) -> None:
        self._move("device", "host", device=-self.num_bytes, host=self.num_bytes)

    def drop(self) -> None:
        if self.place == "device":
            self._move("device", "disk", device=-self.num_bytes)
        else:
            self._move("host", "disk", host=-self.num_bytes)

    def _move(self, here: str, there: str, **change: int) -> None:
        assert self.place == here
        assert not self.users, "moved while it was in use"
        if self.fails and (here, there) != ("device", "host") and there != "disk":
            raise self.fails.pop()
        self.depot.change(**change)
        self.place = there


class Later(Exception):
    """A request that would have to wait."""


def later() -> None:
    raise Later


class Yard(RuleBasedStateMachine):
    """One ledger, some freights, and whatever can happen to them in any order."""

    @initialize(
        sizes=st.lists(st.integers(1, 14), min_size=2, max_size=5),
        pinned=st.booleans(),
        tells_all=st.booleans(),
    )
    def open(self, sizes: list[int], pinned: bool, tells_all: bool) -> None:
        self.depot = Depot(tells_all=tells_all)
        self.ledger = Ledger(self.depot, has_mover_thread=False)
        self.freights = [Freight(self.depot, size) for size in sizes]
        self.leases: list[tuple[Freight, Any, int]] = []
        for index, freight in enumerate(self.freights):
            self.ledger.register(
                freight,
                f"f{index}",
                "wan",
                state="disk",
                is_pinned=pinned and not index,
            )

    def _chosen(self, data: st.DataObject) -> Freight:
        return data.draw(st.sampled_from(self.freights))

    @rule(data=st.data(), working=st.integers(0, 6))
    def take(self, data: st.DataObject, working: int) -> None:
        freight = self._chosen(data)
        try:
            lease = self.ledger.acquire(freight, later, shape=working)
        except (Later, ModelLoadError, OutOfMemory):
            return
        assert freight.place == "device"
        freight.users += 1
        self.depot.change(working=lease.reserved_bytes)
        self.leases.append((freight, lease, lease.reserved_bytes))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), measured=st.integers(0, 6))
    def give_back(self, data: st.DataObject, measured: int) -> None:
        freight, lease, promised = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.depot.change(working=-promised)
        freight.users -= 1
        lease.measured_bytes = measured
        self.ledger.release(freight, lease)

    @rule(data=st.data(), force=st.booleans(), to=st.sampled_from(["device", "host", "disk"]))
    def wish(self, data: st.DataObject, force: bool, to: Any) -> None:
        index = data.draw(st.integers(0, len(self.freights) - 1))
        self.ledger.request_move(f"f{index}", to, force=force)

    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        self.ledger.prefetch(self._chosen(data))

    @rule()
    def carry(self) -> None:
        self.ledger.grant_one_request()

    @rule(data=st.data(), error=st.sampled_from([ModelLoadError("gone"), OutOfMemory("full")]))
    def fail(self, data: st.DataObject, error: Exception) -> None:
        self._chosen(data).fails = [error]

    @rule(data=st.data())
    def evict_idle(self, data: st.DataObject) -> None:
        keep = self._chosen(data)
        self.ledger.evict_idle(keep)

    @invariant()
    def every_row_tells_the_truth_about_users(self) -> None:
        if not hasattr(self, "ledger"):
            return
        rows = {row.name: row for row in self.ledger.report()}
        for index, freight in enumerate(self.freights):
            assert rows[f"f{index}"].num_users == freight.users
            if freight.users:
                assert freight.place == rows[f"f{index}"].state == "device"

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for freight, lease, promised in self.leases:
            self.depot.change(working=-promised)
            freight.users -= 1
            self.ledger.release(freight, lease)
        # Whoever comes now is served at once: nothing holds room that nobody has.
        for freight in self.freights:
            freight.fails = []
        while self.ledger.grant_one_request():
            pass
        for freight in self.freights:
            if freight.num_bytes <= TOTAL:
                with self.ledger.using(freight):
                    assert freight.place == "device"
        assert self.ledger.num_waiting == 0
        assert self.ledger.free_bytes() == TOTAL - self.depot.on_device


TestYard = Yard.TestCase
TestYard.settings = budget(max_examples=400, stateful_step_count=40, deadline=None)


def test_threads_that_want_everything_at_once_all_finish() -> None:
    """Four thousand random jobs on eight threads: no deadlock, no leak, and never too much."""
    depot = Depot()
    ledger, freights = Ledger(depot), [Freight(depot, size) for size in (3, 5, 8, 13, 21)]
    for index, freight in enumerate(freights):
        ledger.register(freight, f"f{index}", "wan", state="disk", is_pinned=index == 1)
    threads_before = threading.active_count()

    def work(seed: int) -> int:
        chance, served = random.Random(seed), 0
        for _ in range(500):
            freight, shape = chance.choice(freights), chance.randrange(3)
            if chance.random() < 0.1:
                ledger.prefetch(freight)
            if chance.random() < 0.05:
                ledger.request_move(f"f{freights.index(freight)}", "host", force=True)
            with ledger.using(freight, shape=shape) as lease:
                with depot.lock:
                    freight.users += 1
                depot.change(working=lease.reserved_bytes)
                assert freight.place == "device"
                depot.change(working=-lease.reserved_bytes)
                with depot.lock:
                    freight.users -= 1
                lease.measured_bytes = shape
                served += 1
        return served

    with ThreadPoolExecutor(8) as threads:
        served = sum(threads.map(work, range(8)))

    assert served == 4000
    assert [row.num_users for row in ledger.report()] == [0] * 5
    assert depot.working == 0 and ledger.num_waiting == 0
    assert threading.active_count() <= threads_before + 1  # the porter


# --- one by one ---


@pytest.fixture
def make() -> Callable[..., tuple[Ledger, list[Freight]]]:
    def build(*sizes: int, host: int = 100, pinned: int | None = None) -> Any:
        depot = Depot(host=host)
        ledger, freights = Ledger(depot), [Freight(depot, size) for size in sizes]
        for index, freight in enumerate(freights):
            ledger.register(freight, f"f{index}", "wan", state="disk", is_pinned=index == pinned)
        return ledger, freights

    return build


def visit(ledger: Ledger, *freights: Freight) -> None:
    for freight in freights:
        with ledger.using(freight):
            pass


def places(freights: list[Freight]) -> list[str]:
    return [freight.place for freight in freights]


def test_the_least_recently_used_leaves_first(make: Any) -> None:
    ledger, freights = make(10, 10, 10)

    visit(ledger, freights[0], freights[1], freights[0], freights[2])

    assert places(freights) == ["device", "host", "device"]


def test_a_pinned_model_leaves_last(make: Any) -> None:
    ledger, freights = make(10, 10, 10, pinned=0)

    visit(ledger, freights[0], freights[1], freights[2])
    assert places(freights) == ["device", "host", "device"]

    with ledger.using(freights[2]):
        visit(ledger, freights[1])
    assert places(freights) == ["host", "device", "device"]


def test_where_the_host_has_no_room_a_model_is_dropped_and_read_again(make: Any) -> None:
    ledger, freights = make(20, 10, host=20)

    visit(ledger, *freights)
    freights[0].depot.host = 5
    visit(ledger, freights[1])

    freights[0].depot.host = 20
    visit(ledger, freights[0])
    assert places(freights)[0] == "device"


def test_models_that_leave_together_do_not_share_one_room_of_the_host(make: Any) -> None:
    ledger, freights = make(10, 10, 2, host=12)
    visit(ledger, *freights)

    ledger.evict_idle(freights[2])

    assert sorted(places(freights)) == ["device", "disk", "host"]


def test_room_is_made_for_what_a_job_of_that_shape_was_measured_to_need(make: Any) -> None:
    ledger, freights = make(10, 10)
    visit(ledger, *freights)
    with ledger.using(freights[0], shape="large") as lease:
        lease.measured_bytes = 8

    assert places(freights) == ["device", "device"]
    with ledger.using(freights[0], shape="large"):
        assert places(freights) == ["device", "host"]


def test_a_model_larger_than_the_device_is_refused_with_both_sizes(make: Any) -> None:
    ledger, freights = make(TOTAL + 1)

    with pytest.raises(OutOfMemory, match="f0 takes 0 MiB, and the device has 0"):
        ledger.acquire(freights[0])

    assert ledger.num_waiting == 0


def test_a_model_that_does_not_load_is_read_once_more(make: Any) -> None:
    ledger, freights = make(10)
    freights[0].fails = [ModelLoadError("a bad moment")]

    visit(ledger, freights[0])

    assert places(freights) == ["device"]


def test_a_model_that_fails_twice_is_absent_until_it_loads_again(make: Any) -> None:
    ledger, freights = make(10)
    freights[0].fails = [ModelLoadError("gone")] * 2

    with pytest.raises(ModelLoadError):
        ledger.acquire(freights[0])
    assert [row.state for row in ledger.report()] == ["absent"]

    visit(ledger, freights[0])
    assert places(freights) == ["device"]


def until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so, or has had time enough to be."""
    end = time.monotonic() + PATIENCE_S
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)


def test_what_is_expected_is_there_before_it_is_asked_for(make: Any) -> None:
    ledger, freights = make(10, 10)
    with ledger.using(freights[0]):
        ledger.prefetch(freights[1])
        until(lambda: freights[1].place == "device")

        assert ledger.acquire(freights[1]).swap_s == 0


def test_what_is_expected_comes_as_far_as_the_host_while_the_device_is_full(make: Any) -> None:
    ledger, freights = make(14, 14)
    with ledger.using(freights[0]):
        ledger.prefetch(freights[1])
        until(lambda: freights[1].place == "host")

        assert places(freights) == ["device", "host"]

    until(lambda: freights[1].place == "device")
    assert places(freights) == ["host", "device"]


def test_a_wish_without_force_drives_nobody_out(make: Any) -> None:
    ledger, freights = make(14, 14)
    visit(ledger, freights[0])

    wish = ledger.request_move("f1", "device")

    assert wish.is_done.wait(PATIENCE_S)
    assert wish.error == "there is no room for it"
    assert places(freights) == ["device", "disk"]


def test_a_model_in_use_leaves_by_force_when_its_last_user_has_left(make: Any) -> None:
    ledger, freights = make(14)
    with ledger.using(freights[0]):
        assert ledger.request_move("f0", "host").error == "it is in use"
        wish = ledger.request_move("f0", "disk", force=True)
        assert not wish.is_done.wait(0.05)

    assert wish.is_done.wait(PATIENCE_S)
    assert places(freights) == ["disk"]


@pytest.mark.parametrize(
    ("used", "name"), [(0, "low"), (0.69, "low"), (0.7, "medium"), (0.9, "high"), (1, "critical")]
)
def test_pressure_has_four_names(used: float, name: str) -> None:
    class Used(Card):
        def free_bytes(self) -> int:
            return round(self.total_bytes * (1 - used))

    assert Ledger(Used(1000), PressureLevels()).pressure == name
