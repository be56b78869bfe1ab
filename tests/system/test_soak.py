"""Hundreds of jobs with random faults: each has one end, and the process does not grow."""

import tempfile
from pathlib import Path

import pytest

from tests.soak import ODDS, Soak

JOBS = 600


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Soak:
    folder = tmp_path_factory.mktemp("soak")
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    (folder / "root").mkdir()
    try:
        soak = Soak(folder / "root")
        soak.run(JOBS)
    finally:
        tempfile.tempdir = before
    return soak


@pytest.mark.slow
def test_no_job_is_lost_and_none_has_two_callbacks_in_a_soak(soaked: Soak) -> None:
    assert (soaked.lost, soaked.called_back_twice) == ([], [])
    assert sum(soaked.endings.values()) == JOBS


@pytest.mark.slow
def test_every_kind_of_fault_happens_in_a_soak(soaked: Soak) -> None:
    assert set(soaked.faults) == {*ODDS, "nothing"}
    assert soaked.kept > 0
    assert {"completed", "UPLOAD_ERROR", "CANCELLED", "TIMEOUT_ERROR"} <= set(soaked.endings)


@pytest.mark.slow
def test_the_process_does_not_grow_in_a_soak(soaked: Soak) -> None:
    first, last = soaked.sizes[0], soaked.sizes[-1]

    assert last.threads <= first.threads + 8  # The pool of delivery threads grows on demand.
    assert last.files <= first.files + 4
    assert last.temporary == first.temporary
    assert last.objects <= first.objects + 3000
    assert last.megabytes <= first.megabytes + 40


@pytest.mark.slow
def test_no_poison_mark_is_left_after_a_soak(soaked: Soak) -> None:
    assert list(Path(soaked.root / "poison").iterdir()) == []
