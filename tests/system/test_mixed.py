"""One worker for everything on a card that is too small for all of it, behind the real loop."""

import pytest

from benchmarks.mixed import Day


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stream_of_mixed_jobs_ends_well_and_models_take_turns() -> None:
    with Day(budget=0.022) as day:
        for _ in day.each_kind():
            pass
        before = day.size()
        for _ in day.each_kind():
            pass

        rows = {row["name"]: row for row in day.report()["models"]}
        after = day.size()

    # Either drove the other out, and both came back.
    assert rows["sdxl"]["loads"] > 1 and rows["wan_t2v"]["loads"] > 1
    assert not [row for row in rows.values() if row["users"] or row["state"] == "absent"]
    assert after["files"] <= before["files"] + 4
    assert after["temporary"] == before["temporary"]
