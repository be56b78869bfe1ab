"""What of torch must be replaced while a fake CUDA device is used, and put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.dry_run.fake_cuda import FakeCuda
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.uploads import Fence


@dataclass(frozen=True, slots=True)
class FakeDevice(Device):
    """The worker's device, whose threads are in `FakeCuda.on` while they compute."""

    fake: FakeCuda | None = None

    def counting(self) -> Any:
        assert self.fake
        return self.fake.on()

    def fence(self) -> Fence:
        assert self.fake
        return _Fence(self.fake)


@dataclass(frozen=True, slots=True)
class _Fence:
    """A mark behind copies; waiting for them is counted."""

    fake: FakeCuda

    def record(self) -> None: ...

    def synchronize(self) -> None:
        self.fake.note_wait("waits for copies of weights")


def device_of(fake: FakeCuda, dtype: torch.dtype) -> FakeDevice:
    return FakeDevice(torch.device("cuda", 0), dtype, fake=fake)


@contextmanager
def installed(fake: FakeCuda) -> Iterator[FakeCuda]:
    """Within this context `torch.cuda` answers for the fake device, and modules can move to it."""
    answers: dict[str, Any] = {
        "memory_allocated": lambda device=None: fake.live_bytes,
        "memory_reserved": lambda device=None: fake.live_bytes,
        "max_memory_allocated": lambda device=None: fake.device_peak_bytes,
        "reset_peak_memory_stats": lambda device=None: fake.reset_peak(),
        "mem_get_info": lambda device=None: (fake.free_bytes, fake.total_bytes),
        "memory_snapshot": list,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: fake.note_wait("synchronizes"),
        "is_bf16_supported": lambda including_emulation=True: True,
        # A Hopper: attention over pages has its own kernel from (8, 0) on.
        "get_device_capability": lambda device=None: (9, 0),
        "cudart": lambda: _Runtime(fake),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch.nn.Module, "_apply", _apply_for(fake)))
        # torch returns 0 for each fake tensor. The worker tells tensors apart by their addresses.
        address = property(lambda tensor: lambda: int(tensor.untyped_storage()._cdata))
        stack.enter_context(patch.object(FakeTensor, "data_ptr", address, create=True))
        # torch reads number after number of a fake tensor. CUDA's comes down as a whole.
        stack.enter_context(patch.object(FakeTensor, "tolist", lambda each: each.cpu().tolist()))
        yield fake


@dataclass(frozen=True, slots=True)
class _Runtime:
    """The part of CUDA's runtime that pins memory."""

    fake: FakeCuda

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int, /) -> int:
        self.fake.pin(address, num_bytes)
        return 0

    def cudaHostUnregister(self, address: int, /) -> int:
        self.fake.unpin(address)
        return 0


def _apply_for(fake: FakeCuda) -> Callable[..., Any]:
    """`torch.nn.Module._apply` for modules whose tensors are fake.

    torch's own swaps fake parameters, which fails if anything else refers to one. On a real device
    it sets `.data`: the parameter stays the same object, and one that is shared moves once. So does
    this.
    """

    def _apply(module: Any, function: Callable[[torch.Tensor], Any], recurse: bool = True) -> Any:
        if recurse:
            for child in module.children():
                child._apply(function)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    module._parameters[name] = _moved(fake, parameter, function(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _faked(fake, function(buffer))
        return module

    return _apply


def _moved(fake: FakeCuda, parameter: Any, made: torch.Tensor) -> Any:
    if isinstance(parameter, FakeTensor):
        new: Any = _faked(fake, made)
        parameter.data, parameter.fake_device = new, new.fake_device
    elif isinstance(made, FakeTensor):
        # A real parameter, such as a LoRA's from its file, cannot have a fake tensor's data.
        return torch.nn.Parameter(made, parameter.requires_grad)
    else:
        parameter.data = made
    return parameter


def _faked(fake: FakeCuda, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if isinstance(tensor, FakeTensor) else fake.as_fake(tensor)
