"""Every storage stores an asset, overwrites it, reads it again, and reports each failure."""

import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from pydantic import SecretStr

from ourvidz_serverless.delivery.storage.base import Storage, read_reference, upload
from ourvidz_serverless.delivery.storage.choose import job_storage, open_storage
from ourvidz_serverless.delivery.storage.directory import DirectoryStorage
from ourvidz_serverless.delivery.storage.inline import InlineStorage
from ourvidz_serverless.delivery.storage.s3 import S3Storage
from ourvidz_serverless.delivery.storage.supabase import PAGE, SupabaseStorage
from ourvidz_serverless.errors import InvalidPrompt, ModelLoadError, UploadError
from ourvidz_serverless.job import S3Config
from ourvidz_serverless.net.addresses import is_public
from ourvidz_serverless.net.retries import Fault
from ourvidz_serverless.settings import Settings
from tests.fakes.clock import Clock
from tests.fakes.local_worker import QUICK
from tests.patience import PATIENCE_S
from tests.servers.local_server import Answer, LocalServer, Request
from tests.servers.s3 import SeaweedServer
from tests.servers.supabase import Bucket
from tests.servers.supabase import SupabaseStorage as SupabaseServer


@pytest.fixture(scope="module")
def supabase() -> Iterator[SupabaseServer]:
    with SupabaseServer() as server:
        yield server


