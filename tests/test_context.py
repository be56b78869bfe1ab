"""What a running job tells of its progress, and when its time is over."""

import math
from typing import Any

import pytest

from ourvidz_serverless.context import Bounds, JobContext, Stop
from ourvidz_serverless.errors import DeadlinePassed
from tests.fakes.clock import Clock


def test_the_rest_is_estimated_by_the_pace_since_a_stages_first_step() -> None:
    now = [100.0]
    told: list[Any] = []
    context = JobContext(Stop(), told.append, Bounds(600), clock=lambda: now[0])

    # The first step is also the one that warms up.
    for done, at in ((1, 130.0), (2, 132.0), (4, 136.0)):
        now[0] = at
        context.step("generate", done, 10)
    context.step("polish", 1, 2)

    assert [each.get("remaining_s") for each in told] == [None, 16.0, 12.0, None]


def test_a_stage_that_is_tried_again_is_estimated_by_the_pace_of_the_new_try() -> None:
    now = [0.0]
    told: list[Any] = []
    context = JobContext(Stop(), told.append, Bounds(600), clock=lambda: now[0])

    # The first try ends without memory after its last step; the second one is slower.
    for done, at in ((1, 1.0), (2, 2.0), (10, 10.0), (1, 60.0), (2, 63.0), (4, 69.0)):
        now[0] = at
        context.step("generate", done, 10)

    assert [each.get("remaining_s") for each in told] == [None, 8.0, 0.0, None, 24.0, 18.0]


# --- a wait for the device ---


def waits(work_s: float, wait_s: float = math.inf, total_s: float = math.inf) -> Any:
    """A job of these bounds, its clock, and what it reports."""
    clock, told = Clock(), list[Any]()
    return JobContext(Stop(), told.append, Bounds(work_s, wait_s, total_s), clock), clock, told


def test_the_jobs_own_time_stands_still_while_it_waits_for_the_device() -> None:
    context, clock, _ = waits(work_s=10)
    clock.advance(4)
    with context.waiting() as hear:
        clock.advance(500)
        hear(1)

    assert (context.remaining_s, context.waited_s, context.elapsed_s) == (6, 500, 504)
    assert context.timings == {"wait": 500}
    clock.advance(6)
    with pytest.raises(DeadlinePassed, match=r"^the job's 10 seconds are over$"):
        context.check()


def test_the_wait_has_a_bound_of_its_own_over_all_its_parts() -> None:
    context, clock, _ = waits(work_s=10, wait_s=300)
    with context.waiting() as hear:
        clock.advance(200)
        hear(1)

    with context.waiting() as hear:
        clock.advance(100)
        with pytest.raises(DeadlinePassed, match=r"^the job waited 300 s for the device$"):
            hear(1)


def test_a_wait_that_ended_in_time_leaves_the_job_its_own_time() -> None:
    context, clock, _ = waits(work_s=10, wait_s=300)
    with context.waiting():
        clock.advance(300)

    assert context.over is None
    assert context.remaining_s == 10


@pytest.mark.parametrize("is_waiting", [True, False])
def test_wait_and_work_together_end_before_the_platforms_own_time(is_waiting: bool) -> None:
    context, clock, _ = waits(work_s=500, wait_s=600, total_s=570)
    with pytest.raises(
        DeadlinePassed,
        match=r"^the job waited (570|400) s for the device, and its 570 seconds are over$",
    ):
        with context.waiting() as hear:
            clock.advance(570 if is_waiting else 400)
            hear(1)
        assert context.remaining_s == 170
        clock.advance(170)
        context.check()


def test_a_job_that_waits_reports_how_many_go_first_and_nothing_twice() -> None:
    context, clock, told = waits(work_s=10)
    with context.waiting() as hear:
        for ahead, at in ((4, 0), (4, 1), (3, 5), (3, 6), (1, 12)):
            clock.seconds = at
            hear(ahead)

    assert [(each["stage"], each["step"], each["steps"]) for each in told] == [
        ("wait", 0, 4),
        ("wait", 1, 4),
        ("wait", 3, 4),
    ]
    assert [each.get("remaining_s") for each in told] == [None, 15, 4]
