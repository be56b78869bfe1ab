"""A job that killed its worker twice is refused, whoever it is sent to."""

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ourvidz_serverless.document import Document
from ourvidz_serverless.errors import OutOfMemory
from ourvidz_serverless.guard.poison_jobs import MAX_MARK_AGE_S, PoisonJobs
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.settings import Settings
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.patience import PATIENCE_S
from tests.servers.handler import failure, start
from tests.servers.runpod import Platform
from tests.servers.supabase import CallbackReceiver

MakeLocal = Callable[..., LocalWorker]
LONG = {"config": {"num_inference_steps": 50, "num_images": 6, "resolution": "256x256"}}


@pytest.fixture
def at(local: MakeLocal, tmp_path: Path) -> LocalWorker:
    return local(settings=Settings(poison_dir=tmp_path / "pills"))


def marks(at: LocalWorker) -> dict[str, int]:
    assert at.settings.poison_dir
    return {mark.name: mark.stat().st_size for mark in at.settings.poison_dir.iterdir()}


def code(document: Document) -> str | None:
    return document.failure.code if document.failure else None


def die(at: LocalWorker, times: int) -> None:
    """What processes do that end with `job-1` in flight."""
    identity = Envelope.of({"input": sdxl_payload()}).identity
    for _ in range(times):
        PoisonJobs(at.settings.poison_dir).mark_started(identity)


def test_a_job_in_flight_is_marked_and_one_that_ended_is_not(at: LocalWorker) -> None:
    at.fake_sdxl.hold()
    with ThreadPoolExecutor() as threads:
        running = threads.submit(at.run)
        assert at.fake_sdxl.at_step.wait(PATIENCE_S)
        in_flight = marks(at)
        at.fake_sdxl.go_on.set()
        running.result(PATIENCE_S)

    assert list(in_flight.values()) == [1]
    assert marks(at) == {}


def test_a_job_that_failed_has_ended_too(at: LocalWorker) -> None:
    at.fake_sdxl.fails = [OutOfMemory("does not fit")]

    at.run()

    assert marks(at) == {}


def test_another_users_job_of_the_same_id_is_not_refused(at: LocalWorker) -> None:
    die(at, times=2)

    assert code(at.run(sdxl_payload(user_id="user-2"))) is None
    assert code(at.run(sdxl_payload(api_key="another"))) is None


def test_one_death_is_forgiven(at: LocalWorker) -> None:
    die(at, times=1)

    assert code(at.run()) is None
    assert marks(at) == {}


def test_after_two_a_job_is_refused_and_stays_so(at: LocalWorker) -> None:
    die(at, times=2)

    documents = [at.run() for _ in range(2)]

    assert [code(each) for each in documents] == ["INVALID_PROMPT"] * 2
    assert documents[0].failure is not None
    assert not documents[0].failure.retryable
    assert documents[0].failure.message.startswith("id: this job has ended its worker twice")


def test_another_job_and_another_users_job_of_that_name_are_done(at: LocalWorker) -> None:
    die(at, times=2)

    assert code(at.run(sdxl_payload(id="job-2"))) is None
    assert code(at.run(sdxl_payload(user_id="user-2"))) is None


def test_a_refusal_for_another_reason_forgives_nothing(at: LocalWorker) -> None:
    die(at, times=1)

    at.run(sdxl_payload(prompt="nude child"))

    assert list(marks(at).values()) == [1]


def test_old_marks_are_forgotten_at_the_start(tmp_path: Path) -> None:
    old, new = (tmp_path / (digit * 64) for digit in "01")
    for mark in (old, new):
        mark.write_bytes(b"..")
    os.utime(old, (0, 0))

    PoisonJobs(tmp_path, clock=lambda: new.stat().st_mtime + MAX_MARK_AGE_S - 1)

    assert list(tmp_path.iterdir()) == [new]


def test_a_file_that_is_no_mark_is_left_alone_however_old(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"..")
    os.utime(tmp_path / "checkpoint.safetensors", (0, 0))

    PoisonJobs(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_an_old_mark_counts_no_more_though_its_worker_started_before(
    at: LocalWorker, tmp_path: Path
) -> None:
    die(at, times=2)
    for mark in (tmp_path / "pills").iterdir():
        os.utime(mark, (0, 0))

    assert code(at.run()) is None
    assert marks(at) == {}


def test_a_folder_that_takes_no_marks_stops_no_job(at: LocalWorker, tmp_path: Path) -> None:
    (tmp_path / "pills").rmdir()
    (tmp_path / "pills").write_text("a file")

    assert code(at.run()) is None


@pytest.mark.slow
def test_a_job_that_killed_two_processes_is_refused_by_the_third(tmp_path: Path) -> None:
    with Platform() as platform, CallbackReceiver() as receiver:
        env = {
            "STORAGE_URL": f"file:{tmp_path}/assets",
            "POISON_DIR": f"{tmp_path}/pills",
            "CALLBACK_URL": receiver.callback_url,
            "JOB_CALLBACK_SECRET": receiver.secret,
        }
        for _ in range(2):
            with start(platform, **env) as process:
                platform.submit(sdxl_payload(**LONG), id="pill")
                before = len(platform.updates("pill"))
                platform.wait_for_updates("pill", before + 1)
                os.kill(process.pid, signal.SIGKILL)
                assert process.wait() == -signal.SIGKILL

        with start(platform, **env):
            platform.submit(sdxl_payload(**LONG), id="pill")
            platform.result("pill")
            after = platform.submit(sdxl_payload(id="job-2"))

            assert platform.result(after)["output"]["status"] == "completed"
        assert failure(platform.status("pill"))["code"] == "INVALID_PROMPT"
        told = [each.document["status"] for each in receiver.received]
        assert told == ["failed", "completed"]