@pytest.fixture(params=["directory", "s3", "supabase"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "directory":
        return DirectoryStorage(tmp_path)
    if request.param == "s3":
        return request.getfixturevalue("s3").storage(prefix="assets")
    server = request.getfixturevalue("supabase")
    return SupabaseStorage(server.url, server.service_key, "workspace-temp", "assets")


def test_a_stored_object_is_read_again(store: Storage) -> None:
    store.put("user/job/0.png", b"picture", "image/png")

    assert store.get("user/job/0.png") == b"picture"


def test_every_key_is_listed_but_a_deleted_one(store: Storage) -> None:
    keys = {f"lister/job-{job}/{name}" for job in range(3) for name in ("0.png", "c.x.json")}
    for key in keys:
        store.put(key, b"x", "application/json")

    store.delete("lister/job-1/0.png")

    left = {key for key in store.keys() if key.startswith("lister/")}  # noqa: SIM118
    assert left == keys - {"lister/job-1/0.png"}


def test_a_supabase_folder_of_many_pages_is_listed_to_its_end(supabase: SupabaseServer) -> None:
    store = SupabaseStorage(supabase.url, supabase.service_key, "many")
    keys = {f"user/job-{i:03}/0.png" for i in range(2 * PAGE)}
    supabase.objects.update({("many", key): (b"", "image/png") for key in keys})

    assert set(store.keys()) == keys


def test_a_reference_is_read_from_another_bucket_of_the_same_store(
    supabase: SupabaseServer,
) -> None:
    supabase.objects["user-library", "user-1/face.png"] = (b"picture", "image/png")
    supabase.buckets["user-library"] = Bucket()
    store = SupabaseStorage(supabase.url, supabase.service_key, "workspace-temp")

    assert read_reference(store, "user-library/user-1/face.png", {"user-library"}) == b"picture"


def test_a_reference_is_read_from_a_folder_beside_the_assets(tmp_path: Path) -> None:
    store = DirectoryStorage(tmp_path)
    store.put("user-library/user-1/face.png", b"picture", "image/png")
    store.put("user-1/face.png", b"another", "image/png")

    assert read_reference(store, "user-library/user-1/face.png", {"user-library"}) == b"picture"
    assert read_reference(store, "user-1/face.png", {"user-library"}) == b"another"


def test_a_second_put_overwrites_the_first(store: Storage) -> None:
    store.put("user/job/1.png", b"first", "image/png")
    store.put("user/job/1.png", b"second", "image/png")

    assert store.get("user/job/1.png") == b"second"


def test_reading_a_missing_object_is_a_fault_that_is_not_transient(store: Storage) -> None:
    with pytest.raises(Fault) as fault:
        store.get("user/job/missing.png")

    assert fault.value.status == 404


def test_the_path_of_an_asset_is_its_key_in_the_bucket(store: Storage) -> None:
    prefix = "" if isinstance(store, DirectoryStorage) else "assets/"

    assert store.url("user/job/0.png", "path", 60) == f"{prefix}user/job/0.png"


def test_a_presigned_s3_url_gives_the_asset_to_anybody(s3: SeaweedServer) -> None:
    store = s3.storage()
    store.put("user/signed/0.png", b"picture", "image/png")

    answer = requests.get(store.url("user/signed/0.png", "presigned", 60), timeout=PATIENCE_S)

    assert (answer.content, answer.headers["Content-Type"]) == (b"picture", "image/png")


def test_a_presigned_supabase_url_gives_the_asset_until_it_expires() -> None:
    clock = Clock()
    with SupabaseServer(clock=clock) as server:
        store = SupabaseStorage(server.url, server.service_key, "workspace-temp")
        store.put("user/signed/0.png", b"picture", "image/png")
        url = store.url("user/signed/0.png", "presigned", 60)
        clock.advance(59)
        before = requests.get(url, timeout=PATIENCE_S)
        clock.advance(1)
        after = requests.get(url, timeout=PATIENCE_S)

    assert (before.ok, after.ok) == (True, False)


def test_a_presigned_supabase_url_gives_the_asset_to_anybody(supabase: SupabaseServer) -> None:
    store = SupabaseStorage(supabase.url, supabase.service_key, "workspace-temp")
    store.put("user/signed/0.png", b"picture", "image/png")

    assert requests.get(store.url("user/signed/0.png", "presigned", 60), timeout=PATIENCE_S).ok


def test_a_public_url_names_bucket_and_key(s3: SeaweedServer, supabase: SupabaseServer) -> None:
    of_s3 = s3.storage().url("a/b/0.png", "public", 60)
    of_supabase = SupabaseStorage(supabase.url, "key", "assets").url("a/b/0.png", "public", 60)

    assert of_s3 == f"{s3.endpoint}/{s3.bucket}/a/b/0.png"
    assert of_supabase == f"{supabase.url}/storage/v1/object/public/assets/a/b/0.png"


ODD_PREFIX = "our assets/50%25 (a+b)"


def test_a_public_s3_url_quotes_as_the_client_does(s3: SeaweedServer) -> None:
    store = s3.storage(prefix=ODD_PREFIX)

    public, signed = (store.url("a/0.png", style, 60) for style in ("public", "presigned"))

    assert urlsplit(public)[:3] == urlsplit(signed)[:3]


@pytest.mark.parametrize(
    ("style", "prefix"), [("public", "our assets/what? 1+1"), ("presigned", "our assets/1+1")]
)
def test_a_supabase_url_is_valid_whatever_the_prefix(
    supabase: SupabaseServer, style: str, prefix: str
) -> None:
    supabase.buckets["shown"] = Bucket(public=True)
    store = SupabaseStorage(supabase.url, supabase.service_key, "shown", prefix)
    store.put("user/job/0.png", b"picture", "image/png")

    url = store.url("user/job/0.png", style, 60)

    assert re.fullmatch("[!-~]+", url)
    assert requests.get(url, timeout=PATIENCE_S).content == b"picture"
    assert store.get("user/job/0.png") == b"picture"


def test_supabase_takes_a_new_secret_key_without_a_bearer(supabase: SupabaseServer) -> None:
    SupabaseStorage(supabase.url, supabase.secret_key, "workspace-temp").put(
        "user/key/0.png", b"picture", "image/png"
    )

    assert supabase.objects["workspace-temp", "user/key/0.png"] == (b"picture", "image/png")


@pytest.mark.parametrize("answers", [[503, 200], ["reset", 429, 200]])
def test_an_upload_is_tried_again_after_a_transient_error(
    supabase: SupabaseServer, answers: list[object]
) -> None:
    supabase.script(answers[:-1])
    store = SupabaseStorage(supabase.url, supabase.service_key, "workspace-temp")

    upload(store, "user/retry/0.png", b"picture", "image/png", QUICK)

    assert ("workspace-temp", "user/retry/0.png") in supabase.objects


def test_an_upload_gives_up_after_three_tries(supabase: SupabaseServer) -> None:
    supabase.script([503, 503, 503])
    store = SupabaseStorage(supabase.url, supabase.service_key, "workspace-temp")

    with pytest.raises(UploadError, match="HTTP 503"):
        upload(store, "user/lost/0.png", b"picture", "image/png", QUICK)

    assert ("workspace-temp", "user/lost/0.png") not in supabase.objects


def test_a_refused_upload_is_not_tried_again(supabase: SupabaseServer) -> None:
    store = SupabaseStorage(supabase.url, supabase.service_key, "workspace-temp")
    before = len(supabase.requests)

    with pytest.raises(UploadError, match="HTTP 415"):
        upload(store, "user/x/0.bin", b"?", "application/octet-stream", QUICK)

    assert len(supabase.requests) == before + 1


class FailingStore(LocalServer):
    """An S3 store that reports an internal error in an answer with the status 200."""

    def __init__(self) -> None:
        super().__init__()
        self.num_requests = 0

    def note(self, request: Request, answer: Answer | None) -> None:
        self.num_requests += 1

    def answer(self, request: Request) -> Answer:
        body = b"<Error><Code>InternalError</Code><Message>once more</Message></Error>"
        return Answer(200, body, {"Content-Type": "application/xml"})


def test_a_try_to_store_in_s3_is_one_request() -> None:
    with FailingStore() as failing:
        store = S3Storage(
            bucket="b", endpoint=failing.url, key_id="id", secret="secret", region="us-east-1"
        )

        with pytest.raises(UploadError):
            upload(store, "u/j/0.png", b"x", "image/png", QUICK)

        assert failing.num_requests == QUICK.tries


def test_a_wrong_secret_is_an_upload_error_without_the_secret(s3: SeaweedServer) -> None:
    with pytest.raises(UploadError) as error:
        upload(s3.storage(secret="wrong-secret"), "u/j/0.png", b"x", "image/png", QUICK)

    assert error.value.message == "storage did not take an asset (HTTP 403)"


def test_a_storage_that_does_not_answer_is_an_upload_error() -> None:
    store = SupabaseStorage("http://127.0.0.1:9", "key", "bucket")

    with pytest.raises(UploadError, match="no answer"):
        upload(store, "u/j/0.png", b"x", "image/png", QUICK)


def own_bucket(s3: SeaweedServer, endpoint: str | None = None) -> S3Config:
    return S3Config(
        bucketName=s3.bucket,
        endpointUrl=endpoint or s3.endpoint,
        accessId=SecretStr(s3.access_key),
        accessSecret=SecretStr(s3.secret_key),
    )


def test_a_job_stores_in_the_bucket_of_its_s3_config(s3: SeaweedServer) -> None:
    store = job_storage(own_bucket(s3), "us-east-1", ("127.0.0.1",))

    store.put("own/bucket/0.png", b"picture", "image/png")

    assert s3.storage().get("own/bucket/0.png") == b"picture"


@pytest.mark.parametrize("listed", ["LocalHost", "localhost."])
def test_an_inner_host_of_s3_config_is_listed_in_every_spelling(
    s3: SeaweedServer, listed: str
) -> None:
    endpoint = s3.endpoint.replace("127.0.0.1", "localhost")

    store = job_storage(own_bucket(s3, endpoint), "us-east-1", (listed,))

    store.put("own/bucket/1.png", b"picture", "image/png")


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "0.0.0.0", "10.0.0.1", "192.168.0.1", "169.254.169.254"),
        *("2130706433", "0x7f.1", "0177.0.0.1", "127.1"),
        *("[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[fe80::1]", "[fd00::1]"),
    ],
)
def test_a_jobs_own_bucket_must_be_on_the_public_internet(s3: SeaweedServer, host: str) -> None:
    config = own_bucket(s3, f"http://{host}:9000")

    with pytest.raises(InvalidPrompt, match=r"^s3Config\.endpointUrl: "):
        job_storage(config, "us-east-1", ("minio.example",))


