"""Refused pictures on RunPod's queue and over HTTP, by the real models and the real classifier."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ourvidz_serverless.settings import Settings
from tests.fakes.landscapes import BOAT, HOUSE, TREE, PainterSdxl, data_uri
from tests.fakes.local_worker import LocalWorker, sdxl_payload, wan_payload
from tests.servers import handler
from tests.servers.handler import failure
from tests.servers.http_service import ServedHttp
from tests.servers.runpod import Platform
from tests.servers.supabase import CallbackReceiver
from tests.servers.worker_process import WorkerProcess

pytestmark = pytest.mark.slow

#: A boat is refused. What is no landscape, as the frames of a WAN of random weights, is marked.
RULES = {"SAFETY_MODEL": "pocket", "SAFETY_RULES": "boat:refuse,nothing:mark"}

#: 128 pixels is the smallest size at which the pocket SDXL paints.
SMALL = {"resolution": "128x128", "num_inference_steps": 10, "guidance_scale": 3}

MakeLocal = Callable[..., LocalWorker]


@pytest.fixture(scope="module")
def receiver() -> Iterator[CallbackReceiver]:
    with CallbackReceiver() as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def worker(
    platform: Platform, receiver: CallbackReceiver, outputs: Path, wan_settings: Settings
) -> Iterator[WorkerProcess]:
    env = {
        **RULES,
        "REQUIRE_SAFETY_MODEL": "true",
        "FAMILIES": "sdxl,wan",
        "WAN_MODEL": wan_settings.wan_model,
        "WAN_VACE_MODEL": str(wan_settings.wan_vace_model),
        "STORAGE_URL": f"file:{outputs}",
        "CALLBACK_URL": receiver.callback_url,
        "JOB_CALLBACK_SECRET": receiver.secret,
    }
    with handler.start(platform, **env) as process:
        yield process


def stored(outputs: Path, job_id: str) -> list[str]:
    return sorted(path.name for path in outputs.rglob(f"{job_id}/*"))


def test_a_boat_that_sdxl_paints_never_leaves_the_worker(
    platform: Platform, receiver: CallbackReceiver, outputs: Path, worker: WorkerProcess
) -> None:
    prompt = "a blue sea under a blue sky, a boat in the middle"
    job = platform.submit(
        sdxl_payload(id="boats", prompt=prompt, config={"num_images": 2, **SMALL})
    )

    refused = failure(platform.result(job))

    assert refused["code"] == "CONTENT_REFUSED"
    assert stored(outputs, "boats") == []
    (callback,) = [each for each in receiver.received if each.document["job_id"] == "boats"]
    assert callback.document["assets"] == []
    assert "boat" not in json.dumps(callback.document).replace('"boats"', "")
    log = worker.wait_for_log("refused under the content policy (picture rule refuse)")
    # The audit trail alone has the label.
    assert not [line for line in log.splitlines() if "boat:" in line and "audit" not in line]


def test_a_tree_that_sdxl_paints_is_delivered(platform: Platform, outputs: Path) -> None:
    prompt = "green hills under a blue sky, a tree in the middle"
    job = platform.submit(sdxl_payload(id="tree", prompt=prompt, config=SMALL))

    output = platform.result(job)["output"]

    assert (output["status"], stored(outputs, "tree")) == ("completed", ["0.png", "0.thumb.webp"])
    assert output["metadata"]["timings"]["safety"] > 0
    assert "marks" not in output["assets"][0]["metadata"]


@pytest.mark.parametrize(
    "payload",
    [
        sdxl_payload(id="reference", config={**SMALL, "image": data_uri(BOAT)}),
        wan_payload(id="first", config={"first_frame": data_uri(BOAT)}),
        wan_payload(id="subject", type="image_fast", config={"image": data_uri(BOAT)}),
    ],
    ids=lambda payload: payload["id"],
)
def test_a_boat_among_the_references_ends_a_job_of_any_family(
    platform: Platform, outputs: Path, payload: dict[str, Any]
) -> None:
    refused = failure(platform.result(platform.submit(payload)))

    assert refused["code"] == "CONTENT_REFUSED"
    assert stored(outputs, payload["id"]) == []


def test_the_frames_of_a_video_and_a_picture_of_wan_are_looked_at(platform: Platform) -> None:
    jobs = [
        platform.submit(wan_payload(id=f"seen-{kind}", type=kind))
        for kind in ("video_fast", "image_fast")
    ]

    outputs = [platform.result(job)["output"] for job in jobs]

    assert [each["assets"][0]["metadata"]["marks"] for each in outputs] == [["nothing"]] * 2


def test_over_http_a_refused_picture_of_six_is_left_out(tmp_path: Path) -> None:
    from ourvidz_serverless.models.memory.device_memory import open_ledger
    from ourvidz_serverless.models.safety import loader

    settings = Settings(safety_model="pocket", safety_rules="boat:refuse", page=False)
    local = LocalWorker(
        tmp_path,
        settings=settings,
        fake_sdxl=PainterSdxl(TREE, HOUSE, TREE, BOAT, TREE, HOUSE),
        classifiers=loader.load(settings, open_ledger(settings)),
    )
    payload = sdxl_payload(config={"resolution": "128x128", "num_images": 6})
    with ServedHttp(settings, local.worker) as service:
        body = service.post("/jobs?wait=100", {"input": payload}).json()
        reference = {**payload, "id": "job-2", "config": {"image": data_uri(BOAT)}}
        refused = service.post("/jobs?wait=100", {"input": reference})

    assert [each["metadata"]["asset_index"] for each in body["assets"]] == [0, 1, 2, 4, 5]
    assert body["metadata"]["refused"] == [3]
    assert (refused.status_code, refused.json()["code"]) == (403, "CONTENT_REFUSED")
    assert [key for key in local.stored() if "/3." in key or "job-2" in key] == []
