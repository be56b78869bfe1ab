"""Fakes of a device, its memory, CUDA's pinning, and a model that has a size and no weights."""

from __future__ import annotations

import threading
import weakref

import torch

from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.memory.pinned import PinnedBlock
from ourvidz_serverless.models.memory.uploads import Uploads


class FakeMemory:
    """The memory of a device and a host, each with a number of bytes."""

    name = "fake"
    is_host = False

    def __init__(self, total_bytes: int, host_bytes: int = 1 << 40) -> None:
        self.total_bytes, self.host_bytes = total_bytes, host_bytes
        self.held = self.held_by_others = 0

    def free_bytes(self) -> int:
        return max(self.total_bytes - self.held - self.held_by_others, 0)

    def host_free_bytes(self) -> int:
        return self.host_bytes


class FakeModel:
    """A `Movable` that has only a size and a place."""

    is_on_disk = True

    def __init__(self, num_bytes: int, memory: FakeMemory | None = None) -> None:
        self.num_bytes, self.place = num_bytes, "host"
        self.memory = memory or FakeMemory(0)
        self.was_evicted = threading.Event()

    def load(self) -> None:
        self.place = "host"

    def to_device(self) -> None:
        self.place = "device"
        self.memory.held += self.num_bytes

    def to_host(self) -> None:
        self._evict_to("host")

    def drop(self) -> None:
        self._evict_to("disk")

    def _evict_to(self, place: str) -> None:
        self.memory.held -= self.num_bytes if self.place == "device" else 0
        self.place = place
        self.was_evicted.set()


def fake_ledger(total_bytes: int) -> Ledger:
    return Ledger(FakeMemory(total_bytes))


#: Some of CUDA's error codes (`cudaError_t`).
MEMORY_ALLOCATION, ALREADY_REGISTERED, NOT_REGISTERED = 2, 712, 713
PAGE = 4096


class FakeCudaRuntime:
    """CUDA's calls to pin memory: whole pages, no page twice, at most `max_bytes`."""

    def __init__(self, max_bytes: int = 1 << 40) -> None:
        self.max_bytes = max_bytes
        self.pages: dict[int, range] = {}

    @property
    def num_bytes(self) -> int:
        return PAGE * sum(map(len, self.pages.values()))

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int, /) -> int:
        pages = range(address // PAGE, -(-(address + num_bytes) // PAGE))
        if self.num_bytes + PAGE * len(pages) > self.max_bytes:
            return MEMORY_ALLOCATION
        if any(each.start < pages.stop and pages.start < each.stop for each in self.pages.values()):
            return ALREADY_REGISTERED
        self.pages[address] = pages
        return 0

    def cudaHostUnregister(self, address: int, /) -> int:
        return 0 if self.pages.pop(address, None) else NOT_REGISTERED


class TorchPinnedAllocator:
    """A model of torch's allocator of pinned memory (CachingHostAllocator.h, torch 2.13).

    A request is rounded up to a power of two, and a freed block is kept for the next one of that
    size, unless `pinned_max_cached_size_mb` is set.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._free: list[int] = []

    def allocate(self, num_bytes: int) -> int:
        size = 1 << (num_bytes - 1).bit_length()
        if size in self._free:
            self._free.remove(size)
        else:
            self.num_bytes += size
        return size

    def free(self, size: int) -> None:
        self._free.append(size)


class FakeFence:
    """A mark behind the copies of a `FakeGpu` that have begun."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu, self._mark = gpu, 0

    def record(self) -> None:
        self._mark = self._gpu.num_completed + self._gpu.num_begun

    def synchronize(self) -> None:
        self._gpu.complete_copies(max(self._mark - self._gpu.num_completed, 0))


class FakeGpu:
    """A GPU for `MovableTensors`, whose memory is a part of the host's.

    It allocates at the lowest free address. Like CUDA's allocator, it reuses freed memory. A copy
    that begins reads its source as late as it may: when somebody waits for it.
    """

    is_cuda = True

    def __init__(
        self,
        num_bytes: int = 1 << 24,
        runtime: FakeCudaRuntime | None = None,
        buffer_bytes: int = 1000,
    ) -> None:
        self._memory = memoryview(bytearray(num_bytes))
        self._allocated: dict[int, int] = {}
        self.runtime = runtime or FakeCudaRuntime()
        self._buffer_bytes, self.num_direct_copies = buffer_bytes, 0
        self._begun: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_completed = 0

    @property
    def used_bytes(self) -> int:
        return sum(self._allocated.values())

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_direct_copies += 1
        return self.empty_like(tensor).copy_(tensor)

    def uploads(self) -> Uploads:
        return Uploads(self, self._buffer_bytes)

    def is_pageable(self, tensor: torch.Tensor) -> bool:
        pages = self.runtime.pages.values()
        return not self.has(tensor) and not any(tensor.data_ptr() // PAGE in each for each in pages)

    def begin_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._begun.append((target, source))

    def fence(self) -> FakeFence:
        return FakeFence(self)

    def complete_copies(self, count: int | None = None) -> None:
        """Complete the first `count` copies that have begun."""
        for target, source in self._begun[:count]:
            target.copy_(source)
            self.num_completed += 1
        del self._begun[:count]

    @property
    def num_begun(self) -> int:
        return len(self._begun)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        start = self._free_address(tensor.nbytes)
        copy = torch.frombuffer(
            self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=start
        )
        self._allocated[start] = tensor.nbytes
        weakref.finalize(copy.untyped_storage(), self._allocated.pop, start)
        strides = torch.empty_like(tensor).stride()
        return copy.as_strided(tensor.shape, strides)

    def has(self, tensor: torch.Tensor) -> bool:
        start = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        return start <= tensor.data_ptr() < start + len(self._memory)

    def copy_to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if self.has(tensor) else tensor

    def pin(self, num_bytes: int) -> PinnedBlock | None:
        try:
            return PinnedBlock(num_bytes, self.runtime)
        except RuntimeError:
            return None

    def unpin(self, block: PinnedBlock) -> None:
        self.complete_copies()
        block.release()

    def count_bytes(self, num_bytes: int) -> None: ...

    def wait(self) -> None:
        self.complete_copies()

    def free_memory(self) -> None: ...

    def _free_address(self, num_bytes: int) -> int:
        start = 0
        for address, size in sorted(self._allocated.items()):
            if start + num_bytes <= address:
                break
            start = -(-(address + size) // 64) * 64
        return start
