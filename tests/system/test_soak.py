"""Hundreds of jobs with random faults: each has one end, and the process does not grow."""

import tempfile
from dataclasses import replace
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
def test_no_job_is_lost_none_has_two_callbacks_and_nothing_grows_in_a_soak(soaked: Soak) -> None:
    assert soaked.defects() == []
    assert sum(soaked.endings.values()) == JOBS


@pytest.mark.slow
def test_a_soak_reports_what_is_lost_and_what_grows(soaked: Soak) -> None:
    leaking = replace(
        soaked,
        lost=["job-7"],
        called_back_twice=["job-8"],
        sizes=[soaked.sizes[0], replace(soaked.sizes[0], files=soaked.sizes[0].files + 600)],
    )

    lost, twice, files = leaking.defects()

    assert (lost, twice) == ("job-7 is lost", "job-8 was called back twice")
    assert files.startswith("files: ")


@pytest.mark.slow
def test_every_kind_of_fault_happens_in_a_soak(soaked: Soak) -> None:
    assert set(soaked.faults) == {*ODDS, "nothing"}
    assert soaked.kept > 0
    assert {"completed", "UPLOAD_ERROR", "CANCELLED", "TIMEOUT_ERROR"} <= set(soaked.endings)


@pytest.mark.slow
def test_no_poison_mark_is_left_after_a_soak(soaked: Soak) -> None:
    assert list(Path(soaked.root / "poison").iterdir()) == []
