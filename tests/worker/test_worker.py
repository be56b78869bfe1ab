"""The life of a job: what is posted and returned, for every way in which it can end."""

import base64
import functools
import gc
import io
import json
import re
import socket
import weakref
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ourvidz_serverless import errors
from ourvidz_serverless.context import Stop
from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.storage.directory import DirectoryStorage
from ourvidz_serverless.document import Document
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.net.retries import Fault, Retry
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_chat import EndlessChat
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import QUICK, LocalWorker, chat_payload, sdxl_payload
from tests.files import ROOT, SPECIFICATION
from tests.patience import PATIENCE_S, start, wait_until
from tests.servers.supabase import CallbackReceiver

MakeLocal = Callable[..., LocalWorker]


def data_uri(colour: str = "red") -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def code(document: Document) -> str | None:
    return document.failure.code if document.failure else None


# --- a job that completes ---


def test_a_completed_document_has_every_field_of_the_specification(local: MakeLocal) -> None:
    body = local().run().callback()

    assert sorted(body) == sorted(SPECIFICATION["document"])
    assert sorted(body["assets"][0]) == sorted(SPECIFICATION["asset"])
    assert sorted(body["assets"][0]["metadata"]) == sorted(SPECIFICATION["image_metadata"])
    assert sorted(body["metadata"]) == sorted([*SPECIFICATION["document_metadata"], "error_type"])


def test_assets_are_stored_under_user_and_job(local: MakeLocal) -> None:
    at = local()

    document = at.run(sdxl_payload(config={"num_images": 3}))

    assert [asset.url for asset in document.assets] == [f"user-1/job-1/{i}.png" for i in range(3)]
    assert at.stored() == sorted(
        f"user-1/job-1/{i}.{kind}" for i in range(3) for kind in ("png", "thumb.webp")
    )


def test_each_image_of_a_batch_has_its_own_seed(local: MakeLocal) -> None:
    at = local()

    document = at.run(sdxl_payload(config={"num_images": 6, "seed": 10}))

    for asset in document.assets:
        with Image.open(at.root / asset.url) as picture:
            assert picture.getpixel((0, 0)) == (asset.metadata["seed"],) * 3


def test_an_asset_reports_its_size_in_bytes(local: MakeLocal) -> None:
    at = local()

    (asset,) = at.run().assets

    assert asset.metadata["file_size_bytes"] == (at.root / asset.url).stat().st_size


def test_a_job_that_is_sent_again_overwrites_its_assets(local: MakeLocal) -> None:
    at = local()
    at.run()

    at.run(sdxl_payload(config={"seed": 99}))

    with Image.open(at.root / "user-1/job-1/0.png") as picture:
        assert picture.getpixel((0, 0)) == (99, 99, 99)


def test_a_second_delivery_of_a_job_without_a_seed_gives_the_same_pictures(
    local: MakeLocal,
) -> None:
    at, unseeded = local(), sdxl_payload(config={"seed": None, "num_images": 3})

    first = at.run(unseeded)
    pictures = {key: (at.root / key).read_bytes() for key in at.stored()}
    again = at.run(unseeded)

    assert first.assets == again.assets
    assert {key: (at.root / key).read_bytes() for key in at.stored()} == pictures


def test_progress_counts_up_to_the_last_step(local: MakeLocal) -> None:
    at = local()

    at.run()

    assert [report["step"] for report in at.progress] == list(range(1, 11))
    assert at.progress[-1]["progress"] == 1.0


def test_a_request_has_the_jobs_size_and_guidance_scale(local: MakeLocal) -> None:
    at = local()

    at.run(sdxl_payload(config={"resolution": "128x64", "guidance_scale": 3}))

    assert at.fake_sdxl.requests[0].size == (128, 64)
    assert at.fake_sdxl.requests[0].guidance_scale == 3


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_a_job_may_choose_the_format_of_its_pictures(local: MakeLocal, name: str) -> None:
    at = local()

    (asset,) = at.run(sdxl_payload(config={"output_format": name, "quality": 80})).assets

    with Image.open(at.root / asset.url) as picture:
        assert picture.format == name.upper()
    assert asset.metadata["format"] == name


