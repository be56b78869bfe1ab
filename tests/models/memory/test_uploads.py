"""Weights go to a GPU through two pinned buffers, bit for bit."""

from typing import Any

import pytest
import torch

from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from tests.fakes.devices import PAGE, FakeCudaRuntime, FakeGpu


def module_of(*tensors: torch.Tensor) -> torch.nn.Module:
    return torch.nn.ParameterList(
        [torch.nn.Parameter(each, requires_grad=False) for each in tensors]
    )


def upload(module: torch.nn.Module, gpu: FakeGpu) -> MovableTensors:
    model = MovableTensors([module], gpu)  # type: ignore[arg-type]
    model.to_device()
    return model


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 2000, 12_345])
@pytest.mark.parametrize("count", [1, 3])
def test_tensors_of_any_size_arrive_through_buffers_of_a_thousand_bytes(
    size: int, count: int
) -> None:
    before = [torch.randint(256, (size,), dtype=torch.uint8) for _ in range(count)]
    module, gpu = module_of(*(each.clone() for each in before)), FakeGpu(buffer_bytes=1000)

    upload(module, gpu)

    assert all(map(torch.equal, module.parameters(), before))
    assert gpu.num_direct_copies == 0


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(7, 5).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(9, dtype=torch.bfloat16)[2:],
        torch.randn(()),
        torch.randn(6, 4)[:, :3],
    ],
    ids=["transposed", "channels-last", "part of another", "number", "with gaps"],
)
def test_a_tensor_arrives_with_its_values_and_strides(tensor: torch.Tensor) -> None:
    before, module = tensor.clone(), module_of(tensor)

    upload(module, FakeGpu())

    (arrived,) = module.parameters()
    assert torch.equal(arrived, before)
    assert arrived.stride() == before.stride()


def test_the_buffers_are_unpinned_after_the_upload() -> None:
    gpu = FakeGpu(buffer_bytes=10 * PAGE)

    upload(module_of(torch.randn(100)), gpu)

    assert gpu.runtime.num_bytes == 0


@pytest.mark.parametrize("pages", [0, 2])
def test_weights_are_sent_in_the_usual_way_if_the_system_cannot_pin_both_buffers(
    pages: int,
) -> None:
    gpu = FakeGpu(buffer_bytes=PAGE, runtime=FakeCudaRuntime(pages * PAGE - 1))
    weights = torch.randn(100)
    module = module_of(weights.clone())

    upload(module, gpu)

    assert all(torch.equal(each, weights) for each in module.parameters())
    assert (gpu.num_direct_copies, gpu.runtime.num_bytes) == (1, 0)


def test_weights_that_are_pinned_already_need_no_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    module, gpu = module_of(torch.randn(100)), FakeGpu()
    model = upload(module, gpu)
    model.to_host()
    pinned: list[int] = []

    def pin(num_bytes: int) -> Any:
        pinned.append(num_bytes)

    monkeypatch.setattr(gpu, "pin", pin)
    model.to_device()

    assert gpu.num_direct_copies == 1
    assert pinned == []
