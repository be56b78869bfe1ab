"""The table of jobs: duplicates join the first delivery, and each job's state is remembered."""

from concurrent.futures import Future

import pytest

from ourvidz_serverless.context import Bounds, JobContext, Stop, discard
from ourvidz_serverless.document import Document, Failure
from ourvidz_serverless.errors import Cancelled, OutOfMemory
from ourvidz_serverless.job import Identity
from ourvidz_serverless.worker import job_table
from ourvidz_serverless.worker.job_table import JobTable
from tests.patience import PATIENCE_S, start

DONE = Document("job-1", "worker-1", "completed")
FAILED = Document("job-1", "worker-1", "failed", failure=Failure.of(OutOfMemory("does not fit")))


def identity(job_id: str = "job-1", user_id: str = "user-1", key: str | None = None) -> Identity:
    return Identity.of(user_id, key, job_id)


def context() -> JobContext:
    return JobContext(Stop(), discard, Bounds(600))


def do(table: JobTable, job: Identity, document: Document = DONE, seconds: float = 1.5) -> Document:
    """Run a job from its beginning to its end."""

    def call() -> Document:
        table.began(job, "sdxl_image_fast", context())
        table.ended(job, document, seconds)
        return document

    return table.run(job, Stop(), call)


class HeldJob:
    """A job that runs until `end` has a document, and deliveries that join it."""

    def __init__(self, table: JobTable) -> None:
        self.table = table
        self.began, self.end, self.stop = Future[None](), Future[Document](), Stop()
        self.posted: list[Document] = []
        self.first = start(table.run, identity(), self.stop, self._call)
        self.began.result(PATIENCE_S)

    def _call(self) -> Document:
        self.table.began(identity(), "sdxl_image_fast", context())
        self.began.set_result(None)
        document = self.end.result(PATIENCE_S)
        self.table.ended(identity(), document, 1.5)
        return document

    def join(self, stop: Stop | None = None, *, posts: bool = False) -> Future[Document]:
        """A second delivery; returns once it has joined."""
        joined = Future[None]()

        def post(document: Document) -> Document:
            self.posted.append(document)
            return document

        delivery = start(
            self.table.run,
            identity(),
            stop or Stop(),
            lambda: pytest.fail("a joined delivery ran the job again"),
            on_join=lambda: joined.set_result(None),
            post=post if posts else None,
        )
        joined.result(PATIENCE_S)
        return delivery


# --- duplicates ---


def test_a_duplicate_gets_the_document_of_the_first_delivery() -> None:
    job = HeldJob(JobTable())
    second = job.join()
    job.end.set_result(DONE)

    assert job.first.result(PATIENCE_S) is second.result(PATIENCE_S) is DONE


def test_the_first_joined_delivery_with_a_post_posts_for_all() -> None:
    job = HeldJob(JobTable())
    deliveries = [job.join(posts=posts) for posts in (False, True, True)]
    job.end.set_result(DONE)

    assert [each.result(PATIENCE_S) for each in deliveries] == [DONE] * 3
    assert job.posted == [DONE]


def test_a_stop_of_a_duplicate_stops_the_job() -> None:
    job, stop = HeldJob(JobTable()), Stop()
    second = job.join(stop)
    stop.set()
    job.stop.wait(PATIENCE_S)
    job.end.set_result(FAILED)

    assert second.result(PATIENCE_S) is FAILED
    assert isinstance(job.stop.error, Cancelled)


def test_a_job_that_ended_runs_again_when_it_is_delivered_again() -> None:
    table = JobTable()
    do(table, identity(), FAILED)

    assert do(table, identity()) is DONE


def test_an_error_of_a_call_reaches_every_delivery_and_leaves_no_job() -> None:
    table = JobTable()
    job = HeldJob(table)
    second = job.join()
    job.end.set_exception(KeyboardInterrupt())

    for delivery in (job.first, second):
        with pytest.raises(KeyboardInterrupt):
            delivery.result(PATIENCE_S)
    assert table.counts()["processing"] == 0


# --- what is remembered ---


def test_a_running_job_is_found_with_its_type_and_time() -> None:
    table = JobTable()
    job = HeldJob(table)

    found = table.find(identity())
    job.end.set_result(DONE)

    assert found is not None
    assert (found["status"], found["type"]) == ("processing", "sdxl_image_fast")
    assert found["processing_time"] >= 0


def test_a_job_that_ended_is_found_with_its_status_and_error() -> None:
    table = JobTable()
    do(table, identity(), FAILED)

    assert table.find(identity()) == {
        "status": "failed",
        "type": "sdxl_image_fast",
        "processing_time": 1.5,
        "error": {"code": "OOM_ERROR", "message": "does not fit", "retryable": True},
    }


@pytest.mark.parametrize(
    "other", [identity("job-2"), identity(user_id="user-2"), identity(key="a-key")]
)
def test_a_job_is_found_only_by_its_own_id_user_and_key(other: Identity) -> None:
    table = JobTable()
    do(table, identity())

    assert table.find(other) is None


def test_a_job_that_was_refused_before_it_began_is_neither_found_nor_counted() -> None:
    table = JobTable()

    def refuse() -> Document:
        table.ended(identity(), FAILED, 0.1)
        return FAILED

    table.run(identity(), Stop(), refuse)

    assert table.find(identity()) is None
    assert table.counts() == {"processing": 0, "completed": 0, "failed": 0}


def test_running_and_ended_jobs_are_counted() -> None:
    table = JobTable()
    for name, document in (("a", DONE), ("b", FAILED), ("c", DONE)):
        do(table, identity(name), document)
    job = HeldJob(table)
    counts = table.counts()
    job.end.set_result(DONE)

    assert counts == {"processing": 1, "completed": 2, "failed": 1}


def test_the_oldest_ended_job_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_table, "MAX_ENDED", 2)
    table = JobTable()
    for name in ("a", "b", "a", "c"):
        do(table, identity(name))

    assert [table.find(identity(name)) is None for name in "abc"] == [False, True, False]
    assert table.counts()["completed"] == 4


def test_stop_all_reaches_every_running_job() -> None:
    table = JobTable()
    job = HeldJob(table)
    table.stop_all(lambda stop: stop.set(OutOfMemory("all of them")))
    job.end.set_result(FAILED)

    assert isinstance(job.stop.error, OutOfMemory)
