"""WAN on a real device: small networks of random weights, against the same on the processor."""

from typing import Any

import numpy as np
import pytest

from ourvidz_serverless.models.wan import loader as wan_loader
from ourvidz_serverless.models.wan.pipeline import WanModel
from ourvidz_serverless.models.wan.request import References
from ourvidz_serverless.settings import Settings
from tests.fakes.recorded_progress import RecordedProgress
from tests.fakes.tiny_wan import diffusers_t2v, picture, render, through_diffusers, write_wan
from tests.gpu.devices import (
    DEVICE,
    MAX_DIFFERENCE,
    ON_A_DEVICE,
    difference,
    needs_cuda,
    waits_in_steps,
)

pytestmark = ON_A_DEVICE

#: The references of one video by each of VACE's ways.
REFERENCES = {
    "first": References(first=picture(1)),
    "first and last": References(first=picture(1), last=picture(2)),
    "subject": References(subject=picture(3)),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return write_wan(tmp_path_factory.mktemp("wan"))


def load(settings: Settings, device: str = DEVICE, **changes: Any) -> WanModel:
    return wan_loader.load(settings.model_copy(update={"device": device, **changes}))


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_makes_the_video_that_a_cpu_makes(settings: Settings, dtype: str) -> None:
    on_cpu, on_gpu = load(settings, "cpu"), load(settings, dtype=dtype)

    assert difference(render(on_cpu), render(on_gpu)) < MAX_DIFFERENCE[dtype]


@needs_cuda
@pytest.mark.parametrize("name", REFERENCES)
def test_a_gpu_makes_the_video_of_a_reference_that_a_cpu_makes(
    settings: Settings, name: str
) -> None:
    on_cpu, on_gpu = load(settings, "cpu"), load(settings, dtype="float32")

    made = [render(model, references=REFERENCES[name]) for model in (on_cpu, on_gpu)]

    assert difference(*made) < MAX_DIFFERENCE["float32"]


def test_a_video_is_that_of_diffusers_on_the_same_device(settings: Settings) -> None:
    pipe = diffusers_t2v(settings).to(DEVICE)

    made = render(load(settings, dtype="float32"))

    assert difference(made, through_diffusers(pipe)) < MAX_DIFFERENCE["float32"]


def test_a_seed_gives_the_same_video_twice_on_a_device(settings: Settings) -> None:
    model = load(settings)

    assert np.array_equal(render(model), render(model))


def test_low_vram_makes_the_same_video_with_tiles_and_one_network_at_a_time(
    settings: Settings,
) -> None:
    usual, low, progress = load(settings), load(settings, low_vram=True), RecordedProgress()

    made = [render(usual), render(low, progress=progress)]

    assert difference(*made) < MAX_DIFFERENCE["bfloat16"]
    assert progress.memory_plans[-1]["offload"]


@needs_cuda
def test_models_that_do_not_fit_together_make_the_same_video_in_turn(settings: Settings) -> None:
    model = load(settings)
    expected = render(model)
    ledger = model.vae.handle.ledger

    for row in ledger.report():
        ledger.request_move(row.name, "host", force=True).is_done.wait(60)

    assert np.array_equal(render(model), expected)


@needs_cuda
def test_the_host_waits_for_no_step_of_a_video(settings: Settings) -> None:
    model = load(settings)
    render(model)

    assert not waits_in_steps(lambda progress: render(model, progress=progress))
