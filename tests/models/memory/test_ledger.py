"""The ledger never exceeds the device, never moves a model in use, and serves every request."""

import random
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ourvidz_serverless.errors import ModelLoadError, OutOfMemory
from ourvidz_serverless.models.memory import ledger as ledger_module
from ourvidz_serverless.models.memory.ledger import Ledger, ModelHandle
from ourvidz_serverless.models.memory.types import Check, Lease, PressureLevels
from tests.examples import examples
from tests.fakes.devices import FakeMemory, FakeModel
from tests.patience import PATIENCE_S, start, wait_until

TOTAL = 24


class StrictMemory:
    """The memory that models really take. It fails if a ledger exceeds the device."""

    def __init__(self, total: int = TOTAL, host: int = 40, counts_working: bool = True) -> None:
        self.lock = threading.Lock()
        # A real device does not know what is reserved for a job that has not taken it yet.
        self.total, self.host, self.counts_working = total, host, counts_working
        self.on_device = self.in_host = self.working = 0

    name = "strict"
    is_host = False

    @property
    def total_bytes(self) -> int:
        return self.total

    def free_bytes(self) -> int:
        return self.total - (self.on_device + self.working if self.counts_working else 0)

    def host_free_bytes(self) -> int:
        return self.host - self.in_host

    def change(self, device: int = 0, host: int = 0, working: int = 0) -> None:
        with self.lock:
            self.on_device += device
            self.in_host += host
            self.working += working
            assert 0 <= self.on_device + self.working <= self.total, "over the device's size"
            assert self.on_device >= 0 and self.in_host >= 0
            assert host <= 0 or self.in_host <= self.host, "over the host's size"


class StrictModel:
    """A model with a size, in one of three places. Its moves can fail."""

    is_on_disk = True

    def __init__(self, memory: StrictMemory, num_bytes: int, place: str = "disk") -> None:
        self.memory, self.num_bytes, self.place = memory, num_bytes, place
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
        self.memory.change(**change)
        self.place = there


class WouldWait(Exception):
    """A request that would have to wait."""


def refuse_to_wait() -> None:
    raise WouldWait


class BoundedLedger(Ledger):
    """A ledger with which a job that would wait for ever fails."""

    def acquire(
        self,
        model: Any,
        check: Check = lambda: None,
        shape: Hashable = None,
        expected_bytes: int | None = None,
    ) -> Lease:
        end = time.monotonic() + PATIENCE_S

        def check_time() -> None:
            assert time.monotonic() < end, "the job got no model"
            check()

        return super().acquire(model, check_time, shape, expected_bytes)


