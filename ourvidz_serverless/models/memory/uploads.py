"""Copies of pageable host memory to a GPU, through two pinned buffers.

A GPU reads pinned memory by itself. Pageable memory, such as a mapped file, is copied by the
driver, piece by piece, and the host waits for each tensor. Here the host fills one pinned buffer
while the GPU reads the other, and no tensor makes it wait.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ourvidz_serverless.models.memory.pinned import PinnedBlock

#: The size of a buffer. At a bus's 25 GB/s it is read in a millisecond, and a copy begins in some
#: microseconds.
BUFFER_BYTES = 32 << 20


class Fence(Protocol):
    """A mark behind the copies that have begun, such as `torch.cuda.Event`."""

    def record(self) -> None: ...

    def synchronize(self) -> None:
        """Wait until the copies before the last `record` are complete."""


class UploadDevice(Protocol):
    """What `Uploads` needs of a device; see `Device`."""

    def send(self, tensor: torch.Tensor) -> torch.Tensor: ...

    def is_pageable(self, tensor: torch.Tensor) -> bool: ...

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor: ...

    def begin_copy(self, target: torch.Tensor, source: torch.Tensor) -> None: ...

    def fence(self) -> Fence: ...

    def pin(self, num_bytes: int) -> PinnedBlock | None: ...

    def unpin(self, block: PinnedBlock) -> None: ...


class Uploads:
    """Sends tensors to a device, from `__enter__` to `__exit__`, which waits for the copies.

    The buffers are pinned at the first tensor in pageable memory. If the system cannot pin them,
    such tensors are sent in the usual way.
    """

    def __init__(self, device: UploadDevice, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._device, self._buffer_bytes = device, buffer_bytes
        self._blocks: list[PinnedBlock] | None = None
        self._fences = [device.fence() for _ in range(2)]
        self._current = self._used = 0

    def __enter__(self) -> Uploads:
        return self

    def __exit__(self, *_: object) -> None:
        for block in self._blocks or ():
            self._device.unpin(block)

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor's copy on the device, with its strides. The copy may still be incomplete."""
        is_plain = not is_traceable_wrapper_subclass(tensor)
        if is_plain and tensor.numel() and self._device.is_pageable(tensor) and self._buffers():
            target = self._device.empty_like(tensor)
            # A tensor with gaps between its elements has other strides there.
            if target.stride() == tensor.stride():
                self._copy(_as_bytes(target), _as_bytes(tensor))
                return target
        return self._device.send(tensor)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        while len(source):
            free = self._buffers()[self._current].memory[self._used :]
            if not len(free):
                self._next_buffer()
                continue
            piece = free[: len(source)]
            piece.copy_(source[: len(piece)])
            self._device.begin_copy(target[: len(piece)], piece)
            self._used += len(piece)
            target, source = target[len(piece) :], source[len(piece) :]

    def _next_buffer(self) -> None:
        """Go on in the other buffer, once the copies from it are complete."""
        self._fences[self._current].record()
        self._current, self._used = 1 - self._current, 0
        self._fences[self._current].synchronize()

    def _buffers(self) -> list[PinnedBlock]:
        if self._blocks is None:
            pinned = [self._device.pin(self._buffer_bytes) for _ in self._fences]
            self._blocks = [block for block in pinned if block]
            if len(self._blocks) < len(self._fences):
                self.__exit__()
                self._blocks = []
        return self._blocks


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor without gaps, in the order of its addresses."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
