"""How much memory the device and the host really have, and how much is free.

With `VRAM_BUDGET_GB` a worker behaves as if its device had that much memory. On CUDA torch's
allocator enforces the limit. On a CPU a `CountedMemory` does: it counts what tensors allocate and
raises torch's out-of-memory error, so a worker without a GPU can run out of memory too.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ourvidz_serverless.models.memory.ledger import Ledger, ModelHandle
from ourvidz_serverless.models.memory.types import Movable, PressureLevels
from ourvidz_serverless.settings import Settings

#: Host memory that evicted models may not take: for the interpreter, images and files.
HOST_RESERVE = 2 << 30

#: Where a container's limit and use are, for cgroups v2 and v1. Page cache counts as free.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def open_ledger(settings: Settings) -> Ledger:
    """A ledger for the device of `DEVICE`, with the levels of `PRESSURE_*`."""
    levels = PressureLevels(
        settings.pressure_medium, settings.pressure_high, settings.pressure_critical
    )
    return Ledger(open_memory(settings), levels)


def standalone_handle(model: Movable) -> ModelHandle:
    """The handle of a model in a ledger of its own, on the host."""
    return Ledger(HostMemory()).register(model, "model", "none")


def open_memory(settings: Settings) -> Any:
    """The memory of the device of `DEVICE`, limited to `VRAM_BUDGET_GB`."""
    budget = int((settings.vram_budget_gb or 0) * (1 << 30))
    asked = settings.device if settings.device != "auto" else "cuda"
    if asked.startswith("cuda") and torch.cuda.is_available():
        return CudaMemory(torch.device(asked), budget)
    return CountedMemory(budget) if budget else HostMemory()


def host_memory() -> tuple[int, int]:
    """The host's total and free bytes: the machine's, or the container's if it has a limit."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for paths in CGROUPS:
        try:
            limit, used, stat = (Path(path).read_text() for path in paths)
        except OSError:
            continue
        if limit.strip().isdigit():
            facts = dict(line.split() for line in stat.splitlines())
            left = int(limit) - int(used) + int(facts.get("inactive_file", 0))
            total, free = min(total, int(limit)), min(free, left)
        break
    return total, max(free, 0)


class HostMemory:
    """A CPU: models on the device are in the host's memory."""

    name = "cpu"
    is_host = True

    def __init__(self) -> None:
        self.total_bytes = host_memory()[0]

    def free_bytes(self) -> int:
        return host_memory()[1]

    def host_free_bytes(self) -> int:
        return max(host_memory()[1] - HOST_RESERVE, 0)


class CudaMemory:
    """A GPU, by the numbers of its driver and of torch's allocator."""

    is_host = False

    def __init__(self, device: torch.device, budget: int) -> None:
        self.name = str(torch.device("cuda", device.index or 0))
        self._device = torch.device(self.name)
        total = torch.cuda.mem_get_info(self._device)[1]
        self.total_bytes = min(budget or total, total)
        # Bytes that the allocator had reserved when it was last asked what graphs keep of them.
        self._asked_at, self._kept_by_graphs = -1, 0
        if budget:
            torch.cuda.set_per_process_memory_fraction(self.total_bytes / total, self._device)

    def free_bytes(self) -> int:
        # Memory that the allocator keeps without a tensor in it counts as free, unless CUDA graphs
        # compute in it.
        allocated = torch.cuda.memory_allocated(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        in_graphs = self._bytes_in_graphs(reserved)
        free = torch.cuda.mem_get_info(self._device)[0] + reserved - allocated - in_graphs
        return max(min(free, self.total_bytes - allocated - in_graphs), 0)

    def _bytes_in_graphs(self, reserved: int) -> int:
        """`unused_in_graphs` of this device, asked again only if the allocator's memory changed."""
        if reserved != self._asked_at:
            segments = torch.cuda.memory_snapshot()
            self._kept_by_graphs = unused_in_graphs(segments, self._device.index)
            self._asked_at = reserved
        return self._kept_by_graphs

    def host_free_bytes(self) -> int:
        return max(host_memory()[1] - HOST_RESERVE, 0)


def unused_in_graphs(segments: Iterable[Mapping[str, Any]], device: int) -> int:
    """Bytes without a tensor that torch's allocator keeps for CUDA graphs.

    A graph computes on the same addresses at each replay, so nothing else may have them, although
    no tensor is there between two replays. `segments` are those of `torch.cuda.memory_snapshot`;
    all but the ordinary pool (0, 0) belong to graphs.
    """
    return sum(
        each["total_size"] - each["allocated_size"]
        for each in segments
        if each["device"] == device and tuple(each["segment_pool_id"]) != (0, 0)
    )


class CountedMemory:
    """A CPU that simulates a device: what tensors allocate is counted and limited.

    Weights are counted by `count_bytes`. Other tensors are counted when an operation in a
    `counting` context has made them. Memory that a kernel uses inside is not seen.
    """

    name = "cpu"
    is_host = False

    def __init__(self, budget: int) -> None:
        self.total_bytes = budget
        self.used_bytes = self.peak_bytes = 0
        # A tensor can be freed in any thread at any moment, even inside these methods.
        self._lock = threading.RLock()
        self._storages: dict[int, weakref.ref[Any]] = {}

    def free_bytes(self) -> int:
        return max(self.total_bytes - self.used_bytes, 0)

    def host_free_bytes(self) -> int:
        return max(host_memory()[1] - HOST_RESERVE, 0)

    def reset_peak(self) -> None:
        self.peak_bytes = self.used_bytes

    def count_bytes(self, num_bytes: int) -> None:
        """Count bytes that no operation made, or fewer if negative. Raises torch's error."""
        with self._lock:
            if num_bytes > 0 and self.used_bytes + num_bytes > self.total_bytes:
                raise torch.OutOfMemoryError(
                    f"{num_bytes} bytes beside {self.used_bytes} of {self.total_bytes}"
                )
            self.used_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def track(self, tensor: torch.Tensor) -> None:
        """Count a tensor until it is freed. Raises torch's error."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            if key in self._storages:
                return
            self.count_bytes(size)
            self._storages[key] = weakref.ref(storage, lambda _: self.untrack(key, size))

    def untrack(self, key: int, size: int) -> None:
        with self._lock:
            if self._storages.pop(key, None) is not None:
                self.used_bytes -= size

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor, no longer counted, as if it had been copied to the host."""
        storage = tensor.untyped_storage()
        self.untrack(storage._cdata, storage.nbytes())
        return tensor

    def counting(self) -> TorchDispatchMode:
        """A context that counts and limits what this thread allocates."""
        return _Counting(self)


class _Counting(TorchDispatchMode):
    def __init__(self, memory: CountedMemory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {
            each.untyped_storage()._cdata
            for each in tree_leaves((args, kwargs))
            if type(each) in PLAIN
        }
        made = func(*args, **kwargs)
        for each in tree_leaves(made):
            # A view of a weight shares the memory that `count_bytes` has counted.
            if type(each) in PLAIN and each.untyped_storage()._cdata not in inputs:
                self._memory.track(each)
        return made


PLAIN = (torch.Tensor, torch.nn.Parameter)
