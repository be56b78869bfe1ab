"""A job's files: where its assets go, who signs them, and what a stop ends."""

import hashlib
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from ourvidz_serverless.context import Bounds, JobContext, discard
from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.job import Job
from ourvidz_serverless.output import Output
from ourvidz_serverless.settings import Settings
from tests.fakes.local_worker import LocalWorker
from tests.servers.s3 import SeaweedServer

MakeLocal = Callable[..., LocalWorker]

JOB = Job(id="job-1", type="sdxl_image_fast", user_id="user-1")
PICTURE = Output(0, np.zeros((8, 8, 3), np.uint8), {"seed": 7})


def context_of(at: LocalWorker) -> JobContext:
    return JobContext(at.stop, discard, Bounds(600))


def test_no_upload_begins_once_its_job_is_stopped(local: MakeLocal) -> None:
    at = local()

    with at.files.delivery(JOB, context_of(at)) as delivery:
        at.stop.set()
        delivery.submit(PICTURE)
        with pytest.raises(Cancelled):
            delivery.assets(lambda: None)

    assert at.stored() == []


def test_the_audit_has_the_digest_of_every_stored_file(local: MakeLocal) -> None:
    at = local()
    context = context_of(at)

    with at.files.delivery(JOB, context) as delivery:
        delivery.submit(PICTURE)
        delivery.assets(context.check)

    folder = at.root / "user-1/job-1"
    assert context.audit["stored_sha256"] == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()
    }


def test_a_presigned_url_lives_as_long_as_presigned_expiry_s_says(
    local: MakeLocal, s3: SeaweedServer
) -> None:
    settings = Settings(asset_url_style="presigned", presigned_expiry_s=90)
    at = local(settings=settings, storage=s3.storage())

    (asset,) = at.run().assets

    for url in (asset.url, asset.thumbnail_url):
        assert parse_qs(urlsplit(url or "").query)["X-Amz-Expires"] == ["90"]
