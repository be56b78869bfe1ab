"""WAN on RunPod's queue and from a terminal: a worker process with the real SDK."""

import io
from collections.abc import Iterator
from pathlib import Path

import av
import pytest

from ourvidz_serverless.delivery import provenance
from ourvidz_serverless.settings import Settings
from tests.fakes import slow_handler
from tests.fakes.local_worker import wan_payload
from tests.fakes.slow_handler import Slowdown
from tests.fakes.tiny_chat import tiny_folder
from tests.files import ROOT
from tests.servers.handler import failure, run_handler
from tests.servers.runpod import Platform
from tests.servers.supabase import CallbackReceiver
from tests.servers.worker_process import WorkerProcess

#: Such a job takes twelve seconds or more with the slowdown on.
MANY_STEPS = {"config": {"num_inference_steps": 60}}


@pytest.fixture(scope="module")
def receiver() -> Iterator[CallbackReceiver]:
    with CallbackReceiver() as server:
        yield server


@pytest.fixture(scope="module")
def slowdown(tmp_path_factory: pytest.TempPathFactory) -> Slowdown:
    return Slowdown(tmp_path_factory.mktemp("slowdown") / "slowdown")


@pytest.fixture(scope="module", autouse=True)
def worker(
    platform: Platform,
    slowdown: Slowdown,
    receiver: CallbackReceiver,
    outputs: Path,
    wan_settings: Settings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[WorkerProcess]:
    env = {
        "FAMILIES": "wan",
        "WAN_MODEL": wan_settings.wan_model,
        "WAN_VACE_MODEL": str(wan_settings.wan_vace_model),
        "WAN_ENHANCER_MODEL": tiny_folder(tmp_path_factory.mktemp("chat")),
        "STORAGE_URL": f"file:{outputs}",
        "CALLBACK_URL": receiver.callback_url,
        "JOB_CALLBACK_SECRET": receiver.secret,
    }
    with slow_handler.start(platform, slowdown, **env) as process:
        yield process


def test_a_completed_video_job_has_a_stored_video_and_one_callback(
    platform: Platform, receiver: CallbackReceiver, outputs: Path
) -> None:
    job = platform.submit(wan_payload(id="completes"))

    output = platform.result(job)["output"]

    assert platform.status(job)["status"] == "COMPLETED"
    data = (outputs / output["assets"][0]["url"]).read_bytes()
    with av.open(io.BytesIO(data)) as file:
        assert file.streams.video[0].frames == output["assets"][0]["metadata"]["frame_num"] == 9
    assert provenance.digital_source_type(data) == provenance.TRAINED
    (callback,) = [each for each in receiver.received if each.document["job_id"] == "completes"]
    assert callback.document == output


def test_an_enhanced_video_job_reports_its_enhanced_prompt(platform: Platform) -> None:
    job = platform.submit(wan_payload(id="enhanced", type="image7b_fast_enhanced"))

    output = platform.result(job)["output"]

    assert output["metadata"]["enhancement_source"] == "qwen_instruct"
    assert output["metadata"]["enhanced_prompt"]


def test_progress_updates_of_a_video_come_in_order_with_the_remaining_seconds(
    platform: Platform, slowdown: Slowdown
) -> None:
    with slowdown.on():
        job = platform.submit(wan_payload(id="progress", **MANY_STEPS))
        platform.wait_for_updates(job, 2)

    platform.result(job)

    updates = [each.document["output"] for each in platform.updates(job) if not each.terminal]
    steps = [update["step"] for update in updates]
    assert len(steps) >= 2
    assert steps == sorted(steps)
    assert updates[-1]["remaining_s"] >= 0


def test_a_cancelled_video_job_frees_its_slot_at_the_next_step(
    platform: Platform, worker: WorkerProcess, slowdown: Slowdown, outputs: Path
) -> None:
    with slowdown.on():
        job = platform.submit(wan_payload(id="cancelled", **MANY_STEPS))
        platform.wait_for_updates(job, 1)
        platform.cancel(job)
        worker.wait_for_log("(cancelled) CANCELLED")

    after = platform.submit(wan_payload(id="after-cancelled"))

    assert platform.result(after)["output"]["status"] == "completed"
    assert platform.status(job)["status"] == "CANCELLED"
    assert not (outputs / "user-1/cancelled").exists()


def test_a_refused_video_job_fails_with_the_name_of_its_field(platform: Platform) -> None:
    job = platform.submit(wan_payload(config={"fps": 60}))

    platform.result(job)

    assert failure(platform.status(job))["message"].startswith("config.fps: ")


def test_prompts_of_video_jobs_are_not_logged(platform: Platform, worker: WorkerProcess) -> None:
    payload = wan_payload(id="quiet", type="image7b_fast_enhanced", prompt="an unmistakable zebra")
    output = platform.result(platform.submit(payload))["output"]

    assert "zebra" not in worker.log
    assert output["metadata"]["enhanced_prompt"] not in worker.log
    assert "Traceback" not in worker.log


# --- without a platform ---


@pytest.mark.slow
def test_the_example_payload_of_wan_makes_a_video_with_the_pocket_model(tmp_path: Path) -> None:
    payload = (ROOT / "test_input.wan.json").read_text()

    run = run_handler("--test_input", payload, FAMILIES="wan", STORAGE_URL=f"file:{tmp_path}")

    assert run.returncode == 0, run.stderr
    path, facts = run.stdout.rsplit(": ", 1)
    assert facts.startswith("17 frames of 128x128, seed 2026, ")
    with av.open(path) as file:
        stream = file.streams.video[0]
        assert (stream.frames, stream.average_rate) == (17, 8)
        assert (stream.width, stream.height) == (128, 128)


def test_a_worker_without_its_wan_weights_exits_with_one_line_that_names_the_setting() -> None:
    run = run_handler(FAMILIES="wan", WAN_MODEL="/no/such/model")

    assert run.returncode == 1
    line = "cannot start: WAN_MODEL: there is nothing at /no/such/model"
    assert run.stderr.strip().splitlines()[-1] == line
    assert "Traceback" not in run.stderr
