"""A job's files at the caller's own presigned URLs: a real S3 server behind TLS."""

import hashlib
import io
import ipaddress
import logging
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from PIL import Image

from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.document import Document
from ourvidz_serverless.models.memory.device_memory import open_ledger
from ourvidz_serverless.models.safety import loader
from ourvidz_serverless.net.addresses import is_public
from ourvidz_serverless.net.policy import Policy
from ourvidz_serverless.settings import Settings
from tests.fakes.landscapes import BOAT, TREE, PainterSdxl
from tests.fakes.local_worker import QUICK, LocalWorker, sdxl_payload, wan_payload
from tests.patience import PATIENCE_S, start, wait_until
from tests.servers.broken_proxy import BrokenProxy, Fault
from tests.servers.https_server import NameServer
from tests.servers.s3 import SeaweedServer
from tests.servers.supabase import CallbackReceiver
from tests.serving.http.page_worker import GreyFrames

MakeLocal = Callable[..., LocalWorker]

#: The name of the S3 server, as its certificate has it.
HOST = "images.example"
LOOPBACK = ipaddress.ip_address("127.0.0.1")


class Bucket:
    """The S3 server under `HOST`: presigned URLs for it, and a policy that finds it."""

    def __init__(self, s3: SeaweedServer, authority: Path) -> None:
        self.s3, self.authority = s3, authority
        self.script: list[Fault] = ["pass"]
        self.names = NameServer()

    def url(self, key: str, **headers: str) -> str:
        """A URL that takes one file, as an application presigns it."""
        client = boto3.client(
            "s3",
            endpoint_url=f"https://{HOST}",
            region_name="us-east-1",
            aws_access_key_id=self.s3.access_key,
            aws_secret_access_key=self.s3.secret_key,
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
        )
        place = {"Bucket": self.s3.bucket, "Key": key, **headers}
        url: str = client.generate_presigned_url("put_object", place, ExpiresIn=600)
        return url

    def stored(self, key: str) -> Any:
        return self.s3.client().get_object(Bucket=self.s3.bucket, Key=key)

    def proxy(self) -> BrokenProxy:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(self.authority / "host.pem")
        return BrokenProxy(self.s3.endpoint, self.script, tls)

    def policy(self, port: int, **changes: Any) -> Policy:
        tls = ssl.create_default_context(cafile=self.authority / "ca.pem")
        world = {"resolve": self.names, "port": port, "tls": tls, "retry": QUICK}
        return Policy(**{**world, "is_public": lambda address: address == LOOPBACK, **changes})


@pytest.fixture
def bucket(s3: SeaweedServer, authority: Path) -> Bucket:
    return Bucket(s3, authority)


@pytest.fixture
def run(local: MakeLocal, bucket: Bucket) -> Callable[..., Document]:
    """Runs a job with these upload URLs on a worker with these parts; its document."""

    def run(*urls: str, config: Mapping[str, Any] | None = None, **parts: Any) -> Document:
        with bucket.proxy() as proxy:
            at = local(upload_policy=bucket.policy(proxy.port), **parts)
            return at.run(sdxl_payload(config={"upload_urls": list(urls), **(config or {})}))

    return run


Run = Callable[..., Document]


def test_each_picture_goes_to_its_own_url(run: Run, bucket: Bucket) -> None:
    urls = [bucket.url(f"each/{index}.png") for index in range(3)]

    document = run(*urls, config={"num_images": 3})

    seeds = [asset.metadata["seed"] for asset in document.assets]
    assert [(asset.url, asset.thumbnail_url) for asset in document.assets] == [
        (f"https://{HOST}/{bucket.s3.bucket}/each/{index}.png", None) for index in range(3)
    ]
    assert seeds == [7, 8, 9]
    for index in range(3):
        stored = bucket.stored(f"each/{index}.png")
        data = stored["Body"].read()
        assert stored["ContentType"] == "image/png"
        assert Image.open(io.BytesIO(data)).size == (64, 64)


def test_the_url_of_a_refused_picture_gets_no_file(run: Run, bucket: Bucket) -> None:
    settings = Settings(safety_model="pocket", safety_rules="boat:refuse")
    urls = [bucket.url(f"left-out/{index}.png") for index in range(3)]

    document = run(
        *urls,
        config={"num_images": 3, "resolution": "128x128"},
        settings=settings,
        fake_sdxl=PainterSdxl(TREE, BOAT, TREE),
        classifiers=loader.load(settings, open_ledger(settings)),
    )

    assert [asset.url[-5:] for asset in document.assets] == ["0.png", "2.png"]
    with pytest.raises(ClientError, match="NoSuchKey"):
        bucket.stored("left-out/1.png")


def test_a_url_that_is_signed_for_a_content_type_takes_that_format(
    run: Run, bucket: Bucket
) -> None:
    url = bucket.url("typed/0.webp", ContentType="image/webp")

    document = run(url, config={"output_format": "webp"})

    assert document.status == "completed"
    assert bucket.stored("typed/0.webp")["ContentType"] == "image/webp"


def test_nothing_of_such_a_job_is_stored_in_the_workers_own_place(
    run: Run, bucket: Bucket, tmp_path: Path
) -> None:
    run(bucket.url("own/0.png"))

    assert not (tmp_path / "assets").exists()


