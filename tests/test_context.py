"""What a running job tells of its progress."""

from typing import Any

from ourvidz_serverless.context import JobContext, Stop


def test_the_rest_is_estimated_by_the_pace_since_a_stages_first_step() -> None:
    now = [100.0]
    told: list[Any] = []
    context = JobContext(Stop(), told.append, 600, clock=lambda: now[0])

    # The first step is also the one that warms up.
    for done, at in ((1, 130.0), (2, 132.0), (4, 136.0)):
        now[0] = at
        context.step("generate", done, 10)
    context.step("polish", 1, 2)

    assert [each.get("remaining_s") for each in told] == [None, 16.0, 12.0, None]


def test_a_stage_that_is_tried_again_is_estimated_by_the_pace_of_the_new_try() -> None:
    now = [0.0]
    told: list[Any] = []
    context = JobContext(Stop(), told.append, 600, clock=lambda: now[0])

    # The first try ends without memory after its last step; the second one is slower.
    for done, at in ((1, 1.0), (2, 2.0), (10, 10.0), (1, 60.0), (2, 63.0), (4, 69.0)):
        now[0] = at
        context.step("generate", done, 10)

    assert [each.get("remaining_s") for each in told] == [None, 8.0, 0.0, None, 24.0, 18.0]