@pytest.mark.parametrize(
    "endpoint",
    [
        *("http://[", "http://a..b", "http://a\\b.example", "http://b\u00fccket", "http://%"),
        "https://store.example:99999",
    ],
)
def test_an_s3_endpoint_that_is_no_url_is_refused_with_its_field_named(
    s3: SeaweedServer, endpoint: str
) -> None:
    with pytest.raises(InvalidPrompt, match=r"^s3Config\.endpointUrl: "):
        job_storage(own_bucket(s3, endpoint), "us-east-1")


def test_a_bucket_whose_host_has_no_address_yet_is_not_refused(s3: SeaweedServer) -> None:
    store = job_storage(own_bucket(s3, "https://store.invalid"), "us-east-1")

    with pytest.raises(UploadError):
        upload(store, "own/bucket/2.png", b"x", "image/png", QUICK)


def test_no_upload_connects_to_a_host_whose_name_later_means_an_inner_address(
    s3: SeaweedServer,
) -> None:
    # As `job_storage` opens it for a name that was public at that time.
    config = own_bucket(s3)
    store = s3.storage(bucket=config.bucketName, endpoint=config.endpointUrl, gate=is_public)

    with pytest.raises(UploadError, match="address is not public"):
        upload(store, "own/bucket/rebound.png", b"x", "image/png", QUICK)

    with pytest.raises(Fault, match="HTTP 404"):
        s3.storage().get("own/bucket/rebound.png")


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("file:outputs", DirectoryStorage),
        ("file:///data/outputs", DirectoryStorage),
        ("inline:", InlineStorage),
        ("s3://bucket", S3Storage),
        ("s3://bucket/pre/fix", S3Storage),
        ("supabase://workspace-temp", SupabaseStorage),
    ],
)
def test_the_storage_url_names_the_kind(url: str, kind: type) -> None:
    settings = Settings(
        storage_url=url,
        bucket_access_key_id=SecretStr("id"),
        bucket_secret_access_key=SecretStr("secret"),
        supabase_url="https://project.example",
        supabase_service_key=SecretStr("key"),
    )

    assert isinstance(open_storage(settings), kind)


