"""Weights and memory on a real device: what a card holds, and what the host gets back."""

import psutil
import pytest
import torch

from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import CudaMemory, open_memory
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from ourvidz_serverless.models.memory.uploads import BUFFER_BYTES
from ourvidz_serverless.settings import Settings
from tests.gpu.devices import ON_A_DEVICE, needs_cuda
from tests.gpu.test_sdxl import load, render

pytestmark = [*ON_A_DEVICE, needs_cuda]

#: Enough to stand out from what else a process allocates.
MODEL_BYTES = 512 << 20


def large_model(device: str = "cuda") -> MovableTensors:
    module = torch.nn.ParameterList(
        torch.nn.Parameter(torch.ones(MODEL_BYTES // 4 // 4), requires_grad=False) for _ in range(4)
    )
    return MovableTensors([module], Device(torch.device(device), torch.float32))


def test_the_host_holds_a_model_that_left_the_device_once_and_none_that_was_dropped() -> None:
    model, process = large_model(), psutil.Process()
    model.to_device()
    without = process.memory_info().rss

    model.to_host()
    parked = process.memory_info().rss - without
    model.to_device()
    model.to_host()
    parked_again = process.memory_info().rss - without
    model.drop()
    left = process.memory_info().rss - without

    assert 0.9 * MODEL_BYTES < parked < 1.2 * MODEL_BYTES
    assert parked_again < 1.2 * MODEL_BYTES
    assert left < 0.2 * MODEL_BYTES


def test_a_model_that_left_the_device_leaves_its_memory_to_others() -> None:
    model, memory = large_model(), open_memory(Settings(device="cuda"))
    before = memory.free_bytes()

    model.to_device()
    taken = before - memory.free_bytes()
    model.to_host()

    assert MODEL_BYTES <= taken < 1.1 * MODEL_BYTES
    assert before - memory.free_bytes() < 0.1 * MODEL_BYTES


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_worker_on_the_second_device_leaves_the_first_one_alone() -> None:
    first = torch.cuda.memory_allocated(0)
    model = load("cuda:1")

    picture = render(model)

    assert picture.any()
    assert model.networks.unet.conv_in.weight.device == torch.device("cuda", 1)
    assert torch.cuda.memory_allocated(0) == first


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
