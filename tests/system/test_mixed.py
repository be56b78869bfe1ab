"""One worker for all families on a device that is too small for all models, with the real loop."""

import pytest

from benchmarks.mixed import MixedJobs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mixed_jobs_complete_though_their_models_evict_each_other() -> None:
    with MixedJobs(budget=0.022) as mixed:
        for _ in mixed.each_kind():
            pass
        before = mixed.size()
        for _ in mixed.each_kind():
            pass

        rows = {row["name"]: row for row in mixed.report()["models"]}
        after = mixed.size()

    # Each model evicted the other, and both were loaded again.
    assert rows["sdxl"]["loads"] > 1 and rows["wan_t2v"]["loads"] > 1
    assert not [row for row in rows.values() if row["users"] or row["state"] == "absent"]
    assert after["files"] <= before["files"] + 4
    assert after["temporary"] == before["temporary"]
