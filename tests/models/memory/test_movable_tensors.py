"""`MovableTensors` between a GPU and pinned host memory: values, places and memory use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import architectures
from ourvidz_serverless.models.memory.device_memory import HostMemory
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from ourvidz_serverless.models.memory.pinned import ALIGNMENT, PinnedBlock, block_bytes
from tests.fakes.devices import PAGE, FakeCudaRuntime, FakeGpu, TorchPinnedAllocator


def network() -> torch.nn.Module:
    """Weights of many sizes, some of them channels last, and a buffer."""
    torch.manual_seed(0)
    made = torch.nn.Sequential(
        torch.nn.Conv2d(3, 17, 3).to(memory_format=torch.channels_last),
        torch.nn.BatchNorm2d(17),
        torch.nn.Linear(17, 129),
        torch.nn.Linear(129, 3).to(torch.bfloat16),
    )
    return made.requires_grad_(False)


def movable(module: torch.nn.Module, gpu: FakeGpu) -> MovableTensors:
    return MovableTensors([module], gpu)  # type: ignore[arg-type]


def values(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in module.state_dict().items()}


# --- moves ---


def test_weights_are_the_same_wherever_they_are() -> None:
    module, gpu = network(), FakeGpu()
    before, model = values(module), movable(module, gpu)

    for _ in range(3):
        model.to_device()
        assert all(map(gpu.has, module.parameters()))
        torch.testing.assert_close(values(module), before, atol=0, rtol=0)
        model.to_host()
        assert not any(map(gpu.has, module.parameters()))
        torch.testing.assert_close(values(module), before, atol=0, rtol=0)


def test_each_eviction_frees_all_gpu_memory_of_the_model() -> None:
    module, gpu = network(), FakeGpu()
    model = movable(module, gpu)

    for _ in range(3):
        model.to_device()
        model.to_host()
        assert gpu.used_bytes == 0


def test_a_second_eviction_uses_the_pinned_copy_of_the_first() -> None:
    module, gpu = network(), FakeGpu()
    model = movable(module, gpu)
    places = []

    for _ in range(2):
        model.to_device()
        model.to_host()
        places.append([each.data_ptr() for each in module.parameters()])

    assert places[0] == places[1]


def test_strides_are_kept_across_a_move() -> None:
    module, gpu = network(), FakeGpu()
    strides, model = [each.stride() for each in module.parameters()], movable(module, gpu)

    model.to_device()
    model.to_host()

    assert [each.stride() for each in module.parameters()] == strides


def test_a_model_can_be_evicted_inside_inference_mode_and_again_outside() -> None:
    module, gpu = network(), FakeGpu()
    model = movable(module, gpu)

    with torch.inference_mode():
        model.to_device()
        model.to_host()
    model.to_device()
    model.to_host()

    assert model.pinned_bytes


def test_a_removed_lora_does_not_replace_the_weights_of_the_next_lora() -> None:
    module, gpu = torch.nn.ModuleList([torch.nn.Linear(4, 4)]), FakeGpu()
    model = movable(module, gpu)
    module.append(torch.nn.Linear(4, 4, bias=False))  # LoRA A
    for _ in range(2):
        model.to_device()
        model.to_host()
    model.to_device()
    del module[1]  # the job was stopped while the model was on the device
    model.to_host()

    module.append(torch.nn.Linear(4, 4, bias=False))  # LoRA B
    torch.nn.init.constant_(module[1].weight, 7)
    model.to_device()
    model.to_host()

    assert (module[1].weight == 7).all()


def test_a_lora_takes_no_space_in_the_models_pinned_block() -> None:
    module, gpu = torch.nn.ModuleList([torch.nn.Linear(4, 4)]), FakeGpu()
    model = movable(module, gpu)
    module.insert(0, torch.nn.Linear(4, 4))  # a LoRA's, which comes first
    model.to_device()
    model.to_host()
    del module[0]

    model.to_device()
    model.to_host()

    assert model.pinned_bytes == block_bytes(module.parameters())


# --- pinned memory ---


def test_an_evicted_model_pins_the_bytes_that_the_ledger_counts_and_a_dropped_one_none() -> None:
    module, gpu = network(), FakeGpu()
    model = MovableTensors([module], gpu, read=lambda: [network()])  # type: ignore[arg-type]
    ledger = Ledger(HostMemory())
    ledger.register(model, "model", "sdxl")

    for _ in range(2):
        model.to_device()
        model.to_host()

        (row,) = ledger.report()
        tensors = len(list(module.parameters()))
        assert row.num_bytes - gpu.runtime.num_bytes < 1000  # the buffers' bytes
        assert gpu.runtime.num_bytes <= row.num_bytes + ALIGNMENT * tensors + PAGE
        model.drop()
        assert gpu.runtime.num_bytes == 0
        model.load()


def test_a_model_that_is_deleted_pins_nothing() -> None:
    module, gpu = network(), FakeGpu()
    model = movable(module, gpu)
    model.to_device()
    model.to_host()

    del model

    assert gpu.runtime.num_bytes == 0
    assert torch.isfinite(module[0].weight).all()


def test_a_model_is_evicted_to_ordinary_memory_if_the_system_cannot_pin_so_much() -> None:
    module, gpu = network(), FakeGpu(runtime=FakeCudaRuntime(max_bytes=PAGE))
    before, model = values(module), movable(module, gpu)

    for _ in range(2):
        model.to_device()
        model.to_host()

    assert model.pinned_bytes == gpu.used_bytes == 0
    torch.testing.assert_close(values(module), before, atol=0, rtol=0)


@pytest.mark.parametrize("family", ["chat", "sdxl"])
def test_the_pinned_block_of_a_published_model_is_as_large_as_its_weights(family: str) -> None:
    """torch's own allocator takes 1.9 times the bytes of Qwen2.5-7B, and keeps them."""
    with architectures.made_on("meta", torch.float16):
        made: Any = getattr(architectures, family)()
    network = made if family == "chat" else made.unet
    weights = [each.nbytes for each in network.parameters()]
    torchs = TorchPinnedAllocator()
    blocks = [torchs.allocate(size) for size in weights]
    for block in blocks:
        torchs.free(block)

    taken = block_bytes(network.parameters())

    assert sum(weights) <= taken < 1.001 * sum(weights)
    assert torchs.num_bytes > (1.8 if family == "chat" else 1.15) * sum(weights)


def test_released_memory_is_unpinned_once_and_its_tensors_stay_readable() -> None:
    runtime = FakeCudaRuntime()
    block = PinnedBlock(100, runtime)
    copy = block.copy(torch.arange(4.0))

    block.release()
    block.release()
    del block

    assert runtime.num_bytes == 0
    assert copy.tolist() == [0, 1, 2, 3]