@pytest.mark.parametrize(
    "url", ["outputs", "s3://", "file:", "ftp://host", "supabase://b", "inline:x", "inline"]
)
def test_an_invalid_storage_url_is_refused_at_start(url: str) -> None:
    with pytest.raises(ModelLoadError, match="STORAGE_URL"):
        open_storage(Settings(storage_url=url))


def test_everybody_may_read_a_stored_file_and_only_its_owner_may_write_it(tmp_path: Path) -> None:
    DirectoryStorage(tmp_path).put("user/job/0.png", b"picture", "image/png")

    assert stat.filemode((tmp_path / "user/job/0.png").stat().st_mode) == "-rw-r--r--"


def test_no_file_outside_the_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "assets/user").mkdir(parents=True)
    (tmp_path / "assets/user/0.png").write_bytes(b"x")
    (tmp_path / "assets/link").symlink_to(tmp_path / "secret")
    store = DirectoryStorage(tmp_path / "assets")

    assert store.find("user/0.png") == tmp_path / "assets/user/0.png"
    for key in ("../secret", str(tmp_path / "secret"), "link", "user", "none", "\0", "x" * 999):
        assert store.find(key) is None


def test_a_file_that_cannot_be_stored_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "user/job/0.png").mkdir(parents=True)

    with pytest.raises(Fault):
        DirectoryStorage(tmp_path).put("user/job/0.png", b"picture", "image/png")

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.put("a/b/0.png", b"", "image/png"),
        lambda store: store.get("a/b/0.png"),
        lambda store: store.keys(),
        lambda store: store.delete("a/b/0.png"),
        lambda store: store.url("a/b/0.png", "path", 60),
    ],
)
def test_an_inline_storage_says_that_nothing_is_stored(call: Callable[[Storage], object]) -> None:
    with pytest.raises(Fault, match="with STORAGE_URL=inline: nothing is stored") as fault:
        call(InlineStorage())

    assert not fault.value.is_transient