class WaitingSdxl(FakeSdxl):
    """Generates its second picture only after the first one is stored."""

    def __init__(self, first: Path) -> None:
        super().__init__()
        self.first = first

    def generate(
        self, request: ImageRequest, progress: Progress
    ) -> Generator[np.ndarray, None, None]:
        for index, picture in enumerate(super().generate(request, progress)):
            if index:
                wait_until(self.first.exists)
            yield picture


def test_a_picture_is_stored_while_the_next_one_is_generated(
    local: MakeLocal, tmp_path: Path
) -> None:
    at = local(fake_sdxl=WaitingSdxl(tmp_path / "assets/user-1/job-1/0.png"))

    assert at.run(sdxl_payload(config={"num_images": 3})).status == "completed"


# --- a job that fails ---


def test_a_failed_document_has_every_field_of_the_specification(local: MakeLocal) -> None:
    document = local().run(sdxl_payload(config={"num_images": 7}))

    assert sorted(document.callback()) == sorted(SPECIFICATION["failed_document"])
    assert document.callback()["metadata"]["error_type"] == "INVALID_PROMPT"
    assert document.callback()["error_message"] == document.callback()["error"]["message"]


def test_the_returned_error_is_the_text_of_the_failure_beside_it(local: MakeLocal) -> None:
    result = local().run(sdxl_payload(type="nonsense")).result()

    assert json.loads(result["error"]) == result["failure"]
    assert set(result["failure"]) == {"code", "message", "retryable"}


@pytest.mark.parametrize(
    "name",
    [name for name in SPECIFICATION["job_types"] if not name.startswith(("sdxl", "admin"))],
)
def test_a_type_that_is_not_served_here_is_unavailable(local: MakeLocal, name: str) -> None:
    document = local().run(sdxl_payload(type=name))

    assert code(document) == "WORKER_UNAVAILABLE"
    assert document.failure.message == f"{name} is not served here; this endpoint serves sdxl"


def test_an_unforeseen_error_is_an_internal_error_without_details(local: MakeLocal) -> None:
    at = local()
    at.fake_sdxl.fails = [RuntimeError("secret path /home/somebody")]

    document = at.run()

    assert code(document) == "INTERNAL_ERROR"
    assert "secret" not in json.dumps(document.result())


def test_an_unforeseen_error_is_logged_with_its_place_and_without_its_message(
    local: MakeLocal, caplog: pytest.LogCaptureFixture
) -> None:
    at = local()
    at.fake_sdxl.fails = [RuntimeError("words of a prompt")]

    at.run()

    assert "RuntimeError at fake_sdxl.py:" in caplog.text
    assert "words of a prompt" not in caplog.text


def test_the_next_job_succeeds_after_one_that_failed(local: MakeLocal) -> None:
    at = local()
    at.fake_sdxl.fails = [RuntimeError("once")]
    at.run()

    assert at.run().status == "completed"


def test_an_error_of_the_model_keeps_its_code(local: MakeLocal) -> None:
    at = local()
    at.fake_sdxl.fails = [errors.OutOfMemory("does not fit")]

    assert code(at.run()) == "OOM_ERROR"


