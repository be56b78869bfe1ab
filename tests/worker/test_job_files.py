"""A job's files: where its assets go, who signs them, and what a stop ends."""

import base64
import hashlib
import io
import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

from ourvidz_serverless.context import Bounds, JobContext, discard
from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.storage.choose import open_storage
from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.job import Job
from ourvidz_serverless.output import Output
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.worker.job_files import JobFiles
from tests.fakes.local_worker import QUICK, LocalWorker, sdxl_payload
from tests.servers.s3 import SeaweedServer
from tests.servers.supabase import CallbackReceiver

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


# --- inline ---


def inline(local: MakeLocal, **parts: Any) -> LocalWorker:
    settings = Settings(storage_url="inline:")
    return local(settings=settings, storage=open_storage(settings), **parts)


def bytes_in(url: str) -> bytes:
    return base64.b64decode(url.partition(";base64,")[2], validate=True)


def test_an_inline_worker_puts_each_picture_into_the_document_and_nothing_on_a_disk(
    local: MakeLocal,
) -> None:
    at = inline(local)

    assets = at.run(sdxl_payload(config={"num_images": 3})).assets

    for asset in assets:
        with Image.open(io.BytesIO(bytes_in(asset.url))) as picture:
            red = picture.getpixel((0, 0))
        assert red == (asset.metadata["seed"],) * 3
        assert asset.thumbnail_url is None
    assert at.stored() == []


def test_the_audit_of_an_inline_worker_has_the_digest_of_each_file(
    local: MakeLocal, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ourvidz.audit")

    (asset,) = inline(local).run().assets

    digest = hashlib.sha256(bytes_in(asset.url)).hexdigest()
    assert f'"stored_sha256": {{"0.png": "{digest}"}}' in caplog.text


def test_nothing_of_an_inline_picture_is_in_the_log(
    local: MakeLocal, caplog: pytest.LogCaptureFixture, receiver: CallbackReceiver
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver.script([410])
    callback = Callback(receiver.callback_url, receiver.secret, policy=QUICK)

    (asset,) = inline(local, callback=callback).run().assets

    assert "callback of job job-1 was not delivered" in caplog.text
    assert "data:" not in caplog.text
    assert asset.url[30:60] not in caplog.text


def test_the_callback_of_an_inline_worker_has_the_same_picture(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    at = inline(local, callback=Callback(receiver.callback_url, receiver.secret, policy=QUICK))

    document = at.run()

    (posted,) = receiver.wait()
    assert posted.document == document.callback()


def test_an_inline_document_whose_callback_fails_is_returned_with_its_picture(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    receiver.script([410])
    at = inline(local, callback=Callback(receiver.callback_url, receiver.secret, policy=QUICK))

    document = at.run()

    assert document.metadata["callback"] == {
        "delivered": False,
        "reason": "HTTP 410",
        "kept": None,
    }
    assert bytes_in(document.assets[0].url)


def test_the_bucket_of_a_job_wins_over_an_inline_worker(
    local: MakeLocal, s3: SeaweedServer
) -> None:
    settings = Settings(storage_url="inline:", s3_config_hosts=("127.0.0.1",))
    at = local(settings=settings, storage=open_storage(settings))
    config = {
        "bucketName": s3.bucket,
        "endpointUrl": s3.endpoint,
        "accessId": s3.access_key,
        "accessSecret": s3.secret_key,
    }

    (asset,) = at.run(s3Config=config).assets

    assert (asset.url, asset.thumbnail_url) == ("user-1/job-1/0.png", "user-1/job-1/0.thumb.webp")


def test_a_stored_reference_at_an_inline_worker_says_that_nothing_is_stored(
    local: MakeLocal,
) -> None:
    document = inline(local).run(sdxl_payload(metadata={"reference_image_url": "user-1/a/0.png"}))

    assert document.status == "completed"
    assert document.metadata["warnings"] == [
        "reference: storage could not read the path; generated without it"
    ]


# --- on RunPod ---


@pytest.mark.parametrize(
    ("env", "is_warned"),
    [
        ({"STORAGE_URL": "file:outputs", "RUNPOD_POD_ID": "pod"}, True),
        ({"STORAGE_URL": "file:/runpod-volume/assets", "RUNPOD_POD_ID": "pod"}, False),
        ({"STORAGE_URL": "file:outputs", "RUNPOD_POD_ID": "pod", "SERVE": "http"}, False),
        ({"STORAGE_URL": "file:outputs"}, False),
        ({"RUNPOD_POD_ID": "pod"}, False),
    ],
)
def test_a_folder_that_nobody_can_reach_is_warned_of_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    env: dict[str, str],
    is_warned: bool,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    JobFiles.of(Settings())

    assert ("STORAGE_URL: nobody can reach the disk" in caplog.text) == is_warned