class LedgerMachine(RuleBasedStateMachine):
    """One ledger, some models, and all operations in any order."""

    @initialize(
        sizes=st.lists(st.integers(1, 14), min_size=2, max_size=5),
        pinned=st.booleans(),
        counts_working=st.booleans(),
    )
    def open(self, sizes: list[int], pinned: bool, counts_working: bool) -> None:
        self.memory = StrictMemory(counts_working=counts_working)
        self.ledger = Ledger(self.memory, has_mover_thread=False)
        self.models = [StrictModel(self.memory, size) for size in sizes]
        self.leases: list[tuple[StrictModel, Any, int]] = []
        for index, model in enumerate(self.models):
            self.ledger.register(
                model,
                f"f{index}",
                "wan",
                state="disk",
                is_pinned=pinned and not index,
            )

    def _chosen(self, data: st.DataObject) -> StrictModel:
        return data.draw(st.sampled_from(self.models))

    @rule(data=st.data(), working=st.integers(0, 6))
    def acquire(self, data: st.DataObject, working: int) -> None:
        model = self._chosen(data)
        try:
            lease = self.ledger.acquire(model, refuse_to_wait, shape=working)
        except (WouldWait, ModelLoadError, OutOfMemory):
            return
        assert model.place == "device"
        model.users += 1
        self.memory.change(working=lease.reserved_bytes)
        self.leases.append((model, lease, lease.reserved_bytes))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), measured=st.integers(0, 6))
    def release(self, data: st.DataObject, measured: int) -> None:
        model, lease, reserved = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.memory.change(working=-reserved)
        model.users -= 1
        lease.measured_bytes = measured
        self.ledger.release(model, lease)

    @rule(data=st.data(), force=st.booleans(), to=st.sampled_from(["device", "host", "disk"]))
    def request_move(self, data: st.DataObject, force: bool, to: Any) -> None:
        index = data.draw(st.integers(0, len(self.models) - 1))
        self.ledger.request_move(f"f{index}", to, force=force)

    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        self.ledger.prefetch(self._chosen(data))

    @rule()
    def grant(self) -> None:
        self.ledger.grant_one_request()

    @rule(data=st.data(), error=st.sampled_from([ModelLoadError("gone"), OutOfMemory("full")]))
    def fail(self, data: st.DataObject, error: Exception) -> None:
        self._chosen(data).fails = [error]

    @rule(data=st.data())
    def evict_idle(self, data: st.DataObject) -> None:
        keep = self._chosen(data)
        self.ledger.evict_idle(keep)

    @invariant()
    def the_report_counts_the_users_of_each_model(self) -> None:
        if not hasattr(self, "ledger"):
            return
        rows = {row.name: row for row in self.ledger.report()}
        for index, model in enumerate(self.models):
            assert rows[f"f{index}"].num_users == model.users
            if model.users:
                assert model.place == rows[f"f{index}"].state == "device"

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for model, lease, reserved in self.leases:
            self.memory.change(working=-reserved)
            model.users -= 1
            self.ledger.release(model, lease)
        # Each model is served at once now: no memory is reserved without a user.
        for model in self.models:
            model.fails = []
        for _ in range(100):
            if not self.ledger.grant_one_request():
                break
        else:
            pytest.fail("move requests without end")
        for model in self.models:
            if model.num_bytes <= TOTAL:
                with self.ledger.using(model, refuse_to_wait):
                    assert model.place == "device"
        assert self.ledger.num_waiting == 0
        assert self.ledger.free_bytes() == TOTAL - self.memory.on_device


def test_jobs_on_eight_threads_neither_deadlock_nor_leak_nor_exceed_the_device() -> None:
    memory = StrictMemory()
    ledger = BoundedLedger(memory)
    models = [StrictModel(memory, size) for size in (3, 5, 8, 13, 21)]
    for index, model in enumerate(models):
        ledger.register(model, f"f{index}", "wan", state="disk", is_pinned=index == 1)
    threads_before = threading.active_count()

    def work(seed: int) -> int:
        chance, served = random.Random(seed), 0
        for _ in range(500):
            model, shape = chance.choice(models), chance.randrange(3)
            if chance.random() < 0.1:
                ledger.prefetch(model)
            if chance.random() < 0.05:
                ledger.request_move(f"f{models.index(model)}", "host", force=True)
            with ledger.using(model, shape=shape) as lease:
                with memory.lock:
                    model.users += 1
                memory.change(working=lease.reserved_bytes)
                assert model.place == "device"
                memory.change(working=-lease.reserved_bytes)
                with memory.lock:
                    model.users -= 1
                lease.measured_bytes = shape
                served += 1
        return served

    works = [start(work, seed) for seed in range(8)]
    served = sum(each.result(PATIENCE_S) for each in works)

    assert served == 4000
    assert [row.num_users for row in ledger.report()] == [0] * 5
    assert memory.working == 0 and ledger.num_waiting == 0
    wait_until(lambda: threading.active_count() <= threads_before + 1)  # the mover thread


# --- one behaviour at a time ---


@pytest.fixture
def make() -> Callable[..., tuple[Ledger, list[StrictModel]]]:
    def build(*sizes: int, host: int = 100, pinned: int | None = None, **options: bool) -> Any:
        memory = StrictMemory(host=host)
        ledger = BoundedLedger(memory, **options)
        models = [StrictModel(memory, size) for size in sizes]
        for index, model in enumerate(models):
            ledger.register(model, f"f{index}", "wan", state="disk", is_pinned=index == pinned)
        return ledger, models

    return build


def use(ledger: Ledger, *models: StrictModel) -> None:
    for model in models:
        with ledger.using(model):
            pass


def places(models: list[StrictModel]) -> list[str]:
    return [model.place for model in models]