def test_a_storage_that_refuses_a_file_is_an_upload_error(local: MakeLocal, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")

    document = local(storage=DirectoryStorage(tmp_path / "file")).run()

    assert code(document) == "UPLOAD_ERROR"
    assert document.assets == ()


def test_the_document_of_an_invalid_payload_without_an_id_has_the_platforms_id(
    local: MakeLocal,
) -> None:
    assert local().run(["nonsense"]).job_id == "rp-1"


def test_the_document_does_not_repeat_an_invalid_id(local: MakeLocal) -> None:
    assert local().run(sdxl_payload(id="../../etc")).job_id == "rp-1"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def any_worker(tmp_path_factory: pytest.TempPathFactory) -> LocalWorker:
    return LocalWorker(tmp_path_factory.mktemp("any"))


@given(JSON, st.dictionaries(st.text(max_size=9), JSON, max_size=3))
def test_any_event_ends_in_a_document_that_is_json(
    any_worker: LocalWorker, payload: object, top: dict[str, object]
) -> None:
    event = {**top, "input": payload}

    document = any_worker.worker.run(Envelope.of(event), Stop(), lambda progress: None)

    assert document.status == "failed"
    assert json.loads(json.dumps(document.result(), allow_nan=False))["error"]


# --- stop, deadline, shutdown ---


def test_a_stopped_job_leaves_at_the_next_step_and_uploads_nothing(local: MakeLocal) -> None:
    at = local()
    at.stop.set()

    assert code(at.run()) == "CANCELLED"
    assert at.stored() == []


def test_a_stop_frees_the_device_at_the_next_step(local: MakeLocal) -> None:
    at = local()
    at.fake_sdxl.hold()
    running = start(at.run)
    assert at.fake_sdxl.at_step.wait(PATIENCE_S)
    at.stop.set()

    assert code(running.result(PATIENCE_S)) == "CANCELLED"

    at.fake_sdxl.go_on.set()
    assert at.run(sdxl_payload(id="job-2"), stop=Stop()).status == "completed"


def test_a_job_that_waits_for_the_device_can_be_stopped(local: MakeLocal) -> None:
    at = local()
    at.fake_sdxl.hold()
    stop = Stop()
    first = start(at.run)
    assert at.fake_sdxl.at_step.wait(PATIENCE_S)
    second = start(at.run, sdxl_payload(id="job-2"), stop)
    stop.set()

    assert code(second.result(PATIENCE_S)) == "CANCELLED"
    at.fake_sdxl.go_on.set()
    assert first.result(PATIENCE_S).status == "completed"


class StoppingStorage(DirectoryStorage):
    """A storage that fails, for a job that is stopped meanwhile."""

    def __init__(self, root: Path, stop: Stop) -> None:
        super().__init__(root)
        self._stop = stop

    def put(self, key: str, data: bytes, mime: str) -> None:
        self._stop.set()
        raise Fault(503)

    def get(self, key: str, bucket: str | None = None) -> bytes:
        self._stop.set()
        raise Fault(503)


@pytest.mark.parametrize("reference", [None, "user-1/job-0/0.png"])
def test_a_job_that_is_stopped_while_a_transfer_fails_is_cancelled(
    local: MakeLocal, tmp_path: Path, reference: str | None
) -> None:
    stop = Stop()
    at = local(storage=StoppingStorage(tmp_path, stop))
    changes = {"reference_image_url": reference, "exact_copy_mode": True} if reference else {}

    assert code(at.run(sdxl_payload(metadata=changes), stop)) == "CANCELLED"


def test_a_deadline_ends_a_job_at_its_next_step(local: MakeLocal) -> None:
    at = local(settings=Settings(job_timeout_s=0.2))
    at.fake_sdxl.hold()

    document = start(at.run).result(PATIENCE_S)

    assert code(document) == "TIMEOUT_ERROR"
    assert document.failure.message == "the job's 0.2 seconds are over"


def test_the_jobs_own_timeout_replaces_the_workers(local: MakeLocal) -> None:
    at = local(settings=Settings(job_timeout_s=60))
    at.fake_sdxl.hold()
    event = {"input": sdxl_payload(), "policy": {"executionTimeout": 200}}

    running = start(at.worker.run, Envelope.of(event), at.stop, at.progress.append)
    document = running.result(PATIENCE_S)

    assert code(document) == "TIMEOUT_ERROR"
    assert document.failure.message == "the job's 0.18 seconds are over"


def test_a_worker_that_shuts_down_accepts_jobs_until_the_grace_is_over(local: MakeLocal) -> None:
    at = local()
    at.worker.close_after(grace_s=60)
    within = at.run()

    at.worker.close_after(grace_s=0)

    assert within.status == "completed"
    wait_until(lambda: code(at.run(sdxl_payload(id="job-2"))) == "WORKER_UNAVAILABLE")


def test_a_closed_worker_refuses_jobs(local: MakeLocal) -> None:
    at = local()
    at.worker.close(grace_s=60)

    assert code(at.run()) == "WORKER_UNAVAILABLE"


def test_a_closed_worker_lets_a_job_finish_within_the_grace(local: MakeLocal) -> None:
    at = local()
    at.fake_sdxl.hold()
    running = start(at.run)
    assert at.fake_sdxl.at_step.wait(PATIENCE_S)
    at.worker.close(grace_s=60)
    at.fake_sdxl.go_on.set()

    assert running.result(PATIENCE_S).status == "completed"


def test_a_closed_worker_stops_a_job_after_the_grace(local: MakeLocal) -> None:
    at = local()
    at.fake_sdxl.hold()
    running = start(at.run)
    assert at.fake_sdxl.at_step.wait(PATIENCE_S)
    at.worker.close(grace_s=0)

    document = running.result(PATIENCE_S)
    assert code(document) == "WORKER_UNAVAILABLE"
    assert document.failure.retryable


# --- two at once ---


def test_only_one_job_computes_at_a_time(local: MakeLocal) -> None:
    at = local()
    for each in [start(at.run, sdxl_payload(id=f"job-{i}"), Stop()) for i in range(4)]:
        assert each.result(PATIENCE_S).status == "completed"

    assert at.fake_sdxl.most_at_once == 1


def test_a_second_delivery_joins_the_first(
    local: MakeLocal, receiver: CallbackReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ourvidz")
    at = local(callback=Callback(receiver.callback_url, receiver.secret))
    at.fake_sdxl.hold()
    first = start(at.run)
    assert at.fake_sdxl.at_step.wait(PATIENCE_S)
    second = start(at.run, None, Stop())
    wait_until(lambda: "arrived again" in caplog.text)
    at.fake_sdxl.go_on.set()

    assert first.result(PATIENCE_S) == second.result(PATIENCE_S)

    assert len(at.fake_sdxl.requests) == 1
    assert len(receiver.received) == 1


@pytest.mark.parametrize(
    ("deliveries", "num_posted"),
    [("q", 0), ("qa", 1), ("qaa", 1), ("qq", 0), ("qqa", 1), ("aq", 1), ("aqa", 1)],
)
def test_exactly_one_callback_is_posted_if_any_delivery_announces(
    local: MakeLocal,
    receiver: CallbackReceiver,
    caplog: pytest.LogCaptureFixture,
    deliveries: str,
    num_posted: int,
) -> None:
    caplog.set_level("INFO", "ourvidz")
    at = local(callback=Callback(receiver.callback_url, receiver.secret))
    envelope = Envelope.of({"id": "rp-1", "input": sdxl_payload()})
    quiet = functools.partial(at.worker.run, announces=False)
    runs = {"q": quiet, "a": at.worker.run}
    at.fake_sdxl.hold()
    ends = []
    for count, kind in enumerate(deliveries):
        ends.append(start(runs[kind], envelope, Stop(), at.progress.append))
        if count == 0:
            assert at.fake_sdxl.at_step.wait(PATIENCE_S)
        wait_until(lambda count=count: caplog.text.count("arrived again") == count)
    at.fake_sdxl.go_on.set()
    documents = [end.result(PATIENCE_S) for end in ends]

    assert {document.status for document in documents} == {"completed"}
    assert len(at.fake_sdxl.requests) == 1
    assert [each.document for each in receiver.received] == [documents[0].callback()] * num_posted


def test_a_joined_delivery_keeps_a_document_that_it_cannot_post(
    local: MakeLocal, receiver: CallbackReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ourvidz")
    receiver.script([410])
    at = local(callback=posting(receiver))
    envelope = Envelope.of({"id": "rp-1", "input": sdxl_payload()})
    quiet = functools.partial(at.worker.run, announces=False)
    at.fake_sdxl.hold()
    first = start(quiet, envelope, Stop(), at.progress.append)
    assert at.fake_sdxl.at_step.wait(PATIENCE_S)
    announcing = start(at.worker.run, envelope, Stop(), at.progress.append)
    wait_until(lambda: "arrived again" in caplog.text)
    at.fake_sdxl.go_on.set()

    callback = announcing.result(PATIENCE_S).metadata["callback"]
    first.result(PATIENCE_S)

    assert (callback["delivered"], callback["kept"]) == (
        False,
        "user-1/job-1/callback.completed.json",
    )
    assert callback["kept"] in at.stored()


def test_jobs_of_two_users_with_the_same_id_both_run(local: MakeLocal) -> None:
    at = local()
    at.fake_sdxl.hold()
    first = start(at.run)
    assert at.fake_sdxl.at_step.wait(PATIENCE_S)
    second = start(at.run, sdxl_payload(user_id="user-2"), Stop())
    at.fake_sdxl.go_on.set()

    assert first.result(PATIENCE_S).assets[0].url == "user-1/job-1/0.png"
    assert second.result(PATIENCE_S).assets[0].url == "user-2/job-1/0.png"


@pytest.mark.parametrize(("ids", "replies"), [(("rp-1", "rp-2"), 2), (("rp-1", "rp-1"), 1)])
def test_anonymous_deliveries_join_only_by_the_platforms_id(
    local: MakeLocal, caplog: pytest.LogCaptureFixture, ids: tuple[str, str], replies: int
) -> None:
    caplog.set_level("INFO", "ourvidz")
    endless = EndlessChat()
    at = local(settings=Settings(families=("chat",)), models={"chat": endless})
    payload = chat_payload(id="hello")
    del payload["user_id"]
    stops = [Stop(), Stop()]
    runs = [
        start(at.worker.run, Envelope.of({"id": name, "input": payload}), stop, at.progress.append)
        for name, stop in zip(ids, stops, strict=True)
    ]
    wait_until(lambda: endless.begun + caplog.text.count("arrived again") == 2)
    for stop in stops:
        stop.set()
    ends = [run.result(PATIENCE_S) for run in runs]

    assert [end.job_id for end in ends] == ["hello", "hello"]
    assert endless.begun == replies


def test_stopping_the_second_delivery_stops_the_job(local: MakeLocal) -> None:
    at = local()
    at.fake_sdxl.hold()
    stop = Stop()
    first = start(at.run)
    assert at.fake_sdxl.at_step.wait(PATIENCE_S)
    second = start(at.run, None, stop)
    stop.set()

    assert code(first.result(PATIENCE_S)) == code(second.result(PATIENCE_S)) == "CANCELLED"


# --- callbacks ---


def posting(receiver: CallbackReceiver) -> Callback:
    return Callback(receiver.callback_url, receiver.secret, policy=QUICK)


def test_the_callback_is_the_returned_document(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    document = local(callback=posting(receiver)).run()

    assert receiver.wait(1)[0].document == document.callback()


def test_the_callback_comes_after_the_last_upload(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    at = local(callback=posting(receiver))

    at.run()

    received = receiver.wait(1)[0]
    assert all((at.root / key).stat().st_mtime <= received.at for key in at.stored())


def test_a_failure_is_posted_too(local: MakeLocal, receiver: CallbackReceiver) -> None:
    local(callback=posting(receiver)).run(sdxl_payload(prompt=None))

    document = receiver.wait(1)[0].document
    assert (document["status"], document["error"]["code"]) == ("failed", "INVALID_PROMPT")


def test_with_callback_processing_the_start_of_a_job_is_posted(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    local(callback=posting(receiver), settings=Settings(callback_processing=True)).run()

    assert [each.document["status"] for each in receiver.wait(2)] == ["processing", "completed"]


def test_an_undelivered_document_is_kept_beside_the_assets(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    receiver.script([500, 500, 500])
    at = local(callback=posting(receiver))

    document = at.run()

    callback = document.result()["metadata"]["callback"]
    assert (document.status, callback["delivered"]) == ("completed", False)
    kept = json.loads((at.root / callback["kept"]).read_text())
    assert kept["assets"] == document.callback()["assets"]


def test_an_undelivered_refusal_of_an_invalid_payload_is_kept_too(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    receiver.script([500, 500, 500])
    at = local(callback=posting(receiver))

    document = at.run(sdxl_payload(prompt=None))

    callback = document.result()["metadata"]["callback"]
    assert callback["kept"] == "undelivered/job-1/callback.failed.json"
    assert json.loads((at.root / callback["kept"]).read_text())["error"]["code"] == "INVALID_PROMPT"


def test_a_refusal_of_an_invalid_payload_is_posted_to_the_jobs_own_url(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    own = local(callback=Callback(None, receiver.secret, allowed_hosts=("127.0.0.1",)))

    own.run(sdxl_payload(prompt=None, callback_url=receiver.callback_url))

    assert receiver.wait(1)[0].document["error"]["code"] == "INVALID_PROMPT"


def unsignable(receiver: CallbackReceiver) -> Callback:
    """A callback that cannot sign: its secret has the prefix of base64, and is none."""
    return Callback(receiver.callback_url, "whsec_abc", policy=QUICK)


def test_an_unforeseen_error_of_a_callback_loses_no_document(
    local: MakeLocal, receiver: CallbackReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    at = local(callback=unsignable(receiver))

    document = at.run()

    callback = document.metadata["callback"]
    assert (document.status, callback["delivered"]) == ("completed", False)
    assert callback["reason"] == "an internal error; the worker's log says where"
    assert callback["kept"] in at.stored()
    assert "job job-1 met a bug: ValueError at signatures.py:" in caplog.text


def test_an_unforeseen_error_of_a_callback_leaves_no_running_job(
    local: MakeLocal, receiver: CallbackReceiver, tmp_path: Path
) -> None:
    marks = tmp_path / "poison"
    at = local(callback=unsignable(receiver), settings=Settings(poison_dir=marks))

    at.run()

    assert at.worker.health()["jobs"] == {"processing": 0, "completed": 1, "failed": 0}
    assert list(marks.iterdir()) == []
    assert at.run().status == "completed"


def test_a_document_that_cannot_be_kept_either_is_returned(
    local: MakeLocal, receiver: CallbackReceiver, tmp_path: Path
) -> None:
    receiver.script([410])
    nowhere = DirectoryStorage(tmp_path / "no\0folder")

    document = local(callback=posting(receiver), storage=nowhere).run()

    assert code(document) == "INTERNAL_ERROR"
    assert document.metadata["callback"] == {
        "delivered": False,
        "reason": "HTTP 410",
        "kept": None,
    }


def test_a_job_runs_if_its_start_cannot_be_posted(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    at = local(callback=unsignable(receiver), settings=Settings(callback_processing=True))

    assert at.run().status == "completed"


# --- how long a callback may take ---

#: Waits longer than a job's time, which only its stop can end.
SLOW = Retry(base_s=20.0, max_s=20.0, jitter=0.0)


def statuses(receiver: CallbackReceiver) -> list[str]:
    return [each.document["status"] for each in receiver.received]


def test_a_stop_ends_the_tries_to_post_the_start(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    receiver.script([503])
    at = local(
        callback=Callback(receiver.callback_url, receiver.secret, policy=SLOW),
        settings=Settings(callback_processing=True),
    )
    running = start(at.run)
    receiver.wait(1)
    at.stop.set()

    assert code(running.result(PATIENCE_S)) == "CANCELLED"
    assert statuses(receiver) == ["processing", "failed"]


def test_the_tries_to_post_the_start_end_with_the_jobs_time(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    receiver.script([503])
    at = local(
        callback=Callback(receiver.callback_url, receiver.secret, policy=SLOW),
        settings=Settings(callback_processing=True, job_timeout_s=15),
    )

    assert at.run().status == "completed"
    assert statuses(receiver) == ["processing", "completed"]


def test_the_tries_to_post_a_document_end_with_the_jobs_time(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    receiver.script([503])
    at = local(
        callback=Callback(receiver.callback_url, receiver.secret, policy=SLOW),
        settings=Settings(job_timeout_s=15),
    )

    assert at.run().metadata["callback"]["reason"] == "HTTP 503"
    assert statuses(receiver) == ["completed"]


@pytest.mark.parametrize(
    "end", [lambda at: at.stop.set(), lambda at: at.worker.close(grace_s=0)], ids=["stop", "grace"]
)
def test_a_receiver_that_hangs_does_not_hold_a_stopped_job(
    local: MakeLocal, monkeypatch: pytest.MonkeyPatch, end: Callable[[LocalWorker], None]
) -> None:
    monkeypatch.setattr("ourvidz_serverless.delivery.outbox.LAST_WORD_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        url = f"http://127.0.0.1:{hanging.getsockname()[1]}/"
        at = local(callback=Callback(url, policy=Retry(base_s=0.01, try_s=20.0)))
        running = start(at.run)
        hanging.settimeout(PATIENCE_S)
        with hanging.accept()[0]:
            end(at)

            callback = running.result(PATIENCE_S).metadata["callback"]
        hanging.settimeout(0)
        with pytest.raises(BlockingIOError):  # there was no second try
            hanging.accept()
    assert callback["delivered"] is False
    assert callback["kept"] in at.stored()


def test_a_stopped_jobs_document_is_tried_again_within_its_last_seconds(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    receiver.script([503, 503])
    at = local(callback=posting(receiver))
    at.stop.set()

    at.run()

    assert statuses(receiver) == ["failed"] * 3
    assert receiver.received[-1].status == 200


def test_the_callback_url_of_an_unauthorized_job_is_not_used(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    own = local(
        callback=Callback(None, receiver.secret, allowed_hosts=("127.0.0.1",)),
        settings=Settings(worker_api_key="worker-key"),
    )

    document = own.run(sdxl_payload(callback_url=receiver.callback_url))

    assert code(document) == "UNAUTHORIZED"
    assert receiver.received == []


# --- references ---


def test_a_reference_is_the_start_image(local: MakeLocal) -> None:
    at = local()

    document = at.run(
        sdxl_payload(
            config={"denoise_strength": 0.4}, metadata={"reference_image_url": data_uri("blue")}
        )
    )

    start = at.fake_sdxl.requests[0].start
    assert start and start.image.getpixel((5, 5)) == (0, 0, 255)
    assert document.metadata["reference_mode"] == "modify"
    assert document.assets[0].metadata["denoise_strength"] == 0.4


def test_a_job_runs_without_a_reference_that_fails_and_warns(local: MakeLocal) -> None:
    document = local().run(sdxl_payload(metadata={"reference_image_url": "http://a.example/x"}))

    assert document.metadata["reference_mode"] == "none"
    (warning,) = document.metadata["warnings"]
    assert warning.startswith("reference: ")
    assert warning.count("reference: ") == 1


@pytest.mark.parametrize(
    "asked", [{"config": {"reference_required": True}}, {"metadata": {"exact_copy_mode": True}}]
)
def test_a_required_reference_that_fails_ends_the_job(
    local: MakeLocal, asked: dict[str, dict[str, bool]]
) -> None:
    metadata = {"reference_image_url": "data:image/png;base64,xxxx", **asked.get("metadata", {})}

    document = local().run(sdxl_payload(metadata=metadata, config=asked.get("config", {})))

    assert code(document) == "REFERENCE_FRAME_ERROR"


def test_a_reference_in_adult_mode_needs_consent(local: MakeLocal) -> None:
    metadata = {"reference_image_url": data_uri()}

    refused = local().run(sdxl_payload(content_type="nsfw", metadata=metadata))
    consented = {**metadata, "reference_consent": True}
    accepted = local().run(sdxl_payload(content_type="nsfw", metadata=consented))

    assert code(refused) == "CONTENT_REFUSED"
    assert "content policy" in refused.failure.message
    assert accepted.status == "completed"


SEXUAL = [
    {"prompt": "a nude in oil"},
    {"compel_enabled": True, "compel_weights": "(nude:1.2)"},
    {"prompt": "a nude in oil", "content_type": "sfw"},
    {"prompt": "a nude in oil", "metadata": {"exact_copy_mode": True}},
    {"prompt": "a nude in oil", "metadata": {"reference_mode": "copy"}},
]


@pytest.mark.parametrize("asked", SEXUAL)
def test_a_reference_beside_a_sexual_text_needs_consent(
    local: MakeLocal, asked: dict[str, Any]
) -> None:
    at = local()
    metadata = {"reference_image_url": data_uri(), **asked.get("metadata", {})}

    refused = at.run(sdxl_payload(**{**asked, "metadata": metadata}))
    assert at.fake_sdxl.requests == []
    consented = {**metadata, "reference_consent": True}
    accepted = at.run(sdxl_payload(**{**asked, "metadata": consented}))

    assert code(refused) == "CONTENT_REFUSED"
    assert refused.failure.message.startswith("content policy: metadata.reference_consent must")
    assert accepted.status == "completed"


def test_a_success_clears_the_error_of_an_earlier_try_in_the_applications_row(
    local: MakeLocal,
) -> None:
    payload = sdxl_payload()
    refused = local().run({**payload, "config": {"num_images": 7}})
    done = local().run(payload)

    row: dict[str, Any] = {}
    for document in (refused, done):
        row |= document.callback()["metadata"]

    assert refused.callback()["metadata"]["error_type"] == "INVALID_PROMPT"
    assert row["error_type"] is None


def test_the_guide_names_the_field_in_a_refusal_for_consent(
    local: MakeLocal,
) -> None:
    metadata = {"reference_image_url": data_uri()}

    refused = local().run(sdxl_payload(content_type="nsfw", metadata=metadata))

    assert refused.failure
    (field,) = re.findall(r"metadata\.\w+", refused.failure.message)
    guide = (ROOT / "docs/integrate.md").read_text()
    consent = guide[guide.index("## Consent") : guide.index("## The bridge")]
    assert f"`{field}` is `true`" in consent
    assert f"{field.removeprefix('metadata.')}: hasReference && consentGiven" in consent


def test_a_sexual_text_without_a_reference_needs_no_consent(local: MakeLocal) -> None:
    assert local().run(sdxl_payload(prompt="a nude in oil")).status == "completed"


def test_an_ordinary_text_beside_a_reference_needs_no_consent(local: MakeLocal) -> None:
    metadata = {"reference_image_url": data_uri()}

    document = local().run(sdxl_payload(negative_prompt="nude", metadata=metadata))

    assert document.status == "completed"


def test_without_require_reference_consent_a_sexual_text_needs_none(local: MakeLocal) -> None:
    at = local(settings=Settings(require_reference_consent=False))
    metadata = {"reference_image_url": data_uri()}

    assert at.run(sdxl_payload(prompt="a nude in oil", metadata=metadata)).status == "completed"


@pytest.mark.parametrize("label", ["NSFW", "Nsfw", " nsfw "])
@pytest.mark.parametrize("field", ["content_type", "contentType"])
def test_an_nsfw_label_means_adult_in_any_case(local: MakeLocal, label: str, field: str) -> None:
    labelled = {"content_type": label}
    if field == "contentType":
        labelled = {"metadata": {"contentType": label}}

    assert code(local().run(sdxl_payload(prompt="a child", **labelled))) == "CONTENT_REFUSED"


# --- the content floor ---


@pytest.mark.parametrize("place", ["prompt", "compel_weights"])
def test_the_floor_reads_every_text_before_anything_is_done(local: MakeLocal, place: str) -> None:
    at = local()

    document = at.run(sdxl_payload(**{place: "nude child"}))

    assert code(document) == "CONTENT_REFUSED"
    assert at.fake_sdxl.requests == []


def test_a_refusal_is_audited_by_rule_and_hash(
    local: MakeLocal, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ourvidz.audit")

    local().run(sdxl_payload(prompt="nude child"))

    line = next(json.loads(each.message) for each in caplog.records if each.name.endswith("audit"))
    assert (line["user_id"], line["type"]) == ("user-1", "sdxl_image_fast")
    assert (line["content"], len(line["texts_sha256"])) == ("minor+sexual", 64)
    assert "nude" not in caplog.text


def test_the_floor_leaves_negative_prompts_alone(local: MakeLocal) -> None:
    assert local().run(sdxl_payload(negative_prompt="child, nude")).status == "completed"


def test_a_stop_signal_keeps_no_memory_of_its_job(tmp_path: Path) -> None:
    latents: list[weakref.ref[Any]] = []

    class Stopped(FakeSdxl):
        def generate(
            self, request: ImageRequest, progress: Progress
        ) -> Generator[np.ndarray, None, None]:
            held = np.zeros(8)
            latents.append(weakref.ref(held))
            local.stop.set()
            progress.step(1, 2)
            yield held

    local = LocalWorker(tmp_path, fake_sdxl=Stopped())

    local.run()

    assert local.stop.error
    gc.collect()
    assert latents[0]() is None


class ObservedPayload(dict[str, Any]):
    """A payload that counts how often it is parsed, and may make its parser fail."""

    def __init__(self, payload: Mapping[str, Any], error: Exception | None = None) -> None:
        super().__init__(payload)
        self.num_parsed, self._error = 0, error

    def items(self) -> Any:
        self.num_parsed += 1
        if self._error:
            raise self._error
        return super().items()


@pytest.mark.parametrize(
    ("keys", "prompt", "parsed"),
    [((), "a red sun", 1), ((), None, 1), (("worker-key",), "a red sun", 0)],
)
def test_a_payload_is_parsed_once_and_never_without_its_key(
    local: MakeLocal, keys: tuple[str, ...], prompt: str | None, parsed: int
) -> None:
    payload = ObservedPayload(sdxl_payload(prompt=prompt))

    local(settings=Settings(worker_api_key=keys)).run(payload)

    assert payload.num_parsed == parsed


def test_a_bug_in_the_parser_ends_the_job_as_an_internal_error(local: MakeLocal) -> None:
    document = local().run(ObservedPayload(sdxl_payload(), RuntimeError("a bug")))

    assert code(document) == "INTERNAL_ERROR"
