"""A callback is signed twice, tried three times, and posted to no other host."""

import base64
import hashlib
import hmac
import re
import socket
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.delivery.callback import DELIVERY_S, Callback, signatures, webhook_id
from ourvidz_serverless.document import Document, Status
from ourvidz_serverless.job import KEY_PATTERN
from ourvidz_serverless.net.retries import Fault, Retry
from ourvidz_serverless.net.supabase import Project
from ourvidz_serverless.settings import Settings
from tests.fakes.local_worker import QUICK
from tests.servers.supabase import CallbackReceiver

KEYS = st.from_regex(KEY_PATTERN.strip("^$"), fullmatch=True)
DONE = Document("job-1", "worker-1", "completed")


def callback(receiver: CallbackReceiver, **options: object) -> Callback:
    options = {"secret": receiver.secret, "policy": QUICK, **options}
    return Callback(receiver.callback_url, **options)  # type: ignore[arg-type]


def test_both_signatures_of_a_callback_match_the_posted_bytes(receiver: CallbackReceiver) -> None:
    callback(receiver).post(DONE)

    (received,) = receiver.wait(1)
    assert (received.signature_ok, received.webhook_ok, received.status) == (True, True, 200)


def test_a_secret_without_the_webhook_prefix_is_the_key_itself() -> None:
    headers = signatures("plain", b"body", "job-1.completed", 1700000000)

    assert headers["X-Callback-Signature"] == (
        "sha256=" + hmac.new(b"plain", b"body", hashlib.sha256).hexdigest()
    )
    signed = hmac.digest(b"plain", b"job-1.completed.1700000000.body", "sha256")
    assert headers["webhook-signature"] == "v1," + base64.b64encode(signed).decode()


def test_the_document_arrives_as_the_edge_function_reads_it(receiver: CallbackReceiver) -> None:
    callback(receiver).post(DONE)

    (received,) = receiver.wait(1)
    assert received.document == {
        "job_id": "job-1",
        "worker_id": "worker-1",
        "status": "completed",
        "assets": [],
        "metadata": {"error_type": None},
    }


def test_the_service_key_is_sent_to_its_own_project(receiver: CallbackReceiver) -> None:
    callback(receiver, project=Project(receiver.url, "service-key")).post(DONE)

    assert receiver.wait(1)[0].headers["Authorization"] == "Bearer service-key"


@pytest.mark.parametrize("answers", [[503], ["reset", 500], [(429, {"Retry-After": "0"})], [408]])
def test_a_callback_is_posted_again_after_a_transient_error(
    receiver: CallbackReceiver, answers: list[object]
) -> None:
    receiver.script(answers)

    callback(receiver).post(DONE)

    assert [each.status for each in receiver.wait(len(answers) + 1)][-1] == 200


def test_the_webhook_id_is_the_same_at_every_try(receiver: CallbackReceiver) -> None:
    receiver.script([503, 503])

    callback(receiver).post(DONE)

    ids = [received.headers["webhook-id"] for received in receiver.wait(3)]
    assert ids == [webhook_id("job-1", "completed")] * 3


@pytest.mark.parametrize("job_id", ["job-1", "a.b", "job.completed", "j" * 128])
def test_the_webhook_id_is_a_digest_whatever_the_job_id(
    receiver: CallbackReceiver, job_id: str
) -> None:
    callback(receiver).post(replace(DONE, job_id=job_id))

    (received,) = receiver.wait(1)
    assert re.fullmatch(r"msg_[0-9a-f]{32}", received.headers["webhook-id"])
    assert received.webhook_ok


@given(st.lists(st.tuples(KEYS, st.sampled_from(get_args(Status))), unique=True, max_size=20))
def test_each_job_and_status_has_its_own_webhook_id(ends: list[tuple[str, str]]) -> None:
    assert len({webhook_id(job, status) for job, status in ends}) == len(ends)


def test_a_callback_is_given_up_after_three_tries(receiver: CallbackReceiver) -> None:
    receiver.script([503] * 5)

    with pytest.raises(Fault, match="HTTP 503"):
        callback(receiver).post(DONE)

    assert len(receiver.received) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 410, 422])