def test_a_video_goes_to_the_url_of_its_job(local: MakeLocal, bucket: Bucket) -> None:
    with bucket.proxy() as proxy:
        at = local(models={"wan": GreyFrames(None)}, upload_policy=bucket.policy(proxy.port))
        config = {"upload_urls": [bucket.url("film/0.mp4")]}

        (asset,) = at.run(wan_payload(config=config)).assets

    stored = bucket.stored("film/0.mp4")
    assert (stored["ContentType"], stored["ContentLength"]) == (
        "video/mp4",
        asset.metadata["file_size_bytes"],
    )
    assert asset.url.endswith("/film/0.mp4")


def test_a_second_delivery_of_a_job_overwrites_the_first(run: Run, bucket: Bucket) -> None:
    url = bucket.url("twice/0.png")

    first, second = run(url), run(url)

    assert first.assets == second.assets
    assert (
        bucket.stored("twice/0.png")["ContentLength"]
        == (first.assets[0].metadata["file_size_bytes"])
    )


@pytest.mark.parametrize("fault", ["reset", "5xx", "lost"])
def test_an_upload_to_a_url_is_tried_again(run: Run, bucket: Bucket, fault: Fault) -> None:
    bucket.script = [fault, "pass"]

    document = run(bucket.url(f"again/{fault}.png"))

    assert document.status == "completed"
    assert bucket.stored(f"again/{fault}.png")["ContentLength"]


def test_a_url_that_refuses_is_an_upload_error_without_its_query(run: Run, bucket: Bucket) -> None:
    url = bucket.url("refused/0.png").replace("X-Amz-Signature=", "X-Amz-Signature=0")

    failure = run(url).failure

    assert failure
    assert failure.code == "UPLOAD_ERROR"
    assert failure.message == "config.upload_urls: the URL did not take an asset (HTTP 403)"
    with pytest.raises(ClientError):
        bucket.stored("refused/0.png")


def test_the_audit_has_the_digest_of_the_uploaded_file(
    run: Run, bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ourvidz.audit")

    run(bucket.url("audit/0.png"))

    digest = hashlib.sha256(bucket.stored("audit/0.png")["Body"].read()).hexdigest()
    assert f'"stored_sha256": {{"0.png": "{digest}"}}' in caplog.text


@pytest.mark.parametrize("is_signed_well", [True, False])
def test_the_signature_of_a_url_is_in_no_log_document_or_callback(
    run: Run,
    bucket: Bucket,
    receiver: CallbackReceiver,
    caplog: pytest.LogCaptureFixture,
    is_signed_well: bool,
) -> None:
    url = bucket.url("quiet/0.png")
    if not is_signed_well:
        url = url.replace("X-Amz-Signature=", "X-Amz-Signature=0")
    caplog.set_level(logging.DEBUG)  # now: boto3 logs what it signs

    document = run(url, callback=Callback(receiver.callback_url, receiver.secret, policy=QUICK))

    (posted,) = receiver.wait()
    for text in (caplog.text, str(document.result()), posted.body.decode(), repr(document)):
        assert "X-Amz" not in text
        assert urlsplit(url).query not in text


# --- before anything is computed ---


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1"])
def test_a_url_of_a_private_host_is_refused_before_the_job_computes(
    local: MakeLocal, bucket: Bucket, address: str
) -> None:
    bucket.names.answers[HOST] = [address]
    at = local(upload_policy=bucket.policy(443, is_public=is_public))

    failure = at.run(sdxl_payload(config={"upload_urls": [bucket.url("inner/0.png")]})).failure

    assert failure
    assert (failure.code, failure.message) == (
        "INVALID_PROMPT",
        "config.upload_urls: Input should name hosts of the public internet",
    )
    assert at.fake_sdxl.requests == []


def test_no_upload_connects_to_a_host_whose_name_later_means_an_inner_address(
    local: MakeLocal, bucket: Bucket
) -> None:
    answers = iter([["93.184.215.14"]])
    with bucket.proxy() as proxy:
        policy = bucket.policy(
            proxy.port, is_public=is_public, resolve=lambda host: next(answers, ["127.0.0.1"])
        )
        at = local(upload_policy=policy)

        failure = at.run(sdxl_payload(config={"upload_urls": [bucket.url("re/0.png")]})).failure

        assert failure
        assert failure.message.endswith("(the host's address is not public)")
        assert proxy.tries == 0


def test_a_cancel_ends_an_upload_that_hangs(local: MakeLocal, bucket: Bucket) -> None:
    bucket.script = ["timeout"]
    with bucket.proxy() as proxy:
        at = local(upload_policy=bucket.policy(proxy.port))
        config = {"upload_urls": [bucket.url("hangs/0.png")]}
        running = start(at.run, sdxl_payload(config=config))
        wait_until(lambda: proxy.tries > 0)
        at.stop.set()
        failure = running.result(PATIENCE_S).failure

    assert failure
    assert failure.code == "CANCELLED"


def test_the_time_of_a_job_ends_an_upload_that_hangs(local: MakeLocal, bucket: Bucket) -> None:
    bucket.script = ["timeout"]
    with bucket.proxy() as proxy:
        at = local(settings=Settings(job_timeout_s=1), upload_policy=bucket.policy(proxy.port))

        failure = at.run(sdxl_payload(config={"upload_urls": [bucket.url("late/0.png")]})).failure

    assert failure
    assert failure.code == "TIMEOUT_ERROR"
