"""Tests that need a GPU: `python -m pytest -m gpu`."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.presets import psnr
from ourvidz_serverless.errors import OutOfMemory
from ourvidz_serverless.models.chat import loader as chat_loader
from ourvidz_serverless.models.chat.cuda_graphs import CudaGraphs
from ourvidz_serverless.models.chat.model import ChatModel
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.chat.sampling import Sampler, sample
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import CudaMemory, open_memory
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, SdxlMemoryPlan
from ourvidz_serverless.models.memory.uploads import BUFFER_BYTES
from ourvidz_serverless.models.sdxl import loader as sdxl_loader
from ourvidz_serverless.models.sdxl import vae as decoders
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_sdxl
from tests.fakes.overflowing_vae import overflowing_vae_settings
from tests.fakes.tiny_chat import generate_text, new_generation, texts_of, tiny_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

#: The largest mean difference that other kernels and fp16 may cause, in grey levels.
MAX_DIFFERENCE = {"float32": 1.0, "float16": 3.0}


def load(device: str, dtype: str = "auto", **settings: Any) -> SdxlModel:
    return sdxl_loader.load(Settings(device=device, dtype=dtype, **settings))


def render(model: SdxlModel, side: int = 256, **changes: Any) -> np.ndarray:
    prompt = "green hills under a blue sky, a yellow sun on the right"
    (picture,) = tiny_sdxl.render(model, prompt, seeds=(2026,), size=(side, side), **changes)
    return picture


@contextmanager
def filled(left_mb: int) -> Iterator[None]:
    """Fill the memory of the device except for `left_mb` MiB."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] - (left_mb << 20)
    held = torch.empty(free, dtype=torch.uint8, device="cuda")
    yield
    del held
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", MAX_DIFFERENCE)
def test_a_gpu_makes_the_picture_that_a_cpu_makes(dtype: str) -> None:
    on_cpu, on_gpu = render(load("cpu")), render(load("cuda", dtype))

    assert np.abs(on_cpu.astype(int) - on_gpu).mean() < MAX_DIFFERENCE[dtype]


def test_a_seed_gives_the_same_picture_twice_on_a_gpu() -> None:
    model = load("cuda")

    assert np.array_equal(render(model), render(model))


def test_a_unet_runs_on_a_gpu_in_fp16_without_autocast() -> None:
    model = load("cuda")
    seen: set[tuple[torch.dtype, bool]] = set()

    def record(network: Any, inputs: Any) -> None:
        seen.add((inputs[0].dtype, torch.is_autocast_enabled("cuda")))

    with model.networks.unet.register_forward_pre_hook(record):
        render(model)

    assert seen == {(torch.float16, False)}


