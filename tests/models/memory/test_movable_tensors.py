"""Weights between a GPU and the host's pinned memory: where they lie, and what that takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import architectures
from ourvidz_serverless.models.memory.device_memory import HostMemory
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from ourvidz_serverless.models.memory.pinned import ALIGNMENT, PinnedBlock, block_bytes
from tests.fakes.devices import PAGE, Gpu, Pins, TorchsPins


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


def moved(module: torch.nn.Module, gpu: Gpu) -> MovableTensors:
    return MovableTensors([module], gpu)  # type: ignore[arg-type]


def values(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in module.state_dict().items()}


# --- there and back ---


def test_weights_are_the_same_wherever_they_are() -> None:
    module, gpu = network(), Gpu()
    before, model = values(module), moved(module, gpu)

    for _ in range(3):
        model.to_device()
        assert all(map(gpu.has, module.parameters()))
        torch.testing.assert_close(values(module), before, atol=0, rtol=0)
        model.to_host()
        assert not any(map(gpu.has, module.parameters()))
        torch.testing.assert_close(values(module), before, atol=0, rtol=0)


def test_a_model_that_leaves_a_second_time_leaves_nothing_on_the_gpu() -> None:
    module, gpu = network(), Gpu()
    model = moved(module, gpu)

    for _ in range(3):
        model.to_device()
        model.to_host()
        assert gpu.used_bytes == 0


def test_what_left_once_leaves_again_without_a_copy() -> None:
    module, gpu = network(), Gpu()
    model = moved(module, gpu)
    places = []

    for _ in range(2):
        model.to_device()
        model.to_host()
        places.append([each.data_ptr() for each in module.parameters()])

    assert places[0] == places[1]


def test_strides_stay_as_they_were() -> None:
    module, gpu = network(), Gpu()
    strides, model = [each.stride() for each in module.parameters()], moved(module, gpu)

    model.to_device()
    model.to_host()

    assert [each.stride() for each in module.parameters()] == strides


def test_a_model_may_leave_within_inference_mode_and_again_without() -> None:
    module, gpu = network(), Gpu()
    model = moved(module, gpu)

    with torch.inference_mode():
        model.to_device()
        model.to_host()
    model.to_device()
    model.to_host()

    assert model.pinned_bytes


def test_a_lora_that_has_gone_does_not_come_back_as_the_next_one() -> None:
    module, gpu = torch.nn.ModuleList([torch.nn.Linear(4, 4)]), Gpu()
    model = moved(module, gpu)
    module.append(torch.nn.Linear(4, 4, bias=False))  # LoRA A
    for _ in range(2):
        model.to_device()
        model.to_host()
    model.to_device()
    del module[1]  # the job was stopped while its network was there
    model.to_host()

    module.append(torch.nn.Linear(4, 4, bias=False))  # LoRA B
    torch.nn.init.constant_(module[1].weight, 7)
    model.to_device()
    model.to_host()

    assert (module[1].weight == 7).all()


def test_a_lora_takes_no_room_in_its_models_block() -> None:
    module, gpu = torch.nn.ModuleList([torch.nn.Linear(4, 4)]), Gpu()
    model = moved(module, gpu)
    module.insert(0, torch.nn.Linear(4, 4))  # a LoRA's, which comes first
    model.to_device()
    model.to_host()
    del module[0]

    model.to_device()
    model.to_host()

    assert model.pinned_bytes == block_bytes(module.parameters())


# --- what it takes of the host ---


def test_a_parked_model_pins_what_the_ledger_counts_and_dropping_it_pins_nothing() -> None:
    module, gpu = network(), Gpu()
    model = MovableTensors([module], gpu, read=lambda: [network()])  # type: ignore[arg-type]
    ledger = Ledger(HostMemory())
    ledger.register(model, "model", "sdxl")

    for _ in range(2):
        model.to_device()
        model.to_host()

        (row,) = ledger.report()
        tensors = len(list(module.parameters()))
        assert row.num_bytes - gpu.pins.num_bytes < 1000  # the buffers' bytes
        assert gpu.pins.num_bytes <= row.num_bytes + ALIGNMENT * tensors + PAGE
        model.drop()
        assert gpu.pins.num_bytes == 0
        model.load()


def test_a_model_that_is_forgotten_pins_nothing() -> None:
    module, gpu = network(), Gpu()
    model = moved(module, gpu)
    model.to_device()
    model.to_host()

    del model

    assert gpu.pins.num_bytes == 0
    assert torch.isfinite(module[0].weight).all()


def test_where_the_system_pins_no_such_amount_the_model_waits_in_ordinary_memory() -> None:
    module, gpu = network(), Gpu(pins=Pins(most=PAGE))
    before, model = values(module), moved(module, gpu)

    for _ in range(2):
        model.to_device()
        model.to_host()

    assert model.pinned_bytes == gpu.used_bytes == 0
    torch.testing.assert_close(values(module), before, atol=0, rtol=0)


@pytest.mark.parametrize("family", ["chat", "sdxl"])
def test_a_published_models_block_is_as_large_as_its_weights(family: str) -> None:
    """torch's own allocator takes 1.9 times Qwen2.5-7B's, and keeps it: the reason for a block."""
    with architectures.made_on("meta", torch.float16):
        made: Any = getattr(architectures, family)()
    network = made if family == "chat" else made.unet
    weights = [each.nbytes for each in network.parameters()]
    torchs = TorchsPins()
    blocks = [torchs.allocate(size) for size in weights]
    for block in blocks:
        torchs.free(block)

    taken = block_bytes(network.parameters())

    assert sum(weights) <= taken < 1.001 * sum(weights)
    assert torchs.num_bytes > (1.8 if family == "chat" else 1.15) * sum(weights)


def test_pinned_memory_is_given_back_once_and_its_tensors_stay_readable() -> None:
    pins = Pins()
    block = PinnedBlock(100, pins)
    copy = block.copy(torch.arange(4.0))

    block.release()
    block.release()
    del block

    assert pins.num_bytes == 0
    assert copy.tolist() == [0, 1, 2, 3]
