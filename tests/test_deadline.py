"""A deadline says how many seconds are left, for a request as for a sleep."""

import math
import threading

import pytest

from ourvidz_serverless.context import Bounds, JobContext, Stop
from ourvidz_serverless.deadline import NEVER, Deadline, current
from tests.fakes.clock import Clock
from tests.patience import PATIENCE_S


def test_of_two_deadlines_the_earlier_one_counts() -> None:
    clock = Clock()
    job = Deadline(lambda: 8.0 - clock())

    seconds_left = [job.within(each, clock).remaining_s() for each in (5.0, 20.0)]

    assert seconds_left == [5.0, 8.0]


def test_a_deadline_within_another_sleeps_as_that_one_does() -> None:
    naps: list[float] = []

    Deadline(sleep=naps.append).within(5.0).sleep(2.0)

    assert naps == [2.0]


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_there_is_no_timeout_after_the_deadline(seconds: float) -> None:
    with pytest.raises(TimeoutError):
        Deadline(lambda: seconds).timeout_s()


@pytest.mark.parametrize(("longest", "timeout_s"), [(2.0, 2.0), (9.0, 7.0), (math.inf, 7.0)])
def test_a_timeout_ends_at_the_deadline(longest: float, timeout_s: float) -> None:
    assert Deadline(lambda: 7.0).timeout_s(longest) == timeout_s


def test_a_deadline_is_current_while_it_is_applied_and_in_its_own_thread_only() -> None:
    seen: list[Deadline] = []

    with Deadline(lambda: 1.0).applied():
        with (inner := Deadline(lambda: 2.0)).applied():
            assert current() is inner
            other = threading.Thread(target=lambda: seen.append(current()))
            other.start()
            other.join(PATIENCE_S)
        assert current().remaining_s() == 1.0

    assert (current(), seen) == (NEVER, [NEVER])


def test_a_stopped_job_has_no_time_left_and_sleeps_no_longer() -> None:
    stop = Stop()
    deadline = JobContext(stop, lambda update: None, Bounds(60.0)).deadline
    assert deadline.remaining_s() > 0

    stop.set()

    deadline.sleep(3600)
    assert deadline.remaining_s() == 0
