"""The handler in RunPod's own loop: the real SDK in a process, against an emulated platform."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from PIL import Image

from tests.fakes import slow_handler
from tests.fakes.local_worker import sdxl_payload
from tests.fakes.slow_handler import Slowdown
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.handler import LOCAL_API, failure, run_handler, served_at, start
from tests.servers.runpod import Platform
from tests.servers.s3 import SeaweedServer
from tests.servers.supabase import CallbackReceiver, SupabaseStorage
from tests.servers.worker_process import WorkerProcess

pytestmark = pytest.mark.slow

#: Longer than any test waits before it submits a job during an open poll.
LONG_POLL_S = 8.0

#: At least twelve seconds with the slowdown on.
MANY_STEPS = {"config": {"num_inference_steps": 50}}
#: A few seconds, so that a test can act while the job runs.
LONG = {"config": {"num_inference_steps": 50, "num_images": 3, "resolution": "192x192"}}


@pytest.fixture(scope="module")
def receiver() -> Iterator[CallbackReceiver]:
    with CallbackReceiver() as server:
        yield server


@pytest.fixture(scope="module")
def slowdown(tmp_path_factory: pytest.TempPathFactory) -> Slowdown:
    return Slowdown(tmp_path_factory.mktemp("slowdown") / "slowdown")


@pytest.fixture(scope="module")
def worker(
    platform: Platform, slowdown: Slowdown, receiver: CallbackReceiver, outputs: Path
) -> Iterator[WorkerProcess]:
    env = {
        "STORAGE_URL": f"file:{outputs}",
        "S3_CONFIG_HOSTS": "127.0.0.1",
        "CALLBACK_URL": receiver.callback_url,
        "JOB_CALLBACK_SECRET": receiver.secret,
    }
    with slow_handler.start(platform, slowdown, **env) as process:
        yield process


def calls_back(receiver: CallbackReceiver, folder: Path, **env: str) -> dict[str, str]:
    """The environment of a worker that stores in a folder and calls a receiver back."""
    return {
        "STORAGE_URL": f"file:{folder / 'assets'}",
        "CALLBACK_URL": receiver.callback_url,
        "JOB_CALLBACK_SECRET": receiver.secret,
        **env,
    }


def called_back(receiver: CallbackReceiver, job_id: str) -> list[str]:
    """The statuses in the callbacks of a job."""
    documents = [each.document for each in receiver.received]
    return [document["status"] for document in documents if document["job_id"] == job_id]


# --- one job ---


@pytest.mark.usefixtures("worker")
def test_a_job_comes_back_with_a_stored_picture(platform: Platform, outputs: Path) -> None:
    job = platform.submit(sdxl_payload(id="ends-well", config={"resolution": "128x64"}))

    platform.result(job)

    status = platform.status(job)
    assert status["status"] == "COMPLETED"
    (asset,) = status["output"]["assets"]
    with Image.open(outputs / asset["url"]) as picture:
        assert picture.size == (128, 64)


@pytest.mark.usefixtures("worker")
def test_the_callback_equals_the_returned_document(
    platform: Platform, receiver: CallbackReceiver
) -> None:
    job = platform.submit(sdxl_payload(id="called-back"))

    output = platform.result(job)["output"]

    (callback,) = [each for each in receiver.received if each.document["job_id"] == "called-back"]
    assert (callback.signature_ok, callback.webhook_ok, callback.status) == (True, True, 200)
    assert callback.document == output


@pytest.mark.usefixtures("worker")
def test_a_refusal_is_a_runpod_failure_whose_text_is_json(platform: Platform) -> None:
    job = platform.submit(sdxl_payload(config={"num_images": 7}))

    platform.result(job)

    status = platform.status(job)
    assert status["status"] == "FAILED"
    assert failure(status) == {
        "code": "INVALID_PROMPT",
        "message": "config.num_images: Input should be less than or equal to 6",
        "retryable": False,
    }
    assert status["output"]["failure"] == failure(status)


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    "name", ["video_fast", "chat_enhance", "image7b_fast_enhanced", "wan_video_high"]
)
def test_a_job_of_a_family_that_is_not_served_is_unavailable_and_retryable(
    platform: Platform, name: str
) -> None:
    job = platform.submit(sdxl_payload(type=name))

    platform.result(job)

    assert failure(platform.status(job))["code"] == "WORKER_UNAVAILABLE"
    assert failure(platform.status(job))["retryable"] is True


@pytest.mark.usefixtures("worker")
def test_an_admin_job_is_answered_while_a_picture_is_rendered(
    platform: Platform, slowdown: Slowdown
) -> None:
    with slowdown.on():
        picture = platform.submit(sdxl_payload(id="under-way", **MANY_STEPS))
        platform.wait_for_updates(picture)
        question = {"type": "admin_utilities", "config": {"operation": "memory_report"}}

        answer = platform.result(platform.submit({"id": "report", **question}))["output"]

    assert platform.status(picture)["status"] == "IN_PROGRESS"
    (row,) = answer["result"]["models"]
    assert (row["name"], row["state"], row["users"]) == ("sdxl", "device", 1)
    assert platform.result(picture)["output"]["status"] == "completed"


@pytest.mark.usefixtures("worker")
def test_an_unknown_type_is_refused_with_the_known_ones(platform: Platform) -> None:
    job = platform.submit(sdxl_payload(type="sdxl_image_best"))

    platform.result(job)

    assert failure(platform.status(job))["message"].startswith("type: Input should be one of ")


@pytest.mark.usefixtures("worker")
def test_progress_comes_in_order_and_never_after_the_result(
    platform: Platform, slowdown: Slowdown
) -> None:
    with slowdown.on():
        job = platform.submit(sdxl_payload(id="told", **MANY_STEPS))
        platform.wait_for_updates(job, 2)

    platform.result(job)
    time.sleep(1)

    updates = platform.updates(job)
    steps = [update.document["output"]["step"] for update in updates if not update.terminal]
    assert len(steps) >= 2
    assert steps == sorted(steps)
    assert [update.terminal for update in updates] == [False] * len(steps) + [True]
    assert platform.status(job)["status"] == "COMPLETED"


# --- several ---


def test_a_cancelled_job_frees_its_slot_at_the_next_step(
    platform: Platform, worker: WorkerProcess, slowdown: Slowdown, outputs: Path
) -> None:
    with slowdown.on():
        job = platform.submit(sdxl_payload(id="cancelled", **MANY_STEPS))
        platform.wait_for_updates(job, 1)
        platform.cancel(job)
        worker.wait_for_log("(cancelled) CANCELLED")

    after = platform.submit(sdxl_payload(id="after-cancelled"))

    assert platform.result(after)["output"]["status"] == "completed"
    assert platform.status(job)["status"] == "CANCELLED"
    assert not (outputs / "user-1/cancelled").exists()


@pytest.mark.usefixtures("worker")
def test_two_jobs_at_once_both_complete(platform: Platform) -> None:
    pair = [platform.submit(sdxl_payload(id=f"pair-{i}", config={"seed": i})) for i in (1, 2)]

    seeds = [platform.result(job)["output"]["assets"][0]["metadata"]["seed"] for job in pair]
    assert seeds == [1, 2]


def test_a_job_delivered_twice_is_rendered_once(
    platform: Platform, worker: WorkerProcess, slowdown: Slowdown, receiver: CallbackReceiver
) -> None:
    with slowdown.on():
        job = platform.submit(sdxl_payload(id="twice", **MANY_STEPS), id="rp-twice")
        platform.submit(sdxl_payload(id="twice", **MANY_STEPS), id=job)
        worker.wait_for_log("twice arrived again")

    first = platform.result(job)
    second = platform.result(job, nth=2)

    assert first["output"] == second["output"]
    assert len([each for each in receiver.received if each.document["job_id"] == "twice"]) == 1


@pytest.mark.usefixtures("worker")
def test_a_job_without_a_seed_that_is_delivered_again_after_its_end_has_the_same_assets(
    platform: Platform,
) -> None:
    unseeded = sdxl_payload(id="unseeded", config={"seed": None})
    job = platform.submit(unseeded, id="rp-unseeded")
    first = platform.result(job)
    platform.submit(unseeded, id=job)

    assert platform.result(job, nth=2)["output"]["assets"] == first["output"]["assets"]


@pytest.mark.usefixtures("worker")
def test_a_job_that_is_cancelled_before_it_begins_ends_cancelled(
    platform: Platform, worker: WorkerProcess, slowdown: Slowdown, receiver: CallbackReceiver
) -> None:
    with slowdown.on():
        job = platform.submit(sdxl_payload(id="at-once", **MANY_STEPS))
        platform.wait_for_status(job, "IN_PROGRESS")
        platform.cancel(job)

        worker.wait_for_log("(at-once) CANCELLED")

    after = platform.submit(sdxl_payload(id="after-at-once"))
    assert platform.result(after)["output"]["status"] == "completed"
    receiver.wait_until(lambda: called_back(receiver, "at-once") == ["failed"])


def test_the_platforms_own_timeout_stops_the_job(
    platform: Platform, worker: WorkerProcess, slowdown: Slowdown
) -> None:
    with slowdown.on():
        job = platform.submit(sdxl_payload(id="overdue", **MANY_STEPS))
        platform.wait_for_updates(job, 1)
        platform.skip(601)

        worker.wait_for_log("(overdue) CANCELLED")
    assert platform.status(job)["status"] == "TIMED_OUT"


# --- a platform that fails ---


@pytest.mark.usefixtures("worker")
def test_a_result_is_posted_until_the_platform_takes_it(platform: Platform) -> None:
    platform.script([503] * 4)

    job = platform.submit(sdxl_payload(id="posted-again"))

    assert platform.result(job)["output"]["status"] == "completed"
    assert platform.script_left == []


def test_a_result_that_the_platform_refuses_is_stored_beside_the_assets(
    platform: Platform, worker: WorkerProcess, outputs: Path
) -> None:
    platform.script([400])

    platform.submit(sdxl_payload(id="refused"))

    kept = outputs / "user-1/refused/result.completed.json"
    worker.wait_for_log("was not taken (HTTP 400); it is kept at user-1/refused/result.completed")
    document = json.loads(kept.read_text())
    assert document["job_id"] == "refused"
    assert (outputs / document["assets"][0]["url"]).exists()


def test_a_failed_jobs_result_that_the_platform_refuses_is_stored_too(
    platform: Platform, worker: WorkerProcess, outputs: Path
) -> None:
    platform.script([400])

    platform.submit(sdxl_payload(id="twice-refused", config={"num_images": 7}))

    worker.wait_for_log("kept at undelivered/twice-refused/result.failed.json")
    kept = outputs / "undelivered/twice-refused/result.failed.json"
    assert json.loads(kept.read_text())["failure"]["code"] == "INVALID_PROMPT"


def test_an_outage_of_the_platform_is_logged_once_and_jobs_run_again_after_it(
    tmp_path: Path,
) -> None:
    with Platform() as own, start(own, STORAGE_URL=f"file:{tmp_path}") as process:
        own.stop()
        process.wait_for_log("the platform sends no jobs")
        time.sleep(5)
        away = process.log
        with Platform(port=own.port) as back:
            assert back.result(back.submit(sdxl_payload()))["output"]["status"] == "completed"
            process.wait_for_log("the platform sends stop signals again")

    outage = [line for line in away.splitlines() if "sends no" in line or "rror" in line]
    assert len([line for line in outage if "sends no jobs" in line]) <= 2, away
    assert len(outage) <= 5, away


# --- shutdown ---


def test_sigterm_lets_a_job_finish_within_the_grace(tmp_path: Path) -> None:
    env = {"STORAGE_URL": f"file:{tmp_path}", "SHUTDOWN_GRACE_S": "600"}
    with Platform() as own, start(own, **env) as process:
        job = own.submit(sdxl_payload(**LONG))
        own.wait_for_updates(job, 1)
        process.terminate()

        assert own.result(job)["output"]["status"] == "completed"
        assert process.wait() == 0


def test_sigterm_stops_a_job_that_outlasts_the_grace(tmp_path: Path) -> None:
    env = {"STORAGE_URL": f"file:{tmp_path / 'assets'}", "SHUTDOWN_GRACE_S": "0"}
    slowdown = Slowdown(tmp_path / "slowdown")
    with Platform() as own, slow_handler.start(own, slowdown, **env) as process, slowdown.on():
        job = own.submit(sdxl_payload(**MANY_STEPS))
        own.wait_for_updates(job, 1)
        process.terminate()

        own.result(job)

        assert failure(own.status(job))["code"] == "WORKER_UNAVAILABLE"
        assert process.wait() == 0


@pytest.mark.parametrize("after_s", [0.3, 1.0, 2.5])
def test_a_job_that_arrives_after_sigterm_is_run_within_the_grace(
    tmp_path: Path, receiver: CallbackReceiver, after_s: float
) -> None:
    name = f"late-{after_s}".replace(".", "-")
    with Platform(hold=LONG_POLL_S) as own, start(own, **calls_back(receiver, tmp_path)) as process:
        process.terminate()
        time.sleep(after_s)
        job = own.submit(sdxl_payload(id=name))

        assert process.wait() == 0
        assert own.status(job)["status"] == "COMPLETED"
    assert called_back(receiver, name) == ["completed"]


def test_a_job_that_arrives_after_the_grace_fails_as_worker_unavailable(
    tmp_path: Path, receiver: CallbackReceiver
) -> None:
    env = calls_back(receiver, tmp_path, SHUTDOWN_GRACE_S="0")
    with Platform(hold=LONG_POLL_S) as own, start(own, **env) as process:
        process.terminate()
        process.wait_for_log("what runs has 0 s to finish")
        time.sleep(1)
        job = own.submit(sdxl_payload(id="too-late"))

        assert process.wait() == 0
        assert failure(own.status(job))["code"] == "WORKER_UNAVAILABLE"
    assert called_back(receiver, "too-late") == ["failed"]


def test_sigterm_while_the_models_load_ends_the_worker(tmp_path: Path) -> None:
    with start(None, STORAGE_URL=f"file:{tmp_path}") as process:
        process.wait_for_log("Loading")
        process.terminate()

        assert process.wait() == 0
    assert not list(tmp_path.rglob("*.png"))


# --- other storage, through the whole path ---


def test_a_jobs_own_s3_config_wins(
    platform: Platform, worker: WorkerProcess, s3: SeaweedServer
) -> None:
    config = {
        "bucketName": s3.bucket,
        "endpointUrl": s3.endpoint,
        "accessId": s3.access_key,
        "accessSecret": s3.secret_key,
    }
    job = platform.submit(sdxl_payload(id="own-bucket"), s3Config=config)

    (asset,) = platform.result(job)["output"]["assets"]

    stored = s3.client().get_object(Bucket=s3.bucket, Key=asset["url"])
    assert stored["ContentType"] == "image/png"
    assert s3.secret_key not in worker.log


def test_supabase_holds_the_assets(receiver: CallbackReceiver) -> None:
    with Platform() as own, SupabaseStorage() as supabase:
        env = {
            "STORAGE_URL": "supabase://workspace-temp",
            "SUPABASE_URL": supabase.url,
            "SUPABASE_SERVICE_KEY": supabase.service_key,
            "CALLBACK_URL": receiver.callback_url,
            "JOB_CALLBACK_SECRET": receiver.secret,
        }
        with start(own, **env):
            job = own.submit(sdxl_payload(id="supabase"))
            own.result(job)

        stored = {key: kind for (_, key), (_, kind) in supabase.objects.items()}
    assert stored == {
        "user-1/supabase/0.png": "image/png",
        "user-1/supabase/0.thumb.webp": "image/webp",
    }


# --- without a platform ---


def test_the_handler_runs_a_test_input_and_prints_where_its_picture_is(tmp_path: Path) -> None:
    payload = json.dumps({"input": sdxl_payload()})

    run = run_handler("--test_input", payload, cwd=tmp_path, STORAGE_URL="file:pictures")

    assert run.returncode == 0, run.stderr
    path, facts = run.stdout.split(": ")
    assert path == "pictures/user-1/job-1/0.png"
    assert re.fullmatch(r"64x64, seed \d+, \d+\.\d s\n", facts)
    assert (tmp_path / path).exists()


def test_a_test_input_with_its_picture_in_the_document_prints_no_picture() -> None:
    payload = json.dumps({"input": sdxl_payload()})

    run = run_handler("--test_input", payload, STORAGE_URL="inline:", RUNPOD_LOG_LEVEL="INFO")

    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("png in the document, which VERBOSE=1 prints: 64x64, seed 7, ")
    assert "base64" not in run.stdout + run.stderr


def test_the_handler_says_in_one_line_why_a_test_input_failed(tmp_path: Path) -> None:
    payload = json.dumps({"input": sdxl_payload(config={"num_images": 7})})

    run = run_handler("--test_input", payload, STORAGE_URL=f"file:{tmp_path}")

    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.splitlines()[-1] == (
        "failed: INVALID_PROMPT: config.num_images: Input should be less than or equal to 6"
    )


def test_verbose_prints_the_document_of_a_test_input_and_its_line_of_the_audit_trail(
    tmp_path: Path,
) -> None:
    payload = json.dumps({"input": sdxl_payload()})

    run = run_handler("--test_input", payload, STORAGE_URL=f"file:{tmp_path}", VERBOSE="1")

    document = json.loads(run.stdout[run.stdout.index("{") :])
    assert document["assets"][0]["url"] == "user-1/job-1/0.png"
    assert '"audit": "job"' in run.stderr


def test_a_test_input_without_an_input_is_reported(tmp_path: Path) -> None:
    run = run_handler("--test_input", '{"prompt": "a red sun"}', STORAGE_URL=f"file:{tmp_path}")

    assert run.returncode == 1
    assert "Job has no input parameter" in run.stderr


def test_the_log_has_no_prompt(tmp_path: Path) -> None:
    words = "an unmistakable zebra " + "and more of it " * 60
    payload = json.dumps({"input": sdxl_payload(prompt=words, negative_prompt=words)})

    run = run_handler("--test_input", payload, STORAGE_URL=f"file:{tmp_path}", LOG_LEVEL="DEBUG")

    assert run.returncode == 0
    assert "zebra" not in run.stdout + run.stderr


def test_the_local_api_answers_runsync(tmp_path: Path) -> None:
    with start(None, *LOCAL_API, STORAGE_URL=f"file:{tmp_path}") as process:
        answer = requests.post(
            f"{served_at(process)}/runsync", json={"input": sdxl_payload()}, timeout=PATIENCE_S
        ).json()

    assert answer["status"] == "COMPLETED"
    assert answer["output"]["assets"][0]["url"] == "user-1/job-1/0.png"


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"SDXL_MODEL": "/no/such/model"}, "SDXL_MODEL: there is nothing at /no/such/model"),
        (
            {"SDXL_MODEL": "no/model", "MODEL_DIRS": "/x"},
            "SDXL_MODEL: there is no no/model here nor",
        ),
        ({"FAMILIES": "sdxl,music"}, "FAMILIES: Input should be a comma-separated choice of"),
        ({"STORAGE_URL": "nowhere"}, "STORAGE_URL: Input should be"),
        ({"CONCURRENCY": "many"}, "CONCURRENCY: Input should be a valid integer"),
    ],
)
def test_a_failed_start_exits_with_one_clear_line(env: dict[str, str], line: str) -> None:
    run = run_handler(**env)

    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith(f"cannot start: {line}")
    assert "Traceback" not in run.stderr


def test_a_broken_checkpoint_is_named_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    (tmp_path / "broken").symlink_to(ROOT / "pocket/sdxl")

    run = run_handler(SDXL_MODEL=str(tmp_path / "broken.safetensors"))

    assert run.returncode == 1
    assert re.search(r"cannot start: SDXL_MODEL: broken.safetensors does not load", run.stderr)
