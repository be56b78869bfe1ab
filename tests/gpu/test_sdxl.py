"""SDXL on a real device: the pocket model, against the same model on the processor."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.presets import psnr
from ourvidz_serverless.errors import OutOfMemory
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, SdxlMemoryPlan
from ourvidz_serverless.models.sdxl import loader as sdxl_loader
from ourvidz_serverless.models.sdxl import vae as decoders
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_sdxl
from tests.fakes.overflowing_vae import overflowing_vae_settings
from tests.fakes.recorded_progress import RecordedProgress
from tests.gpu.devices import (
    DEVICE,
    MAX_DIFFERENCE,
    ON_A_DEVICE,
    difference,
    filled,
    needs_cuda,
    waits_in_steps,
)

pytestmark = ON_A_DEVICE


def load(device: str, dtype: str = "auto", **settings: Any) -> SdxlModel:
    return sdxl_loader.load(Settings(device=device, dtype=dtype, **settings))


def render(model: SdxlModel, side: int = 256, **changes: Any) -> np.ndarray:
    prompt = "green hills under a blue sky, a yellow sun on the right"
    (picture,) = tiny_sdxl.render(model, prompt, seeds=(2026,), size=(side, side), **changes)
    return picture


@needs_cuda
@pytest.mark.parametrize("dtype", MAX_DIFFERENCE)
def test_a_gpu_makes_the_picture_that_a_cpu_makes(dtype: str) -> None:
    on_cpu, on_gpu = render(load("cpu")), render(load("cuda", dtype))

    assert difference(on_cpu, on_gpu) < MAX_DIFFERENCE[dtype]


def test_low_vram_makes_the_same_picture_with_one_network_at_a_time_on_the_device() -> None:
    usual, low, progress = load(DEVICE), load(DEVICE, low_vram=True), RecordedProgress()

    pictures = [render(usual), render(low, progress=progress)]

    assert difference(*pictures) < MAX_DIFFERENCE["float16"]
    assert progress.memory_plans[-1]["offload"]
    on_device = [name for name, part in low.parts.parts.items() if part.device_bytes]
    assert on_device == ["vae"]


def test_each_picture_of_several_is_the_one_of_its_seed_alone() -> None:
    model = load(DEVICE)
    prompt, seeds = "a red sun", (1, 2, 3, 4, 5, 6)

    together = tiny_sdxl.render(model, prompt, seeds=seeds)
    alone = [tiny_sdxl.render(model, prompt, seeds=(seed,))[0] for seed in seeds]

    assert max(map(difference, together, alone)) < MAX_DIFFERENCE["float16"]


@needs_cuda
def test_pictures_from_graphs_are_those_of_eager_steps() -> None:
    eager, replayed = load("cuda"), load("cuda", sdxl_graphs="auto")
    jobs = [{}, {"steps": 12}, {"seeds": (7,)}]

    for job in jobs:
        made = [tiny_sdxl.render(model, "a tree", **job)[0] for model in (eager, replayed)]
        assert difference(*made) < MAX_DIFFERENCE["float16"]

    graphs = replayed.graphs
    assert graphs is not None and not graphs.is_off
    assert graphs.num_replayed > graphs.num_captured == 1


@needs_cuda
def test_the_host_waits_for_no_step_of_a_picture() -> None:
    model = load("cuda")
    render(model)

    # What is before the first step encodes the prompt.
    assert not waits_in_steps(lambda progress: render(model, progress=progress))


@needs_cuda
def test_a_job_after_an_out_of_memory_error_makes_the_same_picture_as_before() -> None:
    model = load("cuda")
    expected = render(model)

    with filled(left_mb=8), pytest.raises(OutOfMemory):
        render(model, side=1024)

    assert np.array_equal(render(model), expected)


def test_a_seed_gives_the_same_picture_twice_on_a_gpu() -> None:
    model = load(DEVICE)

    assert np.array_equal(render(model), render(model))


@needs_cuda
def test_a_unet_runs_on_a_gpu_in_fp16_without_autocast() -> None:
    model = load(DEVICE)
    seen: set[tuple[torch.dtype, bool]] = set()

    def record(network: Any, inputs: Any) -> None:
        seen.add((inputs[0].dtype, torch.is_autocast_enabled("cuda")))

    with model.networks.unet.register_forward_pre_hook(record):
        render(model)

    assert seen == {(torch.float16, False)}


def decode(model: SdxlModel, decoder: Any, latent: torch.Tensor) -> tuple[np.ndarray, int]:
    """A picture, and the peak memory that its decoding needed, in bytes."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        picture = model.decode(decoder, latent, SdxlMemoryPlan(1))
    return picture, torch.cuda.max_memory_allocated() - before


@needs_cuda
def test_a_vae_that_needs_fp32_decodes_almost_the_same_picture_in_bf16_in_less_memory(
    tmp_path: Path,
) -> None:
    model = sdxl_loader.load(overflowing_vae_settings(tmp_path, "cuda"))
    with torch.inference_mode():
        latent = model.encode(Image.fromarray(render(model, side=1024)), SdxlMemoryPlan(1))[
            0
        ].half()
    narrow = decoders.in_bf16(model.networks.vae, model.device)

    usual, took = decode(
        model, decoders.Vae(model.networks.vae, model.device, torch.float32), latent
    )
    close, took_less = decode(model, narrow, latent)

    assert narrow.lever == "vae_bf16"
    assert psnr(usual, close) > 48.1
    assert took_less < 0.8 * took


@needs_cuda
def test_a_tiny_vae_decodes_almost_the_picture_of_the_vae(tmp_path: Path) -> None:
    model = sdxl_loader.load(overflowing_vae_settings(tmp_path, "cuda"))
    with torch.inference_mode():
        latent = model.encode(Image.fromarray(render(model)), SdxlMemoryPlan(1))[0].half()

    usual, _ = decode(model, decoders.Vae(model.networks.vae, model.device, torch.float32), latent)
    tiny, _ = decode(model, model.networks.tiny_vae, latent)

    # Measured in fp32 on a CPU: 33 dB.
    assert psnr(usual, tiny) > 30


def test_a_cached_prompt_embedding_gives_exactly_the_same_picture() -> None:
    model = load(DEVICE)
    lean = SdxlModel(
        model.networks,
        model.device,
        handle=model.handle,
        plans=MemoryPlans(SdxlMemoryPlan(6, lean=True)),
    )

    assert np.array_equal(render(model), render(lean))


@needs_cuda
def test_channels_last_gives_the_same_picture_and_survives_a_move_to_the_host() -> None:
    expected, model = render(load(DEVICE)), load(DEVICE, memory_format="channels_last")
    layer = model.networks.unet.down_blocks[0].resnets[0].conv1

    for _ in range(2):
        assert difference(render(model), expected) < MAX_DIFFERENCE["float16"]
        assert layer.weight.is_cuda
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        model.handle.model.to_host()
        assert not layer.weight.is_cuda
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        model.handle.model.to_device()
