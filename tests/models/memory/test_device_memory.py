"""The memory of a host, and of a CPU that simulates a device by counting allocations."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ourvidz_serverless.models.loading import weight_files
from ourvidz_serverless.models.memory.device import Device, is_out_of_memory
from ourvidz_serverless.models.memory.device_memory import CountedMemory, HostMemory
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors

CPU = torch.device("cpu")
KIB = 1 << 10


def simulated(budget: int) -> tuple[Device, CountedMemory]:
    memory = CountedMemory(budget)
    return Device(CPU, torch.float32, memory), memory


def test_tensors_are_counted_until_they_are_freed() -> None:
    device, memory = simulated(100 * KIB)

    with device.computing():
        one = torch.zeros(KIB)
        two = one + 1
        assert memory.used_bytes == 8 * KIB
        view = two[:10]
        del two
        assert memory.used_bytes == 8 * KIB
        del view

    assert memory.used_bytes == 4 * KIB
    assert memory.peak_bytes == 8 * KIB


def test_an_allocation_beyond_the_budget_raises_torchs_error() -> None:
    device, memory = simulated(10 * KIB)

    with pytest.raises(torch.OutOfMemoryError) as refused, device.computing():
        torch.zeros(3 * KIB)

    assert is_out_of_memory(refused.value)
    assert memory.used_bytes == 0


def test_views_of_weights_are_not_counted_again() -> None:
    device, memory = simulated(100 * KIB)
    layer = torch.nn.Linear(32, 32, bias=False)
    weights = MovableTensors([layer], device)

    weights.to_device()
    with device.computing():
        result = layer(torch.zeros(1, 32))

    assert memory.used_bytes == weights.num_bytes + result.nbytes
    weights.to_host()
    assert memory.used_bytes == result.nbytes


def test_tied_weights_count_once() -> None:
    one, other = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    other.weight = one.weight

    assert MovableTensors([one, other], Device(CPU, torch.float32)).num_bytes == 8 * 8 * 4


def test_tensors_that_are_views_of_one_file_count_only_their_own_bytes(tmp_path: Path) -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 8, bias=False) for _ in range(3)])
    save_file(layers.state_dict(), tmp_path / "layers.safetensors")

    layers.load_state_dict(weight_files.read(tmp_path / "layers.safetensors", True), assign=True)

    device = Device(CPU, torch.float32)
    assert [MovableTensors([layer], device).num_bytes for layer in layers] == [8 * 8 * 4] * 3


def test_all_threads_share_one_budget() -> None:
    device, memory = simulated(10 * KIB)
    kept: list[torch.Tensor] = []

    def allocate() -> None:
        with device.computing():
            kept.append(torch.zeros(KIB))

    threads = [threading.Thread(target=allocate) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()

    assert memory.used_bytes == 8 * KIB


def test_the_free_memory_of_the_host_is_within_its_total() -> None:
    memory = HostMemory()

    assert 0 < memory.free_bytes() <= memory.total_bytes
    assert memory.host_free_bytes() <= memory.free_bytes() + (1 << 28)
