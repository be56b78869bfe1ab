"""Page-locked ("pinned") host memory, in one block for each model that is evicted from a GPU.

A GPU copies from pinned memory at the bus's full speed. torch's own allocator of pinned memory
(ATen/core/CachingHostAllocator.h) rounds each tensor up to a power of two, and keeps freed memory
for the next tensor of that size: 14.2 GiB of Qwen2.5-7B take 27.0, and dropping them frees nothing.
`pinned_max_cached_size_mb` would prevent both, but for every tensor of the process. Chat sends
numbers to the device at each step, and needs the cache for that.

So each model has a block of its own, registered with CUDA. The block is as large as its tensors,
and is freed as a whole. torch's cache stays in use for small, frequent tensors.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, SupportsInt

import torch

#: Each tensor starts at a multiple of so many bytes, the size of a cache line.
ALIGNMENT = 64

#: `cudaHostRegisterPortable`: pinned for every device.
PORTABLE = 1


class CudaRuntime(Protocol):
    """The part of CUDA's runtime that pins memory, as in `torch.cuda.cudart()`.

    Each call returns CUDA's error code, 0 if there is no error.
    """

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int, /) -> SupportsInt: ...

    def cudaHostUnregister(self, address: int, /) -> SupportsInt: ...


class PinnedBlock:
    """Host memory that is pinned until `release`. It stays mapped while it has tensors."""

    def __init__(self, num_bytes: int, runtime: CudaRuntime) -> None:
        """Raises RuntimeError if the system cannot pin so much."""
        with _outside_inference_mode():
            self._memory = torch.frombuffer(_mapped(num_bytes), dtype=torch.uint8)
        self._used = 0
        address = self._memory.data_ptr()
        if code := int(runtime.cudaHostRegister(address, num_bytes, PORTABLE)):
            raise RuntimeError(f"CUDA cannot pin {num_bytes} bytes (error {code})")
        # Runs even if nobody calls `release`: memory must not be unmapped while it is pinned.
        self._unpin = weakref.finalize(self, runtime.cudaHostUnregister, address)
        self._unpin.atexit = False

    @property
    def num_bytes(self) -> int:
        return self._memory.nbytes

    @property
    def memory(self) -> torch.Tensor:
        """All of its bytes, as uint8."""
        return self._memory

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor in the next free part, with the same strides if it has no gaps."""
        start = self._used
        self._used += _aligned(tensor.nbytes)
        strides = torch.empty_like(tensor, device="meta").stride()
        with _outside_inference_mode():
            part = self._memory[start : start + tensor.nbytes].view(tensor.dtype)
            return part.as_strided(tensor.shape, strides).copy_(tensor)

    def release(self) -> None:
        """Unpin the memory. It is freed with the last tensor in it."""
        self._unpin()


def block_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The size of a block that holds these tensors."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def _mapped(num_bytes: int) -> mmap.mmap:
    """Pages that no child process shares, since a GPU would ignore their copy-on-write."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    return memory


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Inference tensors cannot be written to outside inference mode, so make normal ones."""
    with torch.inference_mode(False), torch.no_grad():
        yield
