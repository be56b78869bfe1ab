"""A call that fails is tried again, if the error is one that passes and if time is left."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.net.retries import Fault, Retry, is_transient, retry


class Failing:
    """A call that raises its errors in turn, then returns."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "done"


class Asking(Exception):
    def __init__(self, retry_after: float | None) -> None:
        self.retry_after = retry_after


def test_a_call_is_tried_again_with_growing_waits() -> None:
    naps: list[float] = []
    call = Failing(OSError(), OSError(), OSError())
    policy = Retry(tries=4, jitter=0)

    assert retry(call, on=OSError, policy=policy, deadline=Deadline(sleep=naps.append)) == "done"
    assert naps == [0.5, 1.0, 2.0]


def test_the_last_error_is_the_one_raised() -> None:
    last = OSError("third")
    call = Failing(OSError("first"), OSError("second"), last)

    with pytest.raises(OSError) as raised:
        retry(call, on=(OSError, KeyError), policy=Retry(), deadline=Deadline(sleep=lambda s: None))
    assert raised.value is last


@pytest.mark.parametrize("on", [OSError, (OSError, TimeoutError), lambda error: False])
def test_an_error_that_is_not_named_is_raised_at_once(on: object) -> None:
    call = Failing(KeyError("x"), KeyError("y"))

    with pytest.raises(KeyError):
        retry(call, on=on, policy=Retry(), deadline=Deadline(sleep=must_not_sleep))
    assert len(call.errors) == 1


def must_not_sleep(seconds: float) -> None:
    raise AssertionError(f"slept {seconds} s")


@pytest.mark.parametrize(("asked", "waited"), [(None, 0.5), (0.1, 0.5), (4.0, 4.0), (99.0, 10.0)])
def test_an_error_may_ask_for_a_longer_wait(asked: float | None, waited: float) -> None:
    naps: list[float] = []
    policy, deadline = Retry(jitter=0), Deadline(sleep=naps.append)
    retry(Failing(Asking(asked)), on=Asking, policy=policy, deadline=deadline)

    assert naps == [waited]


@pytest.mark.parametrize(
    ("status", "transient"),
    [(None, True), (408, True), (425, True), (429, True), (500, True), (522, True)]
    + [(status, False) for status in (301, 400, 403, 404, 409, 413, 422)],
)
def test_a_fault_is_transient_where_the_other_side_is_busy_or_gone(
    status: int | None, transient: bool
) -> None:
    assert is_transient(Fault(status)) is transient
    assert not is_transient(OSError())


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7.0), (None, None), ("", None), ("-1", None), ("²", None)]
)
def test_a_fault_reads_the_seconds_that_were_asked_for(
    header: str | None, seconds: float | None
) -> None:
    assert Fault(429, header).retry_after == seconds


def test_a_wait_that_outlasts_the_time_left_is_not_begun() -> None:
    with pytest.raises(OSError):
        retry(
            Failing(OSError()),
            on=OSError,
            policy=Retry(),
            deadline=Deadline(lambda: 0.1, must_not_sleep),
        )


@pytest.mark.parametrize(("drawn", "waited"), [(0.0, 0.75), (0.5, 1.0), (1.0, 1.25)])
def test_a_wait_is_drawn_from_a_quarter_below_its_length_to_a_quarter_above(
    drawn: float, waited: float
) -> None:
    assert Retry(base_s=1.0).wait_s(1, draw=lambda: drawn) == waited


@given(st.integers(1, 100_000), st.floats(0, 1), st.none() | st.floats(0, 1e9))
def test_a_wait_is_never_negative_nor_above_its_limit(
    failures: int, drawn: float, asked: float | None
) -> None:
    assert 0 <= Retry().wait_s(failures, asked, lambda: drawn) <= Retry().max_s
