"""What a job costs: its share of the seconds in which the device is used."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_serverless.context import Bounds, JobContext, Stop, discard
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.worker.device_cost import DeviceCost
from tests.fakes.clock import Clock
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.patience import PATIENCE_S, start, wait_until

PRICE = 0.5


def job() -> JobContext:
    return JobContext(Stop(), discard, Bounds(1e9))


def test_a_job_alone_pays_for_each_of_its_seconds() -> None:
    clock, context = Clock(), job()
    cost = DeviceCost(PRICE, clock)
    clock.advance(100)

    with cost.of(context):
        clock.advance(4)
    clock.advance(100)

    assert context.metadata["cost"] == 4 * PRICE


def test_jobs_that_share_the_device_share_its_seconds() -> None:
    clock, first, second = Clock(), job(), job()
    cost = DeviceCost(PRICE, clock)

    with cost.of(first):
        clock.advance(4)
        with cost.of(second):
            clock.advance(6)

    assert first.metadata["cost"] == (4 + 3) * PRICE
    assert second.metadata["cost"] == 3 * PRICE


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 100)), max_size=40),
)
def test_all_jobs_together_pay_for_the_seconds_in_which_the_device_was_used(
    changes: list[tuple[int, int]],
) -> None:
    clock = Clock()
    cost, contexts, busy_s = DeviceCost(1.0, clock), [job() for _ in range(5)], 0
    running: dict[int, ExitStack] = {}
    for who, seconds in changes:
        if who in running:
            running.pop(who).close()
        else:
            running[who] = ExitStack()
            running[who].enter_context(cost.of(contexts[who]))
        clock.advance(seconds)
        busy_s += seconds if running else 0
    for stack in running.values():
        stack.close()

    paid = sum(context.metadata.get("cost", 0) for context in contexts)
    assert paid == pytest.approx(busy_s, abs=1e-6)


def test_a_failed_job_pays_for_what_it_used() -> None:
    clock, context = Clock(), job()

    with pytest.raises(ValueError), DeviceCost(PRICE, clock).of(context):
        clock.advance(2)
        raise ValueError

    assert context.metadata["cost"] == 2 * PRICE


def test_a_document_has_a_cost_only_if_there_is_a_price(
    local: Callable[..., LocalWorker],
) -> None:
    free, priced = local().run(), local(settings=Settings(gpu_price_per_second=PRICE)).run()

    assert "cost" not in free.metadata
    assert 0 < priced.metadata["cost"] <= priced.metadata["timings"]["generate"] * PRICE + 1e-4


def test_a_job_that_never_had_the_device_costs_nothing(local: Callable[..., LocalWorker]) -> None:
    at = local(settings=Settings(gpu_price_per_second=PRICE))

    refused = at.run(sdxl_payload(prompt="nude child"))

    assert refused.failure
    assert "cost" not in refused.metadata


def test_a_wait_for_the_device_costs_nothing(local: Callable[..., LocalWorker]) -> None:
    clock = Clock()
    at = local(settings=Settings(gpu_price_per_second=PRICE), clock=clock)
    at.fake_sdxl.hold()
    computes = start(at.run, sdxl_payload(id="computes"))
    wait_until(at.fake_sdxl.at_step.is_set)
    waits = start(at.run, sdxl_payload(id="waits"))
    wait_until(lambda: at.worker._device.num_waiting)

    clock.advance(50)
    at.fake_sdxl.go_on.set()

    costs = [each.result(PATIENCE_S).metadata["cost"] for each in (computes, waits)]
    assert costs == [50 * PRICE, 0]
