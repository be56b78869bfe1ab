"""One worker for all families on a device that is too small for all models, with the real loop."""

import pytest

from benchmarks.mixed import Day


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mixed_jobs_complete_though_their_models_evict_each_other() -> None:
    with Day(budget=0.022) as day:
        for _ in day.each_kind():
            pass
        before = day.size()
        for _ in day.each_kind():
            pass

        rows = {row["name"]: row for row in day.report()["models"]}
        after = day.size()

    # Each model evicted the other, and both were loaded again.
    assert rows["sdxl"]["loads"] > 1 and rows["wan_t2v"]["loads"] > 1
    assert not [row for row in rows.values() if row["users"] or row["state"] == "absent"]
    assert after["files"] <= before["files"] + 4
    assert after["temporary"] == before["temporary"]