def test_the_least_recently_used_model_is_evicted_first(make: Any) -> None:
    ledger, models = make(10, 10, 10)

    use(ledger, models[0], models[1], models[0], models[2])

    assert places(models) == ["device", "host", "device"]


def test_a_pinned_model_is_evicted_last(make: Any) -> None:
    ledger, models = make(10, 10, 10, pinned=0)

    use(ledger, models[0], models[1], models[2])
    assert places(models) == ["device", "host", "device"]

    with ledger.using(models[2]):
        use(ledger, models[1])
    assert places(models) == ["host", "device", "device"]


def test_a_model_is_dropped_if_the_host_has_no_room_and_read_again_later(make: Any) -> None:
    ledger, models = make(20, 10, host=20)

    use(ledger, *models)
    models[0].memory.host = 5
    use(ledger, models[1])

    models[0].memory.host = 20
    use(ledger, models[0])
    assert places(models)[0] == "device"


def test_room_in_the_host_is_counted_once_for_models_that_are_evicted_together(make: Any) -> None:
    ledger, models = make(10, 10, 2, host=12)
    use(ledger, *models)

    ledger.evict_idle(models[2])

    assert sorted(places(models)) == ["device", "disk", "host"]


def test_after_an_out_of_memory_a_handle_evicts_every_other_idle_model_and_says_how_much(
    make: Any,
) -> None:
    ledger, models = make(10, 8, 2)
    use(ledger, *models)
    handle = ModelHandle(ledger, models[1])

    with ledger.using(models[2]):
        assert handle.evict_idle() == 10
        assert handle.evict_idle() == 0

    assert places(models) == ["host", "device", "device"]


def test_models_are_evicted_for_the_memory_that_a_job_of_that_shape_took_before(make: Any) -> None:
    ledger, models = make(10, 10)
    use(ledger, *models)
    with ledger.using(models[0], shape="large") as lease:
        lease.measured_bytes = 8

    assert places(models) == ["device", "device"]
    with ledger.using(models[0], shape="large"):
        assert places(models) == ["device", "host"]


def test_models_are_evicted_for_the_memory_that_a_job_expects_until_its_shape_is_measured(
    make: Any,
) -> None:
    ledger, models = make(10, 10)
    use(ledger, *models)

    with ledger.using(models[0], shape="large", expected_bytes=8) as lease:
        assert places(models) == ["device", "host"]
        lease.measured_bytes = 2
    use(ledger, models[1])

    with ledger.using(models[0], shape="large", expected_bytes=8):
        assert places(models) == ["device", "device"]