def test_mapped_weights_arrive_bit_for_bit_and_come_back_from_pinned_memory() -> None:
    torch.manual_seed(0)
    before = torch.randn(3 * BUFFER_BYTES // 4 + 1), torch.randn(5, 7).t(), torch.randn(())
    weights = [torch.nn.Parameter(each.clone(), requires_grad=False) for each in before]
    module = torch.nn.ParameterList(weights)
    model = MovableTensors([module], Device(torch.device("cuda"), torch.float32))

    for _ in range(2):
        model.to_device()
        assert all(each.is_cuda for each in module)
        assert all(map(torch.equal, [each.cpu() for each in module], before))
        model.to_host()
        assert all(each.is_pinned() for each in module)


def decode(model: SdxlModel, decoder: Any, latent: torch.Tensor) -> tuple[np.ndarray, int]:
    """A picture, and the peak memory that its decoding needed, in bytes."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        picture = model.decode(decoder, latent, SdxlMemoryPlan(1))
    return picture, torch.cuda.max_memory_allocated() - before


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


def test_a_tiny_vae_decodes_almost_the_picture_of_the_vae(tmp_path: Path) -> None:
    model = sdxl_loader.load(overflowing_vae_settings(tmp_path, "cuda"))
    with torch.inference_mode():
        latent = model.encode(Image.fromarray(render(model)), SdxlMemoryPlan(1))[0].half()

    usual, _ = decode(model, decoders.Vae(model.networks.vae, model.device, torch.float32), latent)
    tiny, _ = decode(model, model.networks.tiny_vae, latent)

    # Measured in fp32 on a CPU: 33 dB.
    assert psnr(usual, tiny) > 30


def test_the_device_memory_is_what_the_driver_reports() -> None:
    memory = open_memory(Settings(device="cuda"))
    assert isinstance(memory, CudaMemory)
    free, total = torch.cuda.mem_get_info()
    before = memory.free_bytes()

    held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")

    assert memory.total_bytes == total
    assert before >= free
    assert before - memory.free_bytes() == held.numel()


def test_the_peak_memory_of_a_job_is_measured() -> None:
    model = load("cuda")
    model.device.reset_peak()

    render(model)

    peak = model.device.peak_bytes()
    assert peak is not None
    assert peak > model.device.allocated_bytes() > 0


def test_a_job_after_an_out_of_memory_error_makes_the_same_picture_as_before() -> None:
    model = load("cuda")
    expected = render(model)

    with filled(left_mb=8), pytest.raises(OutOfMemory):
        render(model, side=1024)

    assert np.array_equal(render(model), expected)


def test_a_cached_prompt_embedding_gives_exactly_the_same_picture() -> None:
    model = load("cuda")
    lean = SdxlModel(
        model.networks,
        model.device,
        handle=model.handle,
        plans=MemoryPlans(SdxlMemoryPlan(6, lean=True)),
    )

    assert np.array_equal(render(model), render(lean))


def test_channels_last_gives_the_same_picture_and_survives_a_move_to_the_host() -> None:
    expected, model = render(load("cuda")), load("cuda", memory_format="channels_last")
    layer = model.networks.unet.down_blocks[0].resnets[0].conv1

    for _ in range(2):
        assert np.abs(render(model).astype(int) - expected).mean() < MAX_DIFFERENCE["float16"]
        assert layer.weight.is_cuda
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        model.handle.model.to_host()
        assert not layer.weight.is_cuda
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        model.handle.model.to_device()


def test_a_model_moves_into_pinned_memory_each_time_and_dropping_it_frees_that_memory() -> None:
    model = load("cuda")
    parts, layer = model.handle.model, model.networks.unet.conv_in
    torch_pinned_before = torch.cuda.host_memory_stats()["allocated_bytes.current"]

    for _ in range(3):
        parts.to_host()
        assert not layer.weight.is_cuda
        assert layer.weight.is_pinned()
        parts.to_device()
    parts.to_host()
    weight = layer.weight.data
    parts.drop()

    assert not weight.is_pinned()
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == torch_pinned_before


# --- chat ---


def load_tiny_chat(folder: str, graphs: str = "auto", dtype: str = "float32") -> ChatModel:
    """A small chat model. In float32 kernels that round differently choose the same tokens."""
    settings = Settings(
        families=("chat",),
        device="cuda",
        dtype=dtype,
        chat_instruct_model=folder,
        chat_graphs=graphs,
    )
    return chat_loader.load(settings).models["qwen_instruct"]


def replies(model: ChatModel) -> list[str]:
    """Greedy and seeded replies that are generated together and end one after another."""
    sampling = [{}, {"temperature": 1.2, "top_p": 0.9, "seed": 3}, {"repetition_penalty": 1.1}]
    generations = [
        new_generation(model, f"question {at} ", max_tokens=20 + 9 * at, **sampling[at % 3])
        for at in range(7)
    ]
    return texts_of(model.engine, generations)


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def test_replies_from_cuda_graphs_are_the_same_as_without_them(tiny_weights: str) -> None:
    eager, replayed = load_tiny_chat(tiny_weights, "off"), load_tiny_chat(tiny_weights)

    assert replies(replayed) == replies(eager)
    replay = replayed.engine.graphs
    assert replay is not None and not replay.is_off
    assert replay.num_replayed > replay.num_captured > 1
    assert eager.engine.graphs is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cuda_graphs_are_used_in_half_precision(tiny_weights: str, dtype: str) -> None:
    model = load_tiny_chat(tiny_weights, dtype=dtype)

    replies(model)

    replay = model.engine.graphs
    assert replay is not None and not replay.is_off
    assert replay.num_replayed > 0


def test_cuda_graphs_are_dropped_with_the_weights_and_free_their_memory(tiny_weights: str) -> None:
    model = load_tiny_chat(tiny_weights)
    replay = model.engine.graphs
    assert replay is not None
    first = generate_text(model, "hello", max_tokens=40)
    made = replay.num_captured

    with_graphs = torch.cuda.memory_reserved()
    model.to_host()
    assert replay.buckets == []
    assert torch.cuda.memory_reserved() < with_graphs
    model.to_device()

    assert generate_text(model, "hello", max_tokens=40) == first
    assert replay.num_captured == 2 * made
    assert not replay.is_off


def test_a_failed_capture_leaves_the_stream_usable() -> None:
    numbers = torch.ones(4, device="cuda")
    capture, stream = CudaGraphs(numbers.device), torch.cuda.current_stream()

    with pytest.raises(RuntimeError):
        capture(lambda: numbers * numbers.sum().item())

    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    double = capture(lambda: numbers * 2)
    numbers.fill_(21)
    assert double().tolist() == [42.0] * 4


def test_sampling_a_token_waits_for_the_gpu_once() -> None:
    logits = torch.randn(3, 5000, device="cuda")
    params: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.1}, {"temperature": 0}]
    samplers = [
        Sampler(SamplingParams(max_tokens=9, **{"top_k": 40, "seed": 1, **each}), [1])
        for each in params
    ]
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            sample(logits, samplers)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert len(waits) == 1
