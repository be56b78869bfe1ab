"""A job that killed its worker twice is refused by every worker that shares the folder."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ourvidz_serverless.document import Document
from ourvidz_serverless.errors import OutOfMemory
from ourvidz_serverless.guard.poison_jobs import MAX_MARK_AGE_S, PoisonJobs
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.settings import Settings
from tests import patience
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.patience import PATIENCE_S
from tests.servers.handler import failure, start
from tests.servers.runpod import Platform
from tests.servers.supabase import CallbackReceiver

MakeLocal = Callable[..., LocalWorker]
LONG = {"config": {"num_inference_steps": 50, "num_images": 6, "resolution": "256x256"}}


@pytest.fixture
def at(local: MakeLocal, tmp_path: Path) -> LocalWorker:
    return local(settings=Settings(poison_dir=tmp_path / "poison"))


def marks(at: LocalWorker) -> dict[str, int]:
    assert at.settings.poison_dir
    return {mark.name: mark.stat().st_size for mark in at.settings.poison_dir.iterdir()}


def code(document: Document) -> str | None:
    return document.failure.code if document.failure else None


def die(at: LocalWorker, times: int) -> None:
    """Leave the marks of processes that died while `job-1` ran."""
    identity = Envelope.of({"input": sdxl_payload()}).identity
    for _ in range(times):
        PoisonJobs(at.settings.poison_dir).mark_started(identity)


def test_only_a_running_job_has_a_mark(at: LocalWorker) -> None:
    at.fake_sdxl.hold()
    running = patience.start(at.run)
    assert at.fake_sdxl.at_step.wait(PATIENCE_S)
    running_marks = marks(at)
    at.fake_sdxl.go_on.set()
    running.result(PATIENCE_S)

    assert list(running_marks.values()) == [1]
    assert marks(at) == {}


def test_a_failed_job_leaves_no_mark(at: LocalWorker) -> None:
    at.fake_sdxl.fails = [OutOfMemory("does not fit")]

    at.run()

    assert marks(at) == {}


def test_a_job_of_the_same_id_and_another_user_or_key_is_not_refused(at: LocalWorker) -> None:
    die(at, times=2)

    assert code(at.run(sdxl_payload(user_id="user-2"))) is None
    assert code(at.run(sdxl_payload(api_key="another"))) is None


def test_a_job_that_killed_one_process_runs_again(at: LocalWorker) -> None:
    die(at, times=1)

    assert code(at.run()) is None
    assert marks(at) == {}


def test_a_job_that_killed_two_processes_is_refused_from_then_on(at: LocalWorker) -> None:
    die(at, times=2)

    documents = [at.run() for _ in range(2)]

    assert [code(each) for each in documents] == ["INVALID_PROMPT"] * 2
    assert documents[0].failure is not None
    assert not documents[0].failure.retryable
    assert documents[0].failure.message.startswith("id: this job has ended its worker twice")


def test_other_jobs_and_other_users_jobs_run_after_two_deaths(at: LocalWorker) -> None:
    die(at, times=2)

    assert code(at.run(sdxl_payload(id="job-2"))) is None
    assert code(at.run(sdxl_payload(user_id="user-2"))) is None


def test_a_refusal_for_another_reason_keeps_the_mark(at: LocalWorker) -> None:
    die(at, times=1)

    at.run(sdxl_payload(prompt="nude child"))

    assert list(marks(at).values()) == [1]


def test_a_job_is_marked_although_another_worker_removes_its_old_mark(tmp_path: Path) -> None:
    identity = Envelope.of({"input": sdxl_payload()}).identity

    def clock() -> float:
        for mark in tmp_path.iterdir():
            mark.unlink()
        return time.time() + MAX_MARK_AGE_S + 60

    jobs = PoisonJobs(tmp_path, clock)
    PoisonJobs(tmp_path).mark_started(identity)

    jobs.mark_started(identity)

    assert [mark.stat().st_size for mark in tmp_path.iterdir()] == [1]


def test_old_marks_are_removed_at_the_start(tmp_path: Path) -> None:
    old, new = (tmp_path / (digit * 64) for digit in "01")
    for mark in (old, new):
        mark.write_bytes(b"..")
    os.utime(old, (0, 0))

    PoisonJobs(tmp_path, clock=lambda: new.stat().st_mtime + MAX_MARK_AGE_S - 1)

    assert list(tmp_path.iterdir()) == [new]


def test_a_file_that_is_no_mark_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"..")
    os.utime(tmp_path / "checkpoint.safetensors", (0, 0))

    PoisonJobs(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_mark_that_became_old_since_the_start_does_not_count(
    at: LocalWorker, tmp_path: Path
) -> None:
    die(at, times=2)
    for mark in (tmp_path / "poison").iterdir():
        os.utime(mark, (0, 0))

    assert code(at.run()) is None
    assert marks(at) == {}


def test_a_job_runs_if_its_mark_cannot_be_written(at: LocalWorker, tmp_path: Path) -> None:
    (tmp_path / "poison").rmdir()
    (tmp_path / "poison").write_text("a file")

    assert code(at.run()) is None


@pytest.mark.slow
def test_a_third_process_refuses_a_job_that_killed_two(tmp_path: Path) -> None:
    with Platform() as platform, CallbackReceiver() as receiver:
        env = {
            "STORAGE_URL": f"file:{tmp_path}/assets",
            "POISON_DIR": f"{tmp_path}/poison",
            "CALLBACK_URL": receiver.callback_url,
            "JOB_CALLBACK_SECRET": receiver.secret,
        }
        for _ in range(2):
            with start(platform, **env) as process:
                platform.submit(sdxl_payload(**LONG), id="poison")
                before = len(platform.updates("poison"))
                platform.wait_for_updates("poison", before + 1)
                os.kill(process.pid, signal.SIGKILL)
                assert process.wait(PATIENCE_S) == -signal.SIGKILL

        with start(platform, **env):
            platform.submit(sdxl_payload(**LONG), id="poison")
            platform.result("poison")
            after = platform.submit(sdxl_payload(id="job-2"))

            assert platform.result(after)["output"]["status"] == "completed"
        assert failure(platform.status("poison"))["code"] == "INVALID_PROMPT"
        statuses = [each.document["status"] for each in receiver.received]
        assert statuses == ["failed", "completed"]
