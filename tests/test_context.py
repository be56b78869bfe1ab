"""A running job's progress, and when its time is over."""

import math
from typing import Any

import pytest

from ourvidz_serverless.context import Bounds, JobContext, Stop
from ourvidz_serverless.errors import DeadlinePassed
from tests.fakes.clock import Clock


def test_the_remaining_time_is_estimated_from_the_pace_since_a_stages_first_step() -> None:
    now = [100.0]
    reports: list[Any] = []
    context = JobContext(Stop(), reports.append, Bounds(600), clock=lambda: now[0])

    # The first step includes the warm-up, so its time does not count.
    for done, at in ((1, 130.0), (2, 132.0), (4, 136.0)):
        now[0] = at
        context.step("generate", done, 10)
    context.step("polish", 1, 2)

    assert [each.get("remaining_s") for each in reports] == [None, 16.0, 12.0, None]


def test_a_stage_that_starts_again_is_estimated_from_its_new_pace() -> None:
    now = [0.0]
    reports: list[Any] = []
    context = JobContext(Stop(), reports.append, Bounds(600), clock=lambda: now[0])

    # The first try runs out of memory after its last step; the second try is slower.
    for done, at in ((1, 1.0), (2, 2.0), (10, 10.0), (1, 60.0), (2, 63.0), (4, 69.0)):
        now[0] = at
        context.step("generate", done, 10)

    assert [each.get("remaining_s") for each in reports] == [None, 8.0, 0.0, None, 24.0, 18.0]


# --- a wait for the device ---


def job_with(work_s: float, wait_s: float = math.inf, total_s: float = math.inf) -> Any:
    """A job with these bounds, its clock, and its reports of progress."""
    clock, reports = Clock(), list[Any]()
    return (
        JobContext(Stop(), reports.append, Bounds(work_s, wait_s, total_s), clock),
        clock,
        reports,
    )


def test_the_time_for_work_stands_still_while_a_job_waits_for_the_device() -> None:
    context, clock, _ = job_with(work_s=10)
    clock.advance(4)
    with context.waiting() as report_ahead:
        clock.advance(500)
        report_ahead(1)

    assert (context.remaining_s, context.waited_s, context.elapsed_s) == (6, 500, 504)
    assert context.timings == {"wait": 500}
    clock.advance(6)
    with pytest.raises(DeadlinePassed, match=r"^the job's 10 seconds are over$"):
        context.check()


def test_the_wait_limit_counts_all_waits_of_a_job_together() -> None:
    context, clock, _ = job_with(work_s=10, wait_s=300)
    with context.waiting() as report_ahead:
        clock.advance(200)
        report_ahead(1)

    with context.waiting() as report_ahead:
        clock.advance(100)
        with pytest.raises(DeadlinePassed, match=r"^the job waited 300 s for the device$"):
            report_ahead(1)


def test_a_wait_that_ended_in_time_leaves_the_time_for_work() -> None:
    context, clock, _ = job_with(work_s=10, wait_s=300)
    with context.waiting():
        clock.advance(300)

    assert context.stop_reason is None
    assert context.remaining_s == 10


@pytest.mark.parametrize("is_waiting", [True, False])
def test_wait_and_work_together_end_at_the_total_limit(is_waiting: bool) -> None:
    context, clock, _ = job_with(work_s=500, wait_s=600, total_s=570)
    with pytest.raises(
        DeadlinePassed,
        match=r"^the job waited (570|400) s for the device, and its 570 seconds are over$",
    ):
        with context.waiting() as report_ahead:
            clock.advance(570 if is_waiting else 400)
            report_ahead(1)
        assert context.remaining_s == 170
        clock.advance(170)
        context.check()


def test_a_waiting_job_reports_each_new_number_of_jobs_ahead_once() -> None:
    context, clock, reports = job_with(work_s=10)
    with context.waiting() as report_ahead:
        for ahead, at in ((4, 0), (4, 1), (3, 5), (3, 6), (1, 12)):
            clock.seconds = at
            report_ahead(ahead)

    assert [(each["stage"], each["step"], each["steps"]) for each in reports] == [
        ("wait", 0, 4),
        ("wait", 1, 4),
        ("wait", 3, 4),
    ]
    assert [each.get("remaining_s") for each in reports] == [None, 15, 4]
