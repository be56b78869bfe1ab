"""A worker's phases only move forward, and a lost device is never found again."""

import logging

import pytest

from ourvidz_serverless.errors import WorkerUnavailable
from ourvidz_serverless.worker.state import Phase, UnavailableReason, WorkerState


@pytest.mark.parametrize(
    ("phase", "reason"),
    [(Phase.OPEN, None), (Phase.LEAVING, "shutting_down"), (Phase.CLOSED, "shutting_down")],
)
def test_a_worker_that_shuts_down_is_unavailable(
    phase: Phase, reason: UnavailableReason | None
) -> None:
    state = WorkerState()
    state.reach(phase)

    assert state.unavailable_reason == reason


def test_a_worker_accepts_jobs_until_it_is_closed() -> None:
    state = WorkerState()
    state.check_open()
    state.reach(Phase.LEAVING)
    state.check_open()
    state.reach(Phase.CLOSED)

    with pytest.raises(WorkerUnavailable, match=r"^the worker is shutting down$"):
        state.check_open()


def test_a_closed_worker_stays_closed() -> None:
    state = WorkerState()
    state.reach(Phase.CLOSED)
    state.reach(Phase.LEAVING)

    with pytest.raises(WorkerUnavailable):
        state.check_open()


def test_a_worker_that_lost_its_device_is_unhealthy_in_every_phase() -> None:
    state = WorkerState()
    state.check_device()
    state.lose_device()
    state.reach(Phase.CLOSED)

    assert state.is_lost
    assert state.unavailable_reason == "unhealthy"
    with pytest.raises(WorkerUnavailable, match="this worker's device failed"):
        state.check_device()


def test_a_lost_device_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "ourvidz")
    state = WorkerState()
    state.lose_device()
    state.lose_device()

    assert caplog.text.count("takes no more work") == 1