def test_a_refused_callback_is_not_posted_again(receiver: CallbackReceiver, status: int) -> None:
    receiver.script([status])

    with pytest.raises(Fault, match=f"HTTP {status}"):
        callback(receiver).post(DONE)

    assert len(receiver.received) == 1


def test_a_callback_follows_no_redirect(receiver: CallbackReceiver) -> None:
    receiver.script([(302, {"Location": f"{receiver.url}/elsewhere"})])

    with pytest.raises(Fault, match="HTTP 302"):
        callback(receiver).post(DONE)

    assert len(receiver.received) == 1


def test_a_worker_without_a_secret_posts_without_signatures(receiver: CallbackReceiver) -> None:
    with pytest.raises(Fault, match="HTTP 401"):
        Callback.of(Settings(callback_url=receiver.callback_url)).post(DONE)

    (received,) = receiver.wait(1)
    assert "X-Callback-Signature" not in received.headers
    assert "webhook-signature" not in received.headers


def test_a_callback_without_a_url_posts_nothing() -> None:
    assert Callback(None).post(DONE) is None


def test_a_jobs_own_url_is_used_if_its_host_is_allowed(receiver: CallbackReceiver) -> None:
    own = Callback(None, receiver.secret, allowed_hosts=("127.0.0.1",))

    own.post(DONE, receiver.callback_url)

    assert receiver.wait(1)[0].signature_ok


@pytest.mark.parametrize("listed", ["LOCALHOST", "LocalHost.", " localhost "])
def test_a_callback_host_is_allowed_in_every_spelling(
    receiver: CallbackReceiver, listed: str
) -> None:
    own = Callback(None, receiver.secret, allowed_hosts=(listed,))

    own.post(DONE, receiver.callback_url.replace("127.0.0.1", "LocalHost"))

    assert receiver.wait(1)[0].signature_ok


def test_a_jobs_own_url_is_ignored_if_its_host_is_not_allowed(receiver: CallbackReceiver) -> None:
    Callback(None, receiver.secret).post(DONE, receiver.callback_url)

    assert receiver.received == []


@pytest.mark.parametrize(
    "spelling",
    [
        "http://{there}\\@allowed.example/",
        "http://{there}\\.allowed.example/",
        "http://allowed.example@{there}/",
        "http://{there}#@allowed.example/",
        "http://{there}?@allowed.example/",
        "http://{there}\t@allowed.example/",
        "http://[",
        "https://[allowed.example]/",
    ],
)
def test_no_spelling_of_a_callback_url_evades_the_list_of_hosts(
    receiver: CallbackReceiver, spelling: str
) -> None:
    general = Callback(None, allowed_hosts=("allowed.example",))

    general.post(DONE, spelling.format(there=receiver.url.removeprefix("http://")))

    assert receiver.received == []


def test_the_default_callback_url_is_in_the_supabase_project() -> None:
    settings = Settings(supabase_url="https://project.example/")

    assert settings.resolved_callback_url == "https://project.example/functions/v1/job-callback"


def test_a_receiver_that_never_answers_does_not_hold_a_callback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ourvidz_serverless.delivery.callback.DELIVERY_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/callback"

        with pytest.raises(Fault, match="no answer"):
            Callback(url, None, policy=Retry(base_s=0.01, try_s=5.0)).post(DONE)

        silent.settimeout(0)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):  # there was no second try
            silent.accept()


def test_no_try_of_a_callback_begins_after_the_time_of_all_tries(
    receiver: CallbackReceiver,
) -> None:
    receiver.script([503])
    naps: list[float] = []
    slow = Retry(base_s=DELIVERY_S + 1, max_s=DELIVERY_S + 1, jitter=0.0)

    with pytest.raises(Fault, match="HTTP 503"):
        callback(receiver, policy=slow).post(DONE, deadline=Deadline(sleep=naps.append))

    assert (naps, len(receiver.received)) == ([], 1)