def test_the_shape_that_was_measured_longest_ago_is_forgotten_first(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_SHAPES", 2)
    ledger, models = make(10)

    for shape in ("a", "b", "a", "c"):
        with ledger.using(models[0], shape=shape) as lease:
            lease.measured_bytes = 1

    assert list(ledger.report()[0].working_bytes) == ["a", "c"]


def test_a_model_is_tried_though_another_process_holds_the_memory_that_it_needs(
    make: Any,
) -> None:
    ledger, models = make(14, 10)
    use(ledger, models[1])
    models[0].memory.change(working=12)

    with pytest.raises(AssertionError, match="over the device's size"):
        ledger.acquire(models[0], refuse_to_wait)
    assert places(models) == ["host", "host"]


def test_the_largest_model_may_take_what_others_leave_and_what_loaded_models_hold(
    make: Any,
) -> None:
    ledger, models = make(10, 8)
    models[0].memory.change(working=4)
    assert ledger.max_model_bytes == TOTAL - 4

    use(ledger, models[0])
    assert ledger.max_model_bytes == TOTAL - 4


def test_memory_that_a_job_will_take_is_given_to_no_other_model(make: Any) -> None:
    ledger, models = make(10, 10)
    with ledger.using(models[0], shape="large") as lease:
        lease.measured_bytes = 8

    with ledger.using(models[0], shape="large"), pytest.raises(WouldWait):
        ledger.acquire(models[1], refuse_to_wait)


def test_memory_that_two_jobs_took_together_is_not_booked_for_one(make: Any) -> None:
    ledger, models = make(10, 10)
    use(ledger, *models)
    with ledger.using(models[0], shape="large") as lease:
        lease.measured_bytes = 2
    first, second = (ledger.acquire(models[0], shape="large") for _ in range(2))
    first.measured_bytes = 8
    ledger.release(models[0], first)
    ledger.release(models[0], second)

    with ledger.using(models[0], shape="large"):
        assert places(models) == ["device", "device"]


def test_a_model_leaves_the_hosts_memory_before_one_that_has_no_room_there_is_read(
    make: Any,
) -> None:
    ledger, models = make(14, 14, 14, host=28)
    use(ledger, models[0], models[1])
    assert places(models) == ["host", "device", "disk"]

    use(ledger, models[2])

    assert places(models) == ["disk", "host", "device"]


def test_a_prefetched_model_takes_no_place_of_another_in_the_hosts_memory(
    make: Any,
) -> None:
    ledger, models = make(14, 14, 14, host=28, has_mover_thread=False)
    use(ledger, models[0])
    with ledger.using(models[1]):
        models[0].memory.host = 20
        ledger.prefetch(models[2])

        assert not ledger.grant_one_request()

    assert places(models) == ["host", "device", "disk"]


def test_a_model_that_leaves_after_its_last_job_is_dropped_if_the_host_has_become_full(
    make: Any,
) -> None:
    ledger, models = make(14, 14, host=14, has_mover_thread=False)
    with ledger.using(models[0]):
        ledger.request_move("f0", "host", force=True)
        ledger.prefetch(models[1])
        assert ledger.grant_one_request()
        assert places(models) == ["device", "host"]

    assert ledger.grant_one_request()

    assert places(models) == ["disk", "host"]


def test_a_job_starts_beside_another_once_exactly_enough_memory_can_be_freed(make: Any) -> None:
    ledger, models = make(10, 14, 14)
    use(ledger, models[1])

    with ledger.using(models[0]):
        ledger.release(models[2], ledger.acquire(models[2], refuse_to_wait))

    assert places(models) == ["device", "host", "device"]


def test_no_job_gets_a_model_that_is_asked_to_leave(make: Any) -> None:
    ledger, models = make(14, has_mover_thread=False)
    with ledger.using(models[0]):
        ledger.request_move("f0", "disk", force=True)

        with pytest.raises(WouldWait):
            ledger.acquire(models[0], refuse_to_wait)


def test_a_move_of_a_model_that_is_larger_than_the_device_is_refused(make: Any) -> None:
    ledger, _ = make(TOTAL + 1)

    assert ledger.request_move("f0", "device").error == "it is larger than the device"


def test_a_model_that_fills_the_device_is_served(make: Any) -> None:
    ledger, models = make(TOTAL)

    use(ledger, models[0])

    assert places(models) == ["device"]


def test_where_the_device_is_the_host_a_model_may_take_all_of_it(make: Any) -> None:
    ledger, models = make(10)
    use(ledger, models[0])
    models[0].memory.is_host = True
    models[0].memory.change(working=4)

    assert ledger.max_model_bytes == TOTAL


def test_a_model_without_a_file_goes_to_the_host_even_if_the_host_is_full() -> None:
    memory = FakeMemory(TOTAL, host_bytes=0)
    ledger, model, other = BoundedLedger(memory), FakeModel(14, memory), FakeModel(14, memory)
    model.is_on_disk = False
    for name, each in (("made", model), ("read", other)):
        ledger.register(each, name, "wan")

    for each in (model, other, model):
        with ledger.using(each):
            pass

    assert (model.place, other.place) == ("device", "disk")
    ledger.evict_idle(other)
    assert model.place == "host"


def test_an_eviction_after_an_out_of_memory_waits_for_the_move_that_has_begun(make: Any) -> None:
    ledger, models = make(10, 10)
    moving, go_on = threading.Event(), threading.Event()
    to_device = models[1].to_device

    def to_device_later() -> None:
        moving.set()
        go_on.wait(PATIENCE_S)
        to_device()

    models[1].to_device = to_device_later
    use(ledger, models[0])
    ledger.prefetch(models[1])
    assert moving.wait(PATIENCE_S)

    evicting = start(ledger.evict_idle, models[0])
    go_on.set()

    assert evicting.result(PATIENCE_S) == 10
    assert places(models) == ["device", "host"]


def test_a_model_larger_than_the_device_is_refused_with_both_sizes(make: Any) -> None:
    ledger, models = make(TOTAL + 1)

    with pytest.raises(OutOfMemory, match="f0 takes 0 MiB, and the device has 0"):
        ledger.acquire(models[0])

    assert ledger.num_waiting == 0


def test_a_model_that_does_not_load_is_read_once_more(make: Any) -> None:
    ledger, models = make(10)
    models[0].fails = [ModelLoadError("a bad moment")]

    use(ledger, models[0])

    assert places(models) == ["device"]


def test_a_model_that_fails_twice_is_absent_until_it_loads_again(make: Any) -> None:
    ledger, models = make(10)
    models[0].fails = [ModelLoadError("gone")] * 2

    with pytest.raises(ModelLoadError):
        ledger.acquire(models[0])
    assert [row.state for row in ledger.report()] == ["absent"]

    use(ledger, models[0])
    assert places(models) == ["device"]


def test_a_prefetched_model_is_on_the_device_before_it_is_acquired(make: Any) -> None:
    ledger, models = make(10, 10)
    with ledger.using(models[0]):
        ledger.prefetch(models[1])
        wait_until(lambda: models[1].place == "device")

        assert ledger.acquire(models[1]).swap_s == 0


def test_a_prefetched_model_waits_in_the_host_while_the_device_is_full(make: Any) -> None:
    ledger, models = make(14, 14)
    with ledger.using(models[0]):
        ledger.prefetch(models[1])
        wait_until(lambda: models[1].place == "host")

        assert places(models) == ["device", "host"]

    wait_until(lambda: models[1].place == "device")
    assert places(models) == ["host", "device"]


def test_a_move_request_without_force_evicts_no_model(make: Any) -> None:
    ledger, models = make(14, 14)
    use(ledger, models[0])

    request = ledger.request_move("f1", "device")

    assert request.is_done.wait(PATIENCE_S)
    assert request.error == "there is no room for it"
    assert places(models) == ["device", "disk"]


def test_a_forced_move_of_a_model_in_use_waits_for_its_last_user(make: Any) -> None:
    ledger, models = make(14)
    with ledger.using(models[0]):
        assert ledger.request_move("f0", "host").error == "it is in use"
        request = ledger.request_move("f0", "disk", force=True)
        assert not request.is_done.wait(0.05)

    assert request.is_done.wait(PATIENCE_S)
    assert places(models) == ["disk"]


@pytest.mark.parametrize(
    ("used", "name"), [(0, "low"), (0.69, "low"), (0.7, "medium"), (0.9, "high"), (1, "critical")]
)
def test_pressure_has_four_levels(used: float, name: str) -> None:
    class Used(FakeMemory):
        def free_bytes(self) -> int:
            return round(self.total_bytes * (1 - used))

    assert Ledger(Used(1000), PressureLevels()).pressure == name


# At the end of the file: if a test above fails too, it says in a second what this one says after
# minutes, in which hypothesis looks for the shortest run of operations that fails.
TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = examples(400, stateful_step_count=40)


def test_a_model_that_is_used_where_it_is_stays_and_brings_nothing_to_the_device() -> None:
    memory = FakeMemory(10)
    ledger = Ledger(memory)
    first, second = (
        ledger.register(FakeModel(8, memory), name, "fake") for name in ("first", "second")
    )
    with first.using():
        """It is on the device, and idle afterwards."""

    with second.using_where_it_is() as is_used:
        assert not is_used
        assert [row.state for row in ledger.report()] == ["host", "device"]
    with first.using_where_it_is() as is_used:
        assert is_used
        assert ledger.evict_idle(keep=second.model) == 0


def test_a_model_is_not_kept_where_it_is_while_a_job_waits_for_another() -> None:
    memory = FakeMemory(10)
    ledger = Ledger(memory)
    first, second = (
        ledger.register(FakeModel(8, memory), name, "fake") for name in ("first", "second")
    )
    with first.using():
        waiting = start(lambda: ledger.release(second.model, ledger.acquire(second.model)))
        wait_until(lambda: ledger.num_waiting)

        with first.using_where_it_is() as is_used:
            assert not is_used
    waiting.result(PATIENCE_S)
