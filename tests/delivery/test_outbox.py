"""A document that cannot be posted is stored. A job without a key does not choose where."""

from pathlib import Path

import pytest

from ourvidz_serverless.context import Bounds, JobContext, Stop
from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.outbox import Outbox
from ourvidz_serverless.delivery.storage.directory import DirectoryStorage
from ourvidz_serverless.document import Document, Failure
from ourvidz_serverless.errors import InvalidPrompt, JobError, Unauthorized
from ourvidz_serverless.job import Job
from tests.fakes.local_worker import QUICK
from tests.servers.supabase import CallbackReceiver

JOB = Job(id="job-1", type="sdxl_image_fast", user_id="user-1")


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (InvalidPrompt("x"), "user-1/job-1/callback.failed.json"),
        (Unauthorized("x"), "undelivered/job-1/callback.failed.json"),
    ],
)
def test_a_job_without_a_key_does_not_choose_where_its_refusal_is_stored(
    error: JobError, key: str, tmp_path: Path, receiver: CallbackReceiver
) -> None:
    receiver.script([410])
    outbox = Outbox(
        Callback(receiver.callback_url, policy=QUICK), lambda job: DirectoryStorage(tmp_path)
    )
    document = Document("job-1", "worker-1", "failed", failure=Failure.of(error))
    context = JobContext(Stop(), lambda progress: None, Bounds(60.0))

    posted = outbox.post(document, None, lambda: JOB, context)

    assert posted.metadata["callback"]["kept"] == key
    assert (tmp_path / key).is_file()


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (InvalidPrompt("x"), "user-1/job-1/result.failed.json"),
        (Unauthorized("x"), "undelivered/job-1/result.failed.json"),
    ],
)
def test_a_job_without_a_key_does_not_choose_where_its_result_is_stored(
    error: JobError, key: str, tmp_path: Path
) -> None:
    outbox = Outbox(Callback(None), lambda job: DirectoryStorage(tmp_path))
    document = Document("job-1", "worker-1", "failed", failure=Failure.of(error))

    assert outbox.keep_result(document.result(), "job-1", lambda: JOB) == key
    assert (tmp_path / key).is_file()


@pytest.mark.parametrize(
    ("status", "logged"), [(200, ""), (410, "job job-1 could not be announced: HTTP 410")]
)
def test_only_a_start_that_cannot_be_announced_is_logged(
    status: int,
    logged: str,
    tmp_path: Path,
    receiver: CallbackReceiver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    receiver.script([status])
    callback = Callback(receiver.callback_url, receiver.secret, policy=QUICK)
    outbox = Outbox(callback, lambda job: DirectoryStorage(tmp_path))
    document = Document("job-1", "worker-1", "processing")

    outbox.announce(document, None, JobContext(Stop(), lambda progress: None, Bounds(60.0)))

    assert "\n".join(caplog.messages) == logged
