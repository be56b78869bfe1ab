"""The servers that replace RunPod, the application, Supabase and S3 behave as those do."""

import base64
import hmac
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from botocore.exceptions import ClientError

from tests.patience import PATIENCE_S
from tests.servers.runpod import Platform, ResultDropped
from tests.servers.s3 import SeaweedServer
from tests.servers.supabase import Bucket, CallbackReceiver, SupabaseStorage, webhook_key
from tests.servers.worker_process import WorkerDied, WorkerProcess

pytestmark = pytest.mark.slow

# The handler does what a job names under `do`.
HANDLER = """
import asyncio, os, sys
import runpod

running, both = 0, None


async def handler(job):
    global running, both
    both = both or asyncio.Event()
    do = job["input"].get("do")
    if do == "fail":
        return {"error": "it failed", "code": "FAILED"}
    if do == "object":
        return {"error": {"code": "FAILED"}}
    if do == "big":
        return {"text": "x" * job["input"]["size"]}
    if do == "nan":
        return {"value": float("nan")}
    if do == "top":
        return {"bucket": job["s3Config"]["bucketName"]}
    if do == "progress":
        for percent in (25, 75):
            runpod.serverless.progress_update(job, {"percent": percent})
            await asyncio.sleep(0.3)
    if do == "late":
        asyncio.get_running_loop().call_later(
            0.3, runpod.serverless.progress_update, job, {"percent": 99}
        )
    if do == "wait":
        print("waiting", job["id"], flush=True)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            print("stopped", job["id"], flush=True)
            raise
    if do == "meet":
        running += 1
        if running == 2:
            both.set()
        await asyncio.wait_for(both.wait(), 150)
    return {"echo": job["input"]}


async def stream(job):
    for word in job["input"]["words"]:
        yield word


if os.environ.get("DIE"):
    sys.exit("out of order")
runpod.serverless.start({
    "handler": stream if os.environ.get("STREAM") else handler,
    "concurrency_modifier": lambda current: 2,
    "return_aggregate_stream": True,
})
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worker") / "handler.py"
    path.write_text(HANDLER)
    return path


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


@pytest.fixture(scope="module")
def worker(platform: Platform, script: Path) -> Iterator[WorkerProcess]:
    with WorkerProcess(platform, script) as worker:
        yield worker


@pytest.fixture
def at_work(platform: Platform, worker: WorkerProcess) -> Platform:
    return platform


# --- the platform, with the real SDK as its worker ---


def test_a_job_returns_what_the_handler_returned(at_work: Platform) -> None:
    job = at_work.submit({"n": 1})

    assert at_work.result(job) == {"output": {"echo": {"n": 1}}}
    assert at_work.status(job) == {"id": job, "status": "COMPLETED", "output": {"echo": {"n": 1}}}


def test_an_error_text_fails_the_job_and_the_other_fields_are_its_output(at_work: Platform) -> None:
    job = at_work.submit({"do": "fail"})

    assert at_work.result(job) == {"error": "it failed", "output": {"code": "FAILED"}}
    assert at_work.status(job)["status"] == "FAILED"


def test_an_error_object_shows_as_completed_without_output(at_work: Platform) -> None:
    job = at_work.submit({"do": "object"})

    at_work.result(job)
    assert at_work.status(job) == {"id": job, "status": "COMPLETED"}


def test_progress_arrives_before_the_result(at_work: Platform) -> None:
    job = at_work.submit({"do": "progress"})

    at_work.result(job)
    *progress, last = at_work.updates(job)
    assert [update.document["output"]["percent"] for update in progress] == [25, 75]
    assert last.terminal and last.at >= progress[-1].at


def test_progress_after_the_result_puts_the_job_back_in_progress(at_work: Platform) -> None:
    job = at_work.submit({"do": "late"})

    at_work.wait_for_updates(job, 2)
    assert at_work.result(job)["output"]
    assert at_work.status(job)["status"] == "IN_PROGRESS"


def test_cancelling_a_running_job_reaches_its_handler(
    at_work: Platform, worker: WorkerProcess
) -> None:
    job = at_work.submit({"do": "wait"})
    worker.wait_for_log(f"waiting {job}")

    at_work.cancel(job)

    worker.wait_for_log(f"stopped {job}")
    assert at_work.status(job)["status"] == "CANCELLED"
    assert at_work.updates(job) == []


def test_two_jobs_overlap_on_a_worker_with_a_concurrency_of_two(at_work: Platform) -> None:
    jobs = [at_work.submit({"do": "meet"}) for _ in range(2)]

    assert all("output" in at_work.result(job) for job in jobs)


def test_the_same_id_is_delivered_as_often_as_it_is_submitted(at_work: Platform) -> None:
    at_work.submit({"n": 1}, id="twice")
    at_work.submit({"n": 2}, id="twice")

    outputs = [at_work.result("twice", nth=nth)["output"]["echo"]["n"] for nth in (1, 2)]
    assert sorted(outputs) == [1, 2]


def test_top_level_keys_travel_beside_the_input(at_work: Platform) -> None:
    job = at_work.submit({"do": "top"}, s3Config={"bucketName": "mine"})

    assert at_work.result(job)["output"] == {"bucket": "mine"}


@pytest.mark.parametrize("sync", [False, True])
def test_a_result_that_is_too_large_is_dropped(at_work: Platform, sync: bool) -> None:
    size = 20_000_000 if sync else 10_000_000
    fits = at_work.submit({"do": "big", "size": size - 100}, sync=sync)
    exceeds = at_work.submit({"do": "big", "size": size}, sync=sync)

    assert "output" in at_work.result(fits)
    with pytest.raises(ResultDropped, match="bytes are more than"):
        at_work.result(exceeds)
    assert at_work.status(exceeds)["status"] == "IN_PROGRESS"


def test_a_result_with_nan_in_it_is_no_json_and_is_dropped(at_work: Platform) -> None:
    job = at_work.submit({"do": "nan"})

    with pytest.raises(ResultDropped, match="NaN is not JSON"):
        at_work.result(job)


def test_a_result_is_posted_again_after_an_error_of_the_platform(at_work: Platform) -> None:
    at_work.script([503])

    job = at_work.submit({"n": 1})

    assert at_work.result(job)["output"]


def test_the_worker_pings_and_names_its_running_jobs(
    at_work: Platform, worker: WorkerProcess
) -> None:
    job = at_work.submit({"do": "wait"})

    at_work.wait_until(lambda: any(ping.jobs == [job] for ping in at_work.pings), what="a ping")
    at_work.cancel(job)


def test_a_generator_streams_what_it_yields(script: Path) -> None:
    with Platform() as platform, WorkerProcess(platform, script, env={"STREAM": "1"}):
        job = platform.submit({"words": ["a", "b"]})
        document = platform.result(job)

    assert platform.stream(job) == ["a", "b"]
    assert document == {"output": ["a", "b"]} and platform.updates(job)[0].is_stream


def test_jobs_wait_in_the_queue_while_no_worker_polls_and_can_be_cancelled(script: Path) -> None:
    with Platform() as platform:
        first, second = platform.submit({"n": 1}), platform.submit({"n": 2})
        assert platform.status(first)["status"] == "IN_QUEUE"
        platform.cancel(first)

        with WorkerProcess(platform, script):
            platform.result(second)

        assert platform.status(first) == {"id": first, "status": "CANCELLED"}
        assert platform.updates(first) == []


def ask(platform: Platform, path: str, body: bytes | None = None) -> requests.Response:
    """Send a request as a caller does, with a separate HTTP client."""
    return requests.request(
        "GET" if body is None else "POST",
        f"{platform.caller_url}/local/{path}",
        data=body,
        headers={"Authorization": f"Bearer {platform.caller_key}"},
        timeout=PATIENCE_S,
    )


def payload_of(size: int) -> bytes:
    frame = b'{"input": {"text": ""}}'
    return frame.replace(b'""', b'"' + b"x" * (size - len(frame)) + b'"')


def test_run_accepts_a_request_of_10_mb_and_no_more() -> None:
    with Platform() as platform:
        fits, exceeds = (ask(platform, "run", payload_of(10_000_000 + more)) for more in (0, 1))

    assert (fits.status_code, exceeds.status_code) == (200, 400)


def test_runsync_accepts_a_request_of_20_mb_and_no_more() -> None:
    with Platform() as platform:
        fits = ask(platform, "runsync?wait=1", payload_of(20_000_000))
        exceeds = ask(platform, "runsync?wait=1", payload_of(20_000_001))

    assert (fits.status_code, exceeds.status_code) == (200, 400)


@pytest.mark.parametrize(("sync", "kept_s"), [(False, 1800), (True, 60)])
def test_the_platform_forgets_a_result_after_its_time(
    at_work: Platform, sync: bool, kept_s: float
) -> None:
    job = at_work.submit({"n": 1}, sync=sync)
    at_work.result(job)

    at_work.skip(kept_s - 30)
    before = ask(at_work, f"status/{job}")
    at_work.skip(31)
    after = ask(at_work, f"status/{job}")

    assert (before.status_code, after.status_code) == (200, 404)


def test_a_job_that_runs_too_long_times_out_and_its_worker_stops_it(
    at_work: Platform, worker: WorkerProcess
) -> None:
    job = at_work.submit({"do": "wait"}, policy={"executionTimeout": 60_000})
    worker.wait_for_log(f"waiting {job}")

    at_work.skip(61)

    worker.wait_for_log(f"stopped {job}")
    assert at_work.status(job)["status"] == "TIMED_OUT"


def test_a_job_that_no_worker_takes_times_out() -> None:
    with Platform() as platform:
        job = platform.submit({}, policy={"ttl": 60_000})

        platform.skip(61)

        assert platform.status(job)["status"] == "TIMED_OUT"
        assert platform.queued() == []


def test_a_dead_workers_job_is_given_to_another(script: Path) -> None:
    with Platform(dead_after=5) as platform:
        with WorkerProcess(platform, script, worker_id="dies") as dies:
            job = platform.submit({"do": "wait"}, id="moves")
            platform.wait_for_status(job, "IN_PROGRESS")
            dies.kill()
        platform.wait_for_status(job, "IN_QUEUE")
        with WorkerProcess(platform, script, worker_id="lives"):
            platform.wait_until(lambda: any(ping.jobs == [job] for ping in platform.pings))

        assert platform.health()["jobs"]["retried"] == 1


def test_a_job_counts_as_in_progress_though_its_worker_disconnected(script: Path) -> None:
    with Platform(hold=60) as platform, WorkerProcess(platform, script) as worker:
        worker.kill()

        job = platform.submit({"n": 1})

        platform.wait_for_status(job, "IN_PROGRESS")


def test_a_job_is_not_given_to_a_worker_that_was_removed(script: Path) -> None:
    with Platform(hold=60) as platform:
        with WorkerProcess(platform, script):
            pass
        with WorkerProcess(platform, script):
            job = platform.submit({"n": 1})

            assert platform.result(job)["output"]


def test_sigterm_lets_the_running_job_finish_and_the_worker_exits(script: Path) -> None:
    with Platform() as platform, WorkerProcess(platform, script) as worker:
        job = platform.submit({"do": "progress"})
        platform.wait_for_updates(job, 1)

        worker.terminate()

        assert worker.wait() == 0
        assert platform.result(job)["output"]


def test_a_worker_that_dies_early_is_reported_with_its_log(
    platform: Platform, script: Path
) -> None:
    with (
        pytest.raises(WorkerDied, match=r"exit 1\n(.|\n)*out of order"),
        WorkerProcess(platform, script, env={"DIE": "1"}, worker_id="dead"),
    ):
        pass


def test_a_worker_without_a_platform_runs_its_test_input(script: Path) -> None:
    args = ["--test_input", json.dumps({"input": {"n": 1}})]

    with WorkerProcess(None, script, args=args) as worker:
        assert worker.wait() == 0

    assert "'echo': {'n': 1}" in worker.log


# --- the edge function ---


@pytest.fixture
def receiver() -> Iterator[CallbackReceiver]:
    with CallbackReceiver() as receiver:
        yield receiver


def post(
    receiver: CallbackReceiver, document: Any, within_s: float = PATIENCE_S, **changes: str
) -> requests.Response:
    """Post a correctly signed callback with `changes` to its headers."""
    body = json.dumps(document).encode()
    signature = hmac.digest(receiver.secret.encode(), body, "sha256").hex()
    key = webhook_key(receiver.secret)
    webhook = standard_webhook(key, document, time.time())
    headers = {"X-Callback-Signature": f"sha256={signature}"} | webhook | changes
    return requests.post(receiver.callback_url, data=body, headers=headers, timeout=within_s)


def standard_webhook(key: bytes, document: Any, at: float) -> dict[str, str]:
    id, timestamp, body = "msg-1", str(int(at)), json.dumps(document)
    digest = hmac.digest(key, f"{id}.{timestamp}.{body}".encode(), "sha256")
    signature = "v1," + base64.b64encode(digest).decode()
    names = ("webhook-id", "webhook-timestamp", "webhook-signature")
    return dict(zip(names, (id, timestamp, signature), strict=True))


DONE = {"job_id": "job-1", "status": "completed"}


def test_a_signed_callback_is_accepted_and_kept_byte_for_byte(receiver: CallbackReceiver) -> None:
    assert post(receiver, DONE).status_code == 200

    (received,) = receiver.wait()
    assert json.loads(received.body) == received.document == DONE
    assert received.signature_ok and received.webhook_ok


def test_a_callback_with_only_one_of_its_two_signatures_is_refused(
    receiver: CallbackReceiver,
) -> None:
    body = json.dumps(DONE).encode()
    ours = hmac.digest(receiver.secret.encode(), body, "sha256").hex()
    key = webhook_key(receiver.secret)
    either = [
        {"X-Callback-Signature": f"sha256={ours}"},
        standard_webhook(key, DONE, time.time()),
    ]

    answers = [
        requests.post(receiver.callback_url, body, headers=each, timeout=PATIENCE_S)
        for each in either
    ]

    assert [answer.status_code for answer in answers] == [401, 401]
    assert receiver.jobs == {}


def test_a_callback_with_a_wrong_or_missing_signature_is_refused(
    receiver: CallbackReceiver,
) -> None:
    wrong = post(receiver, DONE, **{"X-Callback-Signature": "sha256=" + "0" * 64})
    missing = requests.post(receiver.callback_url, json=DONE, timeout=PATIENCE_S)

    assert (wrong.status_code, missing.status_code) == (401, 401)
    assert receiver.jobs == {} and not receiver.received[0].signature_ok


@pytest.mark.parametrize(
    ("secret", "key"), [("whsec_c2VjcmV0", b"secret"), ("plain secret", b"plain secret")]
)
def test_a_standard_webhook_is_verified_with_the_secrets_own_key(secret: str, key: bytes) -> None:
    with CallbackReceiver(secret) as receiver:
        right = post(receiver, DONE, **standard_webhook(key, DONE, time.time()))
        wrong = post(receiver, DONE, **standard_webhook(b"another key", DONE, time.time()))
        stale = post(receiver, DONE, **standard_webhook(key, DONE, time.time() - 3600))

    assert [response.status_code for response in (right, wrong, stale)] == [200, 401, 401]
    assert [received.webhook_ok for received in receiver.received] == [True, False, False]


@pytest.mark.parametrize("document", [{"status": "completed"}, DONE | {"status": "done"}, [], "x"])
def test_a_callback_without_a_job_or_a_valid_status_is_refused(
    receiver: CallbackReceiver, document: Any
) -> None:
    assert post(receiver, document).status_code == 400


def test_a_receiver_skips_callbacks_after_completed_but_not_after_failed(
    receiver: CallbackReceiver,
) -> None:
    documents = [DONE | {"status": status} for status in ("failed", "completed", "failed")]

    answers = [post(receiver, document).json() for document in documents]

    assert ["skipped" in answer for answer in answers] == [False, False, True]
    assert receiver.jobs == {"job-1": "completed"}


def test_a_receiver_with_a_list_of_jobs_skips_an_unknown_job() -> None:
    with CallbackReceiver(known={"job-2"}) as receiver:
        assert post(receiver, DONE).json()["skipped"] == "unknown job"


def test_a_receiver_follows_its_script_of_faults_and_then_answers_normally(
    receiver: CallbackReceiver,
) -> None:
    receiver.slow_seconds = 3
    receiver.script([503, (429, {"Retry-After": "7"}), "reset", "slow"])

    assert post(receiver, DONE).status_code == 503
    assert post(receiver, DONE).headers["Retry-After"] == "7"
    with pytest.raises(requests.ConnectionError):
        post(receiver, DONE)
    with pytest.raises(requests.ReadTimeout):
        post(receiver, DONE, within_s=1)
    assert post(receiver, DONE).json()["skipped"] == "already completed"
    assert [received.status for received in receiver.received] == [503, 429, None, 200, 200]


def test_a_receiver_that_cuts_its_answer_has_accepted_the_callback(
    receiver: CallbackReceiver,
) -> None:
    receiver.script(["cut"])

    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        post(receiver, DONE)

    assert receiver.jobs == {"job-1": "completed"}


# --- Supabase Storage ---


@pytest.fixture
def storage() -> Iterator[SupabaseStorage]:
    with SupabaseStorage() as storage:
        yield storage


def upload(
    storage: SupabaseStorage,
    path: str = "user/job/0.png",
    body: bytes = b"png",
    mime: str = "image/png",
    **more: str,
) -> requests.Response:
    headers = both_headers(storage) | {"Content-Type": mime} | more
    return requests.post(object_url(storage, path), data=body, headers=headers, timeout=PATIENCE_S)


def both_headers(storage: SupabaseStorage) -> dict[str, str]:
    return {"Authorization": f"Bearer {storage.service_key}", "apikey": storage.service_key}


def object_url(storage: SupabaseStorage, path: str, route: str = "") -> str:
    return f"{storage.url}/storage/v1/object/{route}workspace-temp/{path}"


def true_status(response: requests.Response) -> str:
    """The status in the body of an error, whose HTTP status is always 400."""
    assert response.status_code == 400
    return str(response.json()["statusCode"])


def test_an_upload_is_stored_with_its_type_and_read_back_with_the_key(
    storage: SupabaseStorage,
) -> None:
    assert upload(storage).json()["Key"] == "workspace-temp/user/job/0.png"

    assert storage.objects["workspace-temp", "user/job/0.png"] == (b"png", "image/png")
    url = object_url(storage, "user/job/0.png")
    assert requests.get(url, headers=both_headers(storage), timeout=PATIENCE_S).content == b"png"
    assert requests.get(url, timeout=PATIENCE_S).status_code == 401


def test_a_second_upload_is_a_duplicate_unless_it_overwrites(storage: SupabaseStorage) -> None:
    upload(storage)

    assert true_status(upload(storage, body=b"new")) == "409"
    assert upload(storage, body=b"new", **{"x-upsert": "true"}).status_code == 200
    assert storage.objects["workspace-temp", "user/job/0.png"][0] == b"new"


@pytest.mark.parametrize("mime", ["application/octet-stream", "image/gif", "image/png; q=1"])
def test_an_upload_of_a_type_that_the_bucket_does_not_allow_is_refused(
    storage: SupabaseStorage, mime: str
) -> None:
    assert true_status(upload(storage, mime=mime)) == "415"


@pytest.mark.parametrize("path", ["user/a^b.png", "user/f\u00fcr.png", "user//0.png"])
def test_a_key_with_a_character_that_supabase_does_not_allow_is_refused(
    storage: SupabaseStorage, path: str
) -> None:
    assert upload(storage, path).json()["error"] == "InvalidKey"


def test_a_supabase_storage_key_may_contain_a_space(storage: SupabaseStorage) -> None:
    assert upload(storage, "user/my file.png").status_code == 200


def test_an_upload_that_is_too_large_is_refused() -> None:
    with SupabaseStorage({"workspace-temp": Bucket(size_limit=2)}) as storage:
        assert true_status(upload(storage)) == "413"


def test_an_upload_to_a_bucket_that_does_not_exist_is_not_found() -> None:
    with SupabaseStorage({"other": Bucket()}) as storage:
        assert true_status(upload(storage)) == "404"


def test_supabase_needs_a_signed_jwt_key_in_both_headers(storage: SupabaseStorage) -> None:
    forged = storage.service_key[:-4] + "AAAA"

    assert upload(storage, apikey="").status_code == 401
    assert true_status(upload(storage, Authorization=f"Bearer {forged}")) == "403"


def test_supabase_accepts_a_secret_key_only_in_the_header_apikey(storage: SupabaseStorage) -> None:
    key, url = storage.secret_key, object_url(storage, "0.png")
    alone = {"apikey": key, "Content-Type": "image/png"}
    both = alone | {"Authorization": f"Bearer {key}"}

    assert requests.post(url, b"png", headers=alone, timeout=PATIENCE_S).status_code == 200
    assert true_status(requests.post(url, b"png", headers=both, timeout=PATIENCE_S)) == "403"


def test_a_signed_url_opens_one_object_until_it_expires() -> None:
    now = [time.time()]
    with SupabaseStorage(clock=lambda: now[0]) as storage:
        upload(storage)
        sign = object_url(storage, "user/job/0.png", "sign/")
        answer = requests.post(
            sign, json={"expiresIn": 60}, headers=both_headers(storage), timeout=PATIENCE_S
        )
        url = f"{storage.url}/storage/v1{answer.json()['signedURL']}"

        assert requests.get(url, timeout=PATIENCE_S).content == b"png"
        assert true_status(requests.get(url[:-4] + "AAAA", timeout=PATIENCE_S)) == "400"
        now[0] += 61
        assert requests.get(url, timeout=PATIENCE_S).json()["error"] == "InvalidJWT"


@pytest.mark.parametrize(("public", "status"), [(True, 200), (False, 400)])
def test_only_a_public_bucket_is_read_without_a_key(public: bool, status: int) -> None:
    with SupabaseStorage({"workspace-temp": Bucket(public=public)}) as storage:
        upload(storage)
        url = object_url(storage, "user/job/0.png", "public/")

        assert requests.get(url, timeout=PATIENCE_S).status_code == status


def test_storage_follows_its_script_of_faults_and_stores_nothing_at_a_fault(
    storage: SupabaseStorage,
) -> None:
    storage.script([500])

    assert upload(storage).status_code == 500
    assert storage.objects == {}
    assert upload(storage).status_code == 200


def test_a_stopped_server_answers_no_request_even_on_an_open_connection() -> None:
    with requests.Session() as session, SupabaseStorage() as storage:
        session.get(storage.url, timeout=PATIENCE_S)
        storage.stop()

        with pytest.raises(requests.ConnectionError):
            session.get(storage.url, timeout=PATIENCE_S)


# --- S3 ---


@pytest.fixture(scope="module")
def s3() -> Iterator[SeaweedServer]:
    with SeaweedServer() as server:
        yield server


def refused_status(call: Callable[[], Any]) -> int:
    with pytest.raises(ClientError) as caught:
        call()
    return caught.value.response["ResponseMetadata"]["HTTPStatusCode"]


def test_an_s3_object_is_read_back_with_its_type(s3: SeaweedServer) -> None:
    client = s3.client()
    client.put_object(Bucket=s3.bucket, Key="a/0.png", Body=b"png", ContentType="image/png")

    found = client.get_object(Bucket=s3.bucket, Key="a/0.png")

    assert (found["Body"].read(), found["ContentType"]) == (b"png", "image/png")


def test_s3_refuses_a_wrong_secret_and_an_unknown_bucket(s3: SeaweedServer) -> None:
    stranger = s3.client(secret_key="wrong")

    assert refused_status(lambda: stranger.put_object(Bucket=s3.bucket, Key="0", Body=b"")) == 403
    assert refused_status(lambda: s3.client().put_object(Bucket="other", Key="0", Body=b"")) in (
        403,
        404,
    )


def test_two_s3_servers_run_side_by_side(s3: SeaweedServer) -> None:
    with SeaweedServer() as other:
        assert other.endpoint != s3.endpoint
        assert other.client().list_objects_v2(Bucket=other.bucket)["KeyCount"] == 0
